//! What is dirty goes to media: copied under the lock of its shard, written without it.
//!
//! Invariants:
//! 1. A block that is being written back is claimed: it is not evicted, and no second copy of it
//!    is on its way. What is written to it meanwhile makes it dirty again.
//! 2. What goes to media is a copy, so that no unit of it changes while media take it: a sector
//!    below is written as it was at one moment.
//! 3. Blocks go in ascending order, neighbours as one request, and of a block the dirty lines
//!    only, rounded to the smallest unit below.
//! 4. When media refuse, what was to be written is dirty again, and the failure is kept.
//!
//! Why a flush is enough: it lists every block that is dirty or claimed while it looks at a shard.
//! A write that was acknowledged before is in RAM and dirty (listed), on its way (claimed, so
//! listed and waited for), or on media (and the flush below is still to come).
//!
//! What this does not do: choose when ([`super::flusher`] and whoever flushes do).

use std::sync::atomic::Ordering;
use std::sync::PoisonError;

use super::engine::{count, Engine, Range};
use super::shard::Claim;
use super::{Plant, BLOCK, LINE};
use crate::block::{Extent, Flags, Op, Request};
use crate::error::{Kind, Result};
use crate::media::{caused_by, Cause};
use crate::sg::Sg;

/// Blocks that are copied before they are written.
const STAGED: usize = 64;
const BYTES: u64 = BLOCK as u64;

/// Copies of what is about to be written.
#[derive(Debug, Default)]
pub struct Staging {
    bytes: Vec<u8>,
    /// Where each run of bytes goes: offset on the device and length, in the order of `bytes`.
    runs: Vec<(u64, usize)>,
    /// The blocks that are claimed for it, with the lines that were dirty.
    held: Vec<(u64, u16)>,
}

/// What a look at a block found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It was copied and is claimed.
    Copied,
    /// There is nothing to write.
    Nothing,
    /// Somebody else moves it.
    Claimed,
}

impl Engine {
    /// Writes back what is dirty of these blocks, which ascend. With `wait` all of it is on its
    /// way or done by somebody else when this returns; without, claimed blocks are left out. Bytes
    /// that are to be `durable` are so then: they are written with FUA, dirty or not, because
    /// somebody else may have written them without.
    pub(super) fn clean(&self, blocks: &[u64], wait: bool, durable: Option<Range>) -> Result<()> {
        self.check_failed()?;
        let _pass = self.pass();
        let mut staging = self.staging();
        let (mut next, mut missed) = (0, false);
        let mut result = Ok(());
        while next < blocks.len() && result.is_ok() {
            while let Some(block) = blocks.get(next) {
                if staging.held.len() == STAGED {
                    break;
                }
                // Who holds claims does not wait for others.
                let must = durable.map_or(0, |range| range.lines_in(*block, self.unit_lines));
                match self.copy(*block, must, wait && staging.held.is_empty(), &mut staging) {
                    Found::Claimed if wait => break,
                    Found::Copied => {}
                    Found::Nothing | Found::Claimed => missed = true,
                }
                next += 1;
            }
            result = self.write_staged(&mut staging, durable.is_some());
        }
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
        if missed && result.is_ok() && durable.is_some() && !self.planted(Plant::FuaForgotten) {
            // It left RAM again, or never came in.
            result = self.below(Op::Flush, 0, 0, Flags::empty(), &Sg::new());
        }
        result.map_err(|error| self.fail(error))
    }

    fn staging(&self) -> Staging {
        let kept = self.staging.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_default()
    }

    /// Claims a block and copies what is dirty of it, and the lines that `must` be written.
    fn copy(&self, block: u64, must: u16, wait: bool, staging: &mut Staging) -> Found {
        let cell = self.cell(block);
        let mut shard = cell.lock();
        while shard.claimed(block) {
            if !wait {
                return Found::Claimed;
            }
            shard = cell.wait(shard);
        }
        let Some(slot) = shard.directory.find(block) else { return Found::Nothing };
        let dirty = shard.directory.entry(slot).dirty;
        let lines = dirty | must;
        if lines == 0 {
            return Found::Nothing;
        }
        if dirty != 0 && !self.planted(Plant::CleanAfterWriteBack) {
            shard.directory.set_clean(slot);
            self.dirty.fetch_sub(1, Ordering::Relaxed);
        }
        if !self.planted(Plant::NoClaimInWriteBack) {
            shard.claims.push(Claim { block, lent: false });
        }
        staging.held.push((block, lines));
        let address = shard.store.address(slot);
        let end = self.block_len(block) as usize;
        for (skip, len) in runs_of(lines, end) {
            // SAFETY: inside the slot, which does not change under the lock.
            let bytes = unsafe { std::slice::from_raw_parts(address.add(skip), len) };
            staging.push(block * BYTES + skip as u64, bytes);
        }
        Found::Copied
    }

    /// Writes what was copied, and ends the claims whatever comes of it.
    fn write_staged(&self, staging: &mut Staging, durable: bool) -> Result<()> {
        let (mut start, mut result) = (0, Ok(()));
        let kept = caused_by(Cause::WriteBack);
        let with_fua = durable && !self.planted(Plant::FuaForgotten);
        let fua = if with_fua { Flags::FUA } else { Flags::empty() };
        for (at, len) in &staging.runs {
            if result.is_ok() {
                let bytes = &mut staging.bytes[start..start + len];
                // SAFETY: the buffer outlives the request, and nobody else has it.
                let sg = unsafe { Sg::host(bytes.as_mut_ptr(), *len as u64) };
                result = self.below(Op::Write, *at, *len as u64, fua, &sg);
                count(&self.moved.writes, 1);
                count(&self.moved.bytes_written, *len as u64);
            }
            start += len;
        }
        drop(kept);
        if let Err(error) = &result {
            // Before the claims end, so that nobody takes the blocks for clean.
            self.fail(error.clone());
        }
        for (block, lines) in staging.held.drain(..) {
            let cell = self.cell(block);
            let mut shard = cell.lock();
            let slot = shard.directory.find(block);
            if let (Err(_), Some(slot)) = (&result, slot) {
                if shard.directory.set_dirty(slot, lines, || self.now()) {
                    count(&self.dirty, 1);
                }
            } else if let (Some(slot), true) = (slot, self.planted(Plant::CleanAfterWriteBack)) {
                if shard.directory.set_clean(slot) != 0 {
                    self.dirty.fetch_sub(1, Ordering::Relaxed);
                }
            }
            count(&self.moved.blocks_written, u64::from(result.is_ok()));
            shard.release(block);
            cell.notify(&shard);
        }
        staging.bytes.clear();
        staging.runs.clear();
        result
    }

    /// Blocks from `first` to before `end` that are dirty or moving, in ascending order.
    pub(super) fn unsettled(&self, first: u64, end: u64) -> Vec<u64> {
        let mut blocks = Vec::new();
        let forgotten = usize::from(self.planted(Plant::FlushForgetsShard));
        for cell in self.cells.iter().skip(forgotten) {
            let shard = cell.lock();
            blocks.extend(shard.directory.dirty().map(|(block, _)| block));
            blocks.extend(shard.claims.iter().map(|claim| claim.block));
        }
        blocks.retain(|block| (first..end).contains(block));
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// Dirty blocks, a share of `most` from each shard, in ascending order: those that have been
    /// so since before `until`, or without it those that go next.
    pub(super) fn some_dirty(&self, most: usize, until: Option<u32>) -> Vec<u64> {
        let share = most.div_ceil(self.cells.len());
        let mut blocks = Vec::new();
        for cell in &self.cells {
            let shard = cell.lock();
            let before = blocks.len();
            if until.is_none() {
                blocks.extend(shard.directory.coldest_dirty(share));
            }
            if blocks.len() == before {
                let old = |since: u32| until.is_none_or(|until| since <= until);
                let oldest = shard.directory.dirty().take(share).filter(|(_, since)| old(*since));
                blocks.extend(oldest.map(|(block, _)| block));
            }
        }
        blocks.sort_unstable();
        blocks
    }

    /// Makes every write that was acknowledged before durable.
    pub(super) fn flush(&self) -> Result<()> {
        self.clean(&self.unsettled(0, u64::MAX), true, None)?;
        let result = self.below(Op::Flush, 0, 0, Flags::empty(), &Sg::new());
        result.map_err(|error| self.fail(error))
    }

    // --- zero, discard, extents ------------------------------------------------------------------

    /// The whole blocks of a range: the first one and the one behind the last.
    fn whole_blocks(&self, request: &Request<'_>) -> (u64, u64) {
        let end = request.at + request.len;
        let behind = if end == self.size { end.div_ceil(BYTES) } else { end / BYTES };
        (request.at.div_ceil(BYTES), behind)
    }

    /// Zeroes whole blocks below, forgets them here, and writes zeroes to what is left at both
    /// ends.
    pub(super) fn zero(&self, request: &Request<'_>) -> Result<()> {
        self.check_failed()?;
        let (first, behind) = self.whole_blocks(request);
        let end = request.at + request.len;
        if first >= behind {
            return self.write_zeroes(request.at, request.len, request.flags);
        }
        self.change_below(request, first, behind)?;
        let inner_end = (behind * BYTES).min(end);
        self.write_zeroes(request.at, first * BYTES - request.at, request.flags)?;
        self.write_zeroes(inner_end, end - inner_end, request.flags)
    }

    /// Discards whole blocks; parts of blocks keep what they hold.
    pub(super) fn discard(&self, request: &Request<'_>) -> Result<()> {
        self.check_failed()?;
        let (first, behind) = self.whole_blocks(request);
        if first < behind {
            return self.change_below(request, first, behind);
        }
        Ok(())
    }

    fn change_below(&self, request: &Request<'_>, first: u64, behind: u64) -> Result<()> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let at = first * BYTES;
        let len = (behind * BYTES).min(self.size) - at;
        self.below(request.op, at, len, request.flags, request.sg).map_err(|error| {
            // A refusal to be fast is none of the media's failures.
            if error.kind == Kind::NotSupported {
                error
            } else {
                self.fail(error)
            }
        })?;
        if !self.planted(Plant::ZeroLeavesBlocks) {
            self.forget(first, behind);
        }
        Ok(())
    }

    /// Drops blocks, dirty or not.
    fn forget(&self, first: u64, behind: u64) {
        let cached = self.budget.used.load(Ordering::Relaxed) / BYTES;
        let blocks: Vec<u64> = if behind - first <= cached {
            (first..behind).collect()
        } else {
            let all =
                |cell: &super::shard::Cell| cell.lock().directory.blocks().collect::<Vec<_>>();
            let named = self.cells.iter().flat_map(all);
            named.filter(|block| (first..behind).contains(block)).collect()
        };
        for block in blocks {
            let mut shard = self.cell(block).lock();
            if let Some(slot) = shard.directory.find(block) {
                let dirty = shard.directory.entry(slot).dirty != 0;
                shard.directory.remove(slot);
                self.dirty.fetch_sub(u64::from(dirty), Ordering::Relaxed);
            }
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, flags: Flags) -> Result<()> {
        const ZEROES: [u8; BLOCK] = [0; BLOCK];
        if len == 0 {
            return Ok(());
        }
        let halves = [len.min(BYTES), len.saturating_sub(BYTES)];
        let mut sg = Sg::new();
        for half in halves.into_iter().filter(|half| *half > 0) {
            // SAFETY: a constant that is as long as a block; a write only reads it.
            unsafe { sg.push_host(ZEROES.as_ptr().cast_mut(), half) };
        }
        self.write(&Request { op: Op::Write, at, len, flags: flags & Flags::FUA, sg: &sg })
    }

    /// Data and holes of a range: what is dirty is data, whatever media say.
    pub(super) fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        // Asked first: a block that is written back meanwhile is data below by then.
        let dirty = self.unsettled(at / BYTES, (at + len).div_ceil(BYTES));
        let below = self.next.extents(at, len)?;
        let mut found: Vec<Extent> = Vec::new();
        let mut push = |len: u64, hole: bool| match found.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.hole == hole => last.len += len,
            _ => found.push(Extent { len, hole }),
        };
        let mut start = at;
        for extent in below {
            let end = start + extent.len;
            let mut from = start;
            if extent.hole {
                let here = dirty.partition_point(|block| (block + 1) * BYTES <= start);
                for block in dirty[here..].iter().take_while(|block| **block * BYTES < end) {
                    let (low, high) = ((block * BYTES).max(from), ((block + 1) * BYTES).min(end));
                    push(low - from, true);
                    push(high - low, false);
                    from = high;
                }
            }
            push(end - from, extent.hole);
            start = end;
        }
        Ok(found)
    }
}

impl Staging {
    fn push(&mut self, at: u64, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        match self.runs.last_mut() {
            Some((start, len)) if *start + *len as u64 == at => *len += bytes.len(),
            _ => self.runs.push((at, bytes.len())),
        }
    }
}

/// Runs of dirty lines as first byte and length, within `end` bytes.
fn runs_of(lines: u16, end: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut rest = u32::from(lines);
    std::iter::from_fn(move || {
        let first = rest.trailing_zeros() as usize;
        if rest == 0 || first * LINE >= end {
            return None;
        }
        let count = (rest >> first).trailing_ones() as usize;
        rest &= !(((1u32 << count) - 1) << first);
        let skip = first * LINE;
        Some((skip, (skip + count * LINE).min(end) - skip))
    })
}
