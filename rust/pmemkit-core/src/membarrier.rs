//! A fence that all threads of this process make at once, so that the many who only might be looked
//! at need none of their own. By `membarrier`, Linux 4.14 and later.
//!
//! What this does not do: fence other processes, or order anything where the kernel refuses; who
//! asked [`possible`] and was told no fences on both sides.

use std::sync::atomic::{compiler_fence, fence, AtomicU32, Ordering};

const REGISTER: libc::c_int = 1 << 4;
const EXPEDITED: libc::c_int = 1 << 3;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: takes three numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// True where [`everybody`] works in this process. The answer never changes.
pub fn possible() -> bool {
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

/// The fence of the side that is passed often: nothing for the CPU, where [`fence_all`] fences for
/// it.
#[inline(always)]
pub fn fence_own(asymmetric: bool) {
    if asymmetric {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// The fence of the other side. False where the kernel refused what it had granted.
pub fn fence_all(asymmetric: bool) -> bool {
    fence(Ordering::SeqCst);
    !asymmetric || everybody()
}
