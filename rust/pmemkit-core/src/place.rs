//! A small number for each thread: the index of something that only it stores to.
//!
//! Invariants:
//! 1. A place below [`SHARED`] belongs to at most one living thread. Threads that found none free
//!    have [`SHARED`] all together.
//! 2. Whoever gets a place sees what its last owner stored.
//!
//! What this does not do: tell threads apart for longer than they live.

use std::sync::atomic::{AtomicU64, Ordering};

/// The place of all threads that found no free one.
pub const SHARED: usize = 63;

/// Bit n is set while place n belongs to a thread.
static TAKEN: AtomicU64 = AtomicU64::new(1 << SHARED);

/// The place of one thread, given back when the thread ends.
struct Place(usize);

impl Place {
    fn take() -> Place {
        let mut taken = TAKEN.load(Ordering::Relaxed);
        loop {
            let free = taken.trailing_ones() as usize;
            if free >= SHARED {
                return Place(SHARED);
            }
            let with = taken | 1 << free;
            // Acquire: the last owner's stores come before ours.
            let swap = TAKEN.compare_exchange(taken, with, Ordering::Acquire, Ordering::Relaxed);
            match swap {
                Ok(_) => return Place(free),
                Err(now) => taken = now,
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0 != SHARED {
            TAKEN.fetch_and(!(1 << self.0), Ordering::Release);
        }
    }
}

thread_local! {
    static PLACE: Place = Place::take();
}

/// The place of the calling thread.
#[inline]
pub fn place() -> usize {
    // A thread that is ending has given its place back already.
    PLACE.try_with(|place| place.0).unwrap_or(SHARED)
}

/// The places that threads have, as a mask; that of [`SHARED`] is always in it.
pub fn taken() -> u64 {
    TAKEN.load(Ordering::Acquire)
}
