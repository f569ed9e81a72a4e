//! Parts of a range that are worked on together.

use std::io;
use std::sync::atomic::Ordering;

use linux_raw_sys::general::PIDFD_SELF_THREAD;

use super::LinuxMemory;
use crate::base::failpoint::may_fail;
use crate::base::page::PageRange;

impl LinuxMemory {
    /// Drops the pages of `parts`, all by one system call if the kernel can. Returns how many parts
    /// it did, as [`Backing::discard`](crate::backing::Backing::discard).
    pub(super) fn drop_parts(&self, parts: &[PageRange]) -> io::Result<usize> {
        may_fail!("madvise");
        let done = match parts {
            [_, _, ..] if self.takes_many.load(Ordering::Relaxed) => self.drop_many(parts),
            _ => Ok(0),
        };
        match done {
            Ok(0) => {}
            Ok(done) => return Ok(done),
            // What is wrong with the first part, if anything is, the call for it alone will say.
            Err(error) => self
                .takes_many
                .store(!is_refusal(&error), Ordering::Relaxed),
        }
        self.advise(&parts[0], libc::MADV_DONTNEED).map(|()| 1)
    }

    /// One call for all parts, of which the kernel may do fewer. This process names itself without a
    /// descriptor, since Linux 6.14: older ones refuse that, and would have little gain (they flush
    /// TLBs for each part).
    fn drop_many(&self, parts: &[PageRange]) -> io::Result<usize> {
        let spans: Vec<libc::iovec> = parts
            .iter()
            .map(|part| self.span(part))
            .map(|(start, iov_len)| libc::iovec {
                iov_base: start.cast(),
                iov_len,
            })
            .collect();
        let (advice, flags) = (libc::MADV_DONTNEED, 0);
        // SAFETY:
        // - `span` checked that each span lies inside the reserved range, which is ours alone.
        // - As in `advise`: what is dropped holds zeros, was given up, or covers an equal page of the pool.
        // - `spans` is valid for as long as the call takes.
        let advised_bytes = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                PIDFD_SELF_THREAD,
                spans.as_ptr(),
                spans.len(),
                advice,
                flags,
            )
        };
        let mut left_bytes =
            usize::try_from(advised_bytes).map_err(|_| io::Error::last_os_error())?;
        // It stops between two spans, never inside one (`mm/madvise.c`, `vector_madvise`).
        let is_done = |span: &&libc::iovec| {
            let rest = left_bytes.checked_sub(span.iov_len);
            left_bytes = rest.unwrap_or(0);
            rest.is_some()
        };
        Ok(spans.iter().take_while(is_done).count())
    }
}

/// Whether the kernel does not know the call or this use of it, now and for ever.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [libc::EBADF, libc::EINVAL, libc::EPERM, libc::ENOSYS];
    error
        .raw_os_error()
        .is_some_and(|code| refusals.contains(&code))
}
