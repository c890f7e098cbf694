//! What the pool's lock protects, and the steps that keep it consistent.
//!
//! Invariants: those of [`super::pool`].
//!
//! What this does not do: lock, move bytes.

use super::pool::{Extent, Piece, Placement, Request, State};
use super::region::{BlockState, Member};
use super::{sys, FRAME_SIZE};
use crate::error::{Error, Kind, Result};

/// Where frames may be taken, and what must hold of them.
pub(super) struct Wanted {
    pub frames: u64,
    pub align: u64,
    /// The address they will be mapped at, where that is fixed already: larger units must fit.
    pub at: Option<u64>,
    /// One run or nothing.
    pub whole: bool,
}

impl Wanted {
    /// Frames for a new extent, aligned so that large pages fit.
    pub fn new(frames: u64) -> Wanted {
        Wanted { frames, align: frames.next_power_of_two().min(512), at: None, whole: false }
    }

    /// Frames to come to an address that is in use.
    pub fn at(frames: u64, at: u64) -> Wanted {
        Wanted { at: Some(at), ..Wanted::new(frames) }
    }

    /// Frames that a member of this unit would have to give, if it can.
    fn rounded(&self, unit: u64) -> Option<u64> {
        match self.at {
            None => Some(self.frames.next_multiple_of(unit)),
            Some(at) => {
                let fits = self.frames.is_multiple_of(unit) && at % (unit * FRAME_SIZE) == 0;
                fits.then_some(self.frames)
            }
        }
    }
}

impl State {
    /// Takes frames for a new extent.
    pub fn take(
        &mut self,
        frames: u64,
        request: &Request,
        placement: Placement,
    ) -> Result<Vec<Piece>> {
        let candidates = self.candidates(request.region, None)?;
        if let (Placement::Interleave { granule }, None) = (placement, request.region) {
            if candidates.len() > 1 && frames > granule {
                if let Some(pieces) = self.interleave(frames, granule, &candidates) {
                    return Ok(pieces);
                }
            }
        }
        let wanted = Wanted { whole: request.whole, ..Wanted::new(frames) };
        self.take_from(&wanted, &candidates).ok_or_else(|| {
            let free: u64 = candidates.iter().map(|id| self.free_in(*id)).sum();
            let text = format!(
                "{} bytes: {} bytes are free",
                frames * FRAME_SIZE,
                free.saturating_mul(FRAME_SIZE)
            );
            Error::new(Kind::NoSpace, "allocate", text)
        })
    }

    /// Members by rank that may be taken from: all but one, or only one.
    pub fn candidates(&self, only: Option<u32>, except: Option<u32>) -> Result<Vec<u32>> {
        if let Some(id) = only {
            let member = self.member(id)?;
            member.check_length()?;
            return Ok(vec![id]);
        }
        let mut found: Vec<_> =
            self.members.iter().filter(|&(&id, _)| Some(id) != except).collect();
        found.sort_by_key(|(&id, member)| (member.options.rank, id));
        let mut vanished = None;
        let mut good = Vec::with_capacity(found.len());
        for (&id, member) in found {
            match member.check_length() {
                Ok(()) => good.push(id),
                Err(error) => vanished = Some(error),
            }
        }
        match vanished {
            Some(error) if good.is_empty() => Err(error),
            _ => Ok(good),
        }
    }

    /// A member, or what is wrong with its number.
    pub fn member(&self, id: u32) -> Result<&Member> {
        self.members.get(&id).ok_or_else(|| {
            let text = format!("region {id} is not in this pool");
            Error::new(Kind::Invalid, "pool", text)
        })
    }

    fn free_in(&self, id: u32) -> u64 {
        self.members.get(&id).map_or(0, |member| member.runs.free_frames())
    }

    /// One run of the first member that has one, or runs of several.
    pub fn take_from(&mut self, wanted: &Wanted, candidates: &[u32]) -> Option<Vec<Piece>> {
        for &id in candidates {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let Some(frames) = wanted.rounded(member.unit) else { continue };
            let align = wanted.align.max(member.unit);
            let first = member.runs.take(frames, align);
            if let Some(first) = first.or_else(|| member.runs.take(frames, member.unit)) {
                return Some(vec![Piece { region: id, first, frames }]);
            }
        }
        if wanted.whole {
            return None;
        }
        self.scatter(wanted, candidates)
    }

    /// Runs of several members, or several of one; the largest units first, so that each lies at a
    /// multiple of its unit.
    fn scatter(&mut self, wanted: &Wanted, candidates: &[u32]) -> Option<Vec<Piece>> {
        let mut order = candidates.to_vec();
        let unit = |state: &State, id: &u32| state.members.get(id).map_or(1, |m| m.unit);
        order.sort_by_key(|id| std::cmp::Reverse(unit(self, id)));
        let mut pieces: Vec<Piece> = Vec::new();
        let mut left = wanted.frames;
        for &id in &order {
            let Some(member) = self.members.get_mut(&id) else { continue };
            if wanted.at.is_some_and(|at| at % (member.unit * FRAME_SIZE) != 0) {
                continue;
            }
            let mut size = left / member.unit * member.unit;
            while left >= member.unit && size >= member.unit {
                size = size.min(left / member.unit * member.unit);
                match member.runs.take(size, member.unit) {
                    Some(first) => {
                        pieces.push(Piece { region: id, first, frames: size });
                        left -= size;
                    }
                    None => size = size / 2 / member.unit * member.unit,
                }
            }
        }
        if left > 0 && wanted.at.is_none() {
            // Only members with large units are left: the tail gets a whole one.
            for &id in order.iter().rev() {
                let Some(member) = self.members.get_mut(&id) else { continue };
                let frames = left.next_multiple_of(member.unit);
                let fits = pieces.iter().map(|piece| piece.frames).sum::<u64>() % member.unit == 0;
                if let Some(first) = fits.then(|| member.runs.take(frames, member.unit)).flatten() {
                    pieces.push(Piece { region: id, first, frames });
                    left = 0;
                    break;
                }
            }
        }
        if left > 0 {
            self.give(&pieces);
            return None;
        }
        Some(pieces)
    }

    /// Granules in turns; `None` where one member has no room for its share.
    fn interleave(&mut self, frames: u64, granule: u64, ids: &[u32]) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut left = frames;
        for &id in ids.iter().cycle() {
            if left == 0 {
                break;
            }
            let Some(member) = self.members.get_mut(&id) else { continue };
            let turn = granule.next_multiple_of(member.unit) * u64::from(member.options.weight);
            let frames = turn.min(left.next_multiple_of(member.unit));
            if frames == 0 {
                continue;
            }
            let Some(first) = member.runs.take(frames, member.unit) else {
                self.give(&pieces);
                return None;
            };
            pieces.push(Piece { region: id, first, frames });
            left = left.saturating_sub(frames);
        }
        Some(pieces)
    }

    /// Returns frames.
    pub fn give(&mut self, pieces: &[Piece]) {
        for piece in pieces {
            if let Some(member) = self.members.get_mut(&piece.region) {
                member.runs.give(piece.first, piece.frames);
            }
        }
    }

    /// Window and address of an extent whose frames are where they were first mapped, unless a
    /// displaced extent has the address.
    pub fn home_of(&self, extent: &Extent) -> Option<(u64, u64)> {
        let [piece] = extent.pieces[..] else { return None };
        let member = self.members.get(&piece.region)?;
        let address = member.home(piece.first);
        let end = address + piece.frames * FRAME_SIZE;
        let below = self.extents.range(..end).next_back();
        let taken = below.is_some_and(|(&at, other)| at + other.frames * FRAME_SIZE > address);
        (!taken).then_some((member.window, address))
    }

    /// Addresses in windows of members that show other frames than the window's own.
    pub fn displaced(&self) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        for (&address, extent) in &self.extents {
            let mut at = address;
            for piece in &extent.pieces {
                let end = at + piece.frames * FRAME_SIZE;
                let home = self.members.get(&piece.region).map(|member| member.home(piece.first));
                if home != Some(at) {
                    found.push((at, end));
                }
                at = end;
            }
        }
        found
    }

    /// Maps pieces one after the other.
    ///
    /// # Safety
    /// As for [`sys::map_over`].
    pub unsafe fn map_pieces(&self, base: u64, pieces: &[Piece]) -> Result<()> {
        let mut at = base;
        for piece in pieces {
            // SAFETY: the caller vouches for the range.
            unsafe { self.member(piece.region)?.map(at, piece.first, piece.frames)? };
            at += piece.frames * FRAME_SIZE;
        }
        Ok(())
    }

    /// Pieces of extents at addresses `start` to `end`, cut to them: the extent, the address of the
    /// piece, and what it is.
    pub fn pieces_at(&self, start: u64, end: u64) -> Vec<(u64, u64, Piece)> {
        let before = self.extents.range(..start).next_back();
        let mut found = Vec::new();
        for (&extent, each) in before.into_iter().chain(self.extents.range(start..end)) {
            let mut at = extent;
            for piece in &each.pieces {
                let next = at + piece.frames * FRAME_SIZE;
                let (from, to) = (at.max(start), next.min(end));
                if from < to {
                    let first = piece.first + (from - at) / FRAME_SIZE;
                    let frames = (to - from) / FRAME_SIZE;
                    found.push((extent, from, Piece { region: piece.region, first, frames }));
                }
                at = next;
            }
        }
        found
    }

    /// The extent that an address lies in, and where it starts.
    pub fn extent_at(&mut self, address: u64) -> Option<(u64, &mut Extent)> {
        let (&at, extent) = self.extents.range_mut(..=address).next_back()?;
        (address < at + extent.frames * FRAME_SIZE).then_some((at, extent))
    }

    /// Ends an extent: its address maps what it did before, its frames are free.
    pub fn release(&mut self, address: u64) {
        let Some(mut extent) = self.extents.remove(&address) else { return };
        let live = self.windows.get(&extent.window).map_or(0, |window| window.live);
        let owner = self.windows.get(&extent.window).and_then(|window| window.owner);
        if live == 1 && owner.is_none() {
            if let Some(window) = self.windows.remove(&extent.window) {
                // SAFETY: its last extent is gone.
                unsafe { sys::unmap(extent.window, window.len) };
            }
        } else if self.restore(address, &extent).is_err() {
            // No mapping left to put things right with: its frames stay taken until there is one.
            extent.dead = true;
            self.extents.insert(address, extent);
            return;
        } else if let Some(window) = self.windows.get_mut(&extent.window) {
            window.live -= 1;
        }
        self.used_frames -= extent.frames;
        self.stats.frees += 1;
        self.give(&extent.pieces);
    }

    /// Maps at an extent's addresses what its window is for.
    fn restore(&mut self, address: u64, extent: &Extent) -> Result<()> {
        let owner = self.windows.get(&extent.window).and_then(|window| window.owner);
        let len = extent.frames * FRAME_SIZE;
        let Some(member) = owner.and_then(|id| self.members.get(&id)) else {
            // SAFETY: the extent is over; its addresses lie in our window.
            return unsafe { sys::map_nothing(address, len) };
        };
        let mut at = address;
        for piece in &extent.pieces {
            if Some(piece.region) != owner || member.home(piece.first) != at {
                let first = (at - member.window) / FRAME_SIZE;
                // SAFETY: as above.
                unsafe { member.map(at, first, piece.frames)? };
            }
            at += piece.frames * FRAME_SIZE;
        }
        Ok(())
    }

    /// Lets a member go whose frames are all free. Its window stays while extents have addresses
    /// in it.
    pub fn drop_member(&mut self, id: u32) {
        let Some(member) = self.members.remove(&id) else { return };
        let (base, len) = (member.window, member.frames * FRAME_SIZE);
        let Some(window) = self.windows.get_mut(&base) else { return };
        window.owner = None;
        if window.live == 0 {
            self.windows.remove(&base);
            // SAFETY: no extent has an address in it.
            unsafe { sys::unmap(base, len) };
            return;
        }
        let mut at = base;
        let inside = self.extents.range(base..base + len);
        let ends = inside.map(|(&start, extent)| (start, start + extent.frames * FRAME_SIZE));
        for (start, end) in ends.chain([(base + len, base + len)]) {
            if start > at {
                // A failure keeps old bytes mapped where nobody looks, until the window goes.
                // SAFETY: no extent has an address between these two.
                let _ = unsafe { sys::map_nothing(at, start - at) };
            }
            at = end;
        }
    }

    /// Marks blocks.
    pub fn mark(&mut self, id: u32, first: u64, count: u64, to: BlockState) {
        if let Some(member) = self.members.get_mut(&id) {
            let blocks = first as usize..(first + count) as usize;
            if let Some(blocks) = member.blocks.get_mut(blocks) {
                blocks.fill(to);
            }
        }
    }

    /// What is wrong.
    pub fn validate(&self) -> Vec<String> {
        let runs = self.members.values().map(|member| member.runs.validate());
        let mut wrong: Vec<_> = runs.flatten().collect();
        let mut end_before = 0;
        let mut live = std::collections::BTreeMap::<u64, u64>::new();
        let mut pieces = Vec::new();
        for (&at, extent) in &self.extents {
            if at < end_before {
                wrong.push(format!("the extent at {at:#x} overlaps the one before it"));
            }
            end_before = at + extent.frames * FRAME_SIZE;
            *live.entry(extent.window).or_default() += 1;
            let sum: u64 = extent.pieces.iter().map(|piece| piece.frames).sum();
            if sum != extent.frames {
                wrong.push(format!(
                    "the extent at {at:#x} has {} frames in pieces of {sum}",
                    extent.frames
                ));
            }
            match self.windows.get(&extent.window) {
                Some(window) if at >= extent.window && end_before <= extent.window + window.len => {
                }
                _ => wrong.push(format!("the extent at {at:#x} lies outside its window")),
            }
            pieces.extend(extent.pieces.iter().map(|p| (p.region, p.first, p.frames)));
        }
        for (base, window) in &self.windows {
            let found = live.get(base).copied().unwrap_or(0);
            if found != window.live {
                wrong.push(format!(
                    "the window at {base:#x} counts {} extents, {found} are there",
                    window.live
                ));
            }
        }
        pieces.sort_unstable();
        for pair in pieces.windows(2) {
            if pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1 {
                wrong
                    .push(format!("frame {} of region {} is in two extents", pair[1].1, pair[1].0));
            }
        }
        let used: u64 = self.members.values().map(|m| m.runs.used(0, m.frames)).sum();
        let held: u64 = pieces.iter().map(|piece| piece.2).sum();
        if used != held {
            wrong.push(format!("{used} frames are taken, {held} belong to extents"));
        }
        wrong
    }
}
