//! Reads and writes through RAM.
//!
//! Invariants:
//! 1. A block in RAM is as new as any acknowledged write; media are as new where it is not dirty
//!    and not claimed. So a hit needs no claim, and a miss reads media under one.
//! 2. A claim is waited for only by a thread that has none, and taken only under the gate as a
//!    reader. Zero and discard have the gate alone: nothing moves then between RAM and media.
//! 3. Order of locks: gate, then one shard at a time. Nobody holds a shard while media work.
//! 4. Once `failed` is set nothing is written to media any more, and every write says why. Reads go
//!    on, from RAM where the block is there.
//!
//! Why no read is stale: a block leaves RAM only when it is clean and unclaimed, so media have it
//! by then; and nobody puts an older copy back, since a fill claims the block before it reads media
//! and a write that finds it claimed and absent waits.
//!
//! What this does not do: write back ([`super::writeback`]), run by itself ([`super::flusher`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use smallvec::SmallVec;

use super::cursor::Cursor;
use super::directory::Fresh;
use super::index::spread;
use super::shard::{Cell, Claim, Room, Shard};
use super::store::Budget;
use super::streams::Streams;
use super::writeback::Staging;
use super::{shard_of, Mode, Options, Plant, BLOCK, LINE};
use crate::block::{Device, Flags, Op, Request};
use crate::error::{Error, Result};
use crate::media::port;
use crate::sg::Sg;

/// Blocks that are read from media at once.
const RUN_MOST: u64 = 64;
/// Attempts at a block that others keep taking away, before a request goes around the cache.
const TRIES: usize = 4;
const BYTES: u64 = BLOCK as u64;

/// What was moved to and from media.
#[derive(Debug, Default)]
pub struct Moved {
    /// Blocks written back, whole or in part.
    pub blocks_written: AtomicU64,
    /// Bytes of that.
    pub bytes_written: AtomicU64,
    /// Requests of that.
    pub writes: AtomicU64,
    /// Blocks read into RAM.
    pub blocks_read: AtomicU64,
    /// Requests of that.
    pub reads: AtomicU64,
    /// Blocks read before anybody asked.
    pub blocks_ahead: AtomicU64,
    /// Pieces of requests that went around the cache.
    pub bypassed: AtomicU64,
}

/// The cache without its thread.
pub struct Engine {
    pub(super) next: Arc<dyn Device>,
    pub(super) options: Options,
    pub(super) size: u64,
    pub(super) cells: Box<[Cell]>,
    pub(super) budget: Budget,
    /// Shared by what moves blocks, alone for zero and discard.
    pub(super) gate: RwLock<()>,
    /// The first failure of media to take what is dirty.
    pub(super) failed: OnceLock<Error>,
    /// Dirty entries of all shards, give or take what is changing.
    pub(super) dirty: AtomicU64,
    pub(super) moved: Moved,
    pub(super) staging: Mutex<Vec<Staging>>,
    /// Lines that are written back together: those of the smallest unit below.
    pub(super) unit_lines: u32,
    streams: Mutex<Streams>,
    started: Instant,
    /// Wakes the flusher; true asks it to end.
    pub(super) stop: Mutex<bool>,
    pub(super) wake: Condvar,
    /// The flusher was called and has not begun a round since.
    pub(super) called: AtomicBool,
}

/// Adds to a counter that nobody synchronises by.
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// A part of a request that lies in one block.
#[derive(Clone, Copy)]
struct Piece {
    block: u64,
    /// First byte in the block.
    skip: u64,
    len: u64,
}

/// Bytes of the device, from `at` to before `end`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub at: u64,
    pub end: u64,
}

impl Range {
    /// The lines of a block that it touches, in units of `unit` lines.
    pub fn lines_in(self, block: u64, unit: u32) -> u16 {
        let (first, behind) = (block * BYTES, (block + 1) * BYTES);
        let (low, high) = (self.at.max(first), self.end.min(behind));
        lines_of(low.saturating_sub(first), high.saturating_sub(low), unit)
    }
}

impl Engine {
    pub(super) fn new(next: Arc<dyn Device>, options: Options, shards: usize) -> Self {
        let info = *next.info();
        let slots = (options.size / BYTES).max(1) as usize;
        let (each, more) = (slots / shards, slots % shards);
        let can = cfg!(any(test, feature = "planted-faults"));
        let plant = if can { options.plant } else { Plant::None };
        let cells =
            (0..shards).map(|number| Cell::new(each + usize::from(number < more), plant)).collect();
        Engine {
            next,
            size: info.size,
            cells,
            budget: Budget::new(slots as u64 * BYTES),
            gate: RwLock::new(()),
            failed: OnceLock::new(),
            dirty: AtomicU64::new(0),
            moved: Moved::default(),
            staging: Mutex::default(),
            unit_lines: (info.block_size_min / LINE as u32).max(1),
            streams: Mutex::new(Streams::new(options.read_ahead.min(slots as u64 / 4))),
            started: Instant::now(),
            stop: Mutex::new(false),
            wake: Condvar::new(),
            called: AtomicBool::new(false),
            options,
        }
    }

    #[inline]
    pub(super) fn cell(&self, block: u64) -> &Cell {
        &self.cells[shard_of(spread(block), self.cells.len())]
    }

    /// The shard of a block that is probably in RAM.
    #[inline]
    fn likely_in(&self, block: u64) -> MutexGuard<'_, Shard> {
        let hash = spread(block);
        let cell = &self.cells[shard_of(hash, self.cells.len())];
        cell.expect(hash);
        cell.lock()
    }

    pub(super) fn planted(&self, plant: Plant) -> bool {
        cfg!(any(test, feature = "planted-faults")) && self.options.plant == plant
    }

    /// Tenths of a second since the cache was made.
    pub(super) fn now(&self) -> u32 {
        (self.started.elapsed().as_millis() / 100) as u32
    }

    pub(super) fn pass(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a block: all but the last one are whole.
    #[inline]
    pub(super) fn block_len(&self, block: u64) -> u64 {
        (self.size - block * BYTES).min(BYTES)
    }

    /// The failure that ended writing, if any did.
    pub(super) fn check_failed(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Passes a request of our own on.
    pub(super) fn below(&self, op: Op, at: u64, len: u64, flags: Flags, sg: &Sg) -> Result<()> {
        self.next.submit(&Request { op, at, len, flags, sg })
    }

    // --- reading ---------------------------------------------------------------------------------

    pub(super) fn read(&self, request: &Request<'_>) -> Result<()> {
        let mut cursor = Cursor::new(request.sg);
        let (mut at, end) = (request.at, request.at + request.len);
        while at < end {
            let piece = piece_at(at, end);
            let behind = (end - 1) / BYTES - piece.block + 1;
            self.read_piece(piece, behind, &mut cursor)?;
            at += piece.len;
        }
        Ok(())
    }

    fn read_piece(&self, piece: Piece, behind: u64, cursor: &mut Cursor<'_>) -> Result<()> {
        let Piece { block, skip, len } = piece;
        for _ in 0..TRIES {
            let mut shard = self.likely_in(block);
            if let Some(slot) = shard.directory.find(block) {
                let hit = u64::from(shard.directory.touch(slot));
                shard.counts.read_hits += hit;
                shard.counts.read_misses += 1 - hit;
                let address = shard.store.address(slot);
                // SAFETY: the slot has a block's bytes, and they do not change under the lock.
                return unsafe { cursor.put(address.add(skip as usize), len) };
            }
            drop(shard);
            if !self.fill(block, behind)? {
                break;
            }
        }
        // It was absent a moment ago, so media had it then; and no older than then they have it.
        count(&self.moved.bypassed, 1);
        let part = cursor.part(len)?;
        self.below(Op::Read, block * BYTES + skip, len, Flags::empty(), &part)
    }

    /// Reads a block and absent ones behind it into RAM: `wanted` of them as asked for, more ahead
    /// of a stream. False when there is no room, or media do not give them.
    fn fill(&self, first: u64, wanted: u64) -> Result<bool> {
        let Some((pass, slot)) = self.claim_first(first) else { return Ok(true) };
        let Some(slot) = slot else { return Ok(false) };
        let known =
            self.streams.lock().unwrap_or_else(PoisonError::into_inner).missed(first, wanted);
        let mut run: SmallVec<[u32; 8]> = SmallVec::new();
        run.push(slot);
        let blocks = self.size.div_ceil(BYTES);
        let slots = self.budget.most / BYTES;
        let most = (wanted + known).min(RUN_MOST).min(slots / 4).min(blocks - first);
        for block in first + 1..first + most {
            let Some(slot) = self.claim_behind(block) else { break };
            run.push(slot);
        }
        let result = self.load(first, &run);
        self.settle_fill(first, wanted, &run, result.is_ok());
        drop(pass);
        Ok(result.is_ok())
    }

    /// Claims a block to be filled. `None` when it is there after all; without a slot there is no
    /// room for it, and no claim.
    #[allow(clippy::type_complexity)]
    fn claim_first(&self, block: u64) -> Option<(RwLockReadGuard<'_, ()>, Option<u32>)> {
        let cell = self.cell(block);
        for _ in 0..TRIES {
            let pass = self.pass();
            let mut shard = cell.lock();
            while shard.claimed(block) && !self.planted(Plant::NoClaimInFill) {
                shard = cell.wait(shard);
            }
            if shard.directory.find(block).is_some() {
                return None;
            }
            match shard.room(&self.budget, self.failed.get().is_some()) {
                Room::Slot(slot) => {
                    cell.note_table(&shard);
                    shard.claims.push(Claim { block, lent: true });
                    return Some((pass, Some(slot)));
                }
                Room::None => return Some((pass, None)),
                Room::Clean(blocks) => {
                    drop((shard, pass));
                    // A failure is kept, and from then on nothing dirty is asked to leave.
                    let _ = self.clean(&blocks, false, None);
                }
            }
        }
        Some((self.pass(), None))
    }

    /// Claims one more block for a run, if that needs neither waiting nor writing back.
    fn claim_behind(&self, block: u64) -> Option<u32> {
        let mut shard = self.cell(block).lock();
        if shard.claimed(block) || shard.directory.find(block).is_some() {
            return None;
        }
        let room = shard.room(&self.budget, self.failed.get().is_some());
        let Room::Slot(slot) = room else { return None };
        shard.claims.push(Claim { block, lent: true });
        Some(slot)
    }

    /// Reads a run of blocks into slots that are lent for them.
    fn load(&self, first: u64, run: &[u32]) -> Result<()> {
        let mut sg = Sg::new();
        for (block, slot) in (first..).zip(run) {
            let address = self.cell(block).lock().store.address(*slot);
            // SAFETY: the slot is lent to this thread and stays until it gives it back.
            unsafe { sg.push_host(address, self.block_len(block)) };
        }
        count(&self.moved.reads, 1);
        count(&self.moved.blocks_read, run.len() as u64);
        self.below(Op::Read, first * BYTES, sg.len(), Flags::empty(), &sg)
    }

    fn settle_fill(&self, first: u64, wanted: u64, run: &[u32], filled: bool) {
        for (block, slot) in (first..).zip(run) {
            let cell = self.cell(block);
            let mut shard = cell.lock();
            let there = self.planted(Plant::NoClaimInFill) && shard.directory.find(block).is_some();
            if filled && !there {
                let ahead = block - first >= wanted;
                shard.insert(block, *slot, if ahead { Fresh::Ahead } else { Fresh::Wanted });
                count(&self.moved.blocks_ahead, u64::from(ahead));
            } else {
                shard.directory.give_back(*slot);
            }
            shard.release(block);
            cell.notify(&shard);
        }
    }

    /// Brings blocks in that somebody will want; as many as a quarter of the cache.
    pub(super) fn prefetch(&self, request: &Request<'_>) -> Result<()> {
        let (first, end) = (request.at / BYTES, (request.at + request.len).div_ceil(BYTES));
        let end = end.min(first + self.budget.most / BYTES / 4);
        for block in first..end {
            if self.cell(block).lock().directory.find(block).is_none() {
                self.fill(block, end - block)?;
            }
        }
        Ok(())
    }

    // --- writing ---------------------------------------------------------------------------------

    pub(super) fn write(&self, request: &Request<'_>) -> Result<()> {
        self.check_failed()?;
        let mut cursor = Cursor::new(request.sg);
        let (mut at, end) = (request.at, request.at + request.len);
        while at < end {
            let piece = piece_at(at, end);
            self.write_piece(piece, request.flags, &mut cursor)?;
            at += piece.len;
        }
        if request.len == 0 {
            return Ok(());
        }
        let fua = request.flags.contains(Flags::FUA);
        if fua || self.options.mode == Mode::WriteThrough {
            let blocks: Vec<u64> = (request.at / BYTES..end.div_ceil(BYTES)).collect();
            let durable = fua.then_some(Range { at: request.at, end });
            return self.clean(&blocks, true, durable);
        }
        self.throttle()
    }

    fn write_piece(&self, piece: Piece, flags: Flags, cursor: &mut Cursor<'_>) -> Result<()> {
        let Piece { block, len, .. } = piece;
        let cell = self.cell(block);
        let whole = len == self.block_len(block);
        let mut missed = false;
        for _ in 0..TRIES {
            let mut shard = self.likely_in(block);
            if let Some(slot) = shard.directory.find(block) {
                shard.directory.touch(slot);
                shard.counts.write_hits += u64::from(!missed);
                return self.store(&mut shard, slot, piece, cursor);
            }
            if shard.claimed(block) && !self.planted(Plant::NoClaimInFill) {
                drop(cell.wait(shard));
                continue;
            }
            shard.counts.write_misses += u64::from(!missed);
            missed = true;
            if !whole {
                drop(shard);
                if !self.fill_one(block) {
                    break;
                }
                continue;
            }
            match shard.room(&self.budget, self.failed.get().is_some()) {
                Room::Slot(slot) => {
                    cell.note_table(&shard);
                    shard.insert(block, slot, Fresh::No);
                    return self.store(&mut shard, slot, piece, cursor);
                }
                Room::None => break,
                Room::Clean(blocks) => {
                    drop(shard);
                    self.clean(&blocks, false, None)?;
                }
            }
        }
        self.write_around(piece, flags, cursor)
    }

    /// Reads one block into RAM because a part of it is written.
    fn fill_one(&self, block: u64) -> bool {
        let Some((_pass, slot)) = self.claim_first(block) else { return true };
        let Some(slot) = slot else { return false };
        let result = self.load(block, &[slot]);
        self.settle_fill(block, 1, &[slot], result.is_ok());
        result.is_ok()
    }

    fn store(
        &self,
        shard: &mut Shard,
        slot: u32,
        piece: Piece,
        cursor: &mut Cursor<'_>,
    ) -> Result<()> {
        // SAFETY: inside the slot: a piece lies in one block.
        let address = unsafe { shard.store.address(slot).add(piece.skip as usize) };
        port::hint_store(address, piece.len as usize);
        // SAFETY: the slot has these bytes; this thread holds the lock.
        unsafe { cursor.get(address, piece.len)? };
        let lines = lines_of(piece.skip, piece.len, self.unit_lines);
        if shard.directory.set_dirty(slot, lines, || self.now()) {
            count(&self.dirty, 1);
        }
        Ok(())
    }

    /// Writes to media what has no room in RAM.
    fn write_around(&self, piece: Piece, flags: Flags, cursor: &mut Cursor<'_>) -> Result<()> {
        let Piece { block, skip, len } = piece;
        let cell = self.cell(block);
        let _pass = self.pass();
        let mut shard = cell.lock();
        while shard.claimed(block) {
            shard = cell.wait(shard);
        }
        if let Some(slot) = shard.directory.find(block) {
            return self.store(&mut shard, slot, piece, cursor);
        }
        let part = cursor.part(len)?;
        shard.claims.push(Claim { block, lent: false });
        drop(shard);
        count(&self.moved.bypassed, 1);
        let result = self.below(Op::Write, block * BYTES + skip, len, flags, &part);
        let mut shard = cell.lock();
        shard.release(block);
        cell.notify(&shard);
        drop(shard);
        result.map_err(|error| self.fail(error))
    }

    /// Keeps the first failure of media to take what was written.
    pub(super) fn fail(&self, error: Error) -> Error {
        // A second failure at the same moment keeps the first as the reason.
        let _ = self.failed.set(error);
        self.failed.get().expect("it was set a line ago").clone()
    }

    /// Wakes the flusher when much is dirty, and helps it when too much is.
    fn throttle(&self) -> Result<()> {
        let (dirty, most) = (self.dirty.load(Ordering::Relaxed), self.budget.most / BYTES);
        if dirty * 100 > most * u64::from(self.options.dirty_background) {
            self.call_flusher();
        }
        if dirty * 100 > most * u64::from(self.options.dirty_most) {
            let coldest = self.some_dirty(32, None);
            return self.clean(&coldest, false, None);
        }
        Ok(())
    }
}

/// The part of a request that starts at `at` and lies in one block.
#[inline]
fn piece_at(at: u64, end: u64) -> Piece {
    let skip = at % BYTES;
    Piece { block: at / BYTES, skip, len: (BYTES - skip).min(end - at) }
}

/// The lines of a range in a block, rounded to units of `unit` lines, one a bit.
#[inline]
fn lines_of(skip: u64, len: u64, unit: u32) -> u16 {
    if len == 0 {
        return 0;
    }
    let first = (skip as u32 / LINE as u32) / unit * unit;
    let end = ((skip + len - 1) as u32 / LINE as u32 / unit + 1) * unit;
    ((1u32 << end) - (1u32 << first)) as u16
}
