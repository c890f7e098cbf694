//! A set of byte ranges that knows when to forget details.
//!
//! Invariants:
//! 1. Ranges in the set are disjoint, do not touch each other, and start and end at multiples of
//!    the grain.
//! 2. What was inserted and not removed since is in the set; there may be more in it.
//! 3. There are at most [`RANGES_MOST`] ranges: where there would be more the grain grows, so that
//!    neighbours become one.
//!
//! What this does not do: know how long what it is about is.

use std::collections::BTreeMap;

/// Ranges in a set at most: some hundred kilobytes.
pub const RANGES_MOST: usize = 1 << 14;
/// Bytes of the finest grain: a cache line.
const GRAIN_FIRST: u64 = 64;

/// Byte ranges.
#[derive(Debug)]
pub struct Ranges {
    /// Start and end of each.
    runs: BTreeMap<u64, u64>,
    grain: u64,
}

impl Default for Ranges {
    fn default() -> Self {
        Ranges { runs: BTreeMap::new(), grain: GRAIN_FIRST }
    }
}

impl Ranges {
    /// Puts a range in, and what else is in its first and last grain.
    pub fn insert(&mut self, at: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = at.saturating_add(len);
        self.join(at - at % self.grain, end.checked_next_multiple_of(self.grain).unwrap_or(end));
        while self.runs.len() > RANGES_MOST {
            self.coarsen();
        }
    }

    /// Puts a range in and joins it with those it touches.
    fn join(&mut self, mut start: u64, mut end: u64) {
        while let Some((&first, &last)) = self.runs.range(..=end).next_back() {
            if last < start {
                break;
            }
            self.runs.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        self.runs.insert(start, end);
    }

    fn coarsen(&mut self) {
        self.grain *= 8;
        for (start, end) in std::mem::take(&mut self.runs) {
            let last = end.checked_next_multiple_of(self.grain).unwrap_or(end);
            self.join(start - start % self.grain, last);
        }
    }

    /// Takes whole grains out that lie in a range.
    pub fn remove(&mut self, at: u64, len: u64) {
        let from = at.checked_next_multiple_of(self.grain).unwrap_or(u64::MAX);
        let to = at.saturating_add(len);
        let to = to - to % self.grain;
        if from >= to {
            return;
        }
        while let Some((&first, &last)) = self.runs.range(..to).next_back() {
            if last <= from {
                return;
            }
            self.runs.remove(&first);
            if last > to {
                self.runs.insert(to, last);
            }
            if first < from {
                self.runs.insert(first, from);
                return;
            }
        }
    }

    /// Takes everything out.
    pub fn take(&mut self) -> Ranges {
        std::mem::take(self)
    }

    /// The ranges in order, as start and length.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(&start, &end)| (start, end - start))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.runs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(ranges: &Ranges) -> Vec<(u64, u64)> {
        ranges.iter().collect()
    }

    #[test]
    fn what_touches_becomes_one() {
        let mut ranges = Ranges::default();
        ranges.insert(100, 1);
        ranges.insert(0, 0);
        ranges.insert(256, 10);
        assert_eq!(all(&ranges), [(64, 64), (256, 64)]);
        ranges.insert(127, 130);
        assert_eq!(all(&ranges), [(64, 256)]);
        ranges.insert(1000, 64);
        ranges.insert(u64::MAX - 1, 1);
        assert_eq!(ranges.len(), 3);
        assert_eq!((ranges.take().len(), ranges.len()), (3, 0));
    }

    #[test]
    fn whole_grains_are_taken_out() {
        let mut ranges = Ranges::default();
        ranges.insert(0, 640);
        ranges.remove(70, 200);
        assert_eq!(all(&ranges), [(0, 128), (256, 384)]);
        ranges.remove(65, 10);
        ranges.remove(0, 63);
        assert_eq!(all(&ranges), [(0, 128), (256, 384)]);
        ranges.remove(0, 320);
        assert_eq!(all(&ranges), [(320, 320)]);
        ranges.remove(0, u64::MAX);
        assert_eq!(ranges.len(), 0);
        ranges.remove(0, u64::MAX);
    }

    #[test]
    fn many_ranges_become_coarser_ones_that_cover_them() {
        let mut ranges = Ranges::default();
        let at = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        for index in 0..100_000 {
            ranges.insert(at(index), 8);
        }
        assert!(ranges.len() <= RANGES_MOST);
        let found = all(&ranges);
        for index in 0..100_000 {
            let place = at(index);
            let before = found.partition_point(|(start, _)| *start <= place);
            let (start, len) = found[before - 1];
            assert!(start <= place && place + 8 <= start + len);
        }
    }
}
