//! The system calls of page frames: memory that is zero until it is touched, and a fence that other
//! threads pay nothing for.
//!
//! Preconditions: Linux. Without `membarrier` (an old kernel, a filter of system calls) both sides
//! use a fence of their own.
//!
//! What this does not do: decide anything.

use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

const REGISTER: libc::c_int = 1 << 4;
const EXPEDITED: libc::c_int = 1 << 3;

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

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: takes three numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// True where [`everybody`] works in this process. The answer never changes.
pub fn can_fence_everybody() -> bool {
    const UNKNOWN: u32 = 0;
    static ANSWER: AtomicU32 = AtomicU32::new(UNKNOWN);
    let known = ANSWER.load(Ordering::Relaxed);
    if known != UNKNOWN {
        return known == 2;
    }
    let mine = 1 + u32::from(membarrier(REGISTER) && membarrier(EXPEDITED));
    match ANSWER.compare_exchange(UNKNOWN, mine, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => mine == 2,
        Err(other) => other == 2,
    }
}

/// A full fence on every running thread of this process. False where the kernel refused.
pub fn everybody() -> bool {
    // A child of fork may have to register again.
    membarrier(EXPEDITED) || (membarrier(REGISTER) && membarrier(EXPEDITED))
}
