//! The thread that writes back what is much or old, and gives memory back when there is little.
//!
//! Invariants:
//! 1. It holds nothing while it sleeps, and ends within one write-back of being asked.
//! 2. What it cannot write it leaves to the next flush to tell.
//!
//! What this does not do: look at the limits of control groups; a failure of the kernel to give
//! memory is met where memory is asked for.

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::engine::Engine;
use super::shard::Cell;
use super::BLOCK;
use crate::error::{Error, Kind, Result};

/// The longest sleep between two looks at age and memory.
const NAP: Duration = Duration::from_millis(1000);
/// Blocks that are written before the next look.
const ROUND: usize = 256;
/// Share of the machine's memory that has to be available, in percent.
const AVAILABLE_LEAST: u64 = 5;
/// Percent of the last ten seconds in which somebody waited for memory.
const STALLED_MOST: f64 = 10.0;
/// Shrinks to so many sixteenths in one look; grows back by one.
const SHRINK_TO: u64 = 12;

/// How short of memory the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressure {
    /// Not at all.
    None,
    /// Somebody needs what we have.
    High,
}

impl Pressure {
    /// Reads what the kernel says; nothing readable is no pressure.
    pub fn now() -> Self {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let stalls = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
        Self::judge(&info, &stalls)
    }

    /// Judges the texts of `/proc/meminfo` and `/proc/pressure/memory`.
    pub fn judge(info: &str, stalls: &str) -> Self {
        let kib = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
        };
        let short = match (kib("MemTotal:"), kib("MemAvailable:")) {
            (Some(total), Some(available)) => available * 100 < total * AVAILABLE_LEAST,
            _ => false,
        };
        let average = stalls.lines().find_map(|line| {
            let rest = line.strip_prefix("some avg10=")?;
            rest.split_ascii_whitespace().next()?.parse::<f64>().ok()
        });
        if short || average.is_some_and(|percent| percent > STALLED_MOST) {
            Pressure::High
        } else {
            Pressure::None
        }
    }
}

impl Engine {
    /// Calls the flusher before its nap is over.
    pub(super) fn call_flusher(&self) {
        // A wake-up costs a system call, so one is enough.
        if !self.called.load(Ordering::Relaxed) && !self.called.swap(true, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Writes back what is too much and too old.
    pub(super) fn flush_some(&self) {
        let share = u64::from(self.options.dirty_background);
        let most = self.budget.most / BLOCK as u64 * share / 100;
        while self.dirty.load(Ordering::Relaxed) > most && !self.stopping() {
            if !self.clean_some(&self.some_dirty(ROUND, None)) {
                return;
            }
        }
        let Some(age) = self.options.flush_age else { return };
        let tenths = u32::try_from(age.as_millis() / 100).unwrap_or(u32::MAX);
        let Some(until) = self.now().checked_sub(tenths) else { return };
        while !self.stopping() {
            let old = self.some_dirty(ROUND, Some(until));
            if old.is_empty() || !self.clean_some(&old) {
                return;
            }
        }
    }

    /// False when it is of no use to go on.
    fn clean_some(&self, blocks: &[u64]) -> bool {
        let before = self.moved.blocks_written.load(Ordering::Relaxed);
        self.clean(blocks, false, None).is_ok()
            && self.moved.blocks_written.load(Ordering::Relaxed) > before
    }

    /// Gives memory back under pressure, takes it again when that is over.
    pub(super) fn fit(&self, pressure: Pressure) {
        let budget = &self.budget;
        let allowed = budget.allowed.load(Ordering::Relaxed);
        let next = match pressure {
            Pressure::High => budget.used.load(Ordering::Relaxed).min(allowed) / 16 * SHRINK_TO,
            Pressure::None => (allowed + budget.most.div_ceil(16)).min(budget.most),
        };
        budget.allowed.store(next, Ordering::Relaxed);
        while budget.used.load(Ordering::Relaxed) > next {
            // The largest one first, so that none is left without while others have much.
            let largest = self.cells.iter().max_by_key(|cell| cell.lock().store.slots());
            if !largest.is_some_and(|cell| self.shrink(cell)) {
                return;
            }
        }
    }

    /// Gives one chunk of a shard back; what is dirty in it goes to media first.
    fn shrink(&self, cell: &Cell) -> bool {
        let mut shard = cell.lock();
        if shard.store.slots() == 0 {
            return false;
        }
        if shard.shrink(&self.budget) {
            return true;
        }
        let last = shard.directory.last_blocks(shard.store.last());
        drop(shard);
        let mut blocks: Vec<u64> = last.into_iter().map(|(block, _)| block).collect();
        blocks.sort_unstable();
        self.clean(&blocks, false, None).is_ok() && cell.lock().shrink(&self.budget)
    }

    fn stopping(&self) -> bool {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let age = self.options.flush_age.map_or(NAP, |age| age / 4);
        let nap = age.clamp(Duration::from_millis(10), NAP);
        loop {
            let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
            if *stop {
                return;
            }
            let woken = self.wake.wait_timeout(stop, nap);
            if *woken.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
            self.called.store(false, Ordering::Relaxed);
            self.flush_some();
            if self.options.heed_pressure {
                self.fit(Pressure::now());
            }
        }
    }
}

/// The flusher of a cache; it ends when this is dropped.
pub struct Flusher {
    engine: Arc<Engine>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts the thread.
    pub fn start(engine: Arc<Engine>) -> Result<Flusher> {
        let ours = engine.clone();
        let named = std::thread::Builder::new().name("pmem-flusher".into());
        let thread = named.spawn(move || ours.run()).map_err(|cause| {
            let errno = cause.raw_os_error().unwrap_or(0);
            let mut error = Error::new(Kind::System, "cache", format!("no thread: {cause}"));
            error.source_errno = (errno != 0).then_some(errno);
            error
        })?;
        Ok(Flusher { engine, thread: Some(thread) })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        *self.engine.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.engine.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, what it left dirty is flushed by the cache's drop.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_little_memory_or_long_stalls() {
        let plenty = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable:  500 kB\n";
        let little = "MemTotal: 1000 kB\nMemAvailable:  49 kB\n";
        let calm = "some avg10=0.50 avg60=99.00 avg300=0.00 total=1\nfull avg10=99.00\n";
        let stalled = "some avg10=10.01 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(Pressure::judge(plenty, calm), Pressure::None);
        assert_eq!(Pressure::judge(little, calm), Pressure::High);
        assert_eq!(Pressure::judge(plenty, stalled), Pressure::High);
        assert_eq!(Pressure::judge("", ""), Pressure::None);
        assert_eq!(Pressure::judge("MemTotal: x kB", "some avg10=?"), Pressure::None);
    }
}
