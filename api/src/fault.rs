//! What went wrong, as a client sees it.

use std::time::Duration;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use vmm::{ErrorKind, MonitorError};

/// An error of the API: the HTTP status and the text behind `fault_message`.
///
/// Firecracker answers every error with 400. Here the status says more where Firecracker has no
/// counterpart (an unknown id, a second VM of the same name); a request that Firecracker knows and
/// refuses in the VM's present state stays 400, so that its clients see what they expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A 4xx status, 500 for an error of ours, or 503.
    pub status: StatusCode,
    /// One line for a human; names the field and the value.
    pub message: String,
    /// For 405: the methods that this path does take, as in the `Allow` header.
    pub allow: Option<&'static str>,
}

/// The body of every error reply, as in Firecracker's `Error` schema.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultBody {
    /// One line for a human.
    pub fault_message: String,
}

impl Fault {
    fn new(status: StatusCode, message: impl Into<String>) -> Fault {
        Fault {
            status,
            message: message.into(),
            allow: None,
        }
    }

    /// 400: the request itself is wrong, or Firecracker's API refuses it in this state.
    pub fn bad_request(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::BAD_REQUEST, message)
    }

    /// 404: no such path, VM or merge domain.
    pub fn not_found(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::NOT_FOUND, message)
    }

    /// 405: the path exists, but not with this method. `allow` lists the methods it takes.
    pub fn method_not_allowed(message: impl Into<String>, allow: &'static str) -> Fault {
        Fault {
            allow: Some(allow),
            ..Fault::new(StatusCode::METHOD_NOT_ALLOWED, message)
        }
    }

    /// 409: the request is right but collides with what is there.
    pub fn conflict(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::CONFLICT, message)
    }

    /// 413: the body is larger than `limit_bytes`.
    pub fn body_too_large(limit_bytes: usize) -> Fault {
        Fault::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request body is larger than the limit of {limit_bytes} bytes"),
        )
    }

    /// 408: the body did not come within `time`.
    pub fn too_slow(time: Duration) -> Fault {
        Fault::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the request body did not come within {time:?}"),
        )
    }

    /// 503: as much as there may be of it is in use; later it may be free.
    pub fn unavailable(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// 500: an error inside Samepage.
    pub fn internal(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

/// For requests that Firecracker has too: a state that does not fit is 400, as there.
pub(crate) fn refusal(error: &MonitorError) -> Fault {
    let message = error.to_string();
    match error.kind() {
        ErrorKind::NotFound => Fault::not_found(message),
        ErrorKind::Conflict | ErrorKind::InvalidInput => Fault::bad_request(message),
        // Firecracker knows no such refusals.
        ErrorKind::InUse | ErrorKind::NoRoom => Fault::conflict(message),
        ErrorKind::Internal => {
            log::error!("{message}");
            Fault::internal(message)
        }
    }
}

/// For creating and deleting, which Firecracker does not have: a conflict is 409.
pub(crate) fn conflict_or(error: &MonitorError) -> Fault {
    match error.kind() {
        ErrorKind::Conflict => Fault::conflict(error.to_string()),
        _ => refusal(error),
    }
}
