//! The parts of loom, and few enough of each for it to try everything.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

pub use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
pub use loom::thread::yield_now;
pub use loom::thread::yield_now as spin_loop;

use crate::error::Result;
use crate::frames::plant::Plant;

pub const WORDS: usize = 2;
pub const KEPT: usize = 2;
pub const PATIENCE: u32 = 1000;

static PLANT: Mutex<Plant> = Mutex::new(Plant::None);

/// Plants a mistake until the next call. Tests take turns.
pub fn plant(which: Plant) {
    *PLANT.lock().unwrap_or_else(PoisonError::into_inner) = which;
}

pub fn planted(which: Plant) -> bool {
    *PLANT.lock().unwrap_or_else(PoisonError::into_inner) == which
}

pub fn fence_own(_: bool) {
    loom::sync::atomic::fence(Ordering::SeqCst);
}

pub fn fence_all(_: bool) -> bool {
    loom::sync::atomic::fence(Ordering::SeqCst);
    true
}

/// An array, all zero.
pub struct Table<T>(Vec<T>);

impl<T: Default> Table<T> {
    pub fn new(len: usize) -> Result<Table<T>> {
        Ok(Table((0..len).map(|_| T::default()).collect()))
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}
