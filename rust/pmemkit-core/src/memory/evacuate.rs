//! Moving extents to other frames behind their addresses, while threads go on storing to them.
//!
//! A chunk at a time: stores to the chunk's addresses are held ([`super::catch`]); the bytes are
//! copied to the target frames, which are mapped elsewhere too; the target frames are mapped over
//! the old ones in one step of the kernel; whoever waits stores again, to the new frames. Loads
//! never wait: they find the same bytes before and after.
//!
//! Invariants:
//! 1. All target frames are taken before the first byte moves, and all source frames stay taken
//!    until the last one did: a migration that stops can always go back.
//! 2. It completes, or every extent is where it was, the blocks are in the states they had, and the
//!    error says why. Only a system call that fails on the way back leaves an extent at its new
//!    frames; it is then an extent of these, whole and valid.
//! 3. No store is lost: between hold and mapping nobody stores to the chunk, and afterwards nobody
//!    reaches the old frames through its addresses.
//! 4. One migration at a time a pool.
//!
//! What this does not do: move what is pinned, fixed, or shared with a forked child; it says so.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::catch::Catch;
use super::chunk::{move_chunk, Chunk, Side};
use super::pool::{locked, Extent, Piece, Pool, State};
use super::region::BlockState;
use super::state::Wanted;
use super::{guard, sys, FRAME_SIZE};
use crate::error::{Error, Kind, Result};

/// How long the gate is waited for between looks at the clock.
const GATE_WAIT: Duration = Duration::from_millis(20);

/// What is to be moved.
#[derive(Clone, Debug)]
pub enum Work {
    /// Everything out of a region, which then leaves the pool.
    Remove {
        /// The region.
        region: u32,
        /// Addresses of extents that are over with it instead of moving.
        abandoned: Vec<u64>,
    },
    /// Everything out of some blocks of a region, which go offline.
    Offline {
        /// The region.
        region: u32,
        /// Its first block.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Some extents into a region, each as a whole.
    Move {
        /// Their addresses.
        addresses: Vec<u64>,
        /// The region.
        to: u32,
    },
    /// What lies at some addresses into a region, as far as it can move.
    Ranges {
        /// Where they start and end; no two overlap.
        ranges: Vec<(u64, u64)>,
        /// The region.
        to: u32,
    },
}

/// How far a migration is. Bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Moved so far.
    pub moved: u64,
    /// To be moved.
    pub total: u64,
}

/// What a caller answers to progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop, and put everything back.
    Cancel,
}

/// What a migration did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Bytes that were moved.
    pub bytes: u64,
    /// Extents that they belong to.
    pub extents: u64,
    /// Time from the first chunk to the last.
    pub elapsed_ns: u64,
    /// The longest that stores to one chunk had to wait.
    pub hold_ns_peak: u64,
}

/// A part of an extent, and where its bytes are and go.
struct Move {
    /// The extent.
    extent: u64,
    /// Where the part starts.
    at: u64,
    frames: u64,
    source: Vec<Piece>,
    target: Vec<Piece>,
    /// Frames that are at the target.
    done: u64,
}

/// A migration that was prepared.
struct Plan {
    moves: Vec<Move>,
    /// Region, first block, blocks and their states before.
    blocks: Option<(u32, u64, Vec<BlockState>)>,
    sides: BTreeMap<u32, Side>,
    /// Addresses whose bytes lie in other frames than those of their window, in order. What moves
    /// meanwhile is among them.
    displaced: Vec<(u64, u64)>,
    total: u64,
}

/// Which piece the frame `offset` of an extent lies in: region, frame, frames from there on.
fn locate(pieces: &[Piece], mut offset: u64) -> Option<(u32, u64, u64)> {
    for piece in pieces {
        if offset < piece.frames {
            return Some((piece.region, piece.first + offset, piece.frames - offset));
        }
        offset -= piece.frames;
    }
    None
}

/// The same pieces with `frames` frames from `offset` on replaced; neighbours are joined.
fn replaced(pieces: &[Piece], offset: u64, with: &[Piece]) -> Vec<Piece> {
    let frames: u64 = with.iter().map(|piece| piece.frames).sum();
    let total: u64 = pieces.iter().map(|piece| piece.frames).sum();
    let cut = |mut from: u64, to: u64| {
        let mut part = Vec::new();
        while from < to {
            let Some((region, first, left)) = locate(pieces, from) else { break };
            let frames = left.min(to - from);
            part.push(Piece { region, first, frames });
            from += frames;
        }
        part
    };
    let mut joined: Vec<Piece> = Vec::new();
    for piece in cut(0, offset).into_iter().chain(with.to_vec()).chain(cut(offset + frames, total))
    {
        match joined.last_mut() {
            Some(last)
                if last.region == piece.region && last.first + last.frames == piece.first =>
            {
                last.frames += piece.frames;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

/// What a migration is told from outside.
struct Driver<'a> {
    deadline: Option<Instant>,
    report: &'a mut dyn FnMut(Progress) -> Flow,
    report_every: Duration,
    reported: Option<Instant>,
    progress: Progress,
    hold_ns_peak: u64,
}

impl Driver<'_> {
    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.progress.moved += bytes;
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let Progress { moved, total } = self.progress;
            let text = format!("the time is over with {moved} of {total} bytes moved");
            let mut error = Error::new(Kind::Busy, "migrate", text);
            error.source_errno = Some(libc::ETIMEDOUT);
            return Err(error);
        }
        let recently = self.reported.is_some_and(|last| last.elapsed() < self.report_every);
        if recently && self.progress.moved < self.progress.total {
            return Ok(());
        }
        self.reported = Some(Instant::now());
        if (self.report)(self.progress) == Flow::Continue {
            return Ok(());
        }
        let mut error = Error::new(Kind::Busy, "migrate", "it was cancelled");
        error.source_errno = Some(libc::ECANCELED);
        Err(error)
    }
}

impl Pool {
    /// Carries out a migration. `report` is called now and then and may cancel it.
    pub fn migrate(
        &self,
        work: &Work,
        deadline: Option<Instant>,
        report: &mut dyn FnMut(Progress) -> Flow,
    ) -> Result<Outcome> {
        self.require_own("migrate")?;
        self.refuse_children()?;
        let mut plan = {
            let mut sampler = locked(&self.sampler);
            sampler.abandon();
            self.prepare(work)?
        };
        let mut driver = Driver {
            deadline,
            report,
            report_every: self.options.report_every,
            reported: None,
            progress: Progress { moved: 0, total: plan.total },
            hold_ns_peak: 0,
        };
        let started = Instant::now();
        let moved = self.move_all(&mut plan, &mut driver);
        let elapsed_ns = started.elapsed().as_nanos() as u64;
        let hold_ns_peak = driver.hold_ns_peak;
        if let Err(mut error) = moved {
            if let Err(worse) = self.move_back(&mut plan) {
                error.detail = format!("{}; and going back: {}", error.detail, worse.detail);
            }
            self.finish(work, plan, false, 0);
            return Err(error);
        }
        let extents = plan.moves.len() as u64;
        let bytes = plan.total;
        self.finish(work, plan, true, hold_ns_peak);
        Ok(Outcome { bytes, extents, elapsed_ns, hold_ns_peak })
    }

    /// Makes the blocks of a region usable again.
    pub fn online(&self, region: u32, first: u64, count: u64) -> Result<()> {
        self.require_own("online")?;
        let mut state = locked(&self.state);
        require_blocks(&state, region, first, count)?;
        let block = self.options.block_frames;
        for index in first..first + count {
            let Some(member) = state.members.get_mut(&region) else { continue };
            if member.blocks.get(index as usize) == Some(&BlockState::Offline) {
                member.runs.restore(index * block, block);
                state.mark(region, index, 1, BlockState::Online);
            }
        }
        Ok(())
    }

    fn refuse_children(&self) -> Result<()> {
        if !self.is_shared_with_children() {
            return Ok(());
        }
        let text = "this process has forked, and its children share the pool's frames; say \
                    forget_children once they are gone";
        Err(Error::new(Kind::Busy, "migrate", text))
    }

    // --- preparing -------------------------------------------------------------------------------

    fn prepare(&self, work: &Work) -> Result<Plan> {
        let mut state = locked(&self.state);
        if state.migrating {
            return Err(Error::new(Kind::Busy, "migrate", "the pool is migrating already"));
        }
        let mut plan = Plan {
            moves: Vec::new(),
            blocks: None,
            sides: BTreeMap::new(),
            displaced: Vec::new(),
            total: 0,
        };
        let prepared = self.fill(&mut state, work, &mut plan);
        if let Err(error) = prepared {
            self.undo(&mut state, &plan);
            return Err(error);
        }
        for each in &plan.moves {
            if let Some(extent) = state.extents.get_mut(&each.extent) {
                extent.moving = true;
            }
        }
        state.migrating = true;
        Ok(plan)
    }

    fn fill(&self, state: &mut State, work: &Work, plan: &mut Plan) -> Result<()> {
        let (parts, only, except) = match *work {
            Work::Remove { region, ref abandoned } => {
                let count = state.member(region)?.blocks.len() as u64;
                let parts = self.isolate(state, plan, (region, 0, count), abandoned)?;
                (parts, None, Some(region))
            }
            Work::Offline { region, first, count } => {
                (self.isolate(state, plan, (region, first, count), &[])?, None, None)
            }
            Work::Move { ref addresses, to } => (parts_of(state, addresses, to)?, Some(to), None),
            Work::Ranges { ref ranges, to } => (parts_at(state, ranges, to)?, Some(to), None),
        };
        plan.total = parts.iter().map(|part| part.frames * FRAME_SIZE).sum();
        let candidates = match (parts.is_empty(), only) {
            (true, _) => Vec::new(),
            (false, only) => state.candidates(only, except)?,
        };
        for mut part in parts {
            let wanted = Wanted::at(part.frames, part.at);
            let Some(target) = state.take_from(&wanted, &candidates) else {
                return Err(no_room(state, &candidates, plan.total, &part));
            };
            part.target = target;
            plan.moves.push(part);
        }
        for each in &plan.moves {
            for piece in each.source.iter().chain(&each.target) {
                add_side(state, plan.sides.entry(piece.region), piece.region)?;
            }
        }
        let moving = plan.moves.iter().map(|each| (each.at, each.at + each.frames * FRAME_SIZE));
        plan.displaced = state.displaced();
        plan.displaced.extend(moving);
        plan.displaced.sort_unstable();
        self.watch(state, plan)?;
        if self.options.share_with_children {
            for each in &plan.moves {
                sys::keep_from_children(each.at, each.frames * FRAME_SIZE)?;
            }
            // A child that was forked before the last line has them; one forked later has not.
            self.refuse_children()?;
        }
        Ok(())
    }

    /// Keeps blocks from being filled further; gives what has to leave them.
    fn isolate(
        &self,
        state: &mut State,
        plan: &mut Plan,
        (region, first, count): (u32, u64, u64),
        abandoned: &[u64],
    ) -> Result<Vec<Move>> {
        require_blocks(state, region, first, count)?;
        let block = self.options.block_frames;
        let (start, end) = (first * block, (first + count) * block);
        let mut parts = parts_in(state, region, start, end);
        parts.retain(|part| !abandoned.contains(&part.extent));
        refuse_held(state, &parts)?;
        let Some(member) = state.members.get_mut(&region) else { return Ok(parts) };
        let before = member.blocks[first as usize..(first + count) as usize].to_vec();
        for (index, &was) in before.iter().enumerate() {
            if was == BlockState::Online {
                member.runs.withdraw(start + index as u64 * block, block);
            }
        }
        plan.blocks = Some((region, first, before));
        state.mark(region, first, count, BlockState::Leaving);
        Ok(parts)
    }

    /// Prepares the handler for addresses whose stores wait by a signal.
    fn watch(&self, state: &mut State, plan: &Plan) -> Result<()> {
        let by_signal = |side: &Side| matches!(side.catch, Catch::Signal);
        if !plan.sides.values().any(by_signal) {
            return Ok(());
        }
        guard::install()?;
        for each in &plan.moves {
            let base = state.extents.get(&each.extent).map_or(0, |extent| extent.window);
            let Some(window) = state.windows.get_mut(&base) else { continue };
            if window.watched.is_none() {
                window.watched = Some(guard::Watched::new(base, window.len)?);
            }
        }
        Ok(())
    }

    /// Gives back what a plan took. Its extents are where they were.
    fn undo(&self, state: &mut State, plan: &Plan) {
        for each in &plan.moves {
            state.give(&each.target);
            if self.options.share_with_children {
                let _ = sys::show_to_children(each.at, each.frames * FRAME_SIZE);
            }
        }
        let Some((region, first, before)) = &plan.blocks else { return };
        let block = self.options.block_frames;
        for (index, &was) in before.iter().enumerate() {
            let number = first + index as u64;
            state.mark(*region, number, 1, was);
            if let (BlockState::Online, Some(member)) = (was, state.members.get_mut(region)) {
                member.runs.restore(number * block, block);
            }
        }
    }

    // --- moving ----------------------------------------------------------------------------------

    fn move_all(&self, plan: &mut Plan, driver: &mut Driver<'_>) -> Result<()> {
        driver.advance(0)?;
        for each in &mut plan.moves {
            while each.done < each.frames {
                let chunk = self.next_chunk(each, each.done, true)?;
                self.close_gate(driver.deadline)?;
                let moved = move_chunk(&mut plan.sides, &plan.displaced, &chunk);
                self.open_gate();
                driver.hold_ns_peak = driver.hold_ns_peak.max(moved?);
                each.done += chunk.frames;
                driver.advance(chunk.frames * FRAME_SIZE)?;
            }
        }
        Ok(())
    }

    /// Puts everything back, from the end on, so that what a failure leaves at the target is the
    /// start of a move. Goes on with the others then, and reports the first failure.
    fn move_back(&self, plan: &mut Plan) -> Result<()> {
        let mut failed = Ok(());
        for each in &mut plan.moves {
            let mut chunks = Vec::new();
            let mut offset = 0;
            while offset < each.done {
                let mut chunk = self.next_chunk(each, offset, false)?;
                chunk.frames = chunk.frames.min(each.done - offset);
                offset += chunk.frames;
                chunks.push(chunk);
            }
            while let Some(chunk) = chunks.pop() {
                self.close_gate(None)?;
                let moved = move_chunk(&mut plan.sides, &plan.displaced, &chunk);
                self.open_gate();
                if let Err(error) = moved {
                    failed = failed.and(Err(error));
                    break;
                }
                each.done -= chunk.frames;
            }
        }
        failed
    }

    fn next_chunk(&self, each: &Move, offset: u64, forward: bool) -> Result<Chunk> {
        let sides = (locate(&each.source, offset), locate(&each.target, offset));
        let (Some(source), Some(target)) = sides else {
            let text = format!("frame {offset} of the extent at {:#x} has no place", each.extent);
            return Err(Error::new(Kind::System, "migrate", text));
        };
        let at = each.at + offset * FRAME_SIZE;
        // Chunks end at multiples of their size, so that page tables can be moved as a whole.
        let whole = self.options.chunk - at % self.options.chunk;
        let frames = (whole / FRAME_SIZE).min(source.2).min(target.2);
        let (source, target) = ((source.0, source.1), (target.0, target.1));
        let (from, to) = if forward { (source, target) } else { (target, source) };
        Ok(Chunk { at, frames, from, to })
    }

    fn close_gate(&self, deadline: Option<Instant>) -> Result<()> {
        let mut gate = locked(&self.gate);
        gate.closing = true;
        while gate.inside > 0 {
            let left = deadline.map_or(GATE_WAIT, |deadline| {
                deadline.saturating_duration_since(Instant::now()).min(GATE_WAIT)
            });
            let waited = self.gate_moved.wait_timeout(gate, left);
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                gate.closing = false;
                self.gate_moved.notify_all();
                let text = format!("{} writers stayed inside the gate", gate.inside);
                let mut error = Error::new(Kind::Busy, "migrate", text);
                error.source_errno = Some(libc::ETIMEDOUT);
                return Err(error);
            }
        }
        Ok(())
    }

    fn open_gate(&self) {
        locked(&self.gate).closing = false;
        self.gate_moved.notify_all();
    }

    // --- ending ----------------------------------------------------------------------------------

    fn finish(&self, work: &Work, plan: Plan, completed: bool, hold_ns_peak: u64) {
        let mut state = locked(&self.state);
        if !completed {
            // What could not be put back belongs to where it is now.
            let (stuck, back): (Vec<_>, Vec<_>) =
                plan.moves.into_iter().partition(|each| each.done > 0);
            for each in &stuck {
                self.settle(&mut state, each, each.done);
            }
            let plan = Plan { moves: back, ..plan_of(plan.blocks) };
            self.undo(&mut state, &plan);
            self.release_moved(&mut state, plan.moves.iter().chain(&stuck));
        } else {
            for each in &plan.moves {
                self.settle(&mut state, each, each.frames);
            }
            state.stats.migrated += plan.total;
            state.stats.hold_ns_peak = state.stats.hold_ns_peak.max(hold_ns_peak);
            self.release_moved(&mut state, plan.moves.iter());
            match *work {
                Work::Remove { region, ref abandoned } => {
                    abandoned.iter().for_each(|&address| state.release(address));
                    state.drop_member(region);
                }
                Work::Offline { region, first, count } => {
                    state.mark(region, first, count, BlockState::Offline);
                }
                Work::Move { .. } | Work::Ranges { .. } => {}
            }
        }
        state.migrating = false;
        drop(state);
        self.changed.notify_all();
    }

    /// The first `done` frames of a move are at the target for good.
    fn settle(&self, state: &mut State, each: &Move, done: u64) {
        let cut = |pieces: &[Piece], from: u64, to: u64| {
            let mut part = Vec::new();
            let mut at = from;
            while at < to {
                let Some((region, first, left)) = locate(pieces, at) else { break };
                part.push(Piece { region, first, frames: left.min(to - at) });
                at += left.min(to - at);
            }
            part
        };
        let moved = cut(&each.target, 0, done);
        if let Some(extent) = state.extents.get_mut(&each.extent) {
            let offset = (each.at - each.extent) / FRAME_SIZE;
            extent.pieces = replaced(&extent.pieces, offset, &moved);
        }
        state.give(&cut(&each.source, 0, done));
        state.give(&cut(&each.target, done, each.frames));
        if self.options.share_with_children {
            let _ = sys::show_to_children(each.at, each.frames * FRAME_SIZE);
        }
    }

    fn release_moved<'a>(&self, state: &mut State, moves: impl Iterator<Item = &'a Move>) {
        for each in moves {
            let Some(extent) = state.extents.get_mut(&each.extent) else { continue };
            extent.moving = false;
            if extent.dead {
                state.release(each.extent);
            }
        }
    }
}

fn plan_of(blocks: Option<(u32, u64, Vec<BlockState>)>) -> Plan {
    Plan { moves: Vec::new(), blocks, sides: BTreeMap::new(), displaced: Vec::new(), total: 0 }
}

fn add_side(
    state: &State,
    entry: std::collections::btree_map::Entry<'_, u32, Side>,
    region: u32,
) -> Result<()> {
    let member = state.member(region)?;
    entry.or_insert_with(|| Side {
        file: member.file.clone(),
        offset: member.file_offset(0),
        frames: member.frames,
        catch: member.catch.clone(),
        large_pages: member.options.large_pages,
        writable: member.writable,
        window: member.window,
        alias: None,
    });
    Ok(())
}

fn require_blocks(state: &State, region: u32, first: u64, count: u64) -> Result<()> {
    let blocks = state.member(region)?.blocks.len() as u64;
    if count > 0 && first.checked_add(count).is_some_and(|end| end <= blocks) {
        return Ok(());
    }
    let text = format!("there are no {count} blocks from {first} on: the region has {blocks}");
    Err(Error::new(Kind::OutOfRange, "migrate", text))
}

/// The parts of extents that lie in frames `start` to `end` of a region.
fn parts_in(state: &State, region: u32, start: u64, end: u64) -> Vec<Move> {
    let mut parts = Vec::new();
    for (&address, extent) in &state.extents {
        let mut offset = 0;
        for piece in &extent.pieces {
            let first = piece.first.max(start);
            let last = (piece.first + piece.frames).min(end);
            if piece.region == region && first < last {
                let at = address + (offset + first - piece.first) * FRAME_SIZE;
                let frames = last - first;
                let source = vec![Piece { region, first, frames }];
                parts.push(Move { extent: address, at, frames, source, target: vec![], done: 0 });
            }
            offset += piece.frames;
        }
    }
    parts
}

/// The parts of extents that are to come to a region and are not there.
fn parts_of(state: &mut State, addresses: &[u64], to: u32) -> Result<Vec<Move>> {
    state.member(to)?;
    let mut parts: Vec<Move> = Vec::new();
    for &address in addresses {
        let Some((start, extent)) = state.extent_at(address) else {
            let text = format!("no extent of this pool is at address {address:#x}");
            return Err(Error::new(Kind::Invalid, "migrate", text));
        };
        let elsewhere = extent.pieces.iter().any(|piece| piece.region != to);
        if elsewhere && !parts.iter().any(|part| part.extent == start) {
            let (frames, source) = (extent.frames, extent.pieces.clone());
            parts.push(Move { extent: start, at: start, frames, source, target: vec![], done: 0 });
        }
    }
    refuse_held(state, &parts)?;
    Ok(parts)
}

/// The parts of extents at some addresses that are not in a region yet and can come to it.
fn parts_at(state: &State, ranges: &[(u64, u64)], to: u32) -> Result<Vec<Move>> {
    state.member(to)?;
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable();
    let mut parts = Vec::new();
    let mut end_before = 0;
    for (start, end) in ranges {
        if start < end_before || end < start || (start | end) % FRAME_SIZE != 0 {
            let text = format!("addresses {start:#x} to {end:#x} are no range of their own");
            return Err(Error::new(Kind::Invalid, "migrate", text));
        }
        end_before = end;
        for (extent, at, piece) in state.pieces_at(start, end) {
            let held = state.extents.get(&extent).is_none_or(Extent::is_held);
            if !held && piece.region != to {
                let (frames, source) = (piece.frames, vec![piece]);
                parts.push(Move { extent, at, frames, source, target: vec![], done: 0 });
            }
        }
    }
    Ok(parts)
}

/// Refuses to move what is pinned or fixed, naming the first of them.
fn refuse_held(state: &State, parts: &[Move]) -> Result<()> {
    let extents = parts.iter().filter_map(|part| Some((part, state.extents.get(&part.extent)?)));
    let held: Vec<_> = extents.filter(|(_, extent)| extent.is_held()).collect();
    let Some((part, extent)) = held.first() else { return Ok(()) };
    let why = if extent.fixed { "fixed" } else { "pinned" };
    let text = format!(
        "{} extents cannot move: the first, {} bytes at address {:#x}, is {why}",
        held.len(),
        extent.asked,
        part.extent
    );
    Err(Error::new(Kind::Busy, "migrate", text))
}

fn no_room(state: &State, candidates: &[u32], total: u64, part: &Move) -> Error {
    let members = candidates.iter().filter_map(|id| state.members.get(id));
    let free: u64 = members.map(|member| member.runs.free_frames() * FRAME_SIZE).sum();
    let text = format!(
        "no room: {total} bytes would have to move; after the others, {free} bytes are free for \
         the {} bytes at address {:#x}",
        part.frames * FRAME_SIZE,
        part.at
    );
    Error::new(Kind::NoSpace, "migrate", text)
}
