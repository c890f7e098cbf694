//! Which frames of a region are free: runs in a tree, with parts withdrawn from use.
//!
//! Invariants:
//! 1. `free` runs are disjoint, never adjacent, and never in a withdrawn range.
//! 2. `used` holds what was handed out, run by run, and is disjoint from `free`.
//! 3. Whatever is returned in a withdrawn range stays out until [`Runs::restore`].
//!
//! What this does not do: scale over threads (the pool's lock is held), know addresses.

use std::collections::BTreeMap;

/// The free runs of one region.
#[derive(Debug, Default)]
pub struct Runs {
    free: BTreeMap<u64, u64>,
    used: BTreeMap<u64, u64>,
    withdrawn: BTreeMap<u64, u64>,
    free_frames: u64,
}

/// The parts of `[first, first + count)` that no run of `map` covers.
fn gaps(map: &BTreeMap<u64, u64>, first: u64, count: u64) -> Vec<(u64, u64)> {
    let end = first + count;
    let mut at = first;
    let mut found = Vec::new();
    let start = map.range(..=first).next_back().map_or(first, |(&run, _)| run);
    for (&run, &len) in map.range(start..end) {
        if run + len <= at {
            continue;
        }
        if run > at {
            found.push((at, run - at));
        }
        at = run + len;
    }
    if at < end {
        found.push((at, end - at));
    }
    found
}

impl Runs {
    /// All of `frames` frames, free.
    pub fn new(frames: u64) -> Runs {
        let mut runs = Runs::default();
        runs.add_free(0, frames);
        runs
    }

    /// Frames that may be handed out.
    pub fn free_frames(&self) -> u64 {
        self.free_frames
    }

    /// A free run whose start is a multiple of `align`: the smallest that fits.
    pub fn take(&mut self, count: u64, align: u64) -> Option<u64> {
        let fits = |&(&run, &len): &(&u64, &u64)| {
            let start = run.next_multiple_of(align);
            start + count <= run + len
        };
        let (&run, _) = self.free.iter().filter(fits).min_by_key(|&(_, &len)| len)?;
        let first = run.next_multiple_of(align);
        self.claim(first, count).then_some(first)
    }

    /// Takes exactly this run, where all of it is free.
    pub fn claim(&mut self, first: u64, count: u64) -> bool {
        let Some((&run, &len)) = self.free.range(..=first).next_back() else { return false };
        if run + len < first + count {
            return false;
        }
        self.drop_free(first, count);
        self.used.insert(first, count);
        true
    }

    /// Returns a run, or a part of one, that was taken.
    pub fn give(&mut self, first: u64, count: u64) {
        let (run, len) = match self.used.range(..=first).next_back() {
            Some((&run, &len)) if run + len >= first + count => (run, len),
            _ => return debug_assert!(false, "{count} frames at {first} were not taken"),
        };
        self.used.remove(&run);
        if run < first {
            self.used.insert(run, first - run);
        }
        if run + len > first + count {
            self.used.insert(first + count, run + len - first - count);
        }
        for (at, len) in gaps(&self.withdrawn, first, count) {
            self.add_free(at, len);
        }
    }

    /// Keeps a range from being handed out. What is in use in it stays so until it is returned.
    pub fn withdraw(&mut self, first: u64, count: u64) {
        for (at, len) in gaps(&self.used, first, count) {
            for (at, len) in gaps(&self.withdrawn, at, len) {
                self.drop_free(at, len);
            }
        }
        for (at, len) in gaps(&self.withdrawn, first, count) {
            self.withdrawn.insert(at, len);
        }
    }

    /// Undoes [`Runs::withdraw`] of the same range.
    pub fn restore(&mut self, first: u64, count: u64) {
        let inside: Vec<_> =
            self.withdrawn.range(first..first + count).map(|(&at, &len)| (at, len)).collect();
        for (at, _) in inside {
            self.withdrawn.remove(&at);
        }
        for (at, len) in gaps(&self.used, first, count) {
            self.add_free(at, len);
        }
    }

    /// Frames of a range that are in use.
    pub fn used(&self, first: u64, count: u64) -> u64 {
        count - gaps(&self.used, first, count).iter().map(|(_, len)| len).sum::<u64>()
    }

    fn add_free(&mut self, mut first: u64, mut count: u64) {
        if count == 0 {
            return;
        }
        self.free_frames += count;
        if let Some(len) = self.free.remove(&(first + count)) {
            count += len;
        }
        if let Some((&run, &len)) = self.free.range(..first).next_back() {
            if run + len == first {
                self.free.remove(&run);
                (first, count) = (run, len + count);
            }
        }
        self.free.insert(first, count);
    }

    fn drop_free(&mut self, first: u64, count: u64) {
        let Some((&run, &len)) = self.free.range(..=first).next_back() else { return };
        self.free.remove(&run);
        if run < first {
            self.free.insert(run, first - run);
        }
        if run + len > first + count {
            self.free.insert(first + count, run + len - first - count);
        }
        self.free_frames -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_returned_joins_its_neighbours() {
        let mut runs = Runs::new(64);
        let first = runs.take(16, 16).unwrap();
        let second = runs.take(8, 8).unwrap();
        assert_eq!(runs.free_frames(), 40);
        runs.give(first, 16);
        runs.give(second, 8);
        assert_eq!(runs.take(64, 64), Some(0));
    }

    #[test]
    fn what_is_withdrawn_comes_back_without_what_is_in_use() {
        let mut runs = Runs::new(64);
        assert!(runs.claim(10, 10));
        runs.withdraw(0, 32);
        assert_eq!((runs.free_frames(), runs.used(0, 32)), (32, 10));
        runs.give(12, 2);
        assert_eq!(runs.free_frames(), 32);
        runs.restore(0, 32);
        assert_eq!((runs.free_frames(), runs.used(0, 64)), (56, 8));
        runs.give(10, 2);
        runs.give(14, 6);
        assert_eq!(runs.take(64, 1), Some(0));
    }
}
