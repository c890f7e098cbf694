//! What the protocols between threads are made of. The model checker compiles `areas` and `slot` a
//! second time over other parts, in `model/sync.rs`.

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
pub use std::thread::yield_now;

pub use super::table::Table;
pub use crate::membarrier::{fence_all, fence_own};

use super::plant::Plant;

/// Words of 64 frames in an area.
pub const WORDS: usize = 8;
/// Frames that a thread keeps at most.
pub const KEPT: usize = 128;
/// How often somebody looks whether a thread has left its slot before it gives up.
pub const PATIENCE: u32 = 100_000;

/// True in a test that wants this mistake.
#[inline(always)]
pub fn planted(_: Plant) -> bool {
    false
}
