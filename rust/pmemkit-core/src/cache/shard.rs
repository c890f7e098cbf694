//! One shard: a share of the blocks, with a lock of their own.
//!
//! Invariants:
//! 1. All of a shard changes under its lock. Nobody waits for media while holding it.
//! 2. A claim is the right to move one block between RAM and media, held by one thread. A claimed
//!    block is not evicted. While it is claimed and absent nobody inserts it but the holder.
//! 3. The bytes of a slot are touched under the lock, or by the thread that the slot is lent to.
//! 4. Lent slots and claims of fills are as many.
//!
//! What this does not do: I/O, order among shards.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::directory::{Directory, Fresh};
use super::index::start_among;
use super::store::{Budget, Store};
use super::Plant;
use crate::media::port;

/// Dirty blocks that are written back together to make room for one.
const CLEANED_TOGETHER: usize = 4;

/// What a shard counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
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
}

/// A block that a thread moves between RAM and media.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// The block.
    pub block: u64,
    /// A slot is lent for it.
    pub lent: bool,
}

/// Room for one more block.
#[derive(Debug)]
pub enum Room {
    /// A slot, lent to the caller.
    Slot(u32),
    /// There is none until these blocks are written back, in ascending order.
    Clean(Vec<u64>),
    /// There is none: the request goes around the cache.
    None,
}

/// A share of the blocks.
#[derive(Debug)]
pub struct Shard {
    /// Which blocks there are.
    pub directory: Directory,
    /// Their bytes.
    pub store: Store,
    /// What is under way.
    pub claims: Vec<Claim>,
    /// What happened.
    pub counts: Counts,
    /// Threads that wait for a claim to end.
    waiting: usize,
    plant: Plant,
}

impl Shard {
    fn new(slots: usize, plant: Plant) -> Self {
        Shard {
            directory: Directory::default(),
            store: Store::new(slots),
            claims: Vec::new(),
            counts: Counts::default(),
            waiting: 0,
            plant,
        }
    }

    /// True while some thread moves this block.
    #[inline]
    pub fn claimed(&self, block: u64) -> bool {
        self.claims.iter().any(|claim| claim.block == block)
    }

    /// Ends a claim.
    pub fn release(&mut self, block: u64) {
        if let Some(place) = self.claims.iter().position(|claim| claim.block == block) {
            self.claims.swap_remove(place);
        }
    }

    /// Finds room for one block. With `stuck`, nothing dirty can be written back any more.
    pub fn room(&mut self, budget: &Budget, stuck: bool) -> Room {
        if let Some(slot) = self.directory.lend() {
            return Room::Slot(slot);
        }
        if self.grow(budget) {
            if let Some(slot) = self.directory.lend() {
                return Room::Slot(slot);
            }
        }
        let (claims, unclaimed) = (&self.claims, self.plant == Plant::NoClaimInWriteBack);
        let victim = self.directory.victim(|entry| {
            let moving = claims.iter().any(|claim| claim.block == entry.block);
            (moving && !unclaimed) || (stuck && entry.dirty != 0)
        });
        let Some(victim) = victim else { return Room::None };
        if self.directory.entry(victim).dirty != 0 && self.plant != Plant::EvictionDropsDirty {
            let mut blocks = vec![self.directory.entry(victim).block];
            let more = CLEANED_TOGETHER.min(self.directory.slots() / 64);
            blocks.extend(self.directory.coldest_dirty(more));
            blocks.sort_unstable();
            blocks.dedup();
            return Room::Clean(blocks);
        }
        self.directory.evict(victim);
        self.counts.evictions += 1;
        self.directory.lend().map_or(Room::None, Room::Slot)
    }

    fn grow(&mut self, budget: &Budget) -> bool {
        let count = self.store.next();
        if count == 0 || (self.plant == Plant::NoMemory && self.store.slots() > 0) {
            return false;
        }
        if !self.store.grow(budget) {
            return false;
        }
        let grown = self.directory.grow(count);
        if !grown {
            self.store.shrink(budget);
        }
        grown
    }

    /// Gives the last chunk back as far as that is possible now: false when blocks in it are
    /// dirty or moving.
    pub fn shrink(&mut self, budget: &Budget) -> bool {
        let count = self.store.last();
        for (block, slot) in self.directory.last_blocks(count) {
            if self.directory.entry(slot).dirty == 0 && !self.claimed(block) {
                self.directory.evict(slot);
                self.counts.evictions += 1;
            }
        }
        let free = self.directory.last_are_free(count);
        if free {
            self.directory.shrink(count);
            self.store.shrink(budget);
        }
        free
    }

    /// Puts a block that was filled where it belongs.
    pub fn insert(&mut self, block: u64, slot: u32, fresh: Fresh) {
        self.directory.insert(block, slot, fresh);
    }

    /// What is wrong, in sentences.
    pub fn validate(&self) -> Vec<String> {
        let lent = self.claims.iter().filter(|claim| claim.lent).count();
        let mut wrong = self.directory.validate(lent);
        if self.store.slots() != self.directory.slots() {
            let (bytes, slots) = (self.store.slots(), self.directory.slots());
            wrong.push(format!("bytes for {bytes} slots, {slots} in the directory"));
        }
        for (place, claim) in self.claims.iter().enumerate() {
            if self.claims[..place].iter().any(|other| other.block == claim.block) {
                wrong.push(format!("block {} is claimed twice", claim.block));
            }
        }
        wrong
    }
}

/// A shard and its lock, on cache lines of their own.
#[repr(align(128))]
#[derive(Debug)]
pub struct Cell {
    shard: Mutex<Shard>,
    released: Condvar,
    /// Where the shard's index lies, for hints only: it may have moved.
    table: AtomicPtr<u32>,
    places: AtomicUsize,
}

impl Cell {
    /// A shard of at most so many slots.
    pub fn new(slots: usize, plant: Plant) -> Self {
        Cell {
            shard: Mutex::new(Shard::new(slots, plant)),
            released: Condvar::new(),
            table: AtomicPtr::default(),
            places: AtomicUsize::new(1),
        }
    }

    /// Brings near what a look for this hash reads first: taking the lock waits for all that went
    /// before, and this does not.
    #[inline]
    pub fn expect(&self, hash: u64) {
        let (table, places) = (&self.table, self.places.load(Ordering::Relaxed));
        let place = table.load(Ordering::Relaxed).wrapping_add(start_among(hash, places));
        port::hint_load(place.cast());
    }

    /// Notes where the shard's index lies now.
    pub fn note_table(&self, shard: &Shard) {
        let (table, places) = shard.directory.table();
        self.table.store(table.cast_mut(), Ordering::Relaxed);
        self.places.store(places, Ordering::Relaxed);
    }

    /// The shard, to this thread alone.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, Shard> {
        self.shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until some claim ended.
    pub fn wait<'a>(&self, mut shard: MutexGuard<'a, Shard>) -> MutexGuard<'a, Shard> {
        shard.waiting += 1;
        let mut shard = self.released.wait(shard).unwrap_or_else(PoisonError::into_inner);
        shard.waiting -= 1;
        shard
    }

    /// Wakes whoever waits for claims. With the shard, so that nobody begins to wait meanwhile.
    pub fn notify(&self, shard: &Shard) {
        if shard.waiting > 0 {
            self.released.notify_all();
        }
    }
}
