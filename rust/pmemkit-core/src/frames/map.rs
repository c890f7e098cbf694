//! The page map: one byte a frame.
//!
//! An allocation is told of by the byte of its first frame, its head. The low half says how long it
//! is, the high half what its owner says of it. The other frames of a block have a byte of 0, as
//! have free ones. A run whose length is no order is a head of one frame that blocks follow, each
//! with a byte at its first frame that says how many frames it adds; it ends where no such byte
//! follows.
//!
//! | low half | meaning | high half |
//! |---|---|---|
//! | 0 | nothing begins here | 0 |
//! | 1 to 11 | a block of order 0 to 10 | flags |
//! | 12 | a block of 1 GiB | flags |
//! | 13 | continues the run before by a block | 1 to 12, as above |
//! | 14 | the first frame of a run that goes on | flags |
//!
//! Invariants:
//! 1. Blocks lie at multiples of their length and do not overlap.
//! 2. A head is stored after what continues it and erased before: who sees a head sees the run.
//! 3. An allocation ends when its head changes to 0, which happens once: that is how a double free
//!    is found.
//!
//! What this does not do: tell free frames from those of a magazine, or from tails of blocks,
//! without looking for the head.

use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};

use super::plant::Plant;
use super::table::Table;
use super::{Flags, AREA, GIGANTIC, ORDER_MAX};

/// Nothing begins here.
pub const NOTHING: u8 = 0;
const GIGANTIC_CODE: u8 = 12;
const GOES_ON: u8 = 13;
const RUN: u8 = 14;
const KIND: u8 = 0x0f;
const PINNED: u8 = 1 << 4;
const FIXED: u8 = 1 << 5;
const TAG_SHIFT: u32 = 6;

/// Frames whose bytes are a cache line.
pub const LINE: u64 = 64;

/// What a byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing begins here.
    Nothing,
    /// A block of so many frames that is an allocation.
    Block(u64),
    /// The first frame of a longer run.
    Run,
    /// A block of so many frames that continues a run.
    GoesOn(u64),
    /// No such byte is ever stored.
    Unknown,
}

fn length_of(code: u8) -> Option<u64> {
    match code {
        1..=11 => Some(1 << (code - 1)),
        GIGANTIC_CODE => Some(1 << GIGANTIC),
        _ => None,
    }
}

/// What a byte says.
pub fn mark(byte: u8) -> Mark {
    match byte & KIND {
        0 if byte == 0 => Mark::Nothing,
        RUN => Mark::Run,
        GOES_ON => length_of(byte >> 4).map_or(Mark::Unknown, Mark::GoesOn),
        code => length_of(code).map_or(Mark::Unknown, Mark::Block),
    }
}

/// The byte of a block of this order.
#[inline]
pub fn code(order: u32) -> u8 {
    if order == GIGANTIC {
        GIGANTIC_CODE
    } else {
        order as u8 + 1
    }
}

/// What the owner says, out of the byte of a head.
pub fn flags(byte: u8) -> Flags {
    Flags { pinned: byte & PINNED != 0, movable: byte & FIXED == 0, tag: byte >> TAG_SHIFT }
}

fn with_flags(byte: u8, flags: Flags) -> u8 {
    let fixed = if flags.movable { 0 } else { FIXED };
    let pinned = if flags.pinned { PINNED } else { 0 };
    (byte & KIND) | fixed | pinned | flags.tag << TAG_SHIFT
}

/// A byte as it goes to media: nothing is pinned after a restart.
pub fn durable(byte: u8) -> u8 {
    match mark(byte) {
        Mark::GoesOn(_) => byte,
        _ => byte & !PINNED,
    }
}

/// The order of the largest block at `first` of at most `count` frames.
fn block_order(first: u64, count: u64) -> u32 {
    let fits = first.trailing_zeros().min(count.ilog2());
    if fits >= GIGANTIC {
        GIGANTIC
    } else {
        fits.min(ORDER_MAX)
    }
}

/// The bytes of an allocation, its head first.
pub fn bytes_of(first: u64, count: u64) -> impl Iterator<Item = (u64, u8)> {
    let order = block_order(first, count);
    let whole = 1 << order == count;
    let (mut at, end) = (first + 1, if whole { first } else { first + count });
    let rest = std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let order = block_order(at, end - at);
        let byte = (at, GOES_ON | code(order) << 4);
        at += 1 << order;
        Some(byte)
    });
    std::iter::once((first, if whole { code(order) } else { RUN })).chain(rest)
}

/// What is kept of stores to a map.
pub enum Notes {
    /// Nothing: the map is in DRAM.
    Nothing,
    /// Which lines changed since they were on media.
    Lines(Table<AtomicU64>),
    /// How many there were: each changes a byte of the region.
    Count(AtomicU64),
}

/// The page map.
pub struct PageMap {
    bytes: Table<AtomicU8>,
    notes: Notes,
}

impl PageMap {
    /// A map of zero bytes.
    pub fn new(bytes: Table<AtomicU8>, notes: Notes) -> PageMap {
        PageMap { bytes, notes }
    }

    /// Stores to a map that is in the region so far.
    pub fn stores(&self) -> u64 {
        match &self.notes {
            Notes::Count(stores) => stores.load(Ordering::Relaxed),
            Notes::Nothing | Notes::Lines(_) => 0,
        }
    }

    /// The byte of a frame.
    #[inline]
    pub fn byte(&self, frame: u64) -> u8 {
        self.bytes[frame as usize].load(Ordering::Acquire)
    }

    #[inline]
    fn note(&self, frame: u64) {
        match &self.notes {
            Notes::Nothing => {}
            Notes::Lines(changed) => {
                let line = frame / LINE;
                changed[(line / 64) as usize].fetch_or(1 << (line % 64), Ordering::Release);
            }
            Notes::Count(stores) => {
                stores.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Stores a byte of whoever owns the frame.
    #[inline]
    pub fn set(&self, frame: u64, byte: u8) {
        self.bytes[frame as usize].store(byte, Ordering::Release);
        self.note(frame);
    }

    /// Changes the byte of a frame from one to another; gives the one that was there instead.
    #[inline]
    pub fn change(&self, frame: u64, from: u8, to: u8) -> Result<(), u8> {
        let order = (Ordering::AcqRel, Ordering::Acquire);
        self.bytes[frame as usize].compare_exchange(from, to, order.0, order.1)?;
        self.note(frame);
        Ok(())
    }

    /// Takes down an allocation.
    pub fn record(&self, first: u64, count: u64) {
        let mut bytes = bytes_of(first, count);
        let head = bytes.next();
        for (frame, byte) in bytes.chain(head) {
            self.set(frame, byte);
        }
    }

    /// Erases what follows the head of an allocation.
    pub fn erase_rest(&self, first: u64, count: u64) {
        for (frame, _) in bytes_of(first, count).skip(1) {
            self.set(frame, NOTHING);
        }
    }

    /// Changes what the owner says; false where no allocation begins at the frame.
    pub fn set_flags(&self, first: u64, change: impl Fn(&mut Flags)) -> bool {
        loop {
            let byte = self.byte(first);
            if !matches!(mark(byte), Mark::Block(_) | Mark::Run) {
                return false;
            }
            let mut flags = flags(byte);
            change(&mut flags);
            if self.change(first, byte, with_flags(byte, flags)).is_ok() {
                return true;
            }
        }
    }

    /// The length of the allocation that begins at a frame with this byte, where one does.
    pub fn length(&self, first: u64, byte: u8) -> Option<u64> {
        match mark(byte) {
            Mark::Block(count) => Some(count),
            Mark::Run => {
                let mut end = first + 1;
                while end < self.bytes.len() as u64 {
                    let Mark::GoesOn(count) = mark(self.byte(end)) else { break };
                    end += count;
                }
                Some(end - first)
            }
            _ => None,
        }
    }

    /// The first frame of the block that a frame is in, and what its byte says.
    fn block(&self, frame: u64) -> Option<(u64, Mark)> {
        let orders = (0..=ORDER_MAX).chain([GIGANTIC]);
        orders.map(|order| frame >> order << order).find_map(|start| {
            let mark = mark(self.byte(start));
            match mark {
                Mark::Block(count) | Mark::GoesOn(count) if frame < start + count => {}
                Mark::Run if frame == start => {}
                _ => return None,
            }
            Some((start, mark))
        })
    }

    /// The first frame of the allocation that a frame is in.
    pub fn head(&self, frame: u64) -> Option<u64> {
        let (mut start, mut mark) = self.block(frame)?;
        while let Mark::GoesOn(_) = mark {
            (start, mark) = self.block(start.checked_sub(1)?)?;
        }
        Some(start)
    }

    /// Stores a byte that is on media already.
    pub fn load(&self, frame: u64, byte: u8) {
        self.bytes[frame as usize].store(byte, Ordering::Relaxed);
    }

    /// The frames whose byte is not 0, in order.
    pub fn used(&self) -> impl Iterator<Item = u64> + '_ {
        let all = self.bytes.iter().enumerate();
        let used = all.filter(|(_, byte)| byte.load(Ordering::Relaxed) != NOTHING);
        used.map(|(frame, _)| frame as u64)
    }

    /// True where the blocks that the map holds of an allocation are those it ought to have.
    pub fn is_aligned(&self, first: u64, count: u64) -> bool {
        let kind = |byte| match mark(byte) {
            Mark::GoesOn(_) => byte,
            _ => byte & KIND,
        };
        bytes_of(first, count).all(|(frame, byte)| kind(self.byte(frame)) == byte)
    }

    /// True for a frame that is in a block and not its first.
    pub fn is_inside(&self, frame: u64) -> bool {
        let orders = (1..=ORDER_MAX).chain([GIGANTIC]);
        orders.map(|order| frame >> order << order).any(|start| {
            let mark = mark(self.byte(start));
            let block = matches!(mark, Mark::Block(n) | Mark::GoesOn(n) if frame < start + n);
            block && start != frame
        })
    }

    /// True where all bytes of an area are 0.
    pub fn is_zero(&self, area: u64) -> bool {
        let start = (area * AREA) as usize;
        let end = self.bytes.len().min(start + AREA as usize);
        self.bytes[start..end].iter().all(|byte| byte.load(Ordering::Relaxed) == NOTHING)
    }

    /// Tells of each line that changed, and forgets it.
    pub fn take_changed(&self, mut line: impl FnMut(u64)) {
        let Notes::Lines(changed) = &self.notes else { return };
        for (index, word) in changed.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut rest = word.swap(0, Ordering::Acquire);
            while rest != 0 {
                line(index as u64 * 64 + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
    }

    /// Says that a line changed.
    pub fn note_line(&self, line: u64) {
        self.note(line * LINE);
    }
}

/// Where a test planted this mistake.
pub fn is(plant: Plant, which: Plant) -> bool {
    cfg!(any(test, feature = "planted-faults")) && plant == which
}
