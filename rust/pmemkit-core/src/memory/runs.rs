//! Which frames of a region are free, asked of the frame allocator in the pool's terms.
//!
//! Invariants:
//! 1. What was taken is an allocation of the allocator, run by run; parts of one may be returned.
//! 2. Nothing is taken from a withdrawn range, and what is returned there stays out until
//!    [`Runs::restore`].
//! 3. A page map in the region is not touched once its file ends before it: nothing is taken then,
//!    and nothing returned. Who cuts the file between the look and the touch gets SIGBUS.
//!
//! What this does not do: scale over threads (the pool's lock is held), know addresses.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::region::MapPlace;
use crate::error::Result;
use crate::frames::{Allocator, Live, Options, ORDER_MAX};
use crate::media;

// Threads keep nothing back: who moves a block must know that it is empty.
const OPTIONS: Options = Options { magazines: false, online: true };

/// The free runs of one region.
pub struct Runs {
    allocator: Allocator,
    /// The file of a page map in the region, and where the map ends in it.
    file: Option<(Arc<OwnedFd>, u64)>,
}

impl Runs {
    /// All of `frames` frames, free.
    pub fn new(frames: u64) -> Result<Runs> {
        Ok(Runs { allocator: Allocator::new(frames, OPTIONS)?, file: None })
    }

    /// The same with the page map in the region, made anew.
    pub fn over(frames: u64, map: &MapPlace, file: Arc<OwnedFd>) -> Result<Runs> {
        let allocator = Allocator::over(map.place.clone(), frames, OPTIONS)?;
        Ok(Runs { allocator, file: Some((file, map.end)) })
    }

    /// True where the file was cut before the end of its page map.
    fn is_gone(&self) -> bool {
        let Some((file, end)) = &self.file else { return false };
        media::sys::inspect(file.as_fd()).is_ok_and(|info| info.size < *end)
    }

    /// Bytes of the page map.
    pub fn map_bytes(&self) -> u64 {
        self.allocator.frames() * self.allocator.frame_bytes()
    }

    /// Stores to a page map in the region so far.
    pub fn map_stores(&self) -> u64 {
        self.allocator.map_stores()
    }

    /// Frames that may be handed out.
    pub fn free_frames(&self) -> u64 {
        self.allocator.free_frames()
    }

    /// A free run whose start is a multiple of `align`.
    pub fn take(&mut self, count: u64, align: u64) -> Option<u64> {
        if count == 0 || self.is_gone() {
            return None;
        }
        let order = count.trailing_zeros();
        let got = if count.is_power_of_two() && order <= ORDER_MAX {
            self.allocator.get(order)
        } else {
            self.allocator.get_run(count)
        };
        let first = got.ok()?;
        if first % align == 0 {
            return Some(first);
        }
        self.give(first, count);
        None
    }

    /// Takes exactly this run, where all of it is free.
    pub fn claim(&mut self, first: u64, count: u64) -> bool {
        !self.is_gone() && self.allocator.claim(first, count).is_ok()
    }

    /// Returns frames that were taken: a run, a part of one, or several that are neighbours.
    pub fn give(&mut self, first: u64, count: u64) {
        if self.is_gone() {
            return;
        }
        let end = first + count;
        let found = self.allocator.allocated(first, count).unwrap_or_default();
        debug_assert!(!found.is_empty(), "{count} frames at {first} were not taken");
        for Live { first: run, frames } in found {
            let given = self.allocator.put_run(run, frames);
            debug_assert!(given.is_ok(), "{given:?}");
            for (at, until) in [(run, first), (end, run + frames)] {
                if at < until {
                    self.claim(at, until - at);
                }
            }
        }
    }

    /// Keeps a range from being handed out. What is in use in it stays so until it is returned.
    pub fn withdraw(&mut self, first: u64, count: u64) {
        let done = self.allocator.offline(first, count);
        debug_assert!(done.is_ok(), "{done:?}");
    }

    /// Undoes [`Runs::withdraw`] of the same range.
    pub fn restore(&mut self, first: u64, count: u64) {
        let done = self.allocator.online(first, count);
        debug_assert!(done.is_ok(), "{done:?}");
    }

    /// Frames of a range that are in use.
    pub fn used(&self, first: u64, count: u64) -> u64 {
        if self.is_gone() {
            return 0;
        }
        let found = self.allocator.allocated(first, count).unwrap_or_default();
        let inside =
            |live: &Live| (live.first + live.frames).min(first + count) - live.first.max(first);
        found.iter().map(inside).sum()
    }

    /// What is wrong.
    pub fn validate(&self) -> Vec<String> {
        if self.is_gone() {
            return vec!["its page map vanished with the end of its file".to_owned()];
        }
        self.allocator.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_run_come_back_and_join() {
        let mut runs = Runs::new(1024).unwrap();
        let first = runs.take(600, 1).unwrap();
        runs.give(first + 100, 50);
        assert_eq!((runs.used(first, 600), runs.free_frames()), (550, 474));
        runs.give(first + 590, 10);
        runs.give(first, 100);
        runs.give(first + 150, 440);
        assert_eq!(runs.take(1024, 512), Some(0));
        assert_eq!(runs.validate(), Vec::<String>::new());
    }

    #[test]
    fn what_is_withdrawn_comes_back_without_what_is_in_use() {
        let mut runs = Runs::new(1024).unwrap();
        assert!(runs.claim(10, 10));
        runs.withdraw(0, 512);
        assert_eq!((runs.free_frames(), runs.used(0, 512)), (512, 10));
        runs.give(12, 2);
        assert_eq!(runs.free_frames(), 512);
        runs.restore(0, 512);
        assert_eq!((runs.free_frames(), runs.used(0, 1024)), (1016, 8));
    }
}
