//! The parts of loom, and few enough of each for it to try everything.

use std::cell::Cell;

pub use loom::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
pub use loom::thread::yield_now;
pub use loom::thread::yield_now as spin_loop;

pub const SLOTS: usize = 2;
pub const COUNTERS: usize = 2;
pub const LINES: usize = 2;
pub const LOOKS: u32 = 1;

loom::thread_local! {
    static PLACE: Cell<usize> = Cell::new(SLOTS);
}

/// Gives the calling thread a place.
pub fn sit(place: usize) {
    PLACE.with(|cell| cell.set(place));
}

pub fn place() -> usize {
    PLACE.with(Cell::get)
}

pub fn taken() -> u64 {
    u64::MAX
}

pub fn full_fence() {
    fence(Ordering::SeqCst);
}
