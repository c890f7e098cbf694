//! Which frames are free: a bit a frame, and an entry for each area of 512 frames.
//!
//! An entry counts the frames that are taken and says two things of the whole area: that it is
//! taken as one, and that it is offline. An area that was never touched is all zero and free.
//!
//! Invariants:
//! 1. `count of the entry >= bits that are set`: frames are counted before their bits are set and
//!    after their bits are cleared. So whoever counted n frames finds n bits that nobody else may
//!    set, and an entry of 0 is an area without bits.
//! 2. An area is taken as one (`WHOLE`) by a change of its entry from 0; its bits stay clear.
//! 3. `CLOSED` keeps everybody from counting frames but [`Areas::take_span`] that was told so.
//! 4. The bits of frames past the end are set from the start and counted.
//!
//! What this does not do: know what an allocation is, choose an area.

use super::plant::Plant;
use super::sync::{planted, AtomicU16, AtomicU64, Ordering, Table, WORDS};
use crate::error::Result;

/// Frames of an area.
pub const FRAMES: u64 = 64 * WORDS as u64;
const FULL: u16 = FRAMES as u16;
const COUNT: u16 = 0x3ff;
const WHOLE: u16 = 1 << 14;
const CLOSED: u16 = 1 << 15;

/// The bits and entries of all areas.
pub struct Areas {
    bits: Table<AtomicU64>,
    entries: Table<AtomicU16>,
    frames: u64,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Frames that are taken, or past the end.
    pub count: u64,
    /// The area is taken as one.
    pub whole: bool,
    /// The area is offline.
    pub closed: bool,
}

/// The part of a span in one area.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The area.
    pub area: u64,
    /// The first frame, counted from the start of the region.
    pub first: u64,
    /// How many frames.
    pub count: u64,
}

/// The parts of a span, in order.
pub fn parts(first: u64, count: u64) -> impl DoubleEndedIterator<Item = Part> {
    let end = first + count;
    (first / FRAMES..end.div_ceil(FRAMES)).map(move |area| {
        let start = first.max(area * FRAMES);
        Part { area, first: start, count: end.min((area + 1) * FRAMES) - start }
    })
}

/// The words of a part, each with the bits of it.
fn words(part: Part) -> impl DoubleEndedIterator<Item = (usize, u64)> {
    let end = part.first + part.count;
    (part.first / 64..end.div_ceil(64)).map(move |word| {
        let low = part.first.max(word * 64) - word * 64;
        let high = end.min((word + 1) * 64) - word * 64;
        (word as usize, (u64::MAX >> (64 - (high - low))) << low)
    })
}

/// The lowest `count` bits of `mask`.
fn lowest(mask: u64, count: u32) -> u64 {
    let mut rest = mask;
    if mask.count_ones() <= count {
        return mask;
    }
    for _ in 0..count {
        rest &= rest - 1;
    }
    mask ^ rest
}

/// The first `2^order` bits, at a multiple of as many, that are clear in `word`.
pub fn fit(word: u64, order: u32) -> Option<u64> {
    const STARTS: [u64; 7] = [
        u64::MAX,
        0x5555_5555_5555_5555,
        0x1111_1111_1111_1111,
        0x0101_0101_0101_0101,
        0x0001_0001_0001_0001,
        0x0000_0001_0000_0001,
        1,
    ];
    let mut free = !word;
    for step in 0..order {
        free &= free >> (1 << step);
    }
    free &= STARTS[order as usize];
    (free != 0).then(|| (u64::MAX >> (64 - (1 << order))) << free.trailing_zeros())
}

impl Areas {
    /// All frames free and, with `online`, open.
    pub fn new(frames: u64, online: bool) -> Result<Areas> {
        let areas = frames.div_ceil(FRAMES);
        let made = Areas {
            bits: Table::new(areas as usize * WORDS)?,
            entries: Table::new(areas as usize)?,
            frames,
        };
        if !frames.is_multiple_of(FRAMES) {
            let past = Part { area: areas - 1, first: frames, count: areas * FRAMES - frames };
            made.entries[past.area as usize].store(past.count as u16, Ordering::Relaxed);
            for (word, mask) in words(past) {
                made.bits[word].store(mask, Ordering::Relaxed);
            }
        }
        if !online {
            for entry in made.entries.iter() {
                entry.fetch_or(CLOSED, Ordering::Relaxed);
            }
        }
        Ok(made)
    }

    /// How many areas there are.
    pub fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Bytes of bits and entries.
    pub fn size(&self) -> u64 {
        self.count() * (8 * WORDS as u64 + 2)
    }

    /// What the entry of an area says.
    #[inline]
    pub fn entry(&self, area: u64) -> Entry {
        let entry = self.entries[area as usize].load(Ordering::Acquire);
        Entry {
            count: u64::from(entry & COUNT),
            whole: entry & WHOLE != 0,
            closed: entry & CLOSED != 0,
        }
    }

    /// True for an area of which nothing is taken, and which is open.
    #[inline]
    pub fn is_free(&self, area: u64) -> bool {
        self.entries[area as usize].load(Ordering::Relaxed) == 0
    }

    /// The bits of an area.
    pub fn words(&self, area: u64) -> impl Iterator<Item = u64> + '_ {
        let start = area as usize * WORDS;
        self.bits[start..start + WORDS].iter().map(|word| word.load(Ordering::Acquire))
    }

    /// Counts up to `count` more frames as taken; tells how many.
    fn reserve(&self, area: u64, count: u16, least: u16, closed_too: bool) -> u16 {
        let entry = &self.entries[area as usize];
        let shut = if closed_too { WHOLE } else { WHOLE | CLOSED };
        let mut now = entry.load(Ordering::Relaxed);
        loop {
            let granted = count.min(FULL - (now & COUNT));
            if now & shut != 0 || granted < least {
                return 0;
            }
            // Acquire: who freed these frames is done with their bits.
            let next = now + granted;
            match entry.compare_exchange_weak(now, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return granted,
                Err(other) => now = other,
            }
        }
    }

    /// Counts frames as free.
    #[inline]
    fn release(&self, area: u64, count: u16) {
        if count > 0 {
            let before = self.entries[area as usize].fetch_sub(count, Ordering::Release);
            debug_assert!(before & COUNT >= count && before & WHOLE == 0);
        }
    }

    /// Takes up to `want` frames of one word: the word and which of its bits.
    pub fn take_some(&self, area: u64, want: u32) -> Option<(u64, u64)> {
        let start = area as usize * WORDS;
        for (index, word) in self.bits[start..start + WORDS].iter().enumerate() {
            let wanted = lowest(!word.load(Ordering::Relaxed), want);
            if wanted == 0 {
                continue;
            }
            let granted = if planted(Plant::BitsBeforeCount) {
                wanted.count_ones() as u16
            } else {
                self.reserve(area, wanted.count_ones() as u16, 1, false)
            };
            if granted == 0 {
                return None;
            }
            let wanted = lowest(wanted, u32::from(granted));
            let before = word.fetch_or(wanted, Ordering::Acquire);
            let got = wanted & !before;
            if planted(Plant::BitsBeforeCount) {
                self.reserve(area, granted, 1, false);
            }
            self.release(area, granted - got.count_ones() as u16);
            if got != 0 {
                return Some(((start + index) as u64, got));
            }
        }
        None
    }

    /// Takes `2^order` frames at a multiple of as many, for an order below that of an area.
    pub fn take_order(&self, area: u64, order: u32) -> Option<u64> {
        if order > 6 {
            return self.take_words(area, 1 << (order - 6));
        }
        let count = 1 << order;
        let start = area as usize * WORDS;
        let mut reserved = false;
        for (index, word) in self.bits[start..start + WORDS].iter().enumerate() {
            let mut now = word.load(Ordering::Relaxed);
            while let Some(mask) = fit(now, order) {
                if !reserved && self.reserve(area, count, count, false) == 0 {
                    return None;
                }
                reserved = true;
                let next = now | mask;
                match word.compare_exchange_weak(now, next, Ordering::Acquire, Ordering::Relaxed) {
                    Ok(_) => {
                        let bit = u64::from(mask.trailing_zeros());
                        return Some((start + index) as u64 * 64 + bit);
                    }
                    Err(other) => now = other,
                }
            }
        }
        if reserved {
            self.release(area, count);
        }
        None
    }

    /// Takes `count` words at a multiple of as many.
    fn take_words(&self, area: u64, count: usize) -> Option<u64> {
        let start = area as usize * WORDS;
        for first in (start..start + WORDS).step_by(count) {
            let group = &self.bits[first..first + count];
            if group.iter().any(|word| word.load(Ordering::Relaxed) != 0) {
                continue;
            }
            let part = Part { area, first: first as u64 * 64, count: count as u64 * 64 };
            if self.take_part(part, false) {
                return Some(part.first);
            }
        }
        None
    }

    fn take_part(&self, part: Part, closed_too: bool) -> bool {
        let entry = &self.entries[part.area as usize];
        if part.count == FRAMES {
            let flags = if closed_too { entry.load(Ordering::Relaxed) & CLOSED } else { 0 };
            let taken = flags | WHOLE | FULL;
            if planted(Plant::LookThenTake) && entry.load(Ordering::Acquire) == flags {
                entry.store(taken, Ordering::Relaxed);
                return true;
            }
            let order = (Ordering::Acquire, Ordering::Relaxed);
            return entry.compare_exchange(flags, taken, order.0, order.1).is_ok();
        }
        let count = part.count as u16;
        if self.reserve(part.area, count, count, closed_too) == 0 {
            return false;
        }
        for (index, mask) in words(part) {
            let before = self.bits[index].fetch_or(mask, Ordering::Acquire);
            if before & mask != 0 {
                // Only what was clear became ours.
                self.bits[index].fetch_and(!(mask & !before), Ordering::Release);
                for (earlier, mask) in words(part).take_while(|(earlier, _)| *earlier != index) {
                    self.bits[earlier].fetch_and(!mask, Ordering::Release);
                }
                self.release(part.area, count);
                return false;
            }
        }
        true
    }

    /// Takes these very frames; with `closed_too`, offline ones as well. All or none.
    pub fn take_span(&self, first: u64, count: u64, closed_too: bool) -> bool {
        for part in parts(first, count) {
            if !self.take_part(part, closed_too) {
                if part.first > first {
                    self.give_span(first, part.first - first);
                }
                return false;
            }
        }
        true
    }

    /// Gives frames of one word back.
    #[inline]
    pub fn give_word(&self, word: u64, mask: u64) {
        let (area, count) = (word / WORDS as u64, mask.count_ones() as u16);
        let before = self.bits[word as usize].fetch_and(!mask, Ordering::Release);
        debug_assert!(before & mask == mask);
        self.release(area, count);
    }

    /// Gives a span back that was taken as one.
    pub fn give_span(&self, first: u64, count: u64) {
        for part in parts(first, count) {
            if part.count == FRAMES {
                let entry = &self.entries[part.area as usize];
                let before = entry.fetch_sub(WHOLE | FULL, Ordering::Release);
                debug_assert!(before & !CLOSED == WHOLE | FULL);
                continue;
            }
            for (index, mask) in words(part) {
                let before = self.bits[index].fetch_and(!mask, Ordering::Release);
                debug_assert!(before & mask == mask);
            }
            self.release(part.area, part.count as u16);
        }
    }

    /// Takes an area offline or online; true where that was a change.
    pub fn close(&self, area: u64, closed: bool) -> bool {
        let entry = &self.entries[area as usize];
        let before = match closed {
            true => entry.fetch_or(CLOSED, Ordering::AcqRel),
            false => entry.fetch_and(!CLOSED, Ordering::AcqRel),
        };
        (before & CLOSED != 0) != closed
    }

    /// Frames of an area that exist.
    pub fn length(&self, area: u64) -> u64 {
        FRAMES.min(self.frames - area * FRAMES)
    }

    /// The first run of `count` clear bits at or after `from` in open areas, wherever it begins.
    pub fn first_fit(&self, from: u64, count: u64) -> Option<u64> {
        let (mut start, mut at) = (from, from);
        while at < self.frames {
            let area = at / FRAMES;
            let entry = self.entries[area as usize].load(Ordering::Relaxed);
            if entry == 0 {
                at = (area + 1) * FRAMES;
            } else if entry & (WHOLE | CLOSED) != 0 {
                at = (area + 1) * FRAMES;
                start = at;
                continue;
            } else {
                let left = 64 - at % 64;
                let word = self.bits[(at / 64) as usize].load(Ordering::Relaxed) >> (at % 64);
                let free = u64::from(word.trailing_zeros()).min(left);
                at += free;
                if at - start < count && free < left {
                    at += u64::from((word >> free).trailing_ones()).min(left - free);
                    start = at;
                }
            }
            if at - start >= count {
                return Some(start);
            }
        }
        None
    }
}
