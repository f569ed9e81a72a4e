//! From a [`Reply`] or [`Fault`] to bytes on the wire, in the shape of Firecracker's server.
//!
//! `micro_http` sends `HTTP/1.1 204 ` without a reason phrase, `Server: Firecracker API` and
//! `Connection: keep-alive`, and no date. Clients depend on it: `firecracker-rs-sdk` reads until a
//! short read of a 64-byte buffer, so a 204 with hyper's default head, which is exactly 64 bytes
//! long, hangs it; ours has 66.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, SERVER, UPGRADE};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::fault::{Fault, FaultBody};

/// The protocol name of the two-way console stream, in `Upgrade` headers.
pub const CONSOLE_PROTOCOL: &str = "samepage-console";

/// A successful answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// 204
    Empty,
    /// 200 with `application/json`
    Json(Vec<u8>),
    /// 200 with `text/plain`
    Text(Vec<u8>),
}

impl Reply {
    /// A JSON reply of `value`.
    ///
    /// # Errors
    /// 500 if `value` has no JSON form; none of our replies is such.
    pub fn json(value: &impl Serialize) -> Result<Reply, Fault> {
        serde_json::to_vec(value)
            .map(Reply::Json)
            .map_err(|error| Fault::internal(format!("reply has no JSON form: {error}")))
    }

    /// The HTTP response.
    pub fn into_response(self) -> Response<Full<Bytes>> {
        match self {
            Reply::Empty => response(StatusCode::NO_CONTENT, None, Vec::new()),
            Reply::Json(body) => response(StatusCode::OK, Some("application/json"), body),
            Reply::Text(body) => response(StatusCode::OK, Some("text/plain"), body),
        }
    }
}

impl Fault {
    /// The HTTP response: the status, and `{"fault_message": ...}`.
    pub fn into_response(self) -> Response<Full<Bytes>> {
        let body = FaultBody {
            fault_message: self.message,
        };
        // A map of one string cannot fail to serialize.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = response(self.status, Some("application/json"), body);
        if let Some(allow) = self.allow {
            let allow = HeaderValue::from_static(allow);
            response.headers_mut().insert(ALLOW, allow);
        }
        let is_unread = [StatusCode::PAYLOAD_TOO_LARGE, StatusCode::REQUEST_TIMEOUT];
        if is_unread.contains(&self.status) {
            // The rest of the body is not read, so this connection has no next request.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }
}

/// 101: from here on the connection is the console's.
pub fn switch_to_console() -> Response<Full<Bytes>> {
    let mut response = response(StatusCode::SWITCHING_PROTOCOLS, None, Vec::new());
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
    response
}

fn response(
    status: StatusCode,
    content_type: Option<&'static str>,
    body: Vec<u8>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b""));
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Firecracker API"));
    headers.insert(CONNECTION, HeaderValue::from_static("keep-alive"));
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    response
}
