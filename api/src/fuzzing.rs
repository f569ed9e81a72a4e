//! Any bytes at all from clients and files, for fuzz targets and the tests that run their seeds.
//!
//! Nothing here reaches a monitor: a configuration names files, and one that a fuzzer made up could
//! name the host's.

pub mod config_mutator;

use std::convert::Infallible;

use http_body_util::Full;
use hyper::Response;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmm::VmConfig;
use vmm::boot::cmdline;

use crate::fault::{Fault, FaultBody};
use crate::http10::Relabeller;
use crate::reply::Reply;
use crate::request::Request;
use crate::request_body;
use crate::route::route;
use crate::server;

/// What the server keeps of replies that its client does not read.
const UNREAD_BYTES: usize = 4096;

/// A VM's configuration of any bytes, as the body of a request and as a file. What is valid is the
/// same when it was written and read again.
///
/// # Panics
/// If it is not, if the two ways to read it differ, or if a refusal does not say why.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn config(text: &[u8]) {
    let sent = requested(text);
    let read: Result<VmConfig, _> = serde_json::from_slice(text);
    assert_eq!(sent.is_ok(), read.is_ok(), "{sent:?} {read:?}");
    let Ok(config) = sent else {
        return;
    };
    if let Err(error) = config.validate() {
        assert!(!error.to_string().is_empty());
        return;
    }
    let written = serde_json::to_vec(&config).expect("a configuration has a JSON form");
    let again = requested(&written).unwrap_or_else(|fault| panic!("{fault:?}"));
    assert_eq!(again, config);
    // Too long a command line is no finding.
    if let Ok(cmdline) = cmdline::compose(&config) {
        let text = cmdline.as_cstring().map(|text| text.as_bytes().len());
        assert!(text.is_ok_and(|length| length <= cmdline::CMDLINE_LEN_MAX));
    }
}

fn requested(body: &[u8]) -> Result<Box<VmConfig>, Fault> {
    match route(&hyper::Method::PUT, "/vms/a", body)? {
        Request::CreateVm(_, config) => Ok(config),
        other => panic!("not the request that was made: {other:?}"),
    }
}

/// A connection on which a client sends any bytes. The first byte of `input` is the length of the
/// pieces that they are cut into.
///
/// # Panics
/// If the cuts make a difference, or the client gets what is no reply, or one that blames the server.
pub fn connection(input: &[u8]) {
    let Some((&piece_bytes, bytes)) = input.split_first() else {
        return;
    };
    let piece_bytes = usize::from(piece_bytes).max(1);
    relabel(bytes, piece_bytes);
    let replies = converse(bytes, piece_bytes);
    // The reply to a HEAD has the length of a body, and none.
    if !bytes.windows(4).any(|word| word == b"HEAD") {
        check_replies(&replies);
    }
}

/// Nothing but the last digit of a version may change.
fn relabel(bytes: &[u8], piece_bytes: usize) {
    let mut whole = bytes.to_vec();
    Relabeller::new().relabel(&mut whole);
    let mut cut = bytes.to_vec();
    let mut relabeller = Relabeller::new();
    for piece in cut.chunks_mut(piece_bytes) {
        relabeller.relabel(piece);
    }
    assert_eq!(whole, cut);
    for (&before, &after) in bytes.iter().zip(&whole) {
        assert!(before == after || (before, after) == (b'0', b'1'));
    }
}

/// All that a client gets that sends `bytes`, then no more, and reads to the end.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
fn converse(bytes: &[u8], piece_bytes: usize) -> Vec<u8> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(UNREAD_BYTES);
        let serve = async {
            // An error is the client's: it said what is no HTTP.
            let _ = server::connection(theirs, service_fn(answer)).await;
        };
        let (mut reader, mut writer) = tokio::io::split(ours);
        let send = async {
            for piece in bytes.chunks(piece_bytes) {
                if writer.write_all(piece).await.is_err() {
                    return;
                }
                // Otherwise the pieces come as one.
                tokio::task::yield_now().await;
            }
            let _ = writer.shutdown().await;
        };
        let mut replies = Vec::new();
        let receive = async { reader.read_to_end(&mut replies).await };
        let ((), (), received) = tokio::join!(serve, send, receive);
        received.expect("no error in a pipe");
        replies
    })
}

/// The request, as it was understood.
async fn answer(request: hyper::Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let reply = request_body::read_body(body)
        .await
        .and_then(|body| route(&parts.method, parts.uri.path(), &body))
        .map(|request| Reply::Text(format!("{request:?}").into_bytes()));
    Ok(match reply {
        Ok(reply) => reply.into_response(),
        Err(fault) => fault.into_response(),
    })
}

/// Each reply is whole, and each refusal says why.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
fn check_replies(mut replies: &[u8]) {
    while !replies.is_empty() {
        let end = replies.windows(4).position(|four| four == b"\r\n\r\n");
        let (head, rest) = replies.split_at(end.expect("the end of a head") + 4);
        let head = std::str::from_utf8(head).expect("a head of text");
        let mut versions = ["HTTP/1.1 ", "HTTP/1.0 "].iter();
        let status = versions.find_map(|version| head.strip_prefix(version));
        let status = status.and_then(|text| text.get(..3));
        let status = status.unwrap_or_else(|| panic!("no reply: {head}"));
        assert!(
            matches!(status, "100" | "200") || status.starts_with('4'),
            "{head}"
        );
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |text| text.parse().expect("a length"));
        let body = rest.get(..length).expect("a whole body");
        if status.starts_with('4') {
            let body: FaultBody = serde_json::from_slice(body).expect("a fault's body");
            assert!(!body.fault_message.is_empty());
        }
        replies = &rest[length..];
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzz_targets_are_no_findings() {
        for seed in crate::fuzz_seeds::of("config_file") {
            super::config(&seed);
        }
        for seed in crate::fuzz_seeds::of("http_front") {
            super::connection(&seed);
        }
    }
}
