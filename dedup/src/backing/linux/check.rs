//! What a system call returned.

use std::io;

/// Turns a system call's `-1` into the error it left.
pub(crate) fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Turns the `MAP_FAILED` of a mapping call into the error it left.
pub(crate) fn check_mapped(returned: *mut libc::c_void) -> io::Result<()> {
    if returned == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
