//! HTTP over a unix socket as bytes: what clients other than ours get to see.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::wait::PATIENCE;

/// A reply, taken apart only as far as its length is needed.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Everything before the body, the empty line included.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            let text = String::from_utf8_lossy(&self.body);
            panic!("body is not JSON: {error}: {text}")
        })
    }

    /// The text of an error reply, which must be `{"fault_message": ...}` and nothing more.
    ///
    /// # Panics
    /// If it is not.
    pub fn fault(&self) -> String {
        let json = self.json();
        let object = json.as_object().expect("an object");
        assert_eq!(object.len(), 1, "{json}");
        let message = object["fault_message"].as_str().expect("a string");
        assert!(
            !message.is_empty() && !message.contains('\n'),
            "{message:?}"
        );
        message.to_owned()
    }
}

/// One connection to the server.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Connects.
    ///
    /// # Panics
    /// If nobody listens; so for all of these when the server hangs up or takes too long.
    pub fn open(socket: &Path) -> Connection {
        let stream = UnixStream::connect(socket).expect("connect to the server");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("read timeout");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("write timeout");
        Connection { stream }
    }

    /// Sends `bytes` as they are; an error is the server hanging up.
    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads one reply.
    pub fn reply(&mut self) -> Reply {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).expect("head of a reply");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("text");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let length = head
            .to_ascii_lowercase()
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .unwrap_or(0);
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).expect("body of a reply");
        Reply {
            status: status.expect("a status"),
            head,
            body,
        }
    }

    /// One request with a body (empty for none), and its reply.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> Reply {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        let head = match length {
            0 => format!("{head}\r\n"),
            _ => format!("{head}Content-Length: {length}\r\n\r\n"),
        };
        self.send(format!("{head}{body}").as_bytes())
            .expect("send a request");
        self.reply()
    }

    /// What is left to read until the server shuts its side.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.stream
            .read_to_end(&mut bytes)
            .expect("read to the end");
        bytes
    }
}
