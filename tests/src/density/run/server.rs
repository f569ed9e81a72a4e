//! The server of one run, in the run's cgroup.

use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use samepage::client::Client;
use tempfile::TempDir;
use tokio::process::{Child, ChildStdin, Command};

use super::error::RunError;
use super::wait::poll_until;
use crate::binary;
use crate::density::guests::DOMAIN;
use crate::density::host::{Group, HostSettings};

/// How long it may take to come up,
const START_TIME: Duration = Duration::from_secs(30);
/// and to stop with all its guests.
const STOP_TIME: Duration = Duration::from_secs(60);
/// What is kept of its last words.
const LAST_WORDS_BYTES: usize = 2000;

/// A `samepage serve` with the product's own settings. If this process dies in any way, the server's
/// standard input ends and it stops by itself.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// Apart from the child: to wait for that closes its standard input, which would stop it.
    _stdin: Option<ChildStdin>,
    pid: u32,
    client: Client,
    /// Its standard error, kept from the progress bars.
    log: PathBuf,
    /// With its socket; removed with this value.
    _directory: TempDir,
}

impl Server {
    /// Starts it in `group`, and waits until it answers.
    pub(crate) async fn start(
        group: &Group,
        settings: &mut HostSettings,
    ) -> Result<Server, RunError> {
        let directory = tempfile::Builder::new()
            .prefix("samepage-density-")
            .tempdir()
            .map_err(RunError::os("directory for the socket"))?;
        settings.note_directory(directory.path())?;
        let (socket, log) = (
            directory.path().join("api.sock"),
            directory.path().join("log"),
        );
        let stderr = File::create(&log).map_err(RunError::os("log of the server"))?;
        let mut command = Command::from(group.command(binary::samepage()));
        command
            .args(["serve", "--stop-on-stdin-end", "--domain", DOMAIN, "--api-sock"])
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            // A group of its own: Ctrl-C is for the benchmark, which then stops the server in order.
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(RunError::os("start the server"))?;
        let pid = child.id().ok_or(RunError::NoServer)?;
        let mut server = Server {
            _stdin: child.stdin.take(),
            child,
            pid,
            client: Client::new(socket),
            log,
            _directory: directory,
        };
        settings.note_server(pid)?;
        server.wait_up().await?;
        Ok(server)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// A client of it.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Waits for its end, of which nobody knows a good reason during a run.
    pub(crate) async fn died(&mut self) -> RunError {
        match self.child.wait().await {
            Ok(status) => self.death(status),
            Err(error) => RunError::os("wait for the server")(error),
        }
    }

    /// Stops it: asked first, killed if it does not listen.
    pub(crate) async fn stop(mut self) -> Result<(), RunError> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if self.child.id().is_some() {
            // It may have ended at this moment.
            let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        }
        if tokio::time::timeout(STOP_TIME, self.child.wait())
            .await
            .is_ok()
        {
            return Ok(());
        }
        self.child
            .kill()
            .await
            .map_err(RunError::os("kill the server"))?;
        Err(RunError::Late {
            what: "the server's stop, so it was killed".to_owned(),
            time: STOP_TIME,
        })
    }

    async fn wait_up(&mut self) -> Result<(), RunError> {
        let deadline = Instant::now() + START_TIME;
        let up = async {
            while self.client.version().await.is_err() {
                // One look at a time, and no faster than that.
                let _ = poll_until(Instant::now(), || false).await;
            }
        };
        tokio::select! {
            () = up => return Ok(()),
            status = self.child.wait() => {
                let status = status.map_err(RunError::os("wait for the server"))?;
                return Err(self.death(status));
            }
            _ = poll_until(deadline, || false) => {}
        }
        Err(RunError::Late {
            what: "the server's answer".to_owned(),
            time: START_TIME,
        })
    }

    fn death(&self, status: ExitStatus) -> RunError {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let begin = text.len().saturating_sub(LAST_WORDS_BYTES);
        RunError::ServerDied {
            status,
            last_words: String::from_utf8_lossy(&text[begin..]).trim().to_owned(),
        }
    }
}
