//! Read tracking: which blocks are being read, so that none of them is written again.
//!
//! The protocol between a reader and the writer that will reuse a block:
//!
//! ```text
//! reader                          writer (has moved the sector away, now wants the block)
//! R1 map entry -> block           W1 map entry := another block
//! R2 enter(block)                 W2 fence
//! R3 map entry again; if it       W3 idle(block)? no: use another one, or wait
//!    changed: leave, from R1      W4 data into the block
//! R4 copy
//! R5 leave(block)
//! ```
//!
//! Invariants:
//! 1. Whoever passed R3 is seen by W3: R2 and W2 are sequentially consistent, so either R3 sees W1
//!    or W3 sees R2.
//! 2. What was copied in R4 is what the block held: W4 comes after R5 (`leave` releases, `idle`
//!    acquires).
//! 3. Readers never wait. A counter stands for several blocks, so a writer may find a block busy
//!    that nobody reads; it is never the other way round.
//!
//! What this does not do: know where blocks or the map are.

#[cfg(feature = "model-check")]
use loom::sync::atomic::{fence, AtomicU32, Ordering};
#[cfg(not(feature = "model-check"))]
use std::sync::atomic::{fence, AtomicU32, Ordering};

/// Counters of a large arena: few enough to stay in the cache of a core.
const COUNTERS_MOST: u32 = 4096;
/// Counters in one cache line.
const IN_A_LINE: u32 = 16;

/// How many readers are in which blocks.
pub struct Readers {
    counters: Box<[AtomicU32]>,
    mask: u32,
}

impl Readers {
    /// Counters for an arena of so many blocks.
    pub fn new(blocks: u32) -> Self {
        let count = blocks.clamp(1, COUNTERS_MOST).next_power_of_two();
        let counters = (0..count).map(|_| AtomicU32::new(0)).collect();
        Readers { counters, mask: count - 1 }
    }

    /// Neighbouring blocks count in different lines, where there are several.
    fn counter(&self, block: u32) -> &AtomicU32 {
        let spread =
            block.wrapping_mul(IN_A_LINE).wrapping_add(block / (COUNTERS_MOST / IN_A_LINE));
        let index = if self.mask + 1 < COUNTERS_MOST { block } else { spread };
        &self.counters[(index & self.mask) as usize]
    }

    /// Says that a block is being read, before the map is read for the second time.
    pub fn enter(&self, block: u32) {
        self.counter(block).fetch_add(1, Ordering::SeqCst);
        // A read-modify-write alone does not order a later load of other memory everywhere.
        fence(Ordering::SeqCst);
    }

    /// Says that it was read.
    pub fn leave(&self, block: u32) {
        self.counter(block).fetch_sub(1, Ordering::Release);
    }

    /// Orders a store to the map before the next look at the counters.
    pub fn moved_away(&self) {
        fence(Ordering::SeqCst);
    }

    /// True when nobody reads the block.
    pub fn idle(&self, block: u32) -> bool {
        self.counter(block).load(Ordering::Acquire) == 0
    }
}
