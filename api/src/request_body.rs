//! The body of a request: read to its end, within bounds of size and time.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};

use crate::fault::Fault;

/// Largest request body; Firecracker's default limit (`HTTP_MAX_PAYLOAD_SIZE`).
pub const BODY_MAX_BYTES: usize = 51200;

/// How long a body may take to come, once its head is there.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How much of a body beyond the limit is still taken off the wire and thrown away, so that a
/// client which writes all before it reads gets to see the reply.
const DISCARD_MAX_BYTES: u64 = 16 << 20;
const DISCARD_MAX_TIME: Duration = Duration::from_secs(2);

/// Reads a body of at most [`BODY_MAX_BYTES`] that comes within [`BODY_TIME`].
pub(crate) async fn read_body(body: Incoming) -> Result<Bytes, Fault> {
    match tokio::time::timeout(BODY_TIME, read_within_limit(body)).await {
        Ok(body) => body,
        Err(_) => Err(Fault::too_slow(BODY_TIME)),
    }
}

/// The same without a deadline; a body that announces too much is not read first.
async fn read_within_limit(mut body: Incoming) -> Result<Bytes, Fault> {
    if body.size_hint().lower() > BODY_MAX_BYTES as u64 {
        tokio::spawn(discard(body));
        return Err(Fault::body_too_large(BODY_MAX_BYTES));
    }
    match Limited::new(&mut body, BODY_MAX_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            tokio::spawn(discard(body));
            Err(Fault::body_too_large(BODY_MAX_BYTES))
        }
        Err(error) => Err(Fault::bad_request(format!("request body: {error}"))),
    }
}

/// Throws away what a client still sends of a body that was refused, within bounds.
async fn discard(mut body: Incoming) {
    let all = async {
        let mut discarded_bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded_bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
            if discarded_bytes > DISCARD_MAX_BYTES {
                break;
            }
        }
    };
    // Either way the connection is closed afterwards.
    let _ = tokio::time::timeout(DISCARD_MAX_TIME, all).await;
}
