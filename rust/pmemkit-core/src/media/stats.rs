//! Counters of a medium that cost next to nothing: each thread has a place of its own.
//!
//! Invariants:
//! 1. A place of its own belongs to one living thread, which alone adds to it, so a plain load and
//!    store suffice. Threads beyond that share the last place and add atomically.
//! 2. The sum over all places is exact once the threads that counted have been waited for.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::place::{place, SHARED};

/// What was done to a medium since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes stored by us or reported as stored elsewhere.
    pub bytes_stored: u64,
    /// Ranges written back on request (stores that write back by themselves do not count).
    pub flushes: u64,
    /// Fences.
    pub fences: u64,
    /// Calls of `sync`, and of `persist` where that is an `msync`.
    pub syncs: u64,
}

/// One place: a cache line of counters.
#[derive(Default)]
#[repr(align(64))]
struct Line {
    bytes_stored: AtomicU64,
    flushes: AtomicU64,
    fences: AtomicU64,
    /// Each counts as a flush and a fence: one store where the time of a store is felt.
    persists: AtomicU64,
    syncs: AtomicU64,
}

/// The counters of one medium.
pub struct Counters {
    lines: Box<[Line; SHARED + 1]>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters { lines: Box::new(std::array::from_fn(|_| Line::default())) }
    }
}

impl Counters {
    /// Counts bytes stored.
    pub fn stored(&self, bytes: u64) {
        self.add(|line| &line.bytes_stored, bytes);
    }

    /// Counts a range written back.
    pub fn flushed(&self) {
        self.add(|line| &line.flushes, 1);
    }

    /// Counts a fence.
    pub fn fenced(&self) {
        self.add(|line| &line.fences, 1);
    }

    /// Counts a range written back and the fence after it.
    pub fn persisted(&self) {
        self.add(|line| &line.persists, 1);
    }

    /// Counts a wait for the file system.
    pub fn synced(&self) {
        self.add(|line| &line.syncs, 1);
    }

    /// The sums over all threads.
    pub fn sum(&self) -> Stats {
        let total = |field: fn(&Line) -> &AtomicU64| -> u64 {
            self.lines.iter().map(|line| field(line).load(Ordering::Relaxed)).sum()
        };
        let persists = total(|line| &line.persists);
        Stats {
            bytes_stored: total(|line| &line.bytes_stored),
            flushes: total(|line| &line.flushes) + persists,
            fences: total(|line| &line.fences) + persists,
            syncs: total(|line| &line.syncs),
        }
    }

    fn add(&self, field: impl Fn(&Line) -> &AtomicU64, amount: u64) {
        let place = place();
        let counter = field(&self.lines[place]);
        if place == SHARED {
            counter.fetch_add(amount, Ordering::Relaxed);
        } else {
            let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
            counter.store(sum, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use super::*;

    /// One of these tests takes every place there is.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn sums_are_exact_over_more_threads_than_places() {
        let _alone = ALONE.lock().unwrap();
        let counters = Counters::default();
        let barrier = Barrier::new(100);
        std::thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| {
                    barrier.wait();
                    for _ in 0..1000 {
                        counters.stored(3);
                        counters.flushed();
                        counters.fenced();
                        counters.persisted();
                    }
                    counters.synced();
                });
            }
        });
        let expected =
            Stats { bytes_stored: 300_000, flushes: 200_000, fences: 200_000, syncs: 100 };
        assert_eq!(counters.sum(), expected);
    }

    #[test]
    fn places_are_given_back() {
        let _alone = ALONE.lock().unwrap();
        for _ in 0..200 {
            let place = std::thread::spawn(place);
            assert!(place.join().unwrap() < SHARED);
        }
    }
}
