//! Small arenas for tests: as the format has them, with fewer lanes and sectors than Linux makes.
//!
//! Invariants:
//! 1. Map and log have pages of their own, as in the arenas of Linux.
//!
//! What this does not do: info blocks, several arenas.

use std::sync::Arc;

use super::engine::Options;
use super::geometry::Geometry;
use super::log::Entry;
use super::{Btt, GROUP_SIZE};
use crate::block::{Device, Flags, Op, Request};
use crate::error::Result;
use crate::media::crash::PAGE_SIZE;
use crate::media::recording::Recording;
use crate::media::{Granularity, Medium};
use crate::sg::Sg;

/// An arena at byte 0 with `sectors` sectors and `lanes` lanes.
pub fn geometry(sector_size: u32, sectors: u32, lanes: u32) -> Geometry {
    let internal_lbasize = sector_size.next_multiple_of(64);
    let blocks = sectors + lanes;
    let dataoff = 64;
    let data = u64::from(blocks) * u64::from(internal_lbasize);
    // A host writes them back on their own.
    let mapoff = (dataoff + data).next_multiple_of(PAGE_SIZE);
    let logoff = (mapoff + 4 * u64::from(sectors)).next_multiple_of(PAGE_SIZE);
    Geometry {
        start: 0,
        external_lbasize: sector_size,
        external_nlba: sectors,
        internal_lbasize,
        internal_nlba: blocks,
        nfree: lanes,
        dataoff,
        mapoff,
        logoff,
        in_error: false,
    }
}

/// Bytes that such an arena needs.
pub fn size_of(geometry: &Geometry) -> u64 {
    geometry.logoff + u64::from(geometry.nfree) * GROUP_SIZE
}

/// An arena that was never written: an empty map, and a log whose lanes own the spare blocks.
pub fn fresh(geometry: &Geometry) -> Vec<u8> {
    let mut image = vec![0; size_of(geometry) as usize];
    for lane in 0..geometry.nfree {
        let block = geometry.external_nlba + lane;
        let entry = Entry { lba: lane, old_map: block, new_map: block, seq: 1 };
        let lba = lane % geometry.external_nlba;
        let entry = Entry { lba, ..entry };
        let at = geometry.group_at(lane) as usize;
        image[at..at + 8].copy_from_slice(&entry.first_word().to_le_bytes());
        image[at + 8..at + 16].copy_from_slice(&entry.second_word().to_le_bytes());
    }
    image
}

/// A recording that holds an image.
pub fn recording(image: &[u8], granularity: Granularity) -> Arc<Recording> {
    Arc::new(Recording::new(image.len() as u64, granularity, image).expect("memory"))
}

/// The arena on a medium as a device.
pub fn open(medium: &Arc<Recording>, geometry: &Geometry, options: Options) -> Result<Btt> {
    let medium: Arc<dyn Medium> = medium.clone();
    Btt::open(medium, &[*geometry], options)
}

/// Whole sectors from a buffer.
pub fn write(device: &Btt, at: u64, data: &[u8]) -> Result<()> {
    // SAFETY: the buffer outlives the request; a write does not store to it.
    let sg = unsafe { Sg::host(data.as_ptr().cast_mut(), data.len() as u64) };
    submit(device, Op::Write, at, data.len() as u64, &sg)
}

/// Bytes into a new buffer.
pub fn read(device: &Btt, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut data = vec![0xee; len as usize];
    read_into(device, at, &mut data)?;
    Ok(data)
}

/// Bytes into a buffer.
pub fn read_into(device: &Btt, at: u64, buffer: &mut [u8]) -> Result<()> {
    let len = buffer.len() as u64;
    // SAFETY: the buffer outlives the request.
    let sg = unsafe { Sg::host(buffer.as_mut_ptr(), len) };
    submit(device, Op::Read, at, len, &sg)
}

/// A request without a buffer.
pub fn ranged(device: &Btt, op: Op, at: u64, len: u64) -> Result<()> {
    submit(device, op, at, len, &Sg::new())
}

fn submit(device: &Btt, op: Op, at: u64, len: u64, sg: &Sg) -> Result<()> {
    device.submit(&Request { op, at, len, flags: Flags::empty(), sg })
}

/// A small random number generator; the same seed, the same numbers.
pub struct Dice(pub u64);

impl Dice {
    /// A number below `bound`.
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// True where the counts are those of a soak run.
pub fn soak() -> bool {
    std::env::var_os("PMEMKIT_SOAK").is_some_and(|value| value == "1")
}
