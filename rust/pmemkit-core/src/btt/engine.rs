//! One arena of mode `sector`: sectors that are old or new after a power failure, never torn.
//!
//! What a write does, in the order that the argument below needs:
//!
//! ```text
//! W1 take a lane; its free block is nobody's          in memory
//! W2 lock the line of the map; the entry says `old`   in memory
//! W3 data into the free block                         store, write-back
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
//! 2. W6 is 8 bytes that cannot be torn, and everything it speaks of (W3, W4) is on media before.
//!    Once it is there, recovery finds map = `old` or map = new, and makes it new.
//! 3. W7 needs no order of its own: until it is on media, the log entry stands for it. So it must
//!    be on media before that entry is given up, and before another lane moves the same sector on:
//!    recovery goes through the lanes in their order, not in that of time. W5 sees to both: the
//!    lane remembers the line it stored to last, the lock of a line remembers its last store. Who
//!    stores to the map without an order under the lock (zeroing, noting bad media) first orders
//!    the other line that this lock may remember.
//! 4. `old` is stored into (W3 of the lane's next write) only when no reader is in it
//!    ([`super::tracking`]). On media the map may still name it (3.): recovery does not look.
//! 5. Recovery stores map entries only, the same ones every time: it may be interrupted.
//! 6. A lane whose steps failed after W4 is never used again, so that its log entry and its free
//!    block stay as they are.
//! 7. An entry with error or zero state names a block that belongs to its sector all the same.
//! 8. Whoever finds an entry in memory finds the data of its block: W7 comes after a release.
//! 9. A relocation ([`super::levelling`]) is a write of what the sector holds, after that of the
//!    client is durable, with a lane taken anew: nothing above knows the difference.
//!
//! Where it was tried: `explore` (1 to 3, 5, 7, at every crash point), `model` (4, 8, in every
//! interleaving), `concurrency` (4, on real threads).
//!
//! Lock order: lanes, which are only tried and never waited for, then map locks in ascending order.
//!
//! What this does not do: know about requests and buffers ([`super::device`]), repair.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::geometry::Geometry;
use super::levelling::{Leveller, Levelling};
use super::lock::{Guard, Lock};
use super::log::{entry_at, next_seq, Entry};
use super::sync::{fence, place, yield_now, LINES, LOOKS};
use super::tracking::{Readers, Versions};
use super::{Plant, ERROR, MAP_MASK, NORMAL, ZERO};
use crate::error::{Error, Kind, Result};
use crate::media::{caused_by, Cause, Granularity, Medium, Store};

/// Sectors of a batch.
pub const BATCH_MOST: usize = 16;

/// Entries in a cache line of the map: they share a lock and a version.
const ENTRIES_IN_A_LINE: u32 = 16;
const LINE_SIZE: u64 = 64;

/// How an arena is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Nothing is stored; what recovery would do is done in memory.
    pub read_only: bool,
    /// On media of granularity `page`: pay for a sync at each ordering point.
    pub strict: bool,
    /// Whether and how wear is levelled.
    pub levelling: Option<Levelling>,
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
    /// Writes since the arena was opened, and those that no relocation was made for yet.
    pub writes: u32,
    pub saved: u32,
}

/// A lane in a line of its own, so that threads on neighbouring lanes do not share one.
#[repr(align(128))]
pub(super) struct Padded<T>(pub T);

pub(super) type Lanes<'a> = SmallVec<[Guard<'a, Lane>; BATCH_MOST]>;
pub(super) type Entries = SmallVec<[Entry; BATCH_MOST]>;
/// The lines of the map that a batch needs, locked.
pub(super) type Lines<'a> = SmallVec<[Line<'a>; 2]>;

pub(super) struct Line<'a> {
    at: u64,
    unfenced: Guard<'a, Option<Unfenced>>,
    versions: &'a Versions,
}

/// What lines of the map share that have the same number modulo [`LINES`].
#[derive(Default)]
#[repr(align(64))]
pub(super) struct LineState {
    lock: Lock<Option<Unfenced>>,
    versions: Versions,
}

/// Copies a part of a block, or zeroes.
///
/// # Safety
/// `target` must be valid for writes of `len` bytes.
unsafe fn copy_out(
    medium: &dyn Medium,
    from: Option<u64>,
    skip: u32,
    target: *mut u8,
    len: u32,
) -> Result<()> {
    match from {
        // SAFETY: the caller's promise.
        Some(from) => unsafe { medium.load(from + u64::from(skip), target, u64::from(len)) },
        None => {
            // SAFETY: the caller's promise.
            unsafe { target.write_bytes(0, len as usize) };
            Ok(())
        }
    }
}

/// One arena. Offsets of sectors count from its start.
pub struct Arena {
    pub(super) geometry: Geometry,
    pub(super) options: Options,
    pub(super) granularity: Granularity,
    pub(super) lanes: Box<[Padded<Lock<Lane>>]>,
    pub(super) lines: Box<[LineState]>,
    pub(super) readers: Readers,
    pub(super) leveller: Option<Leveller>,
    /// Opened read-only: sectors whose last write is in the log only, and their blocks. Sorted.
    pub(super) finished: Vec<(u32, u32)>,
}

thread_local! {
    static NUMBER: Cell<usize> = Cell::new(next_number());
}

fn next_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A number for the calling thread, from 0 on, that no other thread ever has.
fn thread_number() -> usize {
    NUMBER.with(Cell::get)
}

/// Gives the calling thread another number, so that tests choose its lane.
#[cfg(test)]
pub(super) fn impersonate(number: usize) {
    NUMBER.with(|cell| cell.set(number));
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
    pub(super) fn checked_block(&self, op: &'static str, entry: u32, lba: u32) -> Result<u32> {
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
        let _map = caused_by(Cause::Map);
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
        for _ in 0..LOOKS {
            let state = &self.lines[(lba / ENTRIES_IN_A_LINE) as usize % LINES];
            let look = state.versions.look();
            let entry = self.entry(medium, lba)?;
            let block = self.block_of(entry, lba);
            if !matches!(entry & NORMAL, NORMAL | 0) || block >= self.geometry.internal_nlba {
                break;
            }
            let at = self.geometry.block_at(block) + u64::from(skip);
            // SAFETY: the caller's promise.
            let result = unsafe { medium.load(at, target, u64::from(len)) };
            if look.holds() || self.planted(Plant::NoSecondLook) {
                if let Err(error) = &result {
                    self.note_bad(medium, lba, entry, error.kind);
                }
                return result;
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.read_tracked(medium, lba, skip, target, len) }
    }

    /// The same for sectors that are no plain block, or that are written all the time.
    ///
    /// # Safety
    /// As for [`Arena::read`].
    #[cold]
    pub(super) unsafe fn read_tracked(
        &self,
        medium: &dyn Medium,
        lba: u32,
        skip: u32,
        target: *mut u8,
        len: u32,
    ) -> Result<()> {
        let place = place();
        loop {
            let entry = self.entry(medium, lba)?;
            let block = self.block_of(entry, lba);
            if !self.planted(Plant::NoReadTracking) {
                self.readers.enter(place, block);
            }
            let again = self.entry(medium, lba);
            let result = match again {
                Ok(again) if again != entry => None,
                Ok(_) => {
                    let from = self.source_of(entry, lba);
                    // SAFETY: the caller's promise.
                    Some(from.and_then(|from| unsafe { copy_out(medium, from, skip, target, len) }))
                }
                Err(error) => Some(Err(error)),
            };
            if !self.planted(Plant::NoReadTracking) {
                self.readers.leave(place, block);
            }
            if let Some(result) = result {
                if let Err(error) = &result {
                    self.note_bad(medium, lba, entry, error.kind);
                }
                return result;
            }
        }
    }

    /// Where the bytes of a sector are: `None` for one that reads as zeroes.
    fn source_of(&self, entry: u32, lba: u32) -> Result<Option<u64>> {
        match entry & NORMAL {
            ZERO => Ok(None),
            ERROR => {
                let text = format!("sector {lba} of the arena is in error");
                Err(Error::new(Kind::Media, "read", text))
            }
            _ => Ok(Some(self.geometry.block_at(self.checked_block("read", entry, lba)?))),
        }
    }

    /// Puts a sector into the error state where its block turned out to be bad, as the kernel does.
    /// That this fails too is no news to the reader.
    #[cold]
    fn note_bad(&self, medium: &dyn Medium, lba: u32, entry: u32, kind: Kind) {
        let plain = matches!(entry & NORMAL, NORMAL | 0);
        if kind != Kind::Media || !plain || self.is_read_only() {
            return;
        }
        let mut lines = Lines::new();
        self.lock_lines(lba, 1, &mut lines);
        if self.entry(medium, lba) == Ok(entry) {
            let bad = ERROR | self.block_of(entry, lba);
            let settled = self.settle_others(medium, &lines);
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

    /// Writes sectors that follow each other: as many as there are lanes for, and says how many.
    /// They are durable when this returns (granularity `page`: strict only). It is none where the
    /// free block of a lane has bad media: that lane is given up, and the caller comes again.
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
        let mut lanes = Lanes::new();
        self.take_lanes(sources.len().min(BATCH_MOST), &mut lanes)?;
        let mut lines = Lines::new();
        self.lock_lines(first, lanes.len() as u32, &mut lines);
        let mut entries = Entries::new();
        self.plan(medium, first, &lanes, &mut entries)?;
        let size = self.geometry.sector_size();
        for (lane, source) in lanes.iter_mut().zip(sources) {
            // SAFETY: the caller's promise.
            match unsafe { self.fill_block(medium, lane, *source, size) } {
                Err(error) if error.kind == Kind::Media => {
                    lane.dead = true;
                    return Ok(0);
                }
                result => result?,
            }
        }
        let result = self.exchange(medium, &mut lanes, &mut lines, &entries, NORMAL);
        if result.is_err() {
            lanes.iter_mut().for_each(|lane| lane.dead = true);
        }
        let written = lanes.len();
        if let Some(leveller) = &self.leveller {
            let mut due = None;
            for (lane, entry) in lanes.iter_mut().zip(&entries) {
                due = if leveller.is_due(lane, entry.new_map) { Some(lane.number) } else { due };
            }
            drop(lines);
            drop(lanes);
            if let Some(number) = due {
                self.relocate(medium, leveller, number as usize);
            }
        }
        result.map(|()| written)
    }

    fn check_writable(&self, op: &'static str) -> Result<()> {
        if self.geometry.in_error {
            let text = "the info block has the error flag set: the arena is read-only";
            return Err(Error::new(Kind::ReadOnly, op, text).at(self.geometry.start));
        }
        if self.options.read_only {
            return Err(Error::new(Kind::ReadOnly, op, "the arena was opened read-only"));
        }
        Ok(())
    }

    /// W1. Lanes whose free block is being read, or that failed, are passed over.
    fn take_lanes<'a>(&'a self, wanted: usize, taken: &mut Lanes<'a>) -> Result<()> {
        let count = self.lanes.len();
        // Threads begin where the batches of others do not reach, as far as there is room.
        let apart = if count >= 2 * BATCH_MOST { BATCH_MOST } else { 1 };
        let turn = self.leveller.as_ref().map_or(0, Leveller::turn);
        let start = thread_number().wrapping_mul(apart).wrapping_add(turn);
        loop {
            let mut dead = 0;
            for step in 0..count {
                let Some(lane) = self.lanes[start.wrapping_add(step) % count].0.try_lock() else {
                    continue;
                };
                if lane.dead {
                    dead += 1;
                } else if self.readers.idle(lane.free) || self.planted(Plant::NoReadTracking) {
                    taken.push(lane);
                    if taken.len() == wanted {
                        return Ok(());
                    }
                }
            }
            if !taken.is_empty() {
                return Ok(());
            }
            if dead == count {
                let text = format!("all {count} lanes failed; the arena needs a check");
                return Err(Error::new(Kind::Media, "write", text).at(self.geometry.start));
            }
            yield_now();
        }
    }

    /// W3: data into the free block, with zeroes for metadata that nobody gave us.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    pub(super) unsafe fn fill_block(
        &self,
        medium: &dyn Medium,
        lane: &mut Lane,
        source: *const u8,
        len: u32,
    ) -> Result<()> {
        let at = self.geometry.block_at(lane.free);
        if lane.bad {
            medium.zero(at, u64::from(self.geometry.internal_lbasize))?;
            lane.bad = false;
        }
        let how = if self.planted(Plant::DataStaysInCache) { Store::Cached } else { Store::Auto };
        // SAFETY: the caller's promise.
        unsafe { medium.store(at, source, u64::from(len), how)? };
        if let Some(leveller) = &self.leveller {
            leveller.wrote(lane.free);
        }
        let metadata = self.geometry.external_lbasize.saturating_sub(len);
        if metadata > 0 {
            medium.zero(at + u64::from(len), u64::from(metadata))?;
        }
        Ok(())
    }

    /// Locks the lines of the map that hold `count` entries: one of them, or two.
    pub(super) fn lock_lines<'a>(&'a self, first: u32, count: u32, locked: &mut Lines<'a>) {
        let (line, last) = (first / ENTRIES_IN_A_LINE, (first + count - 1) / ENTRIES_IN_A_LINE);
        let base = self.geometry.start + self.geometry.mapoff;
        let mut lock = |line: u32| {
            let LineState { lock, versions } = &self.lines[line as usize % LINES];
            let at = base + u64::from(line) * LINE_SIZE;
            locked.push(Line { at, unfenced: lock.lock(), versions });
        };
        // Two lines that follow each other have neighbouring locks, or the last and the first.
        match (line == last, (last as usize).is_multiple_of(LINES)) {
            (true, _) => lock(line),
            (false, false) => (lock(line), lock(last)).1,
            (false, true) => (lock(last), lock(line)).1,
        }
    }

    /// What the log will say. Nothing was stored yet, so this may fail.
    pub(super) fn plan(
        &self,
        medium: &dyn Medium,
        first: u32,
        lanes: &Lanes<'_>,
        entries: &mut Entries,
    ) -> Result<()> {
        for (lba, lane) in (first..).zip(lanes) {
            let entry = self.entry(medium, lba)?;
            let mut old_map = self.checked_block("write", entry, lba)?;
            if entry & NORMAL == ERROR && !self.planted(Plant::ErrorForgotten) {
                old_map |= ERROR;
            }
            entries.push(Entry { lba, old_map, new_map: lane.free, seq: lane.next_seq });
        }
        Ok(())
    }

    /// W4 to W8. The map entries get the flags `state`.
    pub(super) fn exchange(
        &self,
        medium: &dyn Medium,
        lanes: &mut Lanes<'_>,
        lines: &mut Lines<'_>,
        entries: &[Entry],
        state: u32,
    ) -> Result<()> {
        if self.planted(Plant::MapBeforeLog) {
            self.store_map(medium, entries, state)?;
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
        self.store_map(medium, entries, state)?;
        lines.iter_mut().for_each(Line::stored);
        for (lane, entry) in lanes.iter_mut().zip(entries) {
            lane.move_on(entry, self.line_at(entry.lba), self.options.plant);
        }
        Ok(())
    }

    fn store_log(
        &self,
        medium: &dyn Medium,
        lanes: &Lanes<'_>,
        entries: &[Entry],
        word: Word,
    ) -> Result<()> {
        let _log = caused_by(Cause::Log);
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
    pub(super) fn store_map(
        &self,
        medium: &dyn Medium,
        entries: &[Entry],
        state: u32,
    ) -> Result<()> {
        // Who finds the entry finds the data, also where nothing was ordered for the media.
        fence(Ordering::Release);
        let _map = caused_by(Cause::Map);
        let mut rest = entries;
        while let Some(first) = rest.first() {
            let line = self.line_at(first.lba);
            let here = rest.iter().take_while(|each| self.line_at(each.lba) == line).count();
            for each in &rest[..here] {
                let at = self.geometry.word_at(each.lba);
                let word = medium.load_u64(at)?;
                medium.store_u64(at, with_entry(word, each.lba, state | each.new_map))?;
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

    /// The same for who stores to the map without an ordering under its lock: where the lock speaks
    /// of another line it will not any more, so that line must be on media first. The line itself
    /// is written back again anyway.
    fn settle_others(&self, medium: &dyn Medium, lines: &Lines<'_>) -> Result<()> {
        let other = |line: &Line<'_>| line.unfenced.is_some_and(|last| last.at != line.at);
        if !lines.iter().any(other) {
            return Ok(());
        }
        self.settle_lines(medium, lines)?;
        self.order(medium)
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
        if !self.planted(Plant::NoOrderAfterZero) {
            self.order(medium)?;
        }
        Ok(in_error)
    }

    fn zero_in_line(&self, medium: &dyn Medium, first: u32, count: u32) -> Result<Option<u32>> {
        let mut lines = Lines::new();
        self.lock_lines(first, count, &mut lines);
        self.settle_others(medium, &lines)?;
        let _map = caused_by(Cause::Map);
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
    /// Says that entries changed, and remembers that this thread wrote the line back.
    fn stored(&mut self) {
        self.versions.changed();
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
