//! Bad media over another medium: sectors that cannot be read until they are written.
//!
//! The list is kept as Linux keeps it, in sectors of 512 bytes: a read that touches one fails
//! before a byte moves, a write that covers one clears it.
//!
//! Invariants:
//! 1. A sector that was cleared holds what was written: bytes first, then the record, then the
//!    list. Whoever is killed in between leaves a sector that is bad, and a write that nobody was
//!    told of.
//! 2. A store that covers only a part of a bad sector is refused before a byte moves: the rest of
//!    the sector could not be read afterwards.
//! 3. Bytes are neither sent from nor received into the mapping: that would not ask the list.
//! 4. Once the list is empty a call costs one load more than without it.
//!
//! What this does not do: make sectors bad, or read its record; whoever opens the medium does.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::{Extent, Granularity, Medium, Stats, Store};
use crate::error::{Error, Kind, Result};
use crate::sg::{RegionId, Segment};

/// Bytes of a sector of the list.
pub const BAD_SECTOR_SIZE: u64 = 512;

/// A run of bad sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRun {
    /// The first sector.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

impl BadRun {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// True where the bytes touch a sector of the run.
    fn touches(&self, at: u64, len: u64) -> bool {
        let (first, end) = (at / BAD_SECTOR_SIZE, at.saturating_add(len).div_ceil(BAD_SECTOR_SIZE));
        len > 0 && self.offset < end && first < self.end()
    }
}

/// Where clearing is written down, before it counts: a line of JSON each time.
#[derive(Debug)]
pub struct Record {
    /// Opened for appending.
    pub file: File,
    /// Where the medium begins in what the file speaks of. Sectors.
    pub base: u64,
}

impl Record {
    fn cleared(&self, run: BadRun) -> Result<()> {
        let (offset, length) = (self.base + run.offset, run.length);
        // It begins with a line end, so that what a crash tore stands on a line of its own.
        let line = format!("\n{{\"clear\": {{\"offset\": {offset}, \"length\": {length}}}}}\n");
        let mut file = &self.file;
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).map_err(|cause| {
            let errno = cause.raw_os_error().unwrap_or(libc::EIO);
            Error::from_errno("write", errno, "writing down that a bad block was cleared")
        })
    }
}

/// A medium with bad sectors.
pub struct BadBlocks {
    next: Arc<dyn Medium>,
    record: Option<Record>,
    /// False once the list is empty.
    any: AtomicBool,
    runs: RwLock<Vec<BadRun>>,
}

impl BadBlocks {
    /// The same medium with these sectors bad, counted from its start.
    pub fn new(next: Arc<dyn Medium>, runs: Vec<BadRun>, record: Option<Record>) -> Self {
        BadBlocks { next, record, any: AtomicBool::new(!runs.is_empty()), runs: RwLock::new(runs) }
    }

    /// The first bad run that the bytes touch.
    fn bad_at(&self, at: u64, len: u64) -> Option<BadRun> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        runs.iter().find(|run| run.touches(at, len)).copied()
    }

    fn check_load(&self, at: u64, len: u64) -> Result<()> {
        match self.bad_at(at, len) {
            None => Ok(()),
            Some(run) => Err(bad("read", at, len, run)),
        }
    }

    /// Carries a store out and clears what it covers.
    fn clearing(
        &self,
        op: &'static str,
        at: u64,
        len: u64,
        store: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if self.bad_at(at, len).is_none() {
            return store();
        }
        let end = at.saturating_add(len);
        let ragged =
            [(at, at.next_multiple_of(BAD_SECTOR_SIZE)), (end & !(BAD_SECTOR_SIZE - 1), end)];
        for (from, to) in ragged {
            if let Some(run) = self.bad_at(from, to.saturating_sub(from)) {
                return Err(bad(op, at, len, run));
            }
        }
        store()?;
        self.clear(at.div_ceil(BAD_SECTOR_SIZE), end / BAD_SECTOR_SIZE)
    }

    /// Takes the sectors from `first` to before `end` off the list.
    fn clear(&self, first: u64, end: u64) -> Result<()> {
        if let Some(record) = &self.record {
            record.cleared(BadRun { offset: first, length: end - first })?;
        }
        let mut runs = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        let left = |run: &BadRun| {
            let before = BadRun {
                offset: run.offset,
                length: run.end().min(first).saturating_sub(run.offset),
            };
            let from = run.offset.max(end);
            [before, BadRun { offset: from, length: run.end().saturating_sub(from) }]
        };
        *runs = runs.iter().flat_map(left).filter(|run| run.length > 0).collect();
        self.any.store(!runs.is_empty(), Ordering::Release);
        Ok(())
    }
}

fn bad(op: &'static str, at: u64, len: u64, run: BadRun) -> Error {
    let BadRun { offset, length } = run;
    let text =
        format!("{len} bytes touch bad media: {length} blocks of 512 bytes from block {offset}");
    Error::new(Kind::Media, op, text).at(at)
}

impl Medium for BadBlocks {
    fn region(&self) -> RegionId {
        self.next.region()
    }

    fn len(&self) -> u64 {
        self.next.len()
    }

    fn granularity(&self) -> Granularity {
        self.next.granularity()
    }

    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        self.check_load(at, len)?;
        // SAFETY: the caller's promise.
        unsafe { self.next.load(at, target, len) }
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, how: Store) -> Result<()> {
        // SAFETY: the caller's promise.
        self.clearing("write", at, len, || unsafe { self.next.store(at, source, len, how) })
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        self.clearing("zero", at, len, || self.next.zero(at, len))
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        self.check_load(at, 8)?;
        self.next.load_u64(at)
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        self.clearing("write", at, 8, || self.next.store_u64(at, value))
    }

    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()> {
        self.next.stored_elsewhere(at, len)
    }

    fn map_unit(&self) -> u64 {
        self.next.map_unit()
    }

    fn stores_by_mapping(&self) -> bool {
        false
    }

    fn loads_by_mapping(&self) -> bool {
        false
    }

    fn blocks(&self) -> bool {
        self.next.blocks()
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        self.next.flush(at, len)
    }

    fn fence(&self) {
        self.next.fence();
    }

    fn persist(&self, at: u64, len: u64) -> Result<()> {
        self.next.persist(at, len)
    }

    fn sync(&self) -> Result<()> {
        self.next.sync()
    }

    fn sync_blocks(&self) -> bool {
        self.next.sync_blocks()
    }

    fn punch(&self, at: u64, len: u64) -> Result<bool> {
        let mut done = false;
        self.clearing("discard", at, len, || {
            done = self.next.punch(at, len)?;
            // What the backing cannot give back is overwritten: a bad sector may not stay one.
            if !done {
                self.next.zero(at, len)?;
                done = true;
            }
            Ok(())
        })?;
        Ok(done)
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        self.next.extents(at, len)
    }

    fn address(&self, segment: &Segment) -> Result<*mut u8> {
        self.next.address(segment)
    }

    fn resize(&self, len: u64) -> Result<()> {
        self.next.resize(len)
    }

    fn stats(&self) -> Stats {
        self.next.stats()
    }

    fn count_blocks(&self, block_size: u64, every: u32) -> Result<()> {
        self.next.count_blocks(block_size, every)
    }

    fn block_counts(&self) -> Option<(u64, Vec<u32>)> {
        self.next.block_counts()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;
    use crate::media::{memfd, Mapped};

    const SIZE: u64 = 16 * BAD_SECTOR_SIZE;

    fn with(runs: &[(u64, u64)], record: Option<Record>) -> BadBlocks {
        let runs = runs.iter().map(|&(offset, length)| BadRun { offset, length }).collect();
        BadBlocks::new(Arc::new(Mapped::anonymous(SIZE, false).unwrap()), runs, record)
    }

    fn read(medium: &BadBlocks, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut target = vec![0; len as usize];
        // SAFETY: the target is as long as that.
        unsafe { medium.load(at, target.as_mut_ptr(), len) }.map(|()| target)
    }

    fn write(medium: &BadBlocks, at: u64, len: u64) -> Result<()> {
        let source = vec![7; len as usize];
        // SAFETY: the source is as long as that.
        unsafe { medium.store(at, source.as_ptr(), len, Store::Auto) }
    }

    fn runs(medium: &BadBlocks) -> Vec<(u64, u64)> {
        medium.runs.read().unwrap().iter().map(|run| (run.offset, run.length)).collect()
    }

    #[test]
    fn a_read_fails_exactly_where_it_touches_a_bad_sector() {
        let medium = with(&[(2, 2), (7, 1)], None);
        for at in (0..SIZE).step_by(8) {
            let sector = at / BAD_SECTOR_SIZE;
            let bad = matches!(sector, 2 | 3 | 7);
            assert_eq!(read(&medium, at, 8).is_err(), bad, "{at}");
            assert_eq!(medium.load_u64(at).is_err(), bad, "{at}");
        }
        assert!(read(&medium, 0, 1024).is_ok() && read(&medium, 0, 1025).is_err());
        assert!(read(&medium, 2048, 1536).is_ok() && read(&medium, 2047, 1).is_err());
        assert!(read(&medium, 1024, 0).is_ok());
        assert_eq!(read(&medium, 1024, 1).unwrap_err().kind, Kind::Media);
        assert_eq!(read(&medium, SIZE - 1, 2).unwrap_err().kind, Kind::OutOfRange);
    }

    #[test]
    fn a_write_clears_what_it_covers_and_no_more() {
        let medium = with(&[(1, 6), (9, 2)], None);
        write(&medium, 3 * 512, 1024).unwrap();
        assert_eq!(runs(&medium), [(1, 2), (5, 2), (9, 2)]);
        assert_eq!(read(&medium, 3 * 512, 1024).unwrap(), [7; 1024]);
        medium.zero(512, 1024).unwrap();
        assert!(medium.punch(6 * 512, 4 * 512).unwrap());
        assert_eq!(runs(&medium), [(5, 1), (10, 1)]);
        write(&medium, 0, SIZE).unwrap();
        assert_eq!(runs(&medium), []);
        assert_eq!(read(&medium, 0, SIZE).unwrap(), [7; SIZE as usize]);
    }

    #[test]
    fn a_write_of_a_part_is_refused_and_nothing_is_written() {
        let medium = with(&[(1, 2), (4, 1)], None);
        let parts =
            [(512, 511), (513, 511), (0, 513), (1024 + 8, 4096), (1536, 513), (2560 - 8, 8)];
        for (at, len) in parts {
            assert_eq!(write(&medium, at, len).unwrap_err().kind, Kind::Media, "{at} {len}");
        }
        assert!(medium.store_u64(512, 1).is_err());
        medium.store_u64(0, 1).unwrap();
        assert_eq!(runs(&medium), [(1, 2), (4, 1)]);
        assert_eq!(read(&medium, 0, 512).unwrap()[8..], [0; 504]);
        write(&medium, 100, 2048 + 512 + 50).unwrap();
        assert_eq!(runs(&medium), []);
    }

    #[test]
    fn clearing_is_written_down_before_it_counts() {
        let file = File::from(memfd("record", false).unwrap());
        let record = Record { file: file.try_clone().unwrap(), base: 100 };
        let medium = with(&[(1, 6)], Some(record));
        write(&medium, 0, 1024).unwrap();
        let (mut text, mut file) = (String::new(), file);
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "\n{\"clear\": {\"offset\": 100, \"length\": 2}}\n");
        let closed = Record { file: File::open("/dev/null").unwrap(), base: 0 };
        let medium = with(&[(1, 6)], Some(closed));
        write(&medium, 512, 512).unwrap_err();
        assert_eq!(runs(&medium), [(1, 6)]);
    }

    #[test]
    fn nothing_is_received_into_bad_media_by_the_kernel() {
        let medium = with(&[(1, 1)], None);
        assert!(!medium.loads_by_mapping() && !medium.stores_by_mapping());
    }
}
