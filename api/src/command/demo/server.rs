//! The demo's own server: a child process that never outlives the demo.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::pss;
use crate::client::Client;
use crate::command::CommandError;

/// How long it may take to come up, and to stop when asked.
const SERVER_TIME: Duration = Duration::from_secs(20);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A server with a socket in a directory of its own.
///
/// If this process dies in any way, the server's standard input ends and it stops by itself.
#[derive(Debug)]
pub(super) struct DemoServer {
    child: Child,
    pid: u32,
    client: Client,
    /// Removed with this value.
    _directory: TempDir,
}

impl DemoServer {
    /// Starts it with one merge domain, and waits until it answers.
    pub(super) async fn start(domain: &str) -> Result<DemoServer, CommandError> {
        let directory = tempfile::Builder::new()
            .prefix("samepage-demo-")
            .tempdir()
            .map_err(CommandError::os("directory for the demo's socket"))?;
        let socket: PathBuf = directory.path().join("samepage.sock");
        let program = std::env::current_exe().map_err(CommandError::os("path of samepage"))?;
        let child = Command::new(program)
            .args(["serve", "--stop-on-stdin-end", "--domain", domain, "--api-sock"])
            .arg(&socket)
            .stdin(Stdio::piped())
            // A group of its own: Ctrl-C is for the demo, which then stops the server in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(CommandError::os("start the demo's server"))?;
        let pid = child
            .id()
            .ok_or_else(|| CommandError::Other("the server ended".to_owned()))?;
        let mut server = DemoServer {
            child,
            pid,
            client: Client::new(socket),
            _directory: directory,
        };
        server.wait_up().await?;
        Ok(server)
    }

    async fn wait_up(&mut self) -> Result<(), CommandError> {
        let deadline = Instant::now() + SERVER_TIME;
        loop {
            let ended = self
                .child
                .try_wait()
                .map_err(CommandError::os("the demo's server"))?;
            if let Some(status) = ended {
                // It has said why on standard error, which is ours too.
                return Err(CommandError::Other(format!(
                    "the demo's server ended: {status}"
                )));
            }
            match self.client.version().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
            }
        }
    }

    /// A client of it.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Its memory, measured.
    pub(super) fn pss_bytes(&self) -> Result<u64, CommandError> {
        pss::of_process(self.pid)
    }

    /// Stops it: asked first, killed if it does not listen.
    pub(super) async fn stop(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // It may have ended already.
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        if tokio::time::timeout(SERVER_TIME, self.child.wait())
            .await
            .is_err()
        {
            log::warn!("the demo's server does not stop and is killed");
            if let Err(error) = self.child.kill().await {
                log::warn!("the demo's server cannot be killed: {error}");
            }
        }
    }
}
