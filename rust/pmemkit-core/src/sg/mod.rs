//! Scatter-gather: a transfer is a list of (region, pfn, offset, length), carried out by memcpy.
//!
//! A pfn here is the number of a 4 KiB frame inside its region: for a region of media that is a
//! sector number of a directly mapped range, for [`RegionId::HOST`] it is a page of this process.
//! There is no page map behind it; the same list works for frames with one and without.
//!
//! Invariants:
//! 1. `segment.offset < FRAME_SIZE`; a segment may run over any number of following frames.
//! 2. `sg.len()` equals the sum of the segments' lengths and never overflows a `u64`.
//! 3. A `HOST` segment is made only through an `unsafe` constructor: its maker vouches for the
//!    memory for as long as the list is in use. Segments of media carry no address at all.
//!
//! What this does not do: own memory, find the media of segments: the [`Registry`] does.

mod registry;
#[cfg(test)]
mod tests;

use smallvec::SmallVec;

use crate::error::{Error, Kind, Result};

pub use registry::{Access, Registry};

/// Bytes of a page frame, the unit of a pfn.
pub const FRAME_SIZE: u64 = 1 << FRAME_SHIFT;
/// log2 of [`FRAME_SIZE`].
pub const FRAME_SHIFT: u32 = 12;

/// The number of a region of bytes, unique in this process and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

impl RegionId {
    /// The address space of this process: buffers of clients, not media.
    pub const HOST: RegionId = RegionId(0);
}

/// A page frame number inside one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pfn(pub u64);

/// One run of bytes of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The region that the pfn counts in.
    pub region: RegionId,
    /// The frame in which the run starts.
    pub pfn: Pfn,
    /// Where in that frame it starts, in bytes, below [`FRAME_SIZE`].
    pub offset: u32,
    /// How many bytes it has; it may run into the frames that follow.
    pub len: u64,
}

impl Segment {
    /// The run of `len` bytes at byte `at` of `region`.
    #[inline(always)]
    pub fn new(region: RegionId, at: u64, len: u64) -> Self {
        let offset = (at % FRAME_SIZE) as u32;
        Segment { region, pfn: Pfn(at >> FRAME_SHIFT), offset, len }
    }

    /// The byte offset of the run inside its region.
    pub fn at(&self) -> u64 {
        (self.pfn.0 << FRAME_SHIFT) + u64::from(self.offset)
    }
}

/// A list of segments: the buffer side of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sg {
    segments: SmallVec<[Segment; 2]>,
    len: u64,
}

impl Sg {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// A list of one run of this process's memory.
    ///
    /// # Safety
    /// `data` must be valid for `len` bytes, for reading (writes to media) or writing (reads), for
    /// as long as this list is in use. Other threads may change the bytes meanwhile; nobody may
    /// free them.
    ///
    /// The list moves when it is returned, with room for a segment that nobody wrote; where the
    /// time of a read is felt, [`Sg::push_host`] into a list that stays in its place costs less.
    #[inline(always)]
    pub unsafe fn host(data: *mut u8, len: u64) -> Self {
        let mut sg = Self::new();
        // SAFETY: the caller vouches for the range.
        unsafe { sg.push_host(data, len) };
        sg
    }

    /// Appends a run of this process's memory.
    ///
    /// # Safety
    /// As for [`Sg::host`].
    #[inline(always)]
    pub unsafe fn push_host(&mut self, data: *mut u8, len: u64) {
        self.append(Segment::new(RegionId::HOST, data as u64, len));
    }

    /// Appends a run of a region of media. `HOST` is refused: that needs a voucher.
    pub fn push(&mut self, segment: Segment) -> Result<()> {
        if segment.region == RegionId::HOST {
            return Err(Error::new(Kind::Invalid, "sg", "a host segment needs push_host"));
        }
        self.append(segment);
        Ok(())
    }

    // Kept together with its callers: a segment that is stored field by field and copied as a whole
    // makes the CPU wait until the stores are in the cache, and everything before them too.
    #[inline(always)]
    fn append(&mut self, segment: Segment) {
        assert!(u64::from(segment.offset) < FRAME_SIZE, "segment starts past its frame");
        self.len = self.len.checked_add(segment.len).expect("sg list longer than 2^64");
        self.segments.push(segment);
    }

    /// Drops all segments and keeps the room for new ones.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// Total bytes of the transfer.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when the transfer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The runs, in transfer order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The address of a `HOST` segment; any other region is an error, with its number in it.
    #[inline(always)]
    pub fn host_address(segment: &Segment) -> Result<*mut u8> {
        if segment.region != RegionId::HOST {
            return Err(no_address(segment.region));
        }
        Ok(segment.at() as *mut u8)
    }
}

#[cold]
#[inline(never)]
fn no_address(region: RegionId) -> Error {
    let text = format!("region {} has no address in this process", region.0);
    Error::new(Kind::NotSupported, "sg", text)
}
