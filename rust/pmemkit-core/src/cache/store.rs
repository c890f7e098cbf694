//! The bytes of a shard's slots, in chunks that come when they are needed and go under pressure.
//!
//! Invariants:
//! 1. Slot `n` has `BLOCK` bytes at one address for as long as its chunk exists.
//! 2. The chunks of all shards together have at most what the [`Budget`] allowed when each came.
//!
//! What this does not do: know which slots are in use; whoever drops a chunk does.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{sys, BLOCK};

/// Slots of a chunk: as many as the kernel maps at once.
pub const CHUNK_SLOTS: usize = sys::HUGE / BLOCK;

/// How much memory all shards of a cache may have.
#[derive(Debug)]
pub struct Budget {
    /// Bytes that may be in use; less than `most` under pressure.
    pub allowed: AtomicU64,
    /// Bytes in use.
    pub used: AtomicU64,
    /// Bytes that the owner gave it.
    pub most: u64,
}

impl Budget {
    /// A budget of which nothing is used.
    pub fn new(most: u64) -> Self {
        Budget { allowed: AtomicU64::new(most), used: AtomicU64::new(0), most }
    }

    fn take(&self, bytes: u64) -> bool {
        let allowed = self.allowed.load(Ordering::Relaxed);
        let fits = |used: u64| Some(used + bytes).filter(|sum| *sum <= allowed);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Memory from the kernel, given back when this is dropped.
#[derive(Debug)]
pub struct Chunk {
    start: *mut u8,
    len: usize,
}

// SAFETY: the address is of memory that belongs to the process, not to a thread. Who uses it sees
// to it that the others do not.
unsafe impl Send for Chunk {}
// SAFETY: as above; there is no method that touches the bytes.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// `len` bytes, a multiple of the page; `None` when there are none.
    pub fn new(len: usize) -> Option<Chunk> {
        sys::map(len).map(|start| Chunk { start, len })
    }

    /// The first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the mapping is this chunk's; slots of it are given out only while it exists.
        unsafe { sys::unmap(self.start, self.len) };
    }
}

/// The bytes of a shard's slots.
#[derive(Debug)]
pub struct Store {
    chunks: Vec<Chunk>,
    slots_most: usize,
}

impl Store {
    /// A store without chunks.
    pub fn new(slots_most: usize) -> Self {
        Store { chunks: Vec::new(), slots_most }
    }

    /// Slots there are.
    pub fn slots(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len / BLOCK).sum()
    }

    /// Slots of the last chunk.
    pub fn last(&self) -> usize {
        self.chunks.last().map_or(0, |chunk| chunk.len / BLOCK)
    }

    /// Slots that the next chunk would have.
    pub fn next(&self) -> usize {
        (self.slots_most - self.slots()).min(CHUNK_SLOTS)
    }

    /// Adds a chunk; false when the budget or the kernel has none.
    pub fn grow(&mut self, budget: &Budget) -> bool {
        let len = self.next() * BLOCK;
        if len == 0 || self.chunks.try_reserve(1).is_err() || !budget.take(len as u64) {
            return false;
        }
        let Some(chunk) = Chunk::new(len) else {
            budget.give_back(len as u64);
            return false;
        };
        self.chunks.push(chunk);
        true
    }

    /// Gives the last chunk back, of which no slot is in use.
    pub fn shrink(&mut self, budget: &Budget) {
        if let Some(chunk) = self.chunks.pop() {
            budget.give_back(chunk.len as u64);
        }
    }

    /// Where a slot's bytes are.
    #[inline]
    pub fn address(&self, slot: u32) -> *mut u8 {
        let slot = slot as usize;
        let chunk = &self.chunks[slot / CHUNK_SLOTS];
        let offset = slot % CHUNK_SLOTS * BLOCK;
        assert!(offset < chunk.len, "slot {slot} has no bytes");
        // SAFETY: inside the chunk, as was just checked.
        unsafe { chunk.start.add(offset) }
    }
}
