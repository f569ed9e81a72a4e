//! Persistent HTTP/1.0 connections, as Firecracker's server keeps them.
//!
//! By the book an HTTP/1.0 connection closes after one reply unless the client asks otherwise.
//! Firecracker's `micro_http` keeps it open, and there are clients (`firecracker-rs-sdk`) that
//! speak HTTP/1.0 without the header and count on it. hyper follows the book and has no switch,
//! so requests are relabelled HTTP/1.1 on their way in: one byte of each request line changes,
//! nothing moves. A client that sends `Connection: close` is still obeyed.
//!
//! The relabeller follows the message framing only as far as it needs to find the next request
//! line. Where it would lose track (chunked bodies, upgrades) it stops for good and passes bytes
//! through: an HTTP/1.0 client can send neither.

/// Longest header line that is looked into; `content-length` and `upgrade` lines are far shorter.
const LINE_MAX_BYTES: usize = 256;
const OLD_VERSION: &[u8] = b" HTTP/1.0";

/// Where in the byte stream the relabeller is.
#[derive(Debug)]
enum Place {
    RequestLine,
    Headers,
    Body {
        left_bytes: u64,
    },
    /// Framing is no longer followed.
    Through,
}

/// Turns `HTTP/1.0` into `HTTP/1.1` in the request lines of a byte stream, in place.
#[derive(Debug)]
pub struct Relabeller {
    place: Place,
    /// The present line so far, without its end; only its first [`LINE_MAX_BYTES`] in headers,
    /// only its last bytes in the request line.
    line: Vec<u8>,
    body_bytes: u64,
    stop_after_head: bool,
}

impl Default for Relabeller {
    fn default() -> Relabeller {
        Relabeller::new()
    }
}

impl Relabeller {
    /// At the start of a connection.
    pub fn new() -> Relabeller {
        Relabeller {
            place: Place::RequestLine,
            line: Vec::new(),
            body_bytes: 0,
            stop_after_head: false,
        }
    }

    /// Whether a request has begun whose head has not ended.
    pub fn is_in_head(&self) -> bool {
        match self.place {
            Place::RequestLine => !self.line.is_empty(),
            Place::Headers => true,
            Place::Body { .. } | Place::Through => false,
        }
    }

    /// Works on the next bytes of the stream.
    pub fn relabel(&mut self, bytes: &mut [u8]) {
        let mut at = 0;
        while at < bytes.len() {
            match &mut self.place {
                Place::Through => return,
                Place::Body { left_bytes } => {
                    let here = (bytes.len() - at) as u64;
                    let taken = here.min(*left_bytes);
                    *left_bytes -= taken;
                    if *left_bytes == 0 {
                        self.place = Place::RequestLine;
                    }
                    // `taken` is at most the slice's own length.
                    at += usize::try_from(taken).unwrap_or(usize::MAX);
                }
                Place::RequestLine => {
                    self.request_line_byte(&mut bytes[at]);
                    at += 1;
                }
                Place::Headers => {
                    self.header_byte(bytes[at]);
                    at += 1;
                }
            }
        }
    }

    fn request_line_byte(&mut self, byte: &mut u8) {
        if *byte == b'\n' {
            // Empty lines before a request line are skipped, as servers do.
            if self.line.iter().any(|&b| b != b'\r') {
                self.place = Place::Headers;
            }
            self.line.clear();
            return;
        }
        self.line.push(*byte);
        if self.line.ends_with(OLD_VERSION) {
            *byte = b'1';
        }
        if self.line.len() > LINE_MAX_BYTES {
            self.line.drain(..LINE_MAX_BYTES - OLD_VERSION.len());
        }
    }

    fn header_byte(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX_BYTES {
                self.line.push(byte);
            }
            return;
        }
        let line = String::from_utf8_lossy(&self.line)
            .trim_end()
            .to_ascii_lowercase();
        self.line.clear();
        if line.is_empty() {
            self.place = match (self.stop_after_head, self.body_bytes) {
                (true, _) => Place::Through,
                (false, 0) => Place::RequestLine,
                (false, left_bytes) => Place::Body { left_bytes },
            };
            self.body_bytes = 0;
            return;
        }
        match line.split_once(':') {
            Some(("content-length", value)) => match value.trim().parse() {
                Ok(length_bytes) => self.body_bytes = length_bytes,
                Err(_) => self.stop_after_head = true,
            },
            Some(("transfer-encoding" | "upgrade", _)) => self.stop_after_head = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relabels `stream` cut into pieces of `piece_bytes`.
    fn relabelled(stream: &str, piece_bytes: usize) -> String {
        let mut relabeller = Relabeller::new();
        let mut bytes = stream.as_bytes().to_vec();
        for piece in bytes.chunks_mut(piece_bytes) {
            relabeller.relabel(piece);
        }
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn request_lines_change_and_bodies_do_not_however_the_bytes_are_cut() {
        let stream = "PUT /a HTTP/1.0\r\nContent-Length: 17\r\n\r\nGET / HTTP/1.0\r\n\n\
                      GET /b HTTP/1.0\r\nx: HTTP/1.0\r\n\r\n\
                      GET /c HTTP/1.1\r\n\r\n\
                      GET /d HTTP/1.0\r\n\r\n";
        let expected = "PUT /a HTTP/1.1\r\nContent-Length: 17\r\n\r\nGET / HTTP/1.0\r\n\n\
                        GET /b HTTP/1.1\r\nx: HTTP/1.0\r\n\r\n\
                        GET /c HTTP/1.1\r\n\r\n\
                        GET /d HTTP/1.1\r\n\r\n";
        for piece_bytes in [1, 2, 3, 7, 64, stream.len()] {
            assert_eq!(relabelled(stream, piece_bytes), expected, "{piece_bytes}");
        }
    }

    #[test]
    fn long_request_line_is_followed_in_bounded_memory() {
        let path = "a".repeat(3 * LINE_MAX_BYTES);
        let stream = format!("GET /{path} HTTP/1.0\r\n\r\n");
        assert_eq!(
            relabelled(&stream, 5),
            stream.replace("HTTP/1.0", "HTTP/1.1")
        );
    }

    #[test]
    fn head_is_from_the_first_byte_of_a_request_to_its_empty_line() {
        let mut relabeller = Relabeller::new();
        let mut is_in_head = |text: &str| {
            relabeller.relabel(&mut text.as_bytes().to_vec());
            relabeller.is_in_head()
        };
        assert!(!is_in_head(""));
        assert!(is_in_head("PU"));
        assert!(is_in_head("T / HTTP/1.1\r\nContent-Length: 2\r\n"));
        assert!(!is_in_head("\r\n{"));
        assert!(!is_in_head("}"));
        assert!(is_in_head("G"));
        assert!(!is_in_head("ET / HTTP/1.1\r\n\r\n"));
    }

    #[test]
    fn nothing_changes_after_an_upgrade_or_a_chunked_body() {
        for header in ["Upgrade: samepage-console", "Transfer-Encoding: chunked"] {
            let stream = format!("GET / HTTP/1.1\r\n{header}\r\n\r\nGET / HTTP/1.0\r\n\r\n");
            assert_eq!(relabelled(&stream, 4), stream);
        }
    }
}
