//! Requests that the API must refuse.

use crate::server::Server;

/// A request that must be refused: method, path, body, status, and what the fault must name.
pub type Refusal<'a> = (&'a str, &'a str, &'a str, u16, &'a str);

/// Makes the request and looks at the refusal.
///
/// # Panics
/// If it is not refused, or not with that status, or the fault does not name what is wrong.
pub fn assert_refused(server: &Server, (method, path, body, status, named): Refusal<'_>) {
    let reply = server.call(method, path, body);
    let fault = reply.fault();
    assert_eq!(reply.status, status, "{method} {path} {body}: {fault}");
    assert!(fault.contains(named), "{method} {path} {body}: {fault}");
}
