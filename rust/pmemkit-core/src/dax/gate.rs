//! A gate that many pass at once, at the price of two plain stores, and that a few shut now and
//! then. A lock for reading costs two locked instructions: a fifth of making one line durable.
//!
//! Invariants:
//! 1. Who passes raises the count of its place before it looks whether the gate is shut; who shuts
//!    it does so before it looks at the counts. A fence lies between on both sides
//!    ([`crate::membarrier`]), so one of the two sees the other.
//! 2. A count belongs to the one thread that has the place, which alone changes it. Threads without
//!    a place of their own, and those that find the gate shut, take `turn` instead.
//! 3. Who is inside by a place of its own passes again, shut or not. Others must not try.
//!
//! What this does not do: let anybody overtake who shuts it.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::membarrier::{self, fence_all, fence_own};
use crate::place::{place, SHARED};

/// Looks at a place in a row, before who shuts the gate sleeps between them.
const LOOKS: u32 = 100;
/// How long it sleeps then.
const NAP: Duration = Duration::from_micros(50);

/// How often the owner of a place is inside.
#[derive(Default)]
#[repr(align(64))]
struct Inside(AtomicU32);

/// A value that is used by many and changed by one.
pub(super) struct Gate<T> {
    shut: AtomicBool,
    asymmetric: bool,
    inside: Box<[Inside; SHARED]>,
    turn: RwLock<()>,
    value: UnsafeCell<T>,
}

// SAFETY: the value is shared between those who pass and moved to none of them, and changed only by
// who shut the gate and waited until nobody was inside (invariant 1).
unsafe impl<T: Send + Sync> Sync for Gate<T> {}

impl<T> Gate<T> {
    /// An open gate.
    pub fn new(value: T) -> Gate<T> {
        Gate {
            shut: AtomicBool::new(false),
            asymmetric: membarrier::possible(),
            inside: Box::new([const { Inside(AtomicU32::new(0)) }; SHARED]),
            turn: RwLock::new(()),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits until it is open and goes in.
    #[inline]
    pub fn pass(&self) -> Passed<'_, T> {
        if let Some(inside) = self.inside.get(place()) {
            let count = inside.0.load(Ordering::Relaxed);
            inside.0.store(count + 1, Ordering::Relaxed);
            fence_own(self.asymmetric);
            // Acquire: what was changed while it was shut comes before.
            if count > 0 || !self.shut.load(Ordering::Acquire) {
                return Passed { gate: self, by: By::Place(&inside.0), _here: PhantomData };
            }
            inside.0.store(count, Ordering::Release);
        }
        self.wait()
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) -> Passed<'_, T> {
        let turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        Passed { gate: self, by: By::Turn(turn), _here: PhantomData }
    }

    /// Shuts it, waits until everybody is out, and gives the value to change.
    ///
    /// [`Kind::NotSupported`] where the kernel refuses the fence that it granted when the gate was
    /// made: then nothing has happened. Who calls is not inside.
    pub fn shut(&self) -> Result<Shut<'_, T>> {
        let turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        // Made first: dropped, it opens the gate again.
        let shut = Shut { gate: self, _turn: turn };
        self.shut.store(true, Ordering::Relaxed);
        if !fence_all(self.asymmetric) {
            let text = "the kernel does not grant membarrier any more";
            return Err(Error::new(Kind::NotSupported, "map", text));
        }
        for inside in self.inside.iter() {
            let mut looks = 0;
            // Acquire: what was done inside comes before.
            while inside.0.load(Ordering::Acquire) != 0 {
                looks += 1;
                if looks < LOOKS {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(NAP);
                }
            }
        }
        Ok(shut)
    }
}

enum By<'a> {
    Place(&'a AtomicU32),
    Turn(#[allow(dead_code)] RwLockReadGuard<'a, ()>), // Its drop is what matters.
}

/// Somebody is inside as long as this value lives, on the thread that made it.
pub(super) struct Passed<'a, T> {
    gate: &'a Gate<T>,
    by: By<'a>,
    /// The place is that of this thread: it must not leave on another.
    _here: PhantomData<*const ()>,
}

impl<T> Deref for Passed<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: whoever changes the value waits until we are out.
        unsafe { &*self.gate.value.get() }
    }
}

impl<T> Drop for Passed<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if let By::Place(count) = self.by {
            count.store(count.load(Ordering::Relaxed) - 1, Ordering::Release);
        }
    }
}

/// Nobody else is inside as long as this value lives.
pub(super) struct Shut<'a, T> {
    gate: &'a Gate<T>,
    _turn: RwLockWriteGuard<'a, ()>,
}

impl<T> Deref for Shut<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: nobody else is inside.
        unsafe { &*self.gate.value.get() }
    }
}

impl<T> DerefMut for Shut<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: nobody else is inside.
        unsafe { &mut *self.gate.value.get() }
    }
}

impl<T> Drop for Shut<'_, T> {
    fn drop(&mut self) {
        self.gate.shut.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// Two words that are equal whenever nobody changes them.
    struct Pair(u64, u64);

    fn stress(gate: &Gate<Pair>, passing: usize) {
        let (stop, passed) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..passing {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let pair = gate.pass();
                        assert_eq!(pair.0, pair.1);
                        passed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mut pair = gate.shut().unwrap();
                        pair.0 += 1;
                        std::thread::yield_now();
                        pair.1 += 1;
                    }
                });
            }
            while gate.pass().0 < 1000 {
                std::thread::sleep(NAP);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(passed.load(Ordering::Relaxed) > 0);
        assert_eq!(gate.pass().1, 1000);
    }

    #[test]
    fn what_is_changed_is_changed_alone() {
        stress(&Gate::new(Pair(0, 0)), 4);
    }

    #[test]
    fn it_works_without_membarrier() {
        stress(&Gate { asymmetric: false, ..Gate::new(Pair(0, 0)) }, 4);
    }

    #[test]
    fn who_has_no_place_passes_too() {
        stress(&Gate::new(Pair(0, 0)), SHARED + 3);
    }

    #[test]
    fn who_is_inside_passes_again_while_somebody_waits() {
        let gate = Gate::new(0);
        let outer = gate.pass();
        std::thread::scope(|scope| {
            let shutting = scope.spawn(|| *gate.shut().unwrap() = 1);
            while !gate.shut.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            assert_eq!(*gate.pass(), 0);
            assert!(!shutting.is_finished());
            drop(outer);
            shutting.join().unwrap();
        });
        assert_eq!(*gate.pass(), 1);
    }
}
