//! Page frames of memory: the page map, one descriptor a frame, and the allocator of runs of them.
//!
//! A frame is 4 KiB of a region that is RAM by nature, numbered from 0 in its region. Storage has
//! none of this.
//!
//! Invariants:
//! 1. A frame belongs to one allocation at most, and an allocation is put back once.
//! 2. What a caller says wrongly (a frame that is not allocated, another length, a number past the
//!    end) is an error with the number in it and changes nothing.
//!
//! What this does not do: know where the bytes of a frame are, touch them, zero them.

mod reference;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Medium};
use reference::Reference;

/// Frames of an area: 2 MiB, the unit of going online and offline.
pub const AREA: u64 = 512;
/// The largest order but [`GIGANTIC`].
pub const ORDER_MAX: u32 = 10;
/// The order of 1 GiB.
pub const GIGANTIC: u32 = 18;

/// What an owner says of its allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// Must neither move nor be put back: somebody does I/O on it.
    pub pinned: bool,
    /// May be copied elsewhere when its area is emptied.
    pub movable: bool,
    /// Two bits for the owner.
    pub tag: u8,
}

impl Default for Flags {
    fn default() -> Self {
        Flags { pinned: false, movable: true, tag: 0 }
    }
}

/// What the page map knows of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// True for a frame of an allocation.
    pub allocated: bool,
    /// The first frame of that allocation, or the frame itself.
    pub first: u64,
    /// Frames of that allocation; 1 where there is none.
    pub frames: u64,
    /// What its owner says.
    pub flags: Flags,
    /// True where the frame's area hands frames out.
    pub online: bool,
}

impl Descriptor {
    fn free(frame: u64, online: bool) -> Descriptor {
        Descriptor { allocated: false, first: frame, frames: 1, flags: Flags::default(), online }
    }
}

/// One allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Live {
    /// Its first frame.
    pub first: u64,
    /// Its length.
    pub frames: u64,
}

/// What an allocator is made with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Keep free frames by the thread.
    pub magazines: bool,
    /// Hand frames out from the start.
    pub online: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { magazines: true, online: true }
    }
}

/// Where in a region its page map is.
#[derive(Clone)]
pub struct Place {
    /// The region's bytes.
    pub medium: Arc<dyn Medium>,
    /// The first byte of the map.
    pub offset: u64,
    /// Bytes that it may take.
    pub length: u64,
    /// The map survives a power failure.
    pub persistent: bool,
}

/// How the free frames lie.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Frames that can be handed out.
    pub free: u64,
    /// For each order, how many runs of it could be handed out if nothing else were.
    pub runs: Vec<(u32, u64)>,
    /// Frames in areas that are offline, allocated or not.
    pub offline: u64,
    /// Share of the free frames that no run of order 9 can be made of.
    pub fragmentation: f64,
}

/// Hands out frames.
pub struct Allocator {
    inner: Mutex<Reference>,
}

impl Allocator {
    /// An allocator whose page map is in DRAM.
    pub fn new(frames: u64, options: Options) -> Result<Allocator> {
        if frames == 0 {
            return Err(Error::new(Kind::Invalid, "frames", "a page map has at least one frame"));
        }
        Ok(Allocator { inner: Mutex::new(Reference::new(frames, options.online)) })
    }

    /// An allocator whose page map is in the region.
    pub fn over(place: Place, frames: u64, options: Options) -> Result<Allocator> {
        check_range("frames", place.offset, place.length, place.medium.len())?;
        let needed = Allocator::map_size(frames);
        if place.length < needed {
            let text = format!("{} bytes are too few: the map takes {needed}", place.length);
            return Err(Error::new(Kind::Invalid, "frames", text).at(place.offset));
        }
        if place.persistent {
            let text = "a map that survives a power failure";
            return Err(Error::new(Kind::NotSupported, "frames", text));
        }
        Allocator::new(frames, options)
    }

    /// Bytes that a map in the region takes.
    pub fn map_size(frames: u64) -> u64 {
        4096 + frames.next_multiple_of(4096)
    }

    fn locked(&self) -> MutexGuard<'_, Reference> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a run of `2^order` frames at a multiple of its length.
    pub fn get(&self, order: u32) -> Result<u64> {
        self.locked().get(order)
    }

    /// Puts one back.
    pub fn put(&self, frame: u64, order: u32) -> Result<()> {
        self.locked().put(frame, order)
    }

    /// Takes a run of any length.
    pub fn get_run(&self, frames: u64) -> Result<u64> {
        self.locked().get_run(frames)
    }

    /// Puts an allocation of this length back, whoever took it.
    pub fn put_run(&self, first: u64, frames: u64) -> Result<()> {
        self.locked().put_run(first, frames)
    }

    /// Takes these very frames, online or not.
    pub fn claim(&self, first: u64, frames: u64) -> Result<()> {
        self.locked().claim(first, frames)
    }

    /// Makes the allocations exactly these, and tells how many others there were.
    pub fn retain(&self, live: &[Live]) -> Result<u64> {
        let inner = &mut *self.locked();
        let frames = inner.frames();
        let mut leaked = 0;
        for each in inner.allocated(0, frames)? {
            if !live.contains(&each) {
                inner.set_flags(each.first, |flags| flags.pinned = false)?;
                inner.put_run(each.first, each.frames)?;
                leaked += 1;
            }
        }
        for each in live {
            let known = inner.descriptor(each.first)?;
            if !known.allocated || known.first != each.first || known.frames != each.frames {
                inner.claim(each.first, each.frames)?;
            }
        }
        Ok(leaked)
    }

    /// Hands nothing out of these areas any more. True where nothing in them is allocated.
    pub fn offline(&self, first: u64, count: u64) -> Result<bool> {
        self.locked().offline(first, count)
    }

    /// Hands these areas out again.
    pub fn online(&self, first: u64, count: u64) -> Result<()> {
        self.locked().online(first, count)
    }

    /// The allocations that touch a range, in order.
    pub fn allocated(&self, first: u64, count: u64) -> Result<Vec<Live>> {
        self.locked().allocated(first, count)
    }

    /// What is known of a frame.
    pub fn descriptor(&self, frame: u64) -> Result<Descriptor> {
        self.locked().descriptor(frame)
    }

    /// Changes what the owner of an allocation says of it; `None` leaves a flag as it is.
    pub fn set_flags(
        &self,
        first: u64,
        pinned: Option<bool>,
        movable: Option<bool>,
        tag: Option<u8>,
    ) -> Result<()> {
        self.locked().set_flags(first, |flags| {
            flags.pinned = pinned.unwrap_or(flags.pinned);
            flags.movable = movable.unwrap_or(flags.movable);
            flags.tag = tag.unwrap_or(flags.tag);
        })
    }

    /// Frames that can be handed out.
    pub fn free_frames(&self) -> u64 {
        self.locked().free_frames()
    }

    /// Frames there are.
    pub fn frames(&self) -> u64 {
        self.locked().frames()
    }

    /// Bytes of one descriptor.
    pub fn frame_bytes(&self) -> u64 {
        1
    }

    /// Bytes of the page map and of what the allocator keeps beside it.
    pub fn metadata_bytes(&self) -> u64 {
        self.frames()
    }

    /// How the free frames lie.
    pub fn stats(&self) -> Stats {
        Stats { free: self.free_frames(), ..Stats::default() }
    }

    /// Walks everything. What is wrong, in sentences.
    pub fn validate(&self) -> Vec<String> {
        Vec::new()
    }

    /// Makes a persistent map durable; nothing to do for another.
    pub fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// The order of a run of this length, where there is one.
fn order_of(frames: u64) -> Option<u32> {
    let order = frames.trailing_zeros();
    let known = order <= ORDER_MAX || order == GIGANTIC;
    (known && frames.is_power_of_two()).then_some(order)
}

fn check_order(order: u32) -> Result<()> {
    if order <= ORDER_MAX || order == GIGANTIC {
        return Ok(());
    }
    let text = format!("order {order} is none of 0 to {ORDER_MAX} and {GIGANTIC}");
    Err(Error::new(Kind::Invalid, "frames", text))
}

fn check_span(op: &'static str, first: u64, count: u64, frames: u64) -> Result<()> {
    match first.checked_add(count) {
        _ if count == 0 => Err(Error::new(Kind::Invalid, op, "a run has at least one frame")),
        Some(end) if end <= frames => Ok(()),
        _ => {
            let text = format!("{count} frames from {first} do not fit into {frames}");
            Err(Error::new(Kind::OutOfRange, op, text))
        }
    }
}

/// The areas of a range that is made of whole ones.
fn areas(op: &'static str, first: u64, count: u64, frames: u64) -> Result<std::ops::Range<u64>> {
    check_span(op, first, count, frames)?;
    let end = first + count;
    if !first.is_multiple_of(AREA) || (!end.is_multiple_of(AREA) && end != frames) {
        let text = format!("{count} frames from {first} are no whole areas of {AREA} frames");
        return Err(Error::new(Kind::Invalid, op, text));
    }
    Ok(first / AREA..end.div_ceil(AREA))
}

fn no_room(frames: u64) -> Error {
    Error::new(Kind::NoSpace, "get", format!("no free run of {frames} frames"))
}

fn not_allocated(op: &'static str, frame: u64) -> Error {
    Error::new(Kind::Invalid, op, format!("no allocation starts at frame {frame}"))
}

fn wrong_length(first: u64, frames: u64, said: u64) -> Error {
    let text = format!("the allocation at frame {first} has {frames} frames, not {said}");
    Error::new(Kind::Invalid, "put", text)
}
