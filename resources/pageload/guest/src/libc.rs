//! The memory functions that compilers call. The C library has them elsewhere.
//!
//! String instructions, because a loop here would be turned into a call to itself.

use core::arch::asm;

/// Copies forwards.
///
/// # Safety
/// `count` bytes are readable at `from` and writable at `to`; they do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the ABI has the direction flag clear.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Copies, whichever way is right for ranges that overlap.
///
/// # Safety
/// `count` bytes are readable at `from` and writable at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: forwards is right unless `to` starts inside the source; ranges from the caller.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY:
    // 1. The caller vouches for both ranges.
    // 2. `count` is not zero here, so the last bytes exist, and the direction flag is cleared again.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count - 1) => _,
            inout("rsi") from.wrapping_add(count - 1) => _,
            options(nostack)
        );
    }
    to
}

/// Fills.
///
/// # Safety
/// `count` bytes are writable at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the ABI has the direction flag clear.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") count => _, inout("rdi") to => _, in("eax") byte,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Compares as unsigned bytes.
///
/// # Safety
/// `count` bytes are readable at both.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: below `count`, so readable; the volatile access keeps this loop a loop.
        let byte = unsafe { left.wrapping_add(index).read_volatile() };
        // SAFETY: as above.
        let other = unsafe { right.wrapping_add(index).read_volatile() };
        if byte != other {
            return i32::from(byte) - i32::from(other);
        }
    }
    0
}
