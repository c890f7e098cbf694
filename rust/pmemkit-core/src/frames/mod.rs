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

mod allocator;
mod areas;
mod durable;
#[cfg(test)]
mod explore;
mod map;
mod plant;
mod slot;
mod sync;
mod sys;
mod table;
mod tree;
mod validate;

#[cfg(feature = "model-check")]
mod model;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::media::Medium;

pub use allocator::Allocator;

/// Frames of an area: 2 MiB, the unit of going online and offline.
pub const AREA: u64 = 512;
/// The largest order but [`GIGANTIC`].
pub const ORDER_MAX: u32 = 10;
/// The order of 1 GiB.
pub const GIGANTIC: u32 = 18;

/// The largest tag.
pub const TAG_MAX: u8 = 3;

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

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Place { offset, length, persistent, .. } = self;
        write!(f, "Place {{ offset: {offset}, length: {length}, persistent: {persistent} }}")
    }
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
