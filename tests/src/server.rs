//! A real server process, which ends with the test whatever happens.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::binary;
use crate::http::{Connection, Reply};
use crate::wait::{PATIENCE, wait_until};

/// A `samepage serve` with a socket in a directory of its own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
}

impl Server {
    /// Starts one with more arguments, and waits until it answers.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start(arguments: &[&str]) -> Server {
        Server::start_after(":", arguments)
    }

    /// As [`Server::start`], in a process that a shell prepared first, as `ulimit -Sn 256` does.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_after(preparation: &str, arguments: &[&str]) -> Server {
        let directory = tempfile::tempdir().expect("directory for the socket");
        let child = Command::new("sh")
            .args(["-c", &format!("{preparation}\nexec \"$@\""), "sh"])
            .arg(binary::samepage())
            .args(["serve", "--stop-on-stdin-end", "--api-sock"])
            .arg(socket_in(directory.path()))
            .args(arguments)
            // The other end is closed when this process ends, even by SIGKILL.
            .stdin(Stdio::piped())
            .spawn()
            .expect("start the server");
        let mut server = Server { child, directory };
        wait_until("the server answers", PATIENCE, || {
            if let Some(status) = server.child.try_wait().expect("look at the server") {
                panic!("the server ended: {status}");
            }
            UnixStream::connect(server.socket()).is_ok()
        });
        server
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        socket_in(self.directory.path())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection to it.
    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket())
    }

    /// One request on a connection of its own.
    pub fn call(&self, method: &str, path: &str, body: &str) -> Reply {
        self.connect().call(method, path, body)
    }

    /// A request that must succeed with 204.
    ///
    /// # Panics
    /// If it does not.
    pub fn done(&self, method: &str, path: &str, body: &str) {
        let reply = self.call(method, path, body);
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert_eq!(reply.status, 204, "{method} {path} {body}: {text}");
    }

    /// A `samepage` command against this server.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn cli(&self, arguments: &[&str]) -> Output {
        Command::new(binary::samepage())
            .args(arguments)
            .env("SAMEPAGE_SOCKET", self.socket())
            .stdin(Stdio::null())
            .output()
            .expect("run samepage")
    }

    /// Sends `signal` and waits for the server's end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn stop(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let mut ended = None;
        wait_until("the server ends", PATIENCE, || {
            ended = self.child.try_wait().expect("look at the server");
            ended.is_some()
        });
        ended.expect("a status")
    }

    /// Sends `signal`.
    ///
    /// # Panics
    /// If there is no such process.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a pid"), signal).expect("signal the server");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Killed rather than asked: a test that failed must not also hang. A no-op if it ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join("api.sock")
}
