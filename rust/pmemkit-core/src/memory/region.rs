//! One region of a pool: its file, its window, its free runs and its blocks.
//!
//! Invariants:
//! 1. The window is mapped as a whole as long as the region is a member; where the address of a
//!    displaced extent lies in it, that extent's pieces are mapped instead.
//! 2. Frames of a block that is not online are withdrawn: nothing new is put there.
//!
//! What this does not do: lock (the pool does), decide where extents go.

use std::os::fd::{AsFd, OwnedFd};

use super::catch::Catch;
use super::runs::Runs;
use super::sys::FileIdentity;
use super::{sys, FRAME_SIZE};
use crate::error::{Error, Kind, Result};
use crate::frames::Place;
use crate::media;

/// What [`super::Pool::add`] is told of a region.
#[derive(Clone, Debug)]
pub struct RegionOptions {
    /// For messages and statistics.
    pub name: String,
    /// Where its first frame lies in the file. Bytes.
    pub offset: u64,
    /// Bytes from there on.
    pub len: u64,
    /// Preference: regions of a smaller rank are filled first.
    pub rank: u32,
    /// Share of an interleaved extent.
    pub weight: u32,
    /// False for one whose length others may change: it is looked at before every allocation.
    pub sealed: bool,
    /// Ask the kernel for large pages.
    pub large_pages: bool,
    /// Frames that are in use from the start, as `(first, count)`: named arrays. Each becomes a
    /// fixed extent at its home.
    pub claimed: Vec<(u64, u64)>,
    /// Where its page map is; in DRAM where nothing is said.
    pub map: Option<MapPlace>,
}

/// A page map that is in the file of its region, in front of the frames.
#[derive(Clone, Debug)]
pub struct MapPlace {
    /// The bytes of the medium that it may take.
    pub place: Place,
    /// Where these bytes end in the file.
    pub end: u64,
}

/// The state of a memory block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Frames are handed out.
    Online,
    /// It is empty and stays so.
    Offline,
    /// What is in it is being moved out.
    Leaving,
}

impl BlockState {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            BlockState::Online => "online",
            BlockState::Offline => "offline",
            BlockState::Leaving => "leaving",
        }
    }
}

/// A region of a pool.
pub struct Member {
    pub(super) options: RegionOptions,
    pub(super) file: std::sync::Arc<OwnedFd>,
    pub(super) identity: FileIdentity,
    /// Frames that one mapping of this file must be a multiple of.
    pub(super) unit: u64,
    pub(super) frames: u64,
    pub(super) window: u64,
    pub(super) catch: Catch,
    /// `write(2)` works on it.
    pub(super) writable: bool,
    /// Forked children do not get its mappings.
    pub(super) own: bool,
    pub(super) runs: Runs,
    pub(super) blocks: Vec<BlockState>,
}

/// What is known of a region.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// The number it has in this pool.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Frames of its blocks.
    pub frames: u64,
    /// Frames that may be handed out.
    pub free_frames: u64,
    /// Frames of one mapping.
    pub unit: u64,
    /// Where its window starts.
    pub window: u64,
    /// How writers are caught.
    pub catch: &'static str,
    /// Its rank.
    pub rank: u32,
    /// Its weight.
    pub weight: u32,
    /// State and frames in use of each block.
    pub blocks: Vec<(BlockState, u64)>,
    /// True when the file no longer reaches to the end of the region.
    pub truncated: bool,
    /// The page map is in the region.
    pub map_in_region: bool,
    /// Bytes of the page map.
    pub map_bytes: u64,
    /// Stores to a page map in the region since it was made, a byte each.
    pub map_stores: u64,
}

impl Member {
    /// Where a frame lies in the file. Bytes.
    pub(super) fn file_offset(&self, frame: u64) -> u64 {
        self.options.offset + frame * FRAME_SIZE
    }

    /// Where a frame lies when nobody displaced it.
    pub(super) fn home(&self, frame: u64) -> u64 {
        self.window + frame * FRAME_SIZE
    }

    /// Maps frames over addresses of the pool.
    ///
    /// # Safety
    /// As for [`sys::map_over`].
    pub(super) unsafe fn map(&self, at: u64, first: u64, frames: u64) -> Result<()> {
        let len = frames * FRAME_SIZE;
        // SAFETY: the caller vouches for the range.
        unsafe { sys::map_over(at, len, self.file.as_fd(), self.file_offset(first))? };
        if self.own {
            sys::keep_from_children(at, len)?;
        }
        if self.options.large_pages {
            sys::advise_large_pages(at, len);
        }
        Ok(())
    }

    /// False once the file is shorter than the region.
    pub(super) fn check_length(&self) -> Result<()> {
        if self.options.sealed {
            return Ok(());
        }
        let size = media::sys::inspect(self.file.as_fd())?.size;
        let end = self.file_offset(self.frames);
        if size >= end {
            return Ok(());
        }
        let text = format!(
            "region {} vanished: its file has {size} bytes left, {end} belong to the pool",
            self.options.name
        );
        Err(Error::new(Kind::Truncated, "allocate", text))
    }

    /// What is known of it.
    pub(super) fn info(&self, id: u32, block_frames: u64) -> RegionInfo {
        let used = |index: usize| self.runs.used(index as u64 * block_frames, block_frames);
        let blocks = self.blocks.iter().enumerate();
        RegionInfo {
            id,
            name: self.options.name.clone(),
            frames: self.frames,
            free_frames: self.runs.free_frames(),
            unit: self.unit,
            window: self.window,
            catch: self.catch.name(),
            rank: self.options.rank,
            weight: self.options.weight,
            blocks: blocks.map(|(index, &state)| (state, used(index))).collect(),
            truncated: self.check_length().is_err(),
            map_in_region: self.options.map.is_some(),
            map_bytes: self.runs.map_bytes(),
            map_stores: self.runs.map_stores(),
        }
    }
}
