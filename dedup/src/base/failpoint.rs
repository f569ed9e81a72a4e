//! Faults on demand: in a build with the feature `failpoints`, a test can have the system calls that
//! the engine lives on fail (crate `fail`). In any other build nothing of it is left.
//!
//! | point | fails |
//! |---|---|
//! | `memfd` | making the pool |
//! | `mmap` | mapping pool pages over a range |
//! | `unmapped` | mapping or moving something over a range, but only once what was there is gone, as the kernel may |
//! | `madvise` | dropping pages that are zeros or lie over an equal page of the pool; making private copies |
//! | `register` | taking a region on for write protection |
//! | `userfaultfd` | protecting |
//! | `register_again` | registering what was mapped anew in a range that is about to be released |
//! | `release` | releasing a range as a whole; never page by page, which cannot fail on a page that was protected |
//! | `pool_write` | getting memory for a pool page |
//! | `stage`, `stage_copies`, `stage_zeros` | building a range aside: the mapping, copies in it, zeros in it |
//! | `mremap` | putting what was built aside in place |
//! | `fallocate` | punching pages out of the pool |
//! | `pagemap` | asking what lies behind pages |

/// Leaves the function it stands in with `ENOMEM` when a test says so.
macro_rules! may_fail {
    ($point:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($point, |_| Err(std::io::Error::from_raw_os_error(
            libc::ENOMEM
        )));
    };
}

pub(crate) use may_fail;
