//! Replies to what is no HTTP request at all.
//!
//! hyper answers bytes that it cannot read as a request by itself, without a body, before any code
//! of ours is asked. Every error of this API has a `fault_message`, so that reply is recognised on
//! its way out and another sent in its place. It is told from ours by its reason phrase: ours have
//! none.

/// The reply to send in place of `written`, if that is hyper's own.
///
/// `written` must begin where a reply begins.
pub fn stand_in(written: &[u8]) -> Option<Vec<u8>> {
    let head = written.strip_prefix(b"HTTP/1.1 4")?;
    let (code, reason) = head.split_at_checked(2)?;
    if !matches!(reason, [b' ', first, ..] if first.is_ascii_alphabetic()) {
        return None;
    }
    let (status, message) = match code {
        b"31" => ("431", "the request's head is too large"),
        _ => ("400", "not an HTTP request"),
    };
    let body = format!(r#"{{"fault_message":"{message}"}}"#);
    let reply = format!(
        "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    Some(reply.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_replies_with_a_reason_phrase_are_replaced() {
        for ours in [
            "HTTP/1.1 204 \r\n",
            "HTTP/1.1 400 \r\nServer: Firecracker API\r\n",
            "HTTP/1.1 101 \r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 4",
            "HTTP/1.1 400",
            "",
        ] {
            assert_eq!(stand_in(ours.as_bytes()), None, "{ours}");
        }
        for (theirs, status) in [
            (
                "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
                "400",
            ),
            (
                "HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n",
                "431",
            ),
        ] {
            let reply = String::from_utf8(stand_in(theirs.as_bytes()).unwrap()).unwrap();
            assert!(
                reply.starts_with(&format!("HTTP/1.1 {status} \r\n")),
                "{reply}"
            );
            let (head, body) = reply.split_once("\r\n\r\n").unwrap();
            assert!(
                head.ends_with(&format!("Content-Length: {}", body.len())),
                "{reply}"
            );
            serde_json::from_str::<crate::fault::FaultBody>(body).unwrap();
        }
    }
}
