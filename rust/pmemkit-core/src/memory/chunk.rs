//! One chunk of a migration: its bytes go to other frames, and these to its addresses.
//!
//! Invariants:
//! 1. Whatever can fail for want of room or of bytes is tried before stores are held, or leaves the
//!    old mapping in place: an error means that the chunk is where it was.
//! 2. Bytes are read and written at addresses at which no store is held: the chunk's own are only
//!    read.
//!
//! What this does not do: lock the pool, know which extent a chunk belongs to.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::catch::Catch;
use super::{sys, FRAME_SIZE, WINDOW_ALIGN};
use crate::error::{Error, Kind, Result};
use crate::media;
use crate::media::port::Port;

/// A chunk: addresses, and frames on both sides.
pub(super) struct Chunk {
    pub at: u64,
    pub frames: u64,
    pub from: (u32, u64),
    pub to: (u32, u64),
}

/// What of a member the copying needs, so that it needs no lock.
pub(super) struct Side {
    pub file: Arc<OwnedFd>,
    pub offset: u64,
    pub frames: u64,
    pub catch: Catch,
    pub large_pages: bool,
    /// Its bytes can be written through the file: faster than through a mapping where the kernel
    /// has no page yet, because a page that is written whole is not zeroed first.
    pub writable: bool,
    /// Where all of it is mapped as long as it is a member.
    pub window: u64,
    /// A second mapping of all of it, made when it is first needed.
    pub alias: Option<u64>,
}

impl Drop for Side {
    fn drop(&mut self) {
        if let Some(alias) = self.alias {
            // SAFETY: mapped by `alias_of`; nobody else knows it.
            unsafe { sys::unmap(alias, self.frames * FRAME_SIZE) };
        }
    }
}

impl Side {
    /// Where a frame is mapped although its extent's address may be held, or show another frame.
    fn alias_of(&mut self, frame: u64) -> Result<u64> {
        if self.alias.is_none() {
            let len = self.frames * FRAME_SIZE;
            let base = sys::reserve(len, WINDOW_ALIGN)?;
            // SAFETY: reserved just now.
            let mapped = unsafe { sys::map_over(base, len, self.file.as_fd(), self.offset) };
            if let Err(error) = mapped.and_then(|()| sys::keep_from_children(base, len)) {
                // SAFETY: as above.
                unsafe { sys::unmap(base, len) };
                return Err(error);
            }
            if self.large_pages {
                sys::advise_large_pages(base, len);
            }
            self.alias = Some(base);
        }
        Ok(self.alias.unwrap_or_default() + frame * FRAME_SIZE)
    }

    /// Where to read frames of an extent while stores to its address are held. Protecting a large
    /// page splits it, after which each small page of it faults anew: not so through an alias.
    fn read_from(&mut self, chunk: &Chunk) -> Result<u64> {
        if self.large_pages && sys::large_pages_possible() {
            return self.alias_of(chunk.from.1);
        }
        Ok(chunk.at)
    }

    /// Where to write frames that a chunk goes to: in the window, unless an extent that was moved
    /// away has their address there.
    fn write_to(&mut self, chunk: &Chunk, displaced: &[(u64, u64)]) -> Result<u64> {
        let start = self.window + chunk.to.1 * FRAME_SIZE;
        let end = start + chunk.frames * FRAME_SIZE;
        let after = displaced.partition_point(|&(_, taken_end)| taken_end <= start);
        match displaced.get(after) {
            Some(&(taken, _)) if taken < end => self.alias_of(chunk.to.1),
            _ => Ok(start),
        }
    }

    /// Copies bytes to frames that are mapped at `to`.
    fn copy(&self, frame: u64, from: u64, to: u64, len: u64) -> Result<()> {
        if self.writable && !sys::is_resident(to, len)? {
            let offset = self.offset + frame * FRAME_SIZE;
            // SAFETY: the source is mapped for this length; where its file was cut, the call fails.
            return unsafe {
                media::sys::write(self.file.as_fd(), offset, from as *const u8, len)
                    .map_err(vanished)
            };
        }
        // SAFETY: both are mappings of ours of this length; the guard was installed by `Pool::add`.
        let copied = unsafe { Port::get().copy_bulk(to as *mut u8, from as *const u8, len) };
        if copied.is_fault() {
            let text = format!(
                "copying {len} bytes faulted at address {:#x}: the region's file was cut, or there \
                 is no room for its bytes",
                copied.value
            );
            return Err(Error::new(Kind::Truncated, "migrate", text));
        }
        Ok(())
    }

    /// Maps frames at an address of an extent.
    fn map_at(&self, at: u64, frame: u64, frames: u64) -> Result<()> {
        let len = frames * FRAME_SIZE;
        // SAFETY: the addresses are those of an extent that is moving; its bytes are in the frames.
        unsafe { sys::map_over(at, len, self.file.as_fd(), self.offset + frame * FRAME_SIZE)? };
        // While it is moving no child gets it; see `Pool::fill`.
        let _ = sys::keep_from_children(at, len);
        if self.large_pages {
            sys::advise_large_pages(at, len);
        }
        Ok(())
    }
}

/// Moves one chunk; gives the nanoseconds for which its stores were held.
pub(super) fn move_chunk(
    sides: &mut BTreeMap<u32, Side>,
    displaced: &[(u64, u64)],
    chunk: &Chunk,
) -> Result<u64> {
    let len = chunk.frames * FRAME_SIZE;
    let missing = || Error::new(Kind::System, "migrate", "a region of the chunk is not there");
    let source = sides.get_mut(&chunk.from.0).ok_or_else(missing)?;
    let from = source.read_from(chunk)?;
    let catch = source.catch.clone();
    let target = sides.get_mut(&chunk.to.0).ok_or_else(missing)?;
    let to = target.write_to(chunk, displaced)?;
    // Pages are brought in before anybody has to wait; those of the address itself mostly are.
    if from != chunk.at {
        sys::populate_read(from, len).map_err(vanished)?;
    }
    if !target.writable {
        sys::populate_write(to, len).map_err(vanished)?;
    }
    let started = Instant::now();
    // SAFETY: the chunk is a part of an extent, which is mapped as long as it is moving.
    let hold = unsafe { catch.hold(chunk.at, len)? };
    target.copy(chunk.to.1, from, to, len)?;
    target.map_at(chunk.at, chunk.to.1, chunk.frames)?;
    hold.moved();
    Ok(started.elapsed().as_nanos() as u64)
}

fn vanished(error: Error) -> Error {
    if error.source_errno != Some(libc::EFAULT) {
        return error;
    }
    let text = format!("the region's file does not reach here any more: {}", error.detail);
    Error::new(Kind::Truncated, "migrate", text)
}
