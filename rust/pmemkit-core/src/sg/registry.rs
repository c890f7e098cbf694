//! The regions of this process by their numbers, and copies from one list of segments to another:
//! memory to storage, DAX to DAX, media to a buffer. One pass, and no buffer in between unless
//! neither side lends its addresses.
//!
//! States of a region: known -> leaving -> gone. [`Registry::remove`] makes a region leave; copies
//! in flight notice at their next step and fail, and `remove` returns when the last has.
//!
//! Invariants:
//! 1. Everything that can be refused is refused before a byte moves: unknown regions, what a region
//!    does not allow, ranges past its end, lists of different lengths, overlap.
//! 2. A range that is written overlaps no other range of the copy, neither one that is read nor one
//!    that is written. Two regions over the same bytes are not noticed: whoever registers both has
//!    to keep them apart.
//! 3. Bytes move in the order of the lists. When a copy fails, `moved` bytes from its start were
//!    stored, and nothing behind the step that failed.
//! 4. After a copy, what was stored was flushed and fenced; a durable one also synced every region
//!    that was written.
//! 5. While a step runs the region is not gone: `remove` waits for it.
//!
//! Lock order: the map, then one region's gate; never the map under a gate. A step holds the gates
//! of its source and its target for reading, without waiting for the second.
//!
//! What this does not do: retry, copy in parallel, close a region.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bitflags::bitflags;

use super::{RegionId, Segment, Sg};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Medium, Store};

/// Bytes of one step: what a region that goes away waits for, at most.
const STEP: u64 = 1 << 20;
/// Copies of more bytes than this go around the CPU's cache, which they would only empty: a cached
/// store reads the line first, and that is a third of the traffic.
const STREAM_MIN: u64 = 4 << 20;

bitflags! {
    /// What copies may do with a region.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Access: u8 {
        /// Be a source.
        const READ = 1;
        /// Be a target.
        const WRITE = 2;
    }
}

/// One region.
struct Entry {
    medium: Arc<dyn Medium>,
    access: Access,
    /// True once the region is leaving. Steps hold it for reading.
    leaving: RwLock<bool>,
}

impl Entry {
    /// Keeps the region from going away, unless it is leaving.
    fn enter(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let held = self.leaving.try_read().map_err(|_| gone(self.medium.region()))?;
        if *held {
            return Err(gone(self.medium.region()));
        }
        Ok(held)
    }
}

/// The regions that segments can name.
#[derive(Default)]
pub struct Registry {
    entries: RwLock<HashMap<RegionId, Arc<Entry>>>,
}

/// One side of a step.
enum Side<'a> {
    Host(*mut u8),
    Media { entry: &'a Entry, at: u64 },
}

impl Registry {
    /// The registry of this process.
    pub fn get() -> &'static Registry {
        static REGISTRY: OnceLock<Registry> = OnceLock::new();
        REGISTRY.get_or_init(Registry::default)
    }

    /// Makes a medium known by its number. One that is known stays as it is.
    pub fn add(&self, medium: Arc<dyn Medium>, access: Access) -> RegionId {
        let region = medium.region();
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let entry = || Arc::new(Entry { medium, access, leaving: RwLock::new(false) });
        entries.entry(region).or_insert_with(entry);
        region
    }

    /// Forgets a region. Returns when no copy touches it any more; false where it was not known.
    pub fn remove(&self, region: RegionId) -> bool {
        let entry = self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&region);
        let Some(entry) = entry else { return false };
        *entry.leaving.write().unwrap_or_else(PoisonError::into_inner) = true;
        true
    }

    /// How many regions are known.
    pub fn count(&self) -> usize {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn entry(&self, region: RegionId) -> Result<Arc<Entry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(&region).cloned().ok_or_else(|| gone(region))
    }

    /// Copies all bytes of `source` to the ranges of `target`, in order; gives how many.
    ///
    /// An error's `moved` says how many bytes were copied before it.
    pub fn copy(&self, source: &Sg, target: &Sg, durable: bool) -> Result<u64> {
        if source.len() != target.len() {
            let text = format!("{} bytes do not go into {}", source.len(), target.len());
            return Err(Error::new(Kind::Invalid, "copy", text));
        }
        check_overlap(source, target)?;
        let from = self.resolve(source, Access::READ)?;
        let to = self.resolve(target, Access::WRITE)?;
        let mut moved = 0;
        let done = carry(&from, &to, source, target, &mut moved);
        // What was stored is fenced whatever came after it; a failure comes first.
        let settled = settle(&to, durable && done.is_ok());
        done.and(settled).map(|()| moved).map_err(|mut error| {
            error.moved = Some(moved);
            error
        })
    }

    /// The region of each segment, after asking whether it allows that and has the range.
    fn resolve(&self, sg: &Sg, wanted: Access) -> Result<Vec<Option<Arc<Entry>>>> {
        let op = if wanted == Access::READ { "read" } else { "write" };
        sg.segments().iter().map(|segment| self.resolve_one(segment, wanted, op)).collect()
    }

    fn resolve_one(
        &self,
        segment: &Segment,
        wanted: Access,
        op: &'static str,
    ) -> Result<Option<Arc<Entry>>> {
        if segment.region == RegionId::HOST {
            return Ok(None);
        }
        let entry = self.entry(segment.region)?;
        if !entry.access.contains(wanted) {
            let text = format!("region {} does not allow that", segment.region.0);
            let kind = if wanted == Access::WRITE { Kind::ReadOnly } else { Kind::NotSupported };
            return Err(Error::new(kind, op, text).at(segment.at()));
        }
        check_range(op, segment.at(), segment.len, entry.medium.len())?;
        Ok(Some(entry))
    }
}

fn gone(region: RegionId) -> Error {
    Error::new(Kind::Closed, "copy", format!("region {} is not there any more", region.0))
}

/// Refuses ranges to be written that meet any other range.
fn check_overlap(source: &Sg, target: &Sg) -> Result<()> {
    let range = |written: bool| move |one: &Segment| (one.region, one.at(), one.len, written);
    let sources = source.segments().iter().map(range(false));
    let mut ranges: Vec<_> = sources.chain(target.segments().iter().map(range(true))).collect();
    ranges.retain(|(_, _, len, _)| *len > 0);
    ranges.sort_unstable();
    // The ends of what is read and of what is written so far, in the region at hand.
    let (mut region, mut read_end, mut written_end) = (RegionId::HOST, 0, 0);
    for (of, at, len, written) in ranges {
        if of != region {
            (region, read_end, written_end) = (of, 0, 0);
        }
        if at < written_end || (written && at < read_end) {
            let text = format!("ranges of region {} overlap, and one of them is written", of.0);
            return Err(Error::new(Kind::Invalid, "copy", text).at(at));
        }
        let end = if written { &mut written_end } else { &mut read_end };
        *end = (*end).max(at.saturating_add(len));
    }
    Ok(())
}

type Resolved = [Option<Arc<Entry>>];

/// Walks both lists side by side.
fn carry(from: &Resolved, to: &Resolved, source: &Sg, target: &Sg, moved: &mut u64) -> Result<()> {
    let how = if source.len() > STREAM_MIN { Store::NonTemporal } else { Store::Auto };
    let (mut reads, mut writes) = (Cursor::new(source, from), Cursor::new(target, to));
    while let (Some((read, left)), Some((write, room))) = (reads.side()?, writes.side()?) {
        let len = left.min(room).min(STEP);
        step(&read, &write, len, how)?;
        *moved += len;
        reads.advance(len);
        writes.advance(len);
    }
    Ok(())
}

/// A place in a list of segments.
struct Cursor<'a> {
    segments: &'a [Segment],
    entries: &'a Resolved,
    index: usize,
    into: u64,
}

impl<'a> Cursor<'a> {
    fn new(sg: &'a Sg, entries: &'a Resolved) -> Self {
        Cursor { segments: sg.segments(), entries, index: 0, into: 0 }
    }

    /// Where it is and how many bytes its segment has left; `None` at the end.
    fn side(&mut self) -> Result<Option<(Side<'a>, u64)>> {
        while self.segments.get(self.index).is_some_and(|segment| segment.len == self.into) {
            (self.index, self.into) = (self.index + 1, 0);
        }
        let Some(segment) = self.segments.get(self.index) else { return Ok(None) };
        let side = match &self.entries[self.index] {
            Some(entry) => Side::Media { entry, at: segment.at() + self.into },
            None => Side::Host(Sg::host_address(segment)?.wrapping_add(self.into as usize)),
        };
        Ok(Some((side, segment.len - self.into)))
    }

    fn advance(&mut self, len: u64) {
        self.into += len;
    }
}

/// Moves a run that is contiguous on both sides.
fn step(from: &Side<'_>, to: &Side<'_>, len: u64, how: Store) -> Result<()> {
    match (from, to) {
        (Side::Host(source), Side::Host(target)) => {
            // SAFETY: the makers of both segments vouch for them.
            unsafe { std::ptr::copy(*source, *target, len as usize) };
            Ok(())
        }
        (Side::Host(source), Side::Media { entry, at }) => {
            let _held = entry.enter()?;
            // SAFETY: the segment's maker vouches for the source.
            unsafe { entry.medium.store(*at, *source, len, how) }
        }
        (Side::Media { entry, at }, Side::Host(target)) => {
            let _held = entry.enter()?;
            // SAFETY: the segment's maker vouches for the target.
            unsafe { entry.medium.load(*at, *target, len) }
        }
        (Side::Media { entry, at }, Side::Media { entry: other, at: to }) => {
            let _held = (entry.enter()?, other.enter()?);
            between(&*entry.medium, *at, &*other.medium, *to, len, how)
        }
    }
}

/// From one medium to another: by the address of whichever lends it.
fn between(
    from: &dyn Medium,
    at: u64,
    to: &dyn Medium,
    to_at: u64,
    len: u64,
    how: Store,
) -> Result<()> {
    if from.loads_by_mapping() {
        let source = from.address(&Segment::new(from.region(), at, len))?;
        // SAFETY: the address lies in a mapping that lives as long as its medium; a fault in it is
        // an error of the store.
        let done = unsafe { to.store(to_at, source, len, how) };
        return done.map_err(|error| blame(from, at, len, error));
    }
    if to.stores_by_mapping() {
        let target = to.address(&Segment::new(to.region(), to_at, len))?;
        // SAFETY: as above, with the sides exchanged.
        unsafe { from.load(at, target, len)? };
        to.stored_elsewhere(to_at, len)?;
        return to.flush(to_at, len);
    }
    let mut buffer = Vec::<u8>::with_capacity(len as usize);
    // SAFETY: the buffer has room for `len` bytes, which the load fills before they are stored.
    unsafe {
        from.load(at, buffer.as_mut_ptr(), len)?;
        to.store(to_at, buffer.as_ptr(), len, how)
    }
}

/// The error of the source, where it was the source that failed.
#[cold]
fn blame(from: &dyn Medium, at: u64, len: u64, error: Error) -> Error {
    let mut buffer = Vec::<u8>::with_capacity(len as usize);
    // SAFETY: the buffer has room for `len` bytes.
    unsafe { from.load(at, buffer.as_mut_ptr(), len) }.err().unwrap_or(error)
}

/// Fences the regions that were written, each once, or makes them durable.
fn settle(to: &Resolved, durable: bool) -> Result<()> {
    let mut seen: Vec<RegionId> = Vec::new();
    for entry in to.iter().flatten() {
        let region = entry.medium.region();
        if seen.contains(&region) {
            continue;
        }
        seen.push(region);
        entry.medium.fence();
        if durable {
            entry.medium.sync()?;
        }
    }
    Ok(())
}
