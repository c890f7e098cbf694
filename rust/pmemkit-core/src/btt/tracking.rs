//! Read tracking: which blocks are being read, so that none of them is written again.
//!
//! The protocol between a reader and the writer that will reuse a block:
//!
//! ```text
//! reader                          writer (has moved the sector away, now wants the block)
//! R1 map entry -> block           W1 map entry := another block; release the lane
//! R2 enter(block)                 W2 take the lane (a compare-exchange), full fence
//! R3 map entry again; if it       W3 idle(block)? no: use another lane, or wait
//!    changed: leave, from R1      W4 data into the block
//! R4 copy
//! R5 leave(block)
//! ```
//!
//! Before it leaves such a trace, a reader looks a few times without one. Each line of the map has
//! a version, which changes after an entry did and before the block that it left is used again:
//!
//! ```text
//! R1 version                      W1 map entry := another block
//! R2 map entry -> block           W2 version += 1; release the lane
//! R3 copy                         W3 take the lane
//! R4 version again; if it         W4 data into the block
//!    changed: once more, from R1
//! ```
//!
//! Invariants:
//! 1. Whoever passed R3 is seen by W3: R2 and W2 are full fences, so either R3 sees W1 or W3 sees
//!    R2.
//! 2. Whoever copied any of W4 finds the version changed: W2 comes before W4, R3 before R4.
//! 3. What was copied in R4 is what the block held: W4 comes after R5 (`leave` releases, `idle`
//!    acquires).
//! 4. Readers never wait. A slot belongs to one thread ([`crate::place`]) and names the block it
//!    reads; threads without one count in a table where several blocks share a counter, so a writer
//!    may find a block busy that nobody reads; it is never the other way round.
//!
//! What this does not do: know where blocks or the map are.

use super::sync::{fence, full_fence, taken, AtomicU64, Ordering, COUNTERS, SLOTS};

/// Counts the changes of some entries of the map. Changed under their lock only.
#[derive(Default)]
pub struct Versions(AtomicU64);

/// What a reader saw before it read an entry.
pub struct Look<'a> {
    versions: &'a Versions,
    seen: u64,
}

impl Versions {
    /// Says that an entry changed. The block it left is stored into only after this.
    pub fn changed(&self) {
        let next = self.0.load(Ordering::Relaxed).wrapping_add(1);
        self.0.store(next, Ordering::Release);
    }

    /// Begins to read without leaving a trace.
    pub fn look(&self) -> Look<'_> {
        Look { versions: self, seen: self.0.load(Ordering::Acquire) }
    }
}

impl Look<'_> {
    /// True when the block could not have been stored into since.
    pub fn holds(&self) -> bool {
        fence(Ordering::Acquire);
        self.versions.0.load(Ordering::Relaxed) == self.seen
    }
}

/// A line of its own for each thread.
#[repr(align(128))]
struct Slot(AtomicU64);

/// Who reads which block.
pub struct Readers {
    /// The block that the thread of this place reads, plus one; 0 for none.
    slots: Box<[Slot]>,
    counters: Box<[AtomicU64]>,
}

impl Readers {
    /// Nobody reads anything.
    pub fn new() -> Self {
        Readers {
            slots: (0..SLOTS).map(|_| Slot(AtomicU64::new(0))).collect(),
            counters: (0..COUNTERS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn counter(&self, block: u32) -> &AtomicU64 {
        &self.counters[block as usize % COUNTERS]
    }

    /// Says that the thread of `place` reads a block, before it reads the map for the second time.
    pub fn enter(&self, place: usize, block: u32) {
        match self.slots.get(place) {
            Some(slot) => slot.0.swap(u64::from(block) + 1, Ordering::SeqCst),
            None => self.counter(block).fetch_add(1, Ordering::SeqCst),
        };
        full_fence();
    }

    /// Says that it was read.
    pub fn leave(&self, place: usize, block: u32) {
        match self.slots.get(place) {
            Some(slot) => slot.0.store(0, Ordering::Release),
            None => {
                self.counter(block).fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// True when nobody reads the block. The caller has just taken the lane that it belongs to.
    pub fn idle(&self, block: u32) -> bool {
        full_fence();
        if self.counter(block).load(Ordering::Acquire) != 0 {
            return false;
        }
        let mut places = taken() & ((1 << SLOTS) - 1);
        while places != 0 {
            let slot = &self.slots[places.trailing_zeros() as usize];
            if slot.0.load(Ordering::Acquire) == u64::from(block) + 1 {
                return false;
            }
            places &= places - 1;
        }
        true
    }
}
