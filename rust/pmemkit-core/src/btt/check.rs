//! Scans the map of an arena: each block must belong to exactly one sector or to one lane.
//!
//! Invariants:
//! 1. Memory is one bit a block, one chunk of the map, and at most [`FINDINGS_MAX`] findings.
//! 2. Nothing read from media is trusted: an entry past the last block is a finding.
//! 3. The scan goes in pieces that the caller chooses, so it can show progress and be stopped.
//!
//! What this does not do: write, or judge the log.

use super::{ERROR, MAP_MASK, NORMAL, ZERO};
use crate::error::{Error, Kind, Result};
use crate::media::Medium;

/// Findings that are kept; more are only counted.
pub const FINDINGS_MAX: usize = 64;

const CHUNK_ENTRIES: usize = 1 << 15;
const ENTRY_SIZE: u64 = 4;

/// What is wrong with a map entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Another sector before it has the same block.
    Duplicate,
    /// There is no such block.
    OutOfRange,
}

/// One wrong entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub wrong: Wrong,
    /// The sector, counted from the start of the arena.
    pub lba: u64,
    /// The block that its entry names.
    pub block: u32,
}

/// A scan under way.
pub struct MapScan {
    seen: Vec<u64>,
    blocks: u32,
    /// Entries that stand for those on media: writes that are in the log only. Sorted by sector.
    finished: Vec<(u64, u32)>,
    findings: Vec<Finding>,
    /// Wrong entries, kept or not: duplicates, out of range.
    pub wrong: [u64; 2],
    /// Entries by their two flag bits: initial, error, zero, normal.
    pub states: [u64; 4],
}

impl MapScan {
    /// A scan of an arena with so many blocks. `finished` are `(sector, block)` of writes that are
    /// in the log and not in the map.
    pub fn new(blocks: u32, mut finished: Vec<(u64, u32)>) -> Result<Self> {
        if blocks == 0 || blocks > MAP_MASK {
            let text = format!("{blocks} blocks are none, or more than {MAP_MASK}");
            return Err(Error::new(Kind::Invalid, "check", text));
        }
        finished.sort_unstable();
        let seen = vec![0; blocks as usize / 64 + 1];
        Ok(MapScan { seen, blocks, finished, findings: Vec::new(), wrong: [0; 2], states: [0; 4] })
    }

    /// Scans `count` entries that lie at `at` on the medium; the first is that of sector `first`.
    pub fn feed(&mut self, medium: &dyn Medium, at: u64, first: u64, count: u64) -> Result<()> {
        let mut chunk = vec![0u32; CHUNK_ENTRIES.min(count as usize)];
        let mut done = 0;
        while done < count {
            let entries = (count - done).min(CHUNK_ENTRIES as u64);
            let Some(from) = done.checked_mul(ENTRY_SIZE).and_then(|bytes| at.checked_add(bytes))
            else {
                let text = format!("{count} entries at byte {at} end behind 2^64");
                return Err(Error::new(Kind::OutOfRange, "check", text));
            };
            let target = &mut chunk[..entries as usize];
            // SAFETY: the target is ours and has room for these entries.
            unsafe { medium.load(from, target.as_mut_ptr().cast(), entries * ENTRY_SIZE)? };
            self.put_finished(target, first + done);
            self.scan(target, first + done);
            done += entries;
        }
        Ok(())
    }

    fn put_finished(&self, entries: &mut [u32], first: u64) {
        let from = self.finished.partition_point(|(lba, _)| *lba < first);
        for (lba, block) in &self.finished[from..] {
            match entries.get_mut((lba - first) as usize) {
                Some(entry) => *entry = (block | NORMAL).to_le(),
                None => break,
            }
        }
    }

    fn scan(&mut self, entries: &[u32], first: u64) {
        for (index, raw) in entries.iter().enumerate() {
            let entry = u32::from_le(*raw);
            let lba = first + index as u64;
            let state = entry & NORMAL;
            self.states[(state >> 30) as usize] += 1;
            // An entry that was never written names the block of its own number.
            let block = if state == 0 { u32::try_from(lba).unwrap_or(u32::MAX) } else { entry };
            let block = if state == 0 { block } else { block & MAP_MASK };
            if block >= self.blocks {
                self.add(Wrong::OutOfRange, lba, block);
            } else if !self.claim(block) {
                self.add(Wrong::Duplicate, lba, block);
            }
        }
    }

    #[cold]
    fn add(&mut self, wrong: Wrong, lba: u64, block: u32) {
        self.wrong[wrong as usize] += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { wrong, lba, block });
        }
    }

    /// Takes a block for its owner; false where it had one, or there is no such block.
    #[inline]
    pub fn claim(&mut self, block: u32) -> bool {
        if block >= self.blocks {
            return false;
        }
        let word = &mut self.seen[block as usize / 64];
        let bit = 1u64 << (block % 64);
        let was = *word & bit;
        *word |= bit;
        was == 0
    }

    /// The first wrong entries.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many blocks have no owner, and the first `limit` of them.
    pub fn unclaimed(&self, limit: usize) -> (u64, Vec<u32>) {
        let mut count = 0;
        let mut first = Vec::new();
        for (index, word) in self.seen.iter().enumerate() {
            let start = index as u64 * 64;
            let inside = u64::from(self.blocks).saturating_sub(start).min(64);
            let mask = if inside == 64 { u64::MAX } else { (1 << inside) - 1 };
            let mut open = !word & mask;
            count += u64::from(open.count_ones());
            while open != 0 && first.len() < limit {
                first.push((start as u32) + open.trailing_zeros());
                open &= open - 1;
            }
        }
        (count, first)
    }

    /// Entries in the states error and zero, which a healthy arena may have too.
    pub fn marked(&self) -> (u64, u64) {
        (self.states[(ERROR >> 30) as usize], self.states[(ZERO >> 30) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::recording::Recording;
    use crate::media::{Granularity, Store};

    fn scanned(entries: &[u32], blocks: u32, finished: Vec<(u64, u32)>) -> MapScan {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let recording = Recording::new(4096, Granularity::Byte, &[0; 4096]).unwrap();
        let medium: &dyn Medium = &recording;
        // SAFETY: the source is a live vector.
        unsafe { medium.store(8, bytes.as_ptr(), bytes.len() as u64, Store::Auto).unwrap() };
        let mut scan = MapScan::new(blocks, finished).unwrap();
        let half = entries.len() as u64 / 2;
        scan.feed(medium, 8, 0, half).unwrap();
        scan.feed(medium, 8 + half * 4, half, entries.len() as u64 - half).unwrap();
        scan
    }

    #[test]
    fn a_permutation_is_clean_and_leaves_the_spare_blocks() {
        let scan = scanned(&[NORMAL | 3, 0, NORMAL | 5, ZERO | 4], 7, vec![]);
        assert_eq!(scan.findings(), []);
        assert_eq!(scan.states, [1, 0, 1, 2]);
        assert_eq!(scan.unclaimed(9), (3, vec![0, 2, 6]));
        assert_eq!(scan.unclaimed(1), (3, vec![0]));
    }

    #[test]
    fn duplicates_and_strangers_are_found() {
        let mut scan = scanned(&[NORMAL | 1, 0, NORMAL | 9, ERROR | 2], 4, vec![]);
        let (wrong, lba) = (Wrong::Duplicate, 1);
        assert_eq!(scan.findings()[0], Finding { wrong, lba, block: 1 });
        assert_eq!(scan.findings()[1].wrong, Wrong::OutOfRange);
        assert_eq!(scan.wrong, [1, 1]);
        assert!(scan.claim(3) && !scan.claim(3) && !scan.claim(4));
    }

    #[test]
    fn writes_in_the_log_stand_for_the_entries_on_media() {
        let scan = scanned(&[NORMAL | 1, NORMAL | 1, NORMAL | 2], 5, vec![(1, 4)]);
        assert_eq!(scan.findings(), []);
        assert_eq!(scan.unclaimed(9), (2, vec![0, 3]));
    }

    #[test]
    fn a_chunk_boundary_is_no_boundary() {
        let count = CHUNK_ENTRIES + 3;
        let recording = Recording::new(1 << 20, Granularity::Byte, &vec![0; 1 << 20]).unwrap();
        let medium: &dyn Medium = &recording;
        let mut scan = MapScan::new(count as u32 + 1, vec![(CHUNK_ENTRIES as u64, 7)]).unwrap();
        scan.feed(medium, 0, 0, count as u64).unwrap();
        assert_eq!(scan.wrong, [1, 0]);
        assert_eq!(scan.unclaimed(2), (2, vec![CHUNK_ENTRIES as u32, count as u32]));
    }

    #[test]
    fn no_blocks_and_too_many_are_refused() {
        assert!(MapScan::new(0, vec![]).is_err());
        assert!(MapScan::new(MAP_MASK + 1, vec![]).is_err());
    }
}
