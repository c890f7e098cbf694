//! What the protocols between threads are made of. The model checker compiles `lock`, `tracking`,
//! `recovery` and `engine` a second time over other parts, in `model/sync.rs`.

pub use std::hint::spin_loop;
pub use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
pub use std::thread::yield_now;

pub use crate::place::{place, taken, SHARED as SLOTS};

/// Counters for readers without a slot.
pub const COUNTERS: usize = 1024;
/// Locks and versions of lines of the map; several lines share one. Few in tests, so that they do.
pub const LINES: usize = if cfg!(test) { 2 } else { 256 };
/// How often a reader looks without leaving a trace, before it says what it reads.
pub const LOOKS: u32 = 3;

/// Orders an atomic read-modify-write and what came before it before every later load. On x86-64
/// that operation is such a fence itself.
#[inline]
pub fn full_fence() {
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(target_arch = "x86_64"))]
    fence(Ordering::SeqCst);
}
