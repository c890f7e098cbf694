//! A lock whose release is one plain store.
//!
//! A mutex of the standard library is released by an atomic exchange, which on x86-64 waits for
//! every write-back under way, like a fence: with it a write of a sector would pay for an ordering
//! that it does not need. Sections under this lock are short and never wait for anything but media.
//!
//! Invariants:
//! 1. A guard exists only while `taken` is true and was set by its maker: the value has one user.
//! 2. Release is a store with release order, acquisition a compare-exchange with acquire order.
//!
//! What this does not do: fairness, sleeping (whoever waits yields), poisoning: values protected by
//! it change in single assignments.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

use super::sync::{spin_loop, yield_now, AtomicBool, Ordering};

/// Tries before the CPU is given away.
const SPINS: u32 = 64;

/// A value for one thread at a time.
#[derive(Debug, Default)]
pub struct Lock<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value moves between threads with the lock, one user at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

/// The right to use the value until dropped.
pub struct Guard<'a, T> {
    lock: &'a Lock<T>,
}

impl<T> Lock<T> {
    /// A lock around a value.
    pub fn new(value: T) -> Self {
        Lock { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// The value, if nobody has it.
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        let free = self.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        // Made only when it is ours: dropping a guard releases.
        free.is_ok().then(|| Guard { lock: self })
    }

    /// The value, as soon as nobody else has it.
    pub fn lock(&self) -> Guard<'_, T> {
        let mut tries = 0u32;
        loop {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            while self.taken.load(Ordering::Relaxed) {
                tries = tries.wrapping_add(1);
                if tries.is_multiple_of(SPINS) {
                    yield_now();
                } else {
                    spin_loop();
                }
            }
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: invariant 1.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: invariant 1.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.taken.store(false, Ordering::Release);
    }
}
