//! A double buffer in RAM over any device: fewer writes to media, reads at the speed of memory.
//!
//! Blocks of 4 KiB live in shards ([`shard`]) by number. A hit is a look into a hash table and a
//! copy under the lock of one shard. Misses and write-back move blocks under claims ([`engine`],
//! [`writeback`]); a thread writes back what is old or much ([`flusher`]). Replacement is S3-FIFO
//! ([`directory`]).
//!
//! Invariants:
//! 1. A read sees every write that was acknowledged before it began, whatever is evicted, written
//!    back or filled meanwhile.
//! 2. What was acknowledged before a flush began is durable when that flush has succeeded; with
//!    FUA, and in mode write-through after the next flush below, so is the write itself.
//! 3. Writes of whole units of the device below (sectors) reach it whole, so that its atomicity is
//!    kept; nothing is promised of the order in which unflushed writes reach media.
//! 4. When media fail to take what was written, nothing is written any more: the failure is told
//!    by the next flush and every write, and what is dirty can still be read.
//! 5. Without memory it is smaller, down to nothing: requests then go around it.
//! 6. Dropping it flushes and ends its thread.
//!
//! What this does not do: outlive a crash (what was not flushed is gone), keep two caches over one
//! device coherent, cache devices whose unit does not divide 4096 bytes (a block would tear it).

mod cursor;
mod directory;
mod engine;
mod flusher;
mod index;
mod list;
mod plant;
mod shard;
mod simulate;
mod store;
mod streams;
mod sys;
#[cfg(test)]
mod tests;
mod writeback;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Caps, Device, Extent, Info, Op, OpSet, Request};
use crate::error::{Error, Kind, Result};
use crate::sg::Sg;
use engine::Engine;
use flusher::Flusher;

pub use plant::Plant;
pub use simulate::{simulate, Simulated, Use};
pub(crate) use store::Chunk as MappedChunk;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Bytes of a line, the least that is written back: what media of this kind write at once.
pub const LINE: usize = 256;
/// A shard has at least so many blocks, unless there is only one.
const SHARD_BLOCKS: u64 = 1024;
const SHARDS_MOST: u64 = 64;

/// When writes go to media.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When they are old, much, flushed or in the way.
    WriteBack,
    /// Before they are acknowledged.
    WriteThrough,
}

/// How a cache behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// When writes go to media.
    pub mode: Mode,
    /// Bytes of RAM for blocks.
    pub size: u64,
    /// The most blocks to read ahead of a stream; 0 is none.
    pub read_ahead: u64,
    /// Percent of the blocks that may be dirty before the flusher begins.
    pub dirty_background: u32,
    /// Percent from which whoever writes helps the flusher.
    pub dirty_most: u32,
    /// How long a block may be dirty; `None` is for ever.
    pub flush_age: Option<Duration>,
    /// Give memory back when the machine is short of it.
    pub heed_pressure: bool,
    /// A mistake to make, in builds that can.
    pub plant: Plant,
}

impl Options {
    /// The usual behaviour with so many bytes of RAM.
    pub const fn new(size: u64) -> Self {
        Options {
            mode: Mode::WriteBack,
            size,
            read_ahead: 32,
            dirty_background: 85,
            dirty_most: 95,
            flush_age: Some(Duration::from_secs(30)),
            heed_pressure: true,
            plant: Plant::None,
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::new(Kind::Invalid, "cache", text));
        if self.size < BLOCK as u64 {
            return refuse(format!("a cache of {} bytes holds no block of {BLOCK}", self.size));
        }
        let most = (index::SLOTS_MOST as u64 * SHARDS_MOST * BLOCK as u64) >> 1;
        if self.size > most {
            return refuse(format!("a cache of {} bytes; {most} are the most", self.size));
        }
        let (background, most) = (self.dirty_background, self.dirty_most);
        if background > most || most > 100 {
            return refuse(format!("dirty shares of {background} and {most} percent"));
        }
        Ok(())
    }
}

/// How many shards a cache of so many blocks has.
fn shards_of(blocks: u64) -> usize {
    let wanted = (blocks / SHARD_BLOCKS).clamp(1, SHARDS_MOST);
    1 << wanted.ilog2()
}

/// The shard of a block among so many, a power of two, by its hash.
#[inline]
fn shard_of(hash: u64, shards: usize) -> usize {
    // Bits that the shard's index does not use.
    (hash >> 7) as usize & (shards - 1)
}

/// What a cache did and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads of blocks that were in RAM.
    pub read_hits: u64,
    /// Reads of blocks that were not.
    pub read_misses: u64,
    /// Writes to blocks that were in RAM.
    pub write_hits: u64,
    /// Writes to blocks that were not.
    pub write_misses: u64,
    /// Blocks that made room.
    pub evictions: u64,
    /// Blocks written to media, whole or in part.
    pub blocks_written: u64,
    /// Bytes of that.
    pub bytes_written: u64,
    /// Requests of that.
    pub writes: u64,
    /// Blocks read from media into RAM.
    pub blocks_read: u64,
    /// Requests of that.
    pub reads: u64,
    /// Blocks read before anybody asked.
    pub blocks_ahead: u64,
    /// Pieces of requests that went around the cache.
    pub bypassed: u64,
    /// Blocks in RAM.
    pub blocks: u64,
    /// Blocks that media do not have yet.
    pub dirty: u64,
    /// Bytes of RAM in use for blocks.
    pub memory: u64,
}

impl CacheStats {
    /// Every figure with its name.
    pub fn named(&self) -> [(&'static str, u64); 15] {
        [
            ("read_hits", self.read_hits),
            ("read_misses", self.read_misses),
            ("write_hits", self.write_hits),
            ("write_misses", self.write_misses),
            ("evictions", self.evictions),
            ("blocks_written", self.blocks_written),
            ("bytes_written", self.bytes_written),
            ("writes", self.writes),
            ("blocks_read", self.blocks_read),
            ("reads", self.reads),
            ("blocks_ahead", self.blocks_ahead),
            ("bypassed", self.bypassed),
            ("blocks", self.blocks),
            ("dirty", self.dirty),
            ("memory", self.memory),
        ]
    }
}

/// A cache as a layer.
pub struct Cache {
    // Dropped first: the thread ends before what is left is flushed.
    flusher: Option<Flusher>,
    engine: Arc<Engine>,
    info: Info,
}

impl Cache {
    /// Puts a cache on top of `next`.
    pub fn new(next: Arc<dyn Device>, options: Options) -> Result<Cache> {
        options.check()?;
        let mut info = *next.info();
        if !(BLOCK as u32).is_multiple_of(info.block_size_min) {
            let unit = info.block_size_min;
            let text = format!("units of {unit} bytes do not fit into blocks of {BLOCK}");
            return Err(Error::new(Kind::NotSupported, "cache", text));
        }
        info.caps.remove(Caps::MAP | Caps::MAP_WRITE);
        info.caps |= Caps::CACHE;
        info.block_size_preferred = info.block_size_preferred.max(BLOCK as u32);
        info.blocking |= OpSet::FLUSH | OpSet::CACHE;
        if info.blocking.intersects(OpSet::READ | OpSet::WRITE) {
            // A read may have to write what is in its way, a write to read what it changes.
            info.blocking |= OpSet::READ | OpSet::WRITE;
        }
        let shards = shards_of(options.size / BLOCK as u64);
        let engine = Arc::new(Engine::new(next, options, shards));
        let flusher = Some(Flusher::start(engine.clone())?);
        Ok(Cache { flusher, engine, info })
    }

    /// Writes back what is dirty and flushes the device below. A cache over a read-only device
    /// has nothing to write.
    pub fn drain(&self) -> Result<()> {
        self.engine.check_failed()?;
        if !self.info.caps.contains(Caps::FLUSH) {
            return Ok(());
        }
        self.engine.flush()
    }

    /// What it did and holds.
    pub fn stats(&self) -> CacheStats {
        let (engine, get) = (&self.engine, |counter: &AtomicU64| counter.load(Ordering::Relaxed));
        let moved = &engine.moved;
        let mut stats = CacheStats {
            blocks_written: get(&moved.blocks_written),
            bytes_written: get(&moved.bytes_written),
            writes: get(&moved.writes),
            blocks_read: get(&moved.blocks_read),
            reads: get(&moved.reads),
            blocks_ahead: get(&moved.blocks_ahead),
            bypassed: get(&moved.bypassed),
            memory: get(&engine.budget.used),
            ..CacheStats::default()
        };
        for cell in &engine.cells {
            let shard = cell.lock();
            stats.read_hits += shard.counts.read_hits;
            stats.read_misses += shard.counts.read_misses;
            stats.write_hits += shard.counts.write_hits;
            stats.write_misses += shard.counts.write_misses;
            stats.evictions += shard.counts.evictions;
            stats.blocks += shard.directory.len() as u64;
            stats.dirty += shard.directory.dirty_len() as u64;
        }
        stats
    }

    /// Walks everything while nobody uses the cache; gives what is wrong, in sentences.
    pub fn validate(&self) -> Vec<String> {
        let _alone = self.engine.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut wrong = Vec::new();
        let mut dirty = 0;
        for (number, cell) in self.engine.cells.iter().enumerate() {
            let shard = cell.lock();
            let found = shard.validate();
            wrong.extend(found.into_iter().map(|text| format!("shard {number}: {text}")));
            dirty += shard.directory.dirty_len() as u64;
            if !shard.claims.is_empty() {
                wrong.push(format!("shard {number}: {} claims are left", shard.claims.len()));
            }
        }
        let counted = self.engine.dirty.load(Ordering::Relaxed);
        if counted != dirty {
            wrong.push(format!("{dirty} blocks are dirty, {counted} are counted"));
        }
        wrong
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.flusher = None;
        // Whoever wants to know of a failure flushes before: nobody listens here.
        let _ = self.drain();
    }
}

impl Device for Cache {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.engine.next)
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        match request.op {
            Op::Read => self.engine.read(request),
            Op::Write => self.engine.write(request),
            Op::Flush => self.engine.flush(),
            Op::Discard => self.engine.discard(request),
            Op::Zero => self.engine.zero(request),
            Op::Cache => self.engine.prefetch(request),
        }
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        self.engine.extents(at, len)
    }

    fn map(&self, request: &Request<'_>, _out: &mut Sg) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "map", "blocks are in RAM").at(request.at))
    }

    fn commit(&self, request: &Request<'_>) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "commit", "there is no mapping").at(request.at))
    }
}
