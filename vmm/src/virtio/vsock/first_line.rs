//! What a client of the host's says first: where it wants to.

use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// Longest first line of a client: `CONNECT 4294967295` and its end fit.
const LINE_BYTES_MAX: usize = 32;

/// What a client said first.
pub(super) enum Line {
    /// It is not there yet.
    None,
    /// What it should be.
    Connect(u32),
    /// Anything else.
    Other,
}

/// A client's first line, taken out of the stream if it is `CONNECT` and a port.
pub(super) fn first_line(stream: &UnixStream) -> Line {
    let mut buffer = [MaybeUninit::uninit(); LINE_BYTES_MAX];
    let peeked = match recv(stream, &mut buffer, RecvFlags::PEEK) {
        Ok(((text, _), _)) => text.to_vec(),
        Err(rustix::io::Errno::WOULDBLOCK) => return Line::None,
        Err(_) => return Line::Other,
    };
    let Some(end) = peeked.iter().position(|&byte| byte == b'\n') else {
        let may_come = (1..LINE_BYTES_MAX).contains(&peeked.len());
        return if may_come { Line::None } else { Line::Other };
    };
    let text = String::from_utf8_lossy(&peeked[..end]);
    let mut words = text.split_ascii_whitespace();
    let is_connect = words
        .next()
        .is_some_and(|word| word.eq_ignore_ascii_case("connect"));
    let port = words.next().and_then(|word| word.parse().ok());
    match (is_connect, port, words.next()) {
        // What comes behind the line is for the guest.
        (true, Some(port), None) => match recv(stream, &mut buffer[..=end], RecvFlags::empty()) {
            Ok(_) => Line::Connect(port),
            Err(_) => Line::Other,
        },
        _ => Line::Other,
    }
}
