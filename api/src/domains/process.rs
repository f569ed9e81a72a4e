//! The process of a monitor: started or adopted, watched until its end.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvFlags, recv};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdout, Command};

use super::cgroup::{CgroupError, CgroupParent};
use super::state_dir::DomainDir;
use crate::domain_name::DomainName;

/// What a monitor says on its standard output once requests are taken.
pub const READY: &str = "ready\n";

/// How long a monitor may take from its start until it takes requests.
const START_TIME: Duration = Duration::from_secs(10);
/// How long it may take to end in order. Then it is killed.
///
/// Shorter than [`CLOSE_TIME`](crate::server::CLOSE_TIME): a server that ends leaves none behind.
const END_TIME: Duration = Duration::from_secs(12);
/// How long after its connections a process that ends may still be there.
pub(super) const EXIT_TIME: Duration = Duration::from_secs(1);

/// What all monitors of a front door are started with.
#[derive(Debug, Clone, Default)]
pub struct StartSettings {
    /// Memory that each domain may take; `None` and 0 are for no budget.
    pub memory_budget_mib: Option<u32>,
    /// Whether a monitor ends when its front door does, however that ends.
    pub ends_with_parent: bool,
    /// Where each domain gets a cgroup, with its budget as limit.
    pub cgroup: Option<CgroupParent>,
}

impl StartSettings {
    fn budget_bytes(&self) -> Option<u64> {
        let mib = self.memory_budget_mib.filter(|&mib| mib > 0)?;
        Some(u64::from(mib) << 20)
    }
}

/// Why a monitor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A system call.
    #[error("cannot {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// An earlier monitor of the domain lives, and is not adopted.
    #[error("its earlier monitor lives still, and does not answer")]
    Held,
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It ended before it was ready, or said something else.
    #[error("its monitor did not start: {0}")]
    Failed(String),
}

/// How a monitor ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MonitorEnd {
    /// As a child of ours.
    Status(ExitStatus),
    /// It was started by a front door before this one, and only its parent is told.
    Unknown,
}

impl fmt::Display for MonitorEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MonitorEnd::Status(status) => write!(f, "{status}"),
            MonitorEnd::Unknown => f.write_str("status unknown"),
        }
    }
}

/// A monitor that lives, or has just ended.
#[derive(Debug)]
pub struct MonitorProcess {
    /// Tells it from all others of this front door.
    pub number: u64,
    pid: Pid,
    /// Readable from its end on.
    pidfd: pipe::Receiver,
    /// If we started it, until somebody waits for it.
    child: Mutex<Option<Child>>,
    /// Open for as long as we live: a monitor that is to end with us sees it close.
    output: tokio::sync::Mutex<Option<ChildStdout>>,
}

impl MonitorProcess {
    /// Starts one, which is not [`ready`](MonitorProcess::ready) yet.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left of it then.
    pub async fn spawn(
        name: &DomainName,
        dir: &DomainDir,
        settings: &StartSettings,
    ) -> Result<MonitorProcess, StartError> {
        let os = |what| move |source| StartError::Os { what, source };
        // From here on the monitor holds the lock, or nobody.
        let log = match dir.lock_log() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(StartError::Held);
            }
            log => log.map_err(os("make its log"))?,
        };
        let socket = dir.bind(settings.ends_with_parent);
        let socket = socket.map_err(os("make its socket"))?;
        let mut tails = OsString::from("--console-tails=");
        tails.push(dir.tails().directory());
        // The program that runs, also where its file was replaced by a newer one.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("samepage")
            .arg("monitor")
            // A name may begin with a hyphen.
            .arg(format!("--domain={name}"))
            .arg(tails)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            // What a terminal sends to the front door is not meant for it.
            .process_group(0);
        if let Some(mib) = settings.memory_budget_mib {
            command.arg(format!("--memory-budget-mib={mib}"));
        }
        if settings.ends_with_parent {
            command.arg("--end-with-parent");
        }
        let mut child = command.spawn().map_err(os("start its monitor"))?;
        let watched = child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .ok_or_else(|| io::Error::other("it has no process id"))
            .and_then(|pid| Ok((pid, watch(pid)?)));
        let (pid, pidfd) = match watched {
            Ok(watched) => watched,
            Err(error) => {
                // It is a child whose status nobody took, so it is no other process. Fails if it has
                // ended already.
                let _ = child.kill().await;
                return Err(os("watch its monitor")(error));
            }
        };
        let output = child.stdout.take();
        Ok(MonitorProcess::new(pid, pidfd, Some(child), output))
    }

    fn new(
        pid: Pid,
        pidfd: pipe::Receiver,
        child: Option<Child>,
        output: Option<ChildStdout>,
    ) -> MonitorProcess {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        MonitorProcess {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            pid,
            pidfd,
            child: Mutex::new(child),
            output: tokio::sync::Mutex::new(output),
        }
    }

    /// Puts a monitor that was started into its domain's cgroup, and waits until it takes requests.
    ///
    /// # Errors
    /// [`StartError`]. Then it is to be killed.
    pub async fn ready(
        &self,
        name: &DomainName,
        dir: &DomainDir,
        settings: &StartSettings,
    ) -> Result<(), StartError> {
        if let Some(parent) = &settings.cgroup {
            let cgroup = parent.of(name);
            let linked = dir.link_cgroup(cgroup.path());
            linked.map_err(|source| StartError::Os {
                what: "note its cgroup",
                source,
            })?;
            // What it took before is little, and counts where the front door is.
            cgroup.take(self.pid, settings.budget_bytes())?;
        }
        let mut said = [0; READY.len()];
        let mut output = self.output.lock().await;
        let reading = async {
            match output.as_mut() {
                Some(output) => output.read_exact(&mut said).await,
                None => Err(io::ErrorKind::BrokenPipe.into()),
            }
        };
        match tokio::time::timeout(START_TIME, reading).await {
            Ok(Ok(_)) if said == *READY.as_bytes() => Ok(()),
            Ok(_) => Err(StartError::Failed(dir.last_words())),
            Err(_) => Err(StartError::Failed(format!(
                "it was not ready after {START_TIME:?}"
            ))),
        }
    }

    /// Takes on the monitor at the other end of `connection`, from which nothing was read yet.
    ///
    /// # Errors
    /// If it has ended, among others.
    pub fn adopt(connection: &UnixStream) -> io::Result<MonitorProcess> {
        let pid = socket_peercred(connection)?.pid;
        let pidfd = watch(pid)?;
        // The connection ends with the process. If it has not ended by now, the number was the
        // monitor's when the pidfd was opened, and is not some later process's. The kernel is asked,
        // for tokio has not heard of a connection that is so young.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(connection, &mut [0; 1], flags) {
            Err(Errno::AGAIN) => Ok(MonitorProcess::new(pid, pidfd, None, None)),
            Err(error) => Err(error.into()),
            Ok(_) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Its number among the processes of the host.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits for its end. One caller may learn the status, the first.
    pub async fn ended(&self) -> MonitorEnd {
        self.gone().await;
        let child = self.child.lock();
        let child = child.unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut child) = child else {
            return MonitorEnd::Unknown;
        };
        match child.wait().await {
            Ok(status) => MonitorEnd::Status(status),
            Err(error) => {
                log::warn!("monitor {}: {error}", self.pid());
                MonitorEnd::Unknown
            }
        }
    }

    /// Whether it ends within `time`.
    pub async fn has_ended(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.gone()).await.is_ok()
    }

    /// Has it end all its VMs and then itself, and waits for that; it is killed if that takes long.
    pub async fn end(&self) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(END_TIME, self.gone()).await.is_err() {
            log::warn!("a monitor did not end within {END_TIME:?}, and is killed");
            self.kill();
            self.gone().await;
        }
    }

    /// Ends it and all its VMs at once. Does not wait.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    async fn gone(&self) {
        // Fails only without a reactor, and then nothing here works.
        let _ = self.pidfd.readable().await;
    }

    fn signal(&self, signal: Signal) {
        // Fails if it has ended, which is what is wanted.
        if let Err(error) = pidfd_send_signal(&self.pidfd, signal) {
            log::debug!("monitor {}: {error}", self.pid());
        }
    }
}

/// A pidfd whose readiness can be awaited.
///
/// It is no pipe, and nothing is read from it. tokio has no other way for such a descriptor without
/// unsafe code (`AsyncFd::register`). Rejected: a thread that polls.
fn watch(pid: Pid) -> io::Result<pipe::Receiver> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    pipe::Receiver::from_owned_fd_unchecked(pidfd)
}
