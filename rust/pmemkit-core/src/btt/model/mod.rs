//! The engine under loom, which tries every interleaving, and every value that the memory model
//! lets a load give.
//!
//! Invariants:
//! 1. `engine`, `levelling`, `recovery`, `lock` and `tracking` are the same files as outside,
//!    compiled a second time over the parts in `sync`. Nothing is levelled here.
//! 2. The medium has the weakest order that one may have: its stores are relaxed and its fence does
//!    nothing, as for a plain file. A load of the map is an acquire, for the address of what is
//!    copied after it depends on it, which no CPU reorders and loom does not know.
//!
//! What this does not do: persistence (`explore` has that).
#![allow(dead_code, clippy::duplicate_mod)]

#[path = "../engine.rs"]
mod engine;
#[path = "../levelling.rs"]
mod levelling;
#[path = "../lock.rs"]
mod lock;
#[path = "../recovery.rs"]
mod recovery;
mod sync;
mod tests;
#[path = "../tracking.rs"]
mod tracking;

use std::sync::Mutex;

use super::fixture::fresh;
use super::{geometry, log, Geometry, MapScan, Plant, Wrong, ERROR, MAP_MASK, NORMAL, ZERO};
use crate::error::{Error, Kind, Result};
use crate::media::{Extent, Granularity, Medium, Store};
use crate::sg::{RegionId, Segment};
use sync::{AtomicU64, Ordering};

/// An arena whose map and data are atomics of loom. Of each block, two words are kept: the first
/// and the last.
struct Modelled {
    geometry: Geometry,
    map: Vec<AtomicU64>,
    blocks: Vec<[AtomicU64; 2]>,
    /// The log, which a lane's owner alone uses.
    log: Mutex<Vec<u8>>,
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

impl Modelled {
    fn new(geometry: Geometry) -> Modelled {
        let image = fresh(&geometry);
        let (map, log) = (geometry.mapoff as usize, geometry.logoff as usize);
        let words = image[map..map + 4 * geometry.external_nlba as usize].chunks_exact(8);
        Modelled {
            geometry,
            map: words.map(|bytes| AtomicU64::new(word(bytes))).collect(),
            blocks: (0..geometry.internal_nlba).map(|_| Default::default()).collect(),
            log: Mutex::new(image[log..].to_vec()),
        }
    }

    fn entry(&self, at: u64) -> Option<&AtomicU64> {
        self.map.get(at.checked_sub(self.geometry.mapoff)? as usize / 8)
    }

    fn block(&self, at: u64) -> Option<&[AtomicU64; 2]> {
        let size = u64::from(self.geometry.internal_lbasize);
        self.blocks.get((at.checked_sub(self.geometry.dataoff)? / size) as usize)
    }

    fn not_modelled<T>(&self, op: &'static str) -> Result<T> {
        Err(Error::new(Kind::NotSupported, op, "not modelled"))
    }
}

impl Medium for Modelled {
    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        let target = unsafe { std::slice::from_raw_parts_mut(target, len as usize) };
        if let Some(first) = at.checked_sub(self.geometry.logoff) {
            let log = self.log.lock().expect("no panic under it");
            target.copy_from_slice(&log[first as usize..first as usize + target.len()]);
        } else if at >= self.geometry.mapoff {
            for (place, bytes) in target.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&self.load_u64(at + 8 * place as u64)?.to_le_bytes());
            }
        } else if let Some([first, last]) = self.block(at) {
            let end = target.len() - 8;
            target[..8].copy_from_slice(&first.load(Ordering::Relaxed).to_le_bytes());
            target[end..].copy_from_slice(&last.load(Ordering::Relaxed).to_le_bytes());
        }
        Ok(())
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, _: Store) -> Result<()> {
        // SAFETY: the caller's promise.
        let source = unsafe { std::slice::from_raw_parts(source, len as usize) };
        let Some([first, last]) = self.block(at) else { return self.not_modelled("store") };
        first.store(word(&source[..8]), Ordering::Relaxed);
        last.store(word(&source[source.len() - 8..]), Ordering::Relaxed);
        Ok(())
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        match self.entry(at) {
            Some(entry) => Ok(entry.load(Ordering::Acquire)),
            None => self.not_modelled("load_u64"),
        }
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        if let Some(first) = at.checked_sub(self.geometry.logoff) {
            let mut log = self.log.lock().expect("no panic under it");
            log[first as usize..first as usize + 8].copy_from_slice(&value.to_le_bytes());
        } else if let Some(entry) = self.entry(at) {
            entry.store(value, Ordering::Relaxed);
        }
        Ok(())
    }

    fn region(&self) -> RegionId {
        RegionId::HOST
    }

    fn len(&self) -> u64 {
        super::fixture::size_of(&self.geometry)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Page
    }

    fn zero(&self, _: u64, _: u64) -> Result<()> {
        self.not_modelled("zero")
    }

    fn stored_elsewhere(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn fence(&self) {}

    fn persist(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<bool> {
        Ok(false)
    }

    fn extents(&self, _: u64, _: u64) -> Result<Vec<Extent>> {
        self.not_modelled("extents")
    }

    fn address(&self, _: &Segment) -> Result<*mut u8> {
        self.not_modelled("address")
    }

    fn resize(&self, _: u64) -> Result<()> {
        self.not_modelled("resize")
    }
}
