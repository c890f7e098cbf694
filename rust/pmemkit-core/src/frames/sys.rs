//! The system calls of page frames: memory that is zero until it is touched.
//!
//! Preconditions: Linux.
//!
//! What this does not do: decide anything.

use std::ptr::{null_mut, NonNull};

/// Maps `len` bytes that read as zero and cost nothing until they are touched.
pub fn map(len: usize) -> Option<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let base = unsafe { libc::mmap(null_mut(), len, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    NonNull::new(base.cast())
}

/// Gives a mapping back.
///
/// # Safety
/// `base` and `len` are those of one [`map`], and nobody uses the bytes any more.
pub unsafe fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: the caller vouches for it.
    unsafe { libc::munmap(base.as_ptr().cast(), len) };
}
