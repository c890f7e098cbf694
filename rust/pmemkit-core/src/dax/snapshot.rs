//! A copy of a mapping as it was at one moment, made while others write.
//!
//! The moment is when every unit (a page) is either write-protected or guarded by the gate that
//! our own stores pass. From then on whoever wants to change a unit has it copied first, and a
//! copier takes the rest in its own time.
//!
//! Invariants:
//! 1. A unit is copied once, and while it is as it was at that moment: its bit is set under the
//!    lock that the copy is made under, and nobody stores to it before the bit is set.
//! 2. The target held zeroes at first, so units of zeroes need not be stored.
//! 3. What goes wrong is kept for the copier: no writer is held up for it.
//!
//! Lock order: the handler's state, then this state.
//!
//! What this does not do: find out about stores, make the moment (the mapping does).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plant::Plant;
use crate::error::{Error, Kind, Result};
use crate::media::{Medium, Store};

/// Bytes that the copier takes at once at most: writers wait that long.
const CHUNK_BYTES: u64 = 64 << 10;

/// What the copy is made of.
pub(super) struct Source {
    pub medium: Arc<dyn Medium>,
    pub offset: u64,
    pub len: u64,
    pub unit: u64,
}

struct State {
    /// A bit a unit.
    copied: Vec<u64>,
    /// The first unit that the copier has not looked at.
    next: u64,
    failure: Option<Error>,
    buffer: Vec<u8>,
}

/// A copy in the making.
pub(super) struct Snapshot {
    source: Source,
    target: Arc<dyn Medium>,
    units: u64,
    state: Mutex<State>,
    plant: Plant,
}

impl Snapshot {
    /// A copy of nothing so far. The target must be as long as the source and hold zeroes.
    pub fn new(source: Source, target: Arc<dyn Medium>, plant: Plant) -> Result<Snapshot> {
        if target.len() < source.len {
            let text = format!("{} bytes do not fit into {}", source.len, target.len());
            return Err(Error::new(Kind::Invalid, "snapshot", text));
        }
        let units = source.len.div_ceil(source.unit);
        let state = State {
            copied: vec![0; units.div_ceil(64) as usize],
            next: 0,
            failure: None,
            buffer: Vec::new(),
        };
        Ok(Snapshot { source, target, units, state: Mutex::new(state), plant })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Saves the units of a range that is about to change.
    pub fn preserve(&self, at: u64, len: u64) {
        if len == 0 || self.plant.is(Plant::StoreForgetsSnapshot) {
            return;
        }
        let mut state = self.state();
        let (first, last) = (at / self.source.unit, (at + len - 1) / self.source.unit);
        for unit in first..=last.min(self.units - 1) {
            if !is_set(&state.copied, unit) {
                self.copy(&mut state, unit, 1);
            }
        }
    }

    /// Runs of the source that are holes now, when nobody can have stored to them before the
    /// moment, need no copy. Asked once the moment is fixed.
    pub fn skip_holes(&self) -> Result<()> {
        let runs = self.source.medium.extents(self.source.offset, self.source.len)?;
        let mut state = self.state();
        let mut at = 0;
        for run in runs {
            let (first, end) = (at, at + run.len);
            at = end;
            if run.hole {
                let behind =
                    if end == self.source.len { self.units } else { end / self.source.unit };
                (first.div_ceil(self.source.unit)..behind)
                    .for_each(|unit| set(&mut state.copied, unit));
            }
        }
        Ok(())
    }

    /// Copies some of what is left; false when there is nothing more.
    pub fn copy_some(&self) -> Result<bool> {
        let mut state = self.state();
        let end = self.units - u64::from(self.plant.is(Plant::SnapshotForgetsUnit));
        while state.next < end && is_set(&state.copied, state.next) {
            // Whole words of bits at once, where they are all set.
            let whole = state.next.is_multiple_of(64)
                && state.copied[(state.next / 64) as usize] == u64::MAX;
            state.next += if whole { 64 } else { 1 };
        }
        let first = state.next;
        let most = first + (CHUNK_BYTES / self.source.unit).max(1);
        let mut last = first;
        while last < end.min(most) && !is_set(&state.copied, last) {
            last += 1;
        }
        if last > first {
            self.copy(&mut state, first, last - first);
            state.next = last;
        }
        match state.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(state.next < end),
        }
    }

    /// Makes the copy durable, once everything is in it.
    pub fn finish(&self) -> Result<()> {
        if let Some(failure) = self.state().failure.take() {
            return Err(failure);
        }
        if self.plant.is(Plant::SnapshotForgetsSync) {
            return Ok(());
        }
        self.target.fence();
        self.target.sync()
    }

    /// Copies units and sets their bits, whatever comes of it.
    fn copy(&self, state: &mut State, first: u64, count: u64) {
        let Source { medium, offset, len, unit } = &self.source;
        let at = first * unit;
        let bytes = (count * unit).min(len - at);
        state.buffer.resize(bytes as usize, 0);
        let buffer = state.buffer.as_mut_ptr();
        // SAFETY: the buffer has `bytes` bytes and is nobody else's.
        let mut done = unsafe { medium.load(offset + at, buffer, bytes) };
        if done.is_ok() && state.buffer.iter().any(|&byte| byte != 0) {
            // SAFETY: as above.
            done = unsafe { self.target.store(at, buffer, bytes, Store::Auto) };
            // The copier's own fence does not wait for what another thread stored.
            self.target.fence();
        }
        (first..first + count).for_each(|unit| set(&mut state.copied, unit));
        if let Err(error) = done {
            state.failure.get_or_insert(error);
        }
    }
}

fn is_set(bits: &[u64], index: u64) -> bool {
    bits[(index / 64) as usize] >> (index % 64) & 1 == 1
}

fn set(bits: &mut [u64], index: u64) {
    bits[(index / 64) as usize] |= 1 << (index % 64);
}
