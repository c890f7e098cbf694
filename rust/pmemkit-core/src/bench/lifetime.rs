//! How long media last under mode sector: the engine itself on a medium that has no data, only
//! counters, until a block reaches its rating.
//!
//! Invariants:
//! 1. Who is moved where is decided by the engine that serves sectors, not by a copy of it.
//! 2. A store to a block counts for the block. A write-back of metadata counts for each line that
//!    it touches; nothing is merged on its way to media.
//!
//! What this does not do: several threads, wear that was there before, reads.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::btt::{Arena, Geometry, Options};
use crate::error::{Error, Kind, Result};
use crate::media::{Extent, Granularity, Medium, Store};
use crate::sg::{RegionId, Segment};

const LINES: [u64; 2] = [64, 256];
const SECTOR: [u8; 4096] = [0; 4096];
const GROUP: u64 = 64;

/// When lines of one size and one area reached the rating first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes of a line.
    pub line_size: u64,
    /// `map` or `log`.
    pub area: &'static str,
    /// Writes of the client until then, if it was before the first block.
    pub writes: Option<u64>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Writes of the client until the first block had reached the rating.
    pub writes: u64,
    /// Writes until all of them have, if they do so at once and nothing is moved.
    pub ideal: u64,
    /// Writes that levelling added.
    pub relocations: u64,
    /// True when a block reached the rating; otherwise there were as many writes as were allowed.
    pub worn_out: bool,
    /// Lines of the metadata.
    pub limits: Vec<Limit>,
    /// Writes of each block, arena by arena.
    pub counts: Vec<u32>,
}

/// Counters in place of media.
struct Ledger {
    geometry: Geometry,
    rating: u32,
    /// Map and log.
    metadata: Vec<AtomicU64>,
    blocks: Vec<AtomicU32>,
    /// Of the metadata, for each size of line.
    lines: [Vec<AtomicU32>; 2],
    /// Blocks that reached the rating.
    worn: AtomicU32,
    /// Lines that did, of each size, of the map and of the log.
    worn_lines: [[AtomicU32; 2]; 2],
}

fn count(counter: &AtomicU32, rating: u32, reached: &AtomicU32) {
    let now = counter.load(Ordering::Relaxed) + 1;
    counter.store(now, Ordering::Relaxed);
    if now == rating {
        reached.fetch_add(1, Ordering::Relaxed);
    }
}

fn zeroes(count: u64) -> Vec<AtomicU32> {
    (0..count).map(|_| AtomicU32::new(0)).collect()
}

impl Ledger {
    fn new(geometry: Geometry, rating: u32) -> Ledger {
        let bytes = geometry.logoff + u64::from(geometry.nfree) * GROUP - geometry.mapoff;
        let ledger = Ledger {
            geometry,
            rating,
            metadata: (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect(),
            blocks: zeroes(u64::from(geometry.internal_nlba)),
            lines: LINES.map(|size| zeroes(bytes.div_ceil(size))),
            worn: AtomicU32::new(0),
            worn_lines: Default::default(),
        };
        for lane in 0..geometry.nfree {
            let block = u64::from(geometry.external_nlba + lane);
            let at = (geometry.group_at(lane) - geometry.start - geometry.mapoff) as usize / 8;
            ledger.metadata[at].store(u64::from(lane) | block << 32, Ordering::Relaxed);
            ledger.metadata[at + 1].store(block | 1 << 32, Ordering::Relaxed);
        }
        ledger
    }

    /// The byte of the metadata at a place of the medium.
    fn metadata_at(&self, at: u64) -> Option<u64> {
        at.checked_sub(self.geometry.start + self.geometry.mapoff)
    }

    fn word(&self, at: u64) -> Result<&AtomicU64> {
        let word = self.metadata_at(at).and_then(|at| self.metadata.get(at as usize / 8));
        word.ok_or_else(|| Error::new(Kind::OutOfRange, "bench", "no metadata there").at(at))
    }

    fn refused<T>(&self) -> Result<T> {
        Err(Error::new(Kind::NotSupported, "bench", "a ledger has counters only"))
    }
}

impl Medium for Ledger {
    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        if self.metadata_at(at).is_none() {
            // SAFETY: the caller's promise.
            unsafe { target.write_bytes(0, len as usize) };
            return Ok(());
        }
        for place in 0..len / 8 {
            let word = self.word(at + 8 * place)?.load(Ordering::Relaxed);
            // SAFETY: inside the caller's range.
            unsafe { target.add(8 * place as usize).cast::<u64>().write_unaligned(word.to_le()) };
        }
        Ok(())
    }

    unsafe fn store(&self, at: u64, _: *const u8, _: u64, _: Store) -> Result<()> {
        let size = u64::from(self.geometry.internal_lbasize);
        let block = (at - self.geometry.start - self.geometry.dataoff) / size;
        let Some(counter) = self.blocks.get(block as usize) else { return self.refused() };
        count(counter, self.rating, &self.worn);
        Ok(())
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        Ok(self.word(at)?.load(Ordering::Relaxed))
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        self.word(at)?.store(value, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        let Some(first) = self.metadata_at(at) else { return self.refused() };
        let area = usize::from(first >= self.geometry.logoff - self.geometry.mapoff);
        for (place, size) in LINES.into_iter().enumerate() {
            for line in first / size..(first + len).div_ceil(size) {
                if let Some(counter) = self.lines[place].get(line as usize) {
                    count(counter, self.rating, &self.worn_lines[place][area]);
                }
            }
        }
        Ok(())
    }

    fn fence(&self) {}

    fn region(&self) -> RegionId {
        RegionId::HOST
    }

    fn len(&self) -> u64 {
        self.geometry.start + self.geometry.mapoff + 8 * self.metadata.len() as u64
    }

    fn granularity(&self) -> Granularity {
        Granularity::Cacheline
    }

    fn zero(&self, _: u64, _: u64) -> Result<()> {
        self.refused()
    }

    fn stored_elsewhere(&self, _: u64, _: u64) -> Result<()> {
        self.refused()
    }

    fn persist(&self, at: u64, len: u64) -> Result<()> {
        self.flush(at, len)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<bool> {
        self.refused()
    }

    fn extents(&self, _: u64, _: u64) -> Result<Vec<Extent>> {
        self.refused()
    }

    fn address(&self, _: &Segment) -> Result<*mut u8> {
        self.refused()
    }

    fn resize(&self, _: u64) -> Result<()> {
        self.refused()
    }
}

/// Writes one sector after the other, as `workload` names them, to arenas of one size, until a
/// block was written `rating` times, or the workload ends.
pub fn lifetime(
    geometries: &[Geometry],
    options: Options,
    rating: u32,
    workload: impl Iterator<Item = u64>,
) -> Result<Lifetime> {
    let mut arenas = Vec::new();
    for geometry in geometries {
        let ledger = Ledger::new(*geometry, rating);
        arenas.push((Arena::open(&ledger, *geometry, options)?, ledger));
    }
    let sectors = geometries.first().map_or(1, |each| u64::from(each.external_nlba));
    let blocks: u64 = geometries.iter().map(|each| u64::from(each.internal_nlba)).sum();
    let mut limits = Vec::new();
    for line_size in LINES {
        limits.extend(["map", "log"].map(|area| Limit { line_size, area, writes: None }));
    }
    let (mut writes, mut worn_out) = (0, false);
    for sector in workload {
        let lba = (sector % sectors) as u32;
        let Some((arena, ledger)) = arenas.get((sector / sectors) as usize) else {
            let text = format!("sector {sector} is behind the last arena");
            return Err(Error::new(Kind::OutOfRange, "bench", text));
        };
        // SAFETY: the source is a constant as large as the largest sector.
        unsafe { arena.write(ledger, lba, &[SECTOR.as_ptr()])? };
        writes += 1;
        for (limit, worn) in limits.iter_mut().zip(ledger.worn_lines.as_flattened()) {
            if worn.load(Ordering::Relaxed) != 0 && limit.writes.is_none() {
                limit.writes = Some(writes);
            }
        }
        if ledger.worn.load(Ordering::Relaxed) != 0 {
            worn_out = true;
            break;
        }
    }
    let counts = arenas.iter().flat_map(|(_, ledger)| &ledger.blocks);
    Ok(Lifetime {
        writes,
        ideal: blocks * u64::from(rating),
        relocations: arenas.iter().map(|(arena, _)| arena.relocations()).sum(),
        worn_out,
        limits,
        counts: counts.map(|count| count.load(Ordering::Relaxed)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btt::{Levelling, Victim};

    fn small() -> Geometry {
        let (sectors, lanes) = (1000, 8);
        let mapoff = 4096 + (sectors + lanes) * 512;
        Geometry {
            start: 0,
            external_lbasize: 512,
            external_nlba: sectors as u32,
            internal_lbasize: 512,
            internal_nlba: (sectors + lanes) as u32,
            nfree: lanes as u32,
            dataoff: 4096,
            mapoff,
            logoff: mapoff + 4096,
            in_error: false,
        }
    }

    fn lived(victim: Option<Victim>, sectors: &[u64]) -> Lifetime {
        let levelling = victim.map(|victim| Levelling { period: 50, victim, seed: 1 });
        let options = Options { levelling, ..Options::default() };
        lifetime(&[small()], options, 1000, sectors.iter().copied().cycle()).unwrap()
    }

    #[test]
    fn one_sector_wears_two_blocks_out_unless_it_is_levelled() {
        let plain = lived(None, &[7]);
        assert_eq!((plain.writes, plain.relocations), (1999, 0));
        assert_eq!(plain.counts.iter().map(|each| u64::from(*each)).sum::<u64>(), plain.writes);
        let levelled = lived(Some(Victim::LeastWorn), &[7]);
        assert!(levelled.writes * 10 >= levelled.ideal * 9, "{} writes", levelled.writes);
        assert!(levelled.relocations * 50 <= levelled.writes + 8 * 50);
        let total = levelled.writes + levelled.relocations;
        assert_eq!(levelled.counts.iter().map(|each| u64::from(*each)).sum::<u64>(), total);
        assert_eq!(*levelled.counts.iter().max().unwrap(), 1000);
    }
}
