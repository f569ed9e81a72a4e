//! Filters of tracepoints, which the crate for `perf_event_open(2)` has no call for.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;

use perf_event::Counter;

/// `PERF_EVENT_IOC_SET_FILTER`: `_IOW('$', 6, char *)` of `include/uapi/linux/perf_event.h`.
const SET_FILTER: libc::c_ulong = 0x4008_2406;

/// Lets only those events pass for which `filter` holds (`Documentation/trace/events.rst`, 5.1).
///
/// # Errors
/// If the kernel does not know a field, or not such a filter.
pub(crate) fn set_filter(counter: &Counter, filter: &str) -> io::Result<()> {
    let text = CString::new(filter).map_err(io::Error::other)?;
    // SAFETY:
    // - The descriptor is the counter's, open as long as the borrow.
    // - The request takes a C string, which the kernel copies before it returns.
    let returned = unsafe { libc::ioctl(counter.as_raw_fd(), SET_FILTER, text.as_ptr()) };
    if returned == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(
        error.kind(),
        format!("filter `{filter}`: {error}"),
    ))
}
