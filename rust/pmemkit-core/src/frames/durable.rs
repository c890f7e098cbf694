//! A page map that survives a power failure: a copy of it on media, brought up to date by a flush.
//!
//! On media are a header and, a page later, the bytes of the map. The map in DRAM is the one that
//! is used; what changed since the last flush is known by the line. A flush carries out, in this
//! order:
//! 1. heads of allocations that are gone become 0;
//! 2. what continued them becomes 0;
//! 3. what continues new runs is stored;
//! 4. heads of new allocations are stored.
//!
//! Each step is on media before the next one begins, and empty ones are left out. The map on media
//! needs no journal: a head is one byte, so each allocation is there or not, and at no point are
//! two there that overlap. What continues a run that has no head is what a flush was in the middle
//! of.
//!
//! Invariants:
//! 1. After a flush the map on media is that of the moment at which it began. In the middle of one,
//!    every allocation of both moments is there, and none that is of neither.
//! 2. The signature is on media after the map behind it was zero.
//! 3. The lock keeps every change of the map out while a flush reads it: a map of different moments
//!    could hold an allocation and the one before it in the same place.
//!
//! What this does not do: know which of the allocations anybody still wants ([`retain`] is told).
//!
//! [`retain`]: super::Allocator::retain

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::map::{self, is, mark, Mark, PageMap, LINE, NOTHING};
use super::plant::Plant;
use super::{Live, Place};
use crate::error::{Error, Kind, Result};
use crate::media::{Granularity, Store};

/// Bytes before the map.
pub const HEADER_SIZE: u64 = 4096;
/// Bytes of the header that are used: a signature, the version, the frames, a checksum of these.
const HEADER_USED: usize = 40;
const SIGNATURE: [u8; 16] = *b"pmemkit page map";
const VERSION: u64 = 1;
/// Bytes of a map that are read at once.
const CHUNK: u64 = 1 << 20;

/// The map on media.
pub struct Durable {
    place: Place,
    frames: u64,
    plant: Plant,
    lock: Mutex<()>,
}

/// Keeps a flush away.
pub type Held<'a> = MutexGuard<'a, ()>;

/// A byte that differs from media.
#[derive(Clone, Copy, Debug)]
struct Change {
    frame: u64,
    was: u8,
    now: u8,
}

fn goes_on(byte: u8) -> bool {
    matches!(mark(byte), Mark::GoesOn(_))
}

impl Change {
    /// The steps of a flush, counted from 0, that store something here, and what. `replaced` are
    /// runs whose head says the same of another length.
    fn steps(&self, replaced: &BTreeSet<u64>) -> impl Iterator<Item = (usize, u8)> {
        let (was, now) = (self.was, self.now);
        // Where only flags differ, it is the same allocation, or one of the same frames.
        let same = mark(was) == mark(now) && !replaced.contains(&self.frame);
        let gone = (was != NOTHING && !same).then(|| (usize::from(goes_on(was)), NOTHING));
        let new = (now != NOTHING).then(|| (if goes_on(now) { 2 } else { 3 }, now));
        gone.into_iter().chain(new)
    }
}

impl Place {
    /// Where the bytes of the map begin.
    pub(super) fn map_offset(&self) -> u64 {
        self.offset + HEADER_SIZE
    }

    /// Refuses a place that has no room.
    pub(super) fn check(&self, frames: u64) -> Result<()> {
        let needed = super::Allocator::map_size(frames);
        crate::media::check_range("frames", self.offset, self.length, self.medium.len())?;
        if self.length < needed {
            let text = format!("{} bytes are too few: the map takes {needed}", self.length);
            return Err(Error::new(Kind::Invalid, "frames", text).at(self.offset));
        }
        if !self.offset.is_multiple_of(HEADER_SIZE) {
            let text = format!("a page map begins at a multiple of {HEADER_SIZE}");
            return Err(Error::new(Kind::Invalid, "frames", text).at(self.offset));
        }
        Ok(())
    }

    fn load(&self, at: u64, target: &mut [u8]) -> Result<()> {
        // SAFETY: the target is ours and has these bytes.
        unsafe { self.medium.load(at, target.as_mut_ptr(), target.len() as u64) }
    }

    fn store(&self, at: u64, source: &[u8], how: Store) -> Result<()> {
        // SAFETY: the source has these bytes.
        unsafe { self.medium.store(at, source.as_ptr(), source.len() as u64, how) }
    }

    /// Waits until what was stored and written back is on media.
    fn settle(&self) -> Result<()> {
        if self.medium.granularity() == Granularity::Page {
            return self.medium.sync();
        }
        self.medium.fence();
        Ok(())
    }
}

/// The bytes of the header.
fn header(frames: u64) -> [u8; HEADER_USED] {
    let mut bytes = [0; HEADER_USED];
    bytes[..16].copy_from_slice(&SIGNATURE);
    bytes[16..24].copy_from_slice(&VERSION.to_le_bytes());
    bytes[24..32].copy_from_slice(&frames.to_le_bytes());
    let sum = checksum(&bytes[..32]);
    bytes[32..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn checksum(bytes: &[u8]) -> u64 {
    // FNV-1a: it tells a torn header from a whole one.
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl Durable {
    /// Finds the map in its place, or makes an empty one there, and reads it into `map`.
    pub fn open(place: Place, frames: u64, plant: Plant, map: &PageMap) -> Result<Durable> {
        let durable = Durable { place, frames, plant, lock: Mutex::new(()) };
        if durable.is_there()? {
            durable.read(|frame, byte| map.load(frame, byte))?;
        } else {
            durable.format()?;
        }
        Ok(durable)
    }

    fn is_there(&self) -> Result<bool> {
        let at = self.place.offset;
        let mut bytes = [0; HEADER_USED];
        self.place.load(at, &mut bytes)?;
        if bytes[..16] != SIGNATURE {
            return Ok(false);
        }
        if checksum(&bytes[..32]) != word(&bytes, 32) {
            // Power failed while it was made: then the map behind it is empty.
            return self.refuse_map("the checksum of the header is wrong").map(|()| false);
        }
        let (version, frames) = (word(&bytes, 16), word(&bytes, 24));
        if version != VERSION {
            let text = format!("the page map has version {version}; {VERSION} is known");
            return Err(Error::new(Kind::NotSupported, "frames", text).at(at));
        }
        if frames != self.frames {
            let text = format!("the page map is one of {frames} frames, not of {}", self.frames);
            return Err(Error::new(Kind::Invalid, "frames", text).at(at));
        }
        Ok(true)
    }

    /// An error where the map holds anything.
    fn refuse_map(&self, text: &str) -> Result<()> {
        let mut used = false;
        self.read(|_, _| used = true)?;
        if used {
            return Err(Error::new(Kind::Corrupt, "frames", text).at(self.place.offset));
        }
        Ok(())
    }

    fn format(&self) -> Result<()> {
        let place = &self.place;
        let sign = || -> Result<()> {
            place.store(place.offset, &header(self.frames), Store::Auto)?;
            place.settle()
        };
        if is(self.plant, Plant::SignatureFirst) {
            sign()?;
        }
        if !place.medium.punch(place.map_offset(), self.frames)? {
            place.medium.zero(place.map_offset(), self.frames)?;
        }
        // A hole is the file system's to make durable.
        place.medium.sync()?;
        if !is(self.plant, Plant::SignatureFirst) {
            sign()?;
        }
        Ok(())
    }

    /// Tells of the bytes that are not 0; holes are not read.
    fn read(&self, mut found: impl FnMut(u64, u8)) -> Result<()> {
        let mut at = 0;
        let mut bytes = vec![0; CHUNK as usize];
        for run in self.place.medium.extents(self.place.map_offset(), self.frames)? {
            let end = at + run.len;
            while at < end && !run.hole {
                let len = CHUNK.min(end - at);
                let chunk = &mut bytes[..len as usize];
                self.place.load(self.place.map_offset() + at, chunk)?;
                for (index, &byte) in chunk.iter().enumerate().filter(|(_, &byte)| byte != 0) {
                    found(at + index as u64, byte);
                }
                at += len;
            }
            at = end;
        }
        Ok(())
    }

    /// The allocations of a map that was read. What continues no run is what a flush did not
    /// finish; it is erased, here and at the next flush.
    pub fn recovered(&self, map: &PageMap, frames: u64) -> Result<Vec<Live>> {
        let refuse = |frame: u64, text: &str| {
            let text = format!("the byte {:#x} of frame {frame} {text}", map.byte(frame));
            Err(Error::new(Kind::Corrupt, "frames", text).at(self.place.map_offset() + frame))
        };
        let mut live = Vec::new();
        // Where the last allocation ends, and where the next byte may stand.
        let mut end = 0;
        for frame in map.used() {
            let byte = map.byte(frame);
            let kind = mark(byte);
            let length = match kind {
                Mark::GoesOn(_) if frame < end && !map.is_inside(frame) => continue,
                Mark::GoesOn(_) if frame >= end => {
                    if !is(self.plant, Plant::OrphansStay) {
                        map.set(frame, NOTHING);
                    }
                    continue;
                }
                Mark::Block(_) | Mark::Run if frame >= end => map.length(frame, byte),
                Mark::Block(_) | Mark::Run | Mark::GoesOn(_) => {
                    return refuse(frame, "lies in an allocation");
                }
                Mark::Nothing | Mark::Unknown => return refuse(frame, "means nothing"),
            };
            let length = length.unwrap_or(1);
            if frame + length > frames || !map.is_aligned(frame, length) {
                return refuse(frame, "begins what cannot be there");
            }
            live.push(Live { first: frame, frames: length });
            end = frame + length;
        }
        Ok(live)
    }

    /// Keeps a flush away while the map changes.
    pub fn hold(&self) -> Held<'_> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the map on media that of now.
    pub fn flush(&self, map: &PageMap) -> Result<()> {
        let _held = self.hold();
        let mut lines = Vec::new();
        map.take_changed(|line| lines.push(line));
        if is(self.plant, Plant::LastLineForgotten) {
            lines.pop();
        }
        let done = self.write(map, &lines);
        if done.is_err() {
            lines.iter().for_each(|&line| map.note_line(line));
        }
        done
    }

    fn write(&self, map: &PageMap, lines: &[u64]) -> Result<()> {
        let mut changes = Vec::new();
        for &line in lines {
            self.changes(map, line, &mut changes)?;
        }
        let replaced = self.replaced(map, &changes);
        let mut steps: [Vec<(u64, u8)>; 4] = Default::default();
        let differs = |each: &&Change| each.was != each.now || replaced.contains(&each.frame);
        for change in changes.iter().filter(differs) {
            for (step, byte) in change.steps(&replaced) {
                steps[self.planted(step)].push((change.frame, byte));
            }
        }
        for step in steps.iter().filter(|step| !step.is_empty()) {
            self.carry_out(step)?;
        }
        Ok(())
    }

    /// Heads of runs that gain or lose what continues them: another run began in the same place.
    fn replaced(&self, map: &PageMap, changes: &[Change]) -> BTreeSet<u64> {
        if is(self.plant, Plant::SameHead) {
            return BTreeSet::new();
        }
        let differ = changes.iter().filter(|change| change.was != change.now);
        let gained = differ.clone().filter(|change| goes_on(change.now)).map(|each| each.frame);
        let lost =
            differ.filter(|change| goes_on(change.was)).filter_map(|c| c.frame.checked_sub(1));
        let heads = gained.chain(lost).filter_map(|frame| map.head(frame));
        heads.filter(|&head| mark(map.byte(head)) == Mark::Run).collect()
    }

    /// The step that a mistake makes of a step.
    fn planted(&self, step: usize) -> usize {
        match (step, self.plant) {
            _ if is(self.plant, Plant::None) => step,
            (0 | 1, Plant::FreesWithTakes) => 3,
            (2, Plant::HeadFirst) => 3,
            (3, Plant::HeadFirst) => 2,
            (1, Plant::TailWithHead) => 0,
            _ => step,
        }
    }

    /// What of a line is on media or in the map.
    fn changes(&self, map: &PageMap, line: u64, changes: &mut Vec<Change>) -> Result<()> {
        let first = line * LINE;
        let mut was = [0; LINE as usize];
        let was = &mut was[..LINE.min(self.frames - first) as usize];
        self.place.load(self.place.map_offset() + first, was)?;
        let all = was.iter().zip(first..);
        let all =
            all.map(|(&was, frame)| Change { frame, was, now: map::durable(map.byte(frame)) });
        changes.extend(all.filter(|each| (each.was, each.now) != (NOTHING, NOTHING)));
        Ok(())
    }

    /// Stores bytes, writes their lines back once each, and waits until they are on media.
    fn carry_out(&self, step: &[(u64, u8)]) -> Result<()> {
        let (place, at) = (&self.place, self.place.map_offset());
        let mut line = None;
        for &(frame, byte) in step {
            let this = frame / LINE;
            if let Some(done) = line.filter(|&line| line != this) {
                self.write_back(done)?;
            }
            place.store(at + frame, &[byte], Store::Cached)?;
            line = Some(this);
        }
        if let Some(done) = line {
            self.write_back(done)?;
        }
        place.settle()
    }

    fn write_back(&self, line: u64) -> Result<()> {
        if is(self.plant, Plant::LinesStayInCache) {
            return Ok(());
        }
        let first = line * LINE;
        let len = LINE.min(self.frames - first);
        self.place.medium.flush(self.place.map_offset() + first, len)
    }
}
