//! What the host's kernel offers, for a caller that has no engine yet.

use std::io;

use crate::backing::linux::Userfaultfd;

/// Names of the userfaultfd features that the engine needs and this kernel lacks; empty if it has
/// all of them (`include/uapi/linux/userfaultfd.h`).
///
/// # Errors
/// When no userfaultfd can be opened: `PermissionDenied` without the right to it, another kind
/// where the kernel has none.
pub fn missing_userfaultfd_features() -> io::Result<Vec<&'static str>> {
    Userfaultfd::missing_features()
}

#[cfg(test)]
mod tests {
    #[test]
    fn host_that_runs_these_tests_lacks_nothing() {
        let missing = super::missing_userfaultfd_features().unwrap();
        assert_eq!(missing, [""; 0]);
    }
}
