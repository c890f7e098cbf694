//! One arena of mode `sector`: sectors that are old or new after a power failure, never torn.
//!
//! What a write does, in the order that the argument below needs:
//!
//! ```text
//! W1 take a lane; its free block is nobody's          in memory
//! W2 data into the free block                         store, write-back
//! W3 lock the line of the map; the entry says `old`   in memory
//! W4 first word of the lane's next log entry          store, write-back
//! W5 write back map lines whose last store nobody has fenced for us
//!    ─────────────────────────────────────────────── order
//! W6 second word of the log entry                     store, write-back
//!    ─────────────────────────────────────────────── order: the write is durable
//! W7 map entry := the new block                       store, write-back, no order
//! W8 `old` is the lane's free block now; unlock       in memory
//! ```
//!
//! A batch takes several lanes and does each step for all of its sectors before the next one, so
//! that it pays for two orderings and not for two a sector.
//!
//! Invariants:
//! A crash at any point leaves each sector old or new, because
//! 1. A block belongs to one sector or to one lane. Before W6 is on media the map and the newest
//!    log entry are as before: the sector is old, and nothing points to the free block.
//! 2. W6 is 8 bytes that cannot be torn, and everything it speaks of (W2, W4) is on media before.
//!    Once it is there, recovery finds map = `old` or map = new, and makes it new.
//! 3. W7 needs no order of its own: until it is on media, the log entry stands for it. So it must
//!    be on media before that entry is given up, and before another lane moves the same sector on:
//!    recovery goes through the lanes in their order, not in that of time. W5 sees to both: the
//!    lane remembers the line it stored to last, the lock of a line remembers its last store.
//! 4. `old` is stored into (W2 of the lane's next write) only when no reader is in it
//!    ([`super::tracking`]). On media the map may still name it (3.): recovery does not look.
//! 5. Recovery stores map entries only, the same ones every time: it may be interrupted.
//! 6. A lane whose steps failed after W4 is never used again, so that its log entry and its free
//!    block stay as they are.
//! 7. An entry with error or zero state names a block that belongs to its sector all the same.
//!
//! Lock order: lanes, which are only tried and never waited for, then map locks in ascending order.
//!
//! What this does not do: know about requests and buffers ([`super::device`]), repair.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use smallvec::SmallVec;

use super::geometry::Geometry;
use super::log::{entry_at, next_seq, Entry};
use super::tracking::Readers;
use super::{Plant, ERROR, MAP_MASK, NORMAL, ZERO};
use crate::error::{Error, Kind, Result};
use crate::media::{Granularity, Medium, Store};

/// Sectors of a batch.
pub const BATCH_MOST: usize = 16;

/// Entries in a cache line of the map: they share a lock.
const ENTRIES_IN_A_LINE: u32 = 16;
const LINE_SIZE: u64 = 64;
pub(super) const LOCKS: usize = 256;

/// How an arena is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Nothing is stored; what recovery would do is done in memory.
    pub read_only: bool,
    /// On media of granularity `page`: pay for a sync at each ordering point.
    pub strict: bool,
    /// A fault for tests.
    pub plant: Plant,
}

/// A line of the map that was stored to, and written back, by a thread that may not have fenced
/// since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unfenced {
    at: u64,
    thread: usize,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub number: u32,
    pub free: u32,
    /// The free block has bad media: it is zeroed before it is used.
    pub bad: bool,
    pub next_place: u32,
    /// The place of the newest entry.
    pub other_place: u32,
    pub next_seq: u32,
    pub unfenced: Option<Unfenced>,
    pub dead: bool,
}

/// A lane in a line of its own, so that threads on neighbouring lanes do not share one.
#[repr(align(128))]
pub(super) struct Padded<T>(pub T);

type Lanes<'a> = SmallVec<[MutexGuard<'a, Lane>; BATCH_MOST]>;
/// The lines of the map that a batch needs, locked.
type Lines<'a> = SmallVec<[Line<'a>; 2]>;

struct Line<'a> {
    at: u64,
    unfenced: MutexGuard<'a, Option<Unfenced>>,
}

/// One arena. Offsets of sectors count from its start.
pub struct Arena {
    pub(super) geometry: Geometry,
    pub(super) options: Options,
    pub(super) granularity: Granularity,
    pub(super) lanes: Box<[Padded<Mutex<Lane>>]>,
    pub(super) map_locks: Box<[Mutex<Option<Unfenced>>]>,
    pub(super) readers: Readers,
    /// Opened read-only: sectors whose last write is in the log only, and their blocks. Sorted.
    pub(super) finished: Vec<(u32, u32)>,
}

/// A number for the calling thread, from 0 on.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    NUMBER.with(Cell::get)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked in between has left values that are whole: they change in one assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The map entry that a word holds for a sector.
fn entry_in(word: u64, lba: u32) -> u32 {
    (word >> (32 * (lba % 2))) as u32
}

fn with_entry(word: u64, lba: u32, entry: u32) -> u64 {
    let shift = 32 * (lba % 2);
    (word & !(0xffff_ffff << shift)) | u64::from(entry) << shift
}

impl Arena {
    /// The map entry of a sector, as recovery left it.
    pub(super) fn entry(&self, medium: &dyn Medium, lba: u32) -> Result<u32> {
        if !self.finished.is_empty() {
            if let Ok(place) = self.finished.binary_search_by_key(&lba, |each| each.0) {
                return Ok(NORMAL | self.finished[place].1);
            }
        }
        Ok(entry_in(medium.load_u64(self.geometry.word_at(lba))?, lba))
    }

    /// The block that an entry names.
    pub(super) fn block_of(&self, entry: u32, lba: u32) -> u32 {
        if entry & NORMAL == 0 {
            lba
        } else {
            entry & MAP_MASK
        }
    }

    /// The block that an entry names, if there is such a block.
    fn checked_block(&self, op: &'static str, entry: u32, lba: u32) -> Result<u32> {
        let block = self.block_of(entry, lba);
        if block < self.geometry.internal_nlba {
            return Ok(block);
        }
        let count = self.geometry.internal_nlba;
        let text = format!("the map sends sector {lba} to block {block} of {count}");
        Err(Error::new(Kind::Corrupt, op, text).at(self.geometry.word_at(lba)))
    }

    /// Stores one entry; the caller holds the lock of its line. Written back, not ordered.
    pub(super) fn store_entry(&self, medium: &dyn Medium, lba: u32, entry: u32) -> Result<()> {
        let at = self.geometry.word_at(lba);
        medium.store_u64(at, with_entry(medium.load_u64(at)?, lba, entry))?;
        medium.flush(at, 8)
    }

    /// Everything this thread stored and wrote back is on media before what it stores next. On
    /// media of granularity `page` that holds only against the death of this process, unless the
    /// arena was opened `strict`.
    pub(super) fn order(&self, medium: &dyn Medium) -> Result<()> {
        if self.options.strict && self.granularity == Granularity::Page {
            return medium.sync();
        }
        medium.fence();
        Ok(())
    }

    /// True in a test that planted this fault.
    pub(super) fn planted(&self, plant: Plant) -> bool {
        cfg!(any(test, feature = "planted-faults")) && self.options.plant == plant
    }

    /// What the arena looks like.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// True when nothing may be written: it was opened so, or its info block says so.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.geometry.in_error
    }

    // --- reading ---------------------------------------------------------------------------------

    /// Copies `len` bytes from byte `skip` of a sector.
    ///
    /// # Safety
    /// `target` must be valid for writes of `len` bytes.
    pub unsafe fn read(
        &self,
        medium: &dyn Medium,
        lba: u32,
        skip: u32,
        target: *mut u8,
        len: u32,
    ) -> Result<()> {
        loop {
            let entry = self.entry(medium, lba)?;
            match entry & NORMAL {
                ZERO => {
                    // SAFETY: the caller's promise.
                    unsafe { target.write_bytes(0, len as usize) };
                    return Ok(());
                }
                ERROR => {
                    let text = format!("sector {lba} of the arena is in error");
                    return Err(Error::new(Kind::Media, "read", text));
                }
                _ => {}
            }
            let block = self.checked_block("read", entry, lba)?;
            if !self.planted(Plant::NoReadTracking) {
                self.readers.enter(block);
            }
            let unchanged = self.entry(medium, lba).map(|again| again == entry);
            let result = match unchanged {
                Ok(true) => {
                    let at = self.geometry.block_at(block) + u64::from(skip);
                    // SAFETY: the caller's promise.
                    Some(unsafe { medium.load(at, target, u64::from(len)) })
                }
                Ok(false) if self.planted(Plant::NoSecondLook) => Some(Ok(())),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            };
            if !self.planted(Plant::NoReadTracking) {
                self.readers.leave(block);
            }
            match result {
                None => continue,
                Some(Err(error)) if error.kind == Kind::Media => {
                    self.note_bad(medium, lba, entry);
                    return Err(error);
                }
                Some(result) => return result,
            }
        }
    }

    /// Puts a sector into the error state, as the kernel does where its block cannot be read. That
    /// this fails too is no news to the reader.
    fn note_bad(&self, medium: &dyn Medium, lba: u32, entry: u32) {
        if self.is_read_only() {
            return;
        }
        let mut lines = self.lock_lines(lba, 1);
        if self.entry(medium, lba) == Ok(entry) {
            let bad = ERROR | self.block_of(entry, lba);
            let settled = self.settle_lines(medium, &lines);
            if settled.and_then(|()| self.store_entry(medium, lba, bad)).is_ok() {
                lines.iter_mut().for_each(Line::stored);
            }
        }
    }

    /// True for a sector that reads as zeroes without a look at its block.
    pub fn is_zero(&self, medium: &dyn Medium, lba: u32) -> Result<bool> {
        Ok(self.entry(medium, lba)? & NORMAL == ZERO)
    }

    // --- writing ---------------------------------------------------------------------------------

    /// Writes sectors that follow each other: as many as there are lanes for, at least one, and
    /// says how many. They are durable when this returns (granularity `page`: strict only).
    ///
    /// # Safety
    /// Each source must be valid for reads of [`Geometry::sector_size`] bytes.
    pub unsafe fn write(
        &self,
        medium: &dyn Medium,
        first: u32,
        sources: &[*const u8],
    ) -> Result<usize> {
        self.check_writable("write")?;
        let mut lanes = self.take_lanes(sources.len().min(BATCH_MOST))?;
        for (lane, source) in lanes.iter_mut().zip(sources) {
            // SAFETY: the caller's promise.
            unsafe { self.fill_block(medium, lane, *source)? };
        }
        let mut lines = self.lock_lines(first, lanes.len() as u32);
        let entries = self.exchanges(medium, first, &lanes)?;
        let result = self.exchange(medium, &mut lanes, &mut lines, &entries);
        lanes.iter_mut().for_each(|lane| lane.dead = result.is_err());
        result.map(|()| lanes.len())
    }

    fn check_writable(&self, op: &'static str) -> Result<()> {
        if self.geometry.in_error {
            let text = "the info block has the error flag set: the arena is read-only";
            return Err(Error::new(Kind::Media, op, text).at(self.geometry.start));
        }
        if self.options.read_only {
            return Err(Error::new(Kind::ReadOnly, op, "the arena was opened read-only"));
        }
        Ok(())
    }

    /// W1. Lanes whose free block is being read, or that failed, are passed over.
    fn take_lanes(&self, wanted: usize) -> Result<Lanes<'_>> {
        let count = self.lanes.len();
        // Threads begin where the batches of others do not reach, as far as there is room.
        let apart = if count >= 2 * BATCH_MOST { BATCH_MOST } else { 1 };
        let start = thread_number().wrapping_mul(apart);
        let mut taken = Lanes::new();
        loop {
            let mut dead = 0;
            for step in 0..count {
                let lane = match self.lanes[start.wrapping_add(step) % count].0.try_lock() {
                    Ok(lane) => lane,
                    Err(TryLockError::Poisoned(lane)) => lane.into_inner(),
                    Err(TryLockError::WouldBlock) => continue,
                };
                if lane.dead {
                    dead += 1;
                } else if self.readers.idle(lane.free) || self.planted(Plant::NoReadTracking) {
                    taken.push(lane);
                    if taken.len() == wanted {
                        return Ok(taken);
                    }
                }
            }
            if !taken.is_empty() {
                return Ok(taken);
            }
            if dead == count {
                let text = format!("all {count} lanes failed; the arena needs a check");
                return Err(Error::new(Kind::Media, "write", text).at(self.geometry.start));
            }
            std::thread::yield_now();
        }
    }

    /// W2: data into the free block, with zeroes for metadata, which nobody gave us.
    ///
    /// # Safety
    /// `source` must be valid for reads of a sector.
    unsafe fn fill_block(
        &self,
        medium: &dyn Medium,
        lane: &mut Lane,
        source: *const u8,
    ) -> Result<()> {
        let at = self.geometry.block_at(lane.free);
        if lane.bad {
            medium.zero(at, u64::from(self.geometry.internal_lbasize))?;
            lane.bad = false;
        }
        let size = u64::from(self.geometry.sector_size());
        let how = if self.planted(Plant::DataStaysInCache) { Store::Cached } else { Store::Auto };
        // SAFETY: the caller's promise.
        unsafe { medium.store(at, source, size, how)? };
        let metadata = u64::from(self.geometry.external_lbasize) - size;
        if metadata > 0 {
            medium.zero(at + size, metadata)?;
        }
        Ok(())
    }

    /// Locks the lines of the map that hold `count` entries: one of them, or two.
    fn lock_lines(&self, first: u32, count: u32) -> Lines<'_> {
        let lines = first / ENTRIES_IN_A_LINE..=(first + count - 1) / ENTRIES_IN_A_LINE;
        let slot = |line: &u32| *line as usize % LOCKS;
        let mut lines: SmallVec<[u32; 2]> = lines.collect();
        lines.sort_unstable_by_key(slot);
        let base = self.geometry.start + self.geometry.mapoff;
        lines
            .iter()
            .map(|line| Line {
                at: base + u64::from(*line) * LINE_SIZE,
                unfenced: lock(&self.map_locks[slot(line)]),
            })
            .collect()
    }

    /// What the log will say. Nothing was stored to it yet, so this may fail.
    fn exchanges(
        &self,
        medium: &dyn Medium,
        first: u32,
        lanes: &Lanes<'_>,
    ) -> Result<SmallVec<[Entry; BATCH_MOST]>> {
        let each = |(lba, lane): (u32, &MutexGuard<'_, Lane>)| {
            let entry = self.entry(medium, lba)?;
            let mut old_map = self.checked_block("write", entry, lba)?;
            if entry & NORMAL == ERROR && !self.planted(Plant::ErrorForgotten) {
                old_map |= ERROR;
            }
            Ok(Entry { lba, old_map, new_map: lane.free, seq: lane.next_seq })
        };
        (first..).zip(lanes).map(each).collect()
    }

    /// W4 to W8.
    fn exchange(
        &self,
        medium: &dyn Medium,
        lanes: &mut Lanes<'_>,
        lines: &mut Lines<'_>,
        entries: &[Entry],
    ) -> Result<()> {
        if self.planted(Plant::MapBeforeLog) {
            self.store_map(medium, entries)?;
            self.order(medium)?;
        }
        if self.planted(Plant::SequenceFirst) {
            self.store_log(medium, lanes, entries, Word::Second)?;
            self.order(medium)?;
        }
        self.store_log(medium, lanes, entries, Word::First)?;
        if !self.planted(Plant::UnfencedForgotten) {
            lanes.iter().try_for_each(|lane| settle(medium, lane.unfenced))?;
            self.settle_lines(medium, lines)?;
        }
        if !self.planted(Plant::NoOrderBeforeCommit) {
            self.order(medium)?;
        }
        self.store_log(medium, lanes, entries, Word::Second)?;
        if !self.planted(Plant::NoOrderAfterCommit) {
            self.order(medium)?;
        }
        self.store_map(medium, entries)?;
        lines.iter_mut().for_each(Line::stored);
        for (lane, entry) in lanes.iter_mut().zip(entries) {
            lane.move_on(entry, self.line_at(entry.lba), self.options.plant);
        }
        self.readers.moved_away();
        Ok(())
    }

    fn store_log(
        &self,
        medium: &dyn Medium,
        lanes: &Lanes<'_>,
        entries: &[Entry],
        word: Word,
    ) -> Result<()> {
        for (lane, entry) in lanes.iter().zip(entries) {
            let mut place = lane.next_place;
            if self.planted(Plant::WrongPlace) {
                place = lane.other_place;
            }
            let at = entry_at(&self.geometry, lane.number, place);
            let (at, value) = match word {
                Word::First => (at, entry.first_word()),
                Word::Second => (at + 8, entry.second_word()),
            };
            medium.store_u64(at, value)?;
            if !self.planted(Plant::LogStaysInCache) {
                medium.flush(at, 8)?;
            }
        }
        Ok(())
    }

    /// W7. A line is written back once for all of its entries.
    fn store_map(&self, medium: &dyn Medium, entries: &[Entry]) -> Result<()> {
        let mut rest = entries;
        while let Some(first) = rest.first() {
            let line = self.line_at(first.lba);
            let here = rest.iter().take_while(|each| self.line_at(each.lba) == line).count();
            for each in &rest[..here] {
                let at = self.geometry.word_at(each.lba);
                let word = medium.load_u64(at)?;
                medium.store_u64(at, with_entry(word, each.lba, NORMAL | each.new_map))?;
            }
            if !self.planted(Plant::MapStaysInCache) {
                medium.flush(line, LINE_SIZE.min(medium.len() - line))?;
            }
            rest = &rest[here..];
        }
        Ok(())
    }

    fn line_at(&self, lba: u32) -> u64 {
        let line = u64::from(lba / ENTRIES_IN_A_LINE);
        self.geometry.start + self.geometry.mapoff + line * LINE_SIZE
    }

    fn settle_lines(&self, medium: &dyn Medium, lines: &Lines<'_>) -> Result<()> {
        lines.iter().try_for_each(|line| settle(medium, *line.unfenced))
    }

    // --- zeroing ---------------------------------------------------------------------------------

    /// True where sectors can be zeroed in the map alone: Linux mishandles a zero entry inside a
    /// larger request, so only where a sector fills its page.
    pub fn zeroes_in_map(&self) -> bool {
        self.geometry.sector_size() >= 4096
    }

    /// Makes sectors read as zeroes: the block stays theirs, the entry says zero. One in error is
    /// left to the caller, who writes it: its first is given, or `None` when all is done. Durable
    /// when this returns, as a write is.
    pub fn zero(&self, medium: &dyn Medium, first: u32, count: u32) -> Result<Option<u32>> {
        self.check_writable("zero")?;
        let (mut lba, end) = (first, first + count);
        let mut in_error = None;
        while lba < end && in_error.is_none() {
            let behind = (lba / ENTRIES_IN_A_LINE + 1) * ENTRIES_IN_A_LINE;
            let here = behind.min(end) - lba;
            in_error = self.zero_in_line(medium, lba, here)?;
            lba += here;
        }
        self.order(medium)?;
        Ok(in_error)
    }

    fn zero_in_line(&self, medium: &dyn Medium, first: u32, count: u32) -> Result<Option<u32>> {
        let mut lines = self.lock_lines(first, count);
        self.settle_lines(medium, &lines)?;
        let mut in_error = None;
        for lba in first..first + count {
            let entry = self.entry(medium, lba)?;
            if entry & NORMAL == ERROR {
                in_error = Some(lba);
                break;
            }
            let mut block = self.checked_block("zero", entry, lba)?;
            if self.planted(Plant::ZeroForgetsBlock) {
                block = 0;
            }
            let at = self.geometry.word_at(lba);
            medium.store_u64(at, with_entry(medium.load_u64(at)?, lba, ZERO | block))?;
        }
        let line = self.line_at(first);
        medium.flush(line, LINE_SIZE.min(medium.len() - line))?;
        lines.iter_mut().for_each(Line::stored);
        Ok(in_error)
    }
}

/// One of the two words of a log entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    First,
    Second,
}

impl Lane {
    /// W8: what the exchange left is the lane's.
    fn move_on(&mut self, entry: &Entry, line: u64, plant: Plant) {
        let planted = |each| cfg!(any(test, feature = "planted-faults")) && plant == each;
        if !planted(Plant::LaneKeepsItsBlock) {
            self.free = entry.old_map & MAP_MASK;
        }
        self.bad = entry.left_error();
        std::mem::swap(&mut self.next_place, &mut self.other_place);
        if !planted(Plant::SequenceStuck) {
            self.next_seq = next_seq(entry.seq);
        }
        self.unfenced = Some(Unfenced { at: line, thread: thread_number() });
    }
}

impl Line<'_> {
    /// Remembers that this thread stored to the line and wrote it back.
    fn stored(&mut self) {
        *self.unfenced = Some(Unfenced { at: self.at, thread: thread_number() });
    }
}

/// W5: the next fence of this thread covers the line. It covers what this thread wrote back itself;
/// what another one did is written back once more.
fn settle(medium: &dyn Medium, unfenced: Option<Unfenced>) -> Result<()> {
    match unfenced {
        Some(line) if line.thread != thread_number() => {
            medium.flush(line.at, LINE_SIZE.min(medium.len() - line.at))
        }
        _ => Ok(()),
    }
}
