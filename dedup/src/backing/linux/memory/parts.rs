//! Parts of a range that are worked on together.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use linux_raw_sys::general::PIDFD_SELF_THREAD;

use super::LinuxMemory;
use crate::backing::Part;
use crate::backing::linux::LinuxPool;
use crate::backing::linux::replace::persist;
use crate::fault::may_fail;
use crate::page::PageRange;

/// A range of pages that is armed, if any is. Only the holder of the worker mutex asks.
#[derive(Debug, Default)]
pub(super) struct Armed {
    /// Its first page, and the one behind the last in the upper half; zero if there is none.
    pages: AtomicU64,
    /// Arming failed somewhere in it.
    in_part: AtomicBool,
}

impl Armed {
    /// Notes that a range was to be armed. What comes later in a protected range lies in the first.
    fn note(&self, range: &PageRange, wholly: bool) {
        if self.pages.load(Ordering::Relaxed) != 0 {
            return;
        }
        let pages = u64::from(range.end) << 32 | u64::from(range.start);
        self.pages.store(pages, Ordering::Relaxed);
        self.in_part.store(!wholly, Ordering::Relaxed);
    }

    /// Whether arming failed: nobody knows how far it came, and it is not tried again.
    fn is_in_part(&self) -> bool {
        self.in_part.load(Ordering::Relaxed)
    }

    /// The range, which is not armed from now on, and whether all of it was.
    fn take(&self) -> Option<(PageRange, bool)> {
        let pages = self.pages.swap(0, Ordering::Relaxed);
        let range = (pages & 0xffff_ffff) as u32..(pages >> 32) as u32;
        let in_part = self.in_part.swap(false, Ordering::Relaxed);
        (pages != 0).then_some((range, !in_part))
    }
}

impl LinuxMemory {
    /// [`Backing::share`](crate::backing::Backing::share): pages that lie alone are taken away all
    /// at once, and mapped one by one then, while whoever comes to one sleeps. To map over a page
    /// that is there takes half as long again: the kernel unmaps it and flushes the TLBs each time.
    pub(super) fn share_parts(&self, pool: &LinuxPool, parts: &[Part]) -> io::Result<usize> {
        let taken = match parts {
            // Where the kernel drops one part at a time, it takes as long as mapping over it.
            [_, _, ..] if self.takes_many.load(Ordering::Relaxed) => self.take_away(pool, parts),
            _ => 0,
        };
        if taken == 0 {
            // Also where pages can't be taken away: mapping over them can do without.
            let (range, first) = &parts[0];
            return self.remap(range, Some((pool, *first))).map(|()| 1);
        }
        for (done, (range, first)) in parts[..taken].iter().enumerate() {
            if let Err(error) = self.remap(range, Some((pool, *first))) {
                self.put_back(pool, &parts[done..taken]);
                return if done == 0 { Err(error) } else { Ok(done) };
            }
        }
        Ok(taken)
    }

    /// Drops the pages of parts; whoever comes to one sleeps until the release. Returns of how many
    /// parts, from the first on.
    fn take_away(&self, pool: &LinuxPool, parts: &[Part]) -> usize {
        let range = parts[0].0.start..parts[parts.len() - 1].0.end;
        let (start, len_bytes) = self.span(&range);
        if self.armed.is_in_part() {
            return 0;
        }
        let armed = self.userfaultfd.arm(start, len_bytes);
        self.armed.note(&range, armed.is_ok());
        if armed.is_err() {
            return 0;
        }
        let mut joined: Vec<PageRange> = Vec::with_capacity(parts.len());
        for (range, _) in parts {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range.clone()),
            }
        }
        let dropped = self.drop_parts(&joined).unwrap_or(0);
        let count_to = |end: u32| parts.partition_point(|(range, _)| range.end <= end);
        let taken = joined[..dropped]
            .last()
            .map_or(0, |last| count_to(last.end));
        if let Some(next) = joined.get(dropped) {
            // If it failed at the second of two mappings, the pages of the first are gone.
            self.put_back(pool, &parts[taken..count_to(next.end)]);
        }
        taken
    }

    /// Puts copies in place of pages that were taken away, where they were. There is nowhere to turn
    /// with an error: the guest would find zeros.
    fn put_back(&self, pool: &LinuxPool, parts: &[Part]) {
        for (range, first) in parts {
            for page in range.clone() {
                let (to, len_bytes) = self.span(&(page..page + 1));
                let from = pool.page_address(first.plus(page - range.start));
                persist("no memory for a page of a guest", || {
                    may_fail!("put_back");
                    // SAFETY:
                    // - The source is a whole page of the pool's view, which was compared with the
                    //   page that was there.
                    // - `span` checked that the target lies inside the reserved range; it is armed.
                    let copied = unsafe { self.userfaultfd.copy_protected(to, from, len_bytes) };
                    copied.or_else(|error| match error.kind() {
                        io::ErrorKind::AlreadyExists => Ok(()),
                        _ => Err(error),
                    })
                });
            }
        }
    }

    /// Lets whoever comes to a page that is not there find zeros again. Tells whether it was
    /// otherwise; protection is gone then, and registration.
    ///
    /// Of just what was armed: VMAs begin and end there, so it takes none. All that is protected
    /// would be split at its ends, which fails for ever in a process that has as many VMAs as it may.
    pub(super) fn disarm(&self) -> bool {
        let Some((range, wholly)) = self.armed.take() else {
            return false;
        };
        let (start, len_bytes) = self.span(&range);
        let unregister = || {
            may_fail!("disarm");
            self.userfaultfd.unregister(start, len_bytes)
        };
        if wholly {
            persist("cannot wake the guests of a range", unregister);
        } else if let Err(error) = unregister() {
            // It went as far as arming had come: both go upwards, and stop at the same VMA.
            log::debug!("a part of a range was never armed: {error}");
        }
        true
    }

    /// Drops the pages of `parts`, all by one system call if the kernel can. Returns how many parts
    /// it did, as [`Backing::uncover`](crate::backing::Backing::uncover).
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
        // - As in `advise`: what is dropped holds zeros, or covers an equal page of the pool.
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
