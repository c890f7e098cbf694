//! Which chunks of a pool are in use, found out a few at a time and without the help of programs.
//!
//! A chunk is taken out of this process's page table; its pages stay where they are, and each that
//! is touched comes back by a minor fault. A look at the page table some time later shows which
//! were. For writes alone, the chunk is write-protected instead, and the kernel lifts the
//! protection of each page that is stored to by itself.
//!
//! Invariants:
//! 1. No byte changes, nobody waits, and no access fails: what a sample costs is the faults.
//! 2. A migration ends all samples before it begins: its own protection is the only one then.
//! 3. Only addresses in windows of the pool are touched, under the pool's lock.
//!
//! What this does not do: remember what it saw, decide what is hot, see what other processes do.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::pool::{locked, Pool, State};
use super::{sys, FRAME_SIZE, WINDOW_ALIGN};
use crate::error::{Error, Kind, Result};
use crate::uffd::{feature, mode, page_table, Uffd};

/// Bytes of a chunk, and what its address is a multiple of.
pub const SAMPLE_CHUNK: u64 = WINDOW_ALIGN;

const PAGES: usize = (SAMPLE_CHUNK / FRAME_SIZE) as usize;
const ENTRY: usize = size_of::<u64>();
/// Of an entry of the kernel's page map: the page is there.
const PRESENT: u64 = 1 << 63;
/// The same: it is write-protected by userfaultfd.
const PROTECTED: u64 = 1 << 57;

/// What counts as use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heat {
    /// Loads and stores, by minor faults.
    Accesses,
    /// Stores, by write protection that the kernel lifts (Linux 6.7 or later).
    Writes,
}

/// What was seen of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its address.
    pub at: u64,
    /// Frames of extents in it.
    pub frames: u64,
    /// Those that were used meanwhile; neighbours may count with them, which the kernel maps along.
    pub used: u64,
    /// Where they are: `(region, frames)`.
    pub places: Vec<(u32, u64)>,
    /// A part of it cannot move.
    pub held: bool,
}

struct Chosen {
    at: u64,
    len: u64,
    heat: Heat,
}

/// Samples under way, and what taking them needs.
#[derive(Default)]
pub(super) struct Sampler {
    table: Option<File>,
    uffd: Option<Uffd>,
    chosen: Vec<Chosen>,
}

impl Sampler {
    fn table(&mut self) -> Result<&File> {
        if self.table.is_none() {
            self.table = Some(page_table("sample")?);
        }
        self.table.as_ref().ok_or_else(|| Error::new(Kind::System, "sample", "no page table"))
    }

    fn uffd(&mut self) -> Result<&Uffd> {
        if self.uffd.is_none() {
            let (uffd, _) = Uffd::open("sample")?;
            let needs = feature::WP | feature::WP_SHARED | feature::WP_UNPOPULATED;
            uffd.begin(needs | feature::WP_ASYNC)?;
            self.uffd = Some(uffd);
        }
        self.uffd.as_ref().ok_or_else(|| Error::new(Kind::System, "sample", "no userfaultfd"))
    }

    fn start(&mut self, chosen: Chosen) -> Result<()> {
        match chosen.heat {
            // SAFETY: the range is a part of a window: files mapped shared, or nothing.
            Heat::Accesses => unsafe { sys::unmap_pages(chosen.at, chosen.len)? },
            Heat::Writes => {
                let uffd = self.uffd()?;
                uffd.register(chosen.at, chosen.len, mode::WP).map_err(sys::explained)?;
                if let Err(error) = uffd.protect(chosen.at, chosen.len, true) {
                    uffd.unregister(chosen.at, chosen.len)?;
                    return Err(error);
                }
            }
        }
        self.chosen.push(chosen);
        Ok(())
    }

    /// Ends one sample: nothing of it is left in the page table.
    fn stop(&self, chosen: &Chosen) {
        if let (Heat::Writes, Some(uffd)) = (chosen.heat, &self.uffd) {
            // Fails only where the addresses are mapped no more, and then there is nothing to undo.
            let _ = uffd.unregister(chosen.at, chosen.len);
        }
    }

    /// Ends all samples, for a migration.
    pub fn abandon(&mut self) {
        let chosen = std::mem::take(&mut self.chosen);
        chosen.iter().for_each(|each| self.stop(each));
    }

    fn look(&mut self, chosen: &Chosen, entries: &mut [u8]) -> Result<()> {
        let offset = chosen.at / FRAME_SIZE * ENTRY as u64;
        self.table()?.read_exact_at(entries, offset).map_err(|cause| {
            let errno = cause.raw_os_error().unwrap_or(libc::EIO);
            Error::from_errno("sample", errno, "reading /proc/self/pagemap")
        })
    }
}

impl Pool {
    /// Begins to look at up to `count` chunks, from an address on and around to it again. Gives how
    /// many there are, and the address to go on from the next time. While a migration is under way
    /// there are none.
    pub fn sample_begin(&self, after: u64, count: usize, heat: Heat) -> Result<(usize, u64)> {
        self.require_own("sample")?;
        let mut sampler = locked(&self.sampler);
        if !sampler.chosen.is_empty() {
            return Err(Error::new(Kind::Busy, "sample", "samples are under way already"));
        }
        sampler.table()?;
        let (mut at, mut wrapped, mut failed) = (after, false, Ok(()));
        while sampler.chosen.len() < count {
            let state = locked(&self.state);
            if state.migrating {
                break;
            }
            let Some((start, end)) = next_chunk(&state, at) else {
                if wrapped || after == 0 {
                    break;
                }
                (at, wrapped) = (0, true);
                continue;
            };
            if wrapped && start >= after {
                break;
            }
            at = end;
            let chosen = Chosen { at: start, len: end - start, heat };
            if let Err(error) = sampler.start(chosen) {
                failed = Err(error);
            }
        }
        if sampler.chosen.is_empty() {
            failed?;
        }
        Ok((sampler.chosen.len(), at))
    }

    /// Ends the samples and gives what they show. Chunks that were freed meanwhile are left out,
    /// and so is everything that a migration ended.
    pub fn sample_end(&self) -> Result<Vec<Sample>> {
        self.require_own("sample")?;
        let mut sampler = locked(&self.sampler);
        let chosen = std::mem::take(&mut sampler.chosen);
        let mut found = Vec::with_capacity(chosen.len());
        let mut failed = Ok(());
        let mut entries = [0u8; PAGES * ENTRY];
        for each in &chosen {
            let state = locked(&self.state);
            let entries = &mut entries[..(each.len / FRAME_SIZE) as usize * ENTRY];
            match sampler.look(each, entries) {
                Ok(()) => found.extend(sample_of(&state, each, entries)),
                Err(error) => failed = Err(error),
            }
            sampler.stop(each);
        }
        failed.map(|()| found)
    }
}

/// The first chunk with an extent at or behind an address: its start and end, inside its window.
fn next_chunk(state: &State, after: u64) -> Option<(u64, u64)> {
    let end_of = |(&at, extent): (&u64, &super::pool::Extent)| at + extent.frames * FRAME_SIZE;
    let reaching = state.extents.range(..after).next_back().filter(|each| end_of(*each) > after);
    let (&at, extent) = reaching.or_else(|| state.extents.range(after..).next())?;
    let window = state.windows.get(&extent.window)?;
    let start = at.max(after) / SAMPLE_CHUNK * SAMPLE_CHUNK;
    let end = (start + SAMPLE_CHUNK).min(extent.window + window.len);
    Some((start.max(extent.window), end))
}

/// What the entries of a chunk's pages say about the extents that are there now.
fn sample_of(state: &State, chosen: &Chosen, entries: &[u8]) -> Option<Sample> {
    let end = chosen.at + chosen.len;
    let used = |entry: &[u8]| {
        let bits = entry.try_into().map_or(0, u64::from_ne_bytes);
        match chosen.heat {
            Heat::Accesses => bits & PRESENT != 0,
            Heat::Writes => bits & PROTECTED == 0,
        }
    };
    let mut sample = Sample { at: chosen.at, frames: 0, used: 0, places: Vec::new(), held: false };
    for (extent, at, part) in state.pieces_at(chosen.at, end) {
        let extent = state.extents.get(&extent)?;
        sample.held |= extent.is_held();
        sample.frames += part.frames;
        let first = ((at - chosen.at) / FRAME_SIZE) as usize * ENTRY;
        let bytes = entries.get(first..first + part.frames as usize * ENTRY)?;
        sample.used += bytes.chunks_exact(ENTRY).filter(|entry| used(entry)).count() as u64;
        match sample.places.iter_mut().find(|(region, _)| *region == part.region) {
            Some((_, frames)) => *frames += part.frames,
            None => sample.places.push((part.region, part.frames)),
        }
    }
    (sample.frames > 0).then_some(sample)
}
