//! Which blocks are in RAM, which of them go next, and which are dirty: a shard without its bytes.
//!
//! Replacement is S3-FIFO. New blocks queue in `small`, a tenth of the slots; those that were used
//! again while there go on to `main`, the others leave and their numbers stay in `ghost` for a
//! while. A block that comes back while it is remembered goes to `main` at once. A scan passes
//! through `small` and disturbs nobody. [`super::simulate`] runs this very code without bytes.
//!
//! Invariants:
//! 1. `index` names exactly the entries that are in `small` or `main`, by their blocks.
//! 2. Each slot is in `small`, in `main`, in `free`, or lent to somebody who fills it.
//! 3. The list `dirty` has exactly the entries with a bit in `dirty`, in the order in which they
//!    became so.
//! 4. A victim is only named here. Whoever asked evicts it, and not while it is dirty or claimed.
//!
//! What this does not do: bytes, locks, media; count time (`since` is whatever the caller says).

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use super::index::{spread, Index};
use super::list::{Link, List, Through};

/// Uses that an entry of `small` needs to go on to `main`.
const PROMOTE: u8 = 2;
/// Uses beyond this many are not counted.
const USES_MOST: u8 = 3;
/// `small` has one in so many of the slots.
const SMALL_SHARE: usize = 10;

/// Spreads block numbers over a hash table of the standard library.
#[derive(Default)]
pub struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = spread(self.0 ^ number);
    }
}

type ByBlock<T> = HashMap<u64, T, BuildHasherDefault<BlockHasher>>;

/// Where an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Free, or lent to somebody who fills it.
    Nowhere,
    /// The queue of new blocks.
    Small,
    /// The queue of blocks that were used again.
    Main,
}

/// What the first use of a block that was just read means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// It was used before.
    No,
    /// It was read because it is wanted: this use was counted as a miss.
    Wanted,
    /// It was read ahead: this use is a hit, and the first one.
    Ahead,
}

/// What is known of the block in a slot: as little as a hit needs, so that it is in the cache.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The block's number.
    pub block: u64,
    /// Lines that media do not have yet, one a bit.
    pub dirty: u16,
    /// Uses since it came or was last looked at by the eviction.
    uses: u8,
    fresh: Fresh,
    place: Place,
}

const EMPTY: Entry = Entry { block: 0, dirty: 0, uses: 0, fresh: Fresh::No, place: Place::Nowhere };

/// Numbers of blocks that left `small`, as many as there is room for.
#[derive(Debug, Default)]
struct Ghost {
    /// The turn in which each was put down; a later turn replaces an earlier one.
    turns: ByBlock<u64>,
    queue: VecDeque<(u64, u64)>,
    turn: u64,
}

impl Ghost {
    fn remember(&mut self, block: u64, most: usize) {
        self.turn += 1;
        self.turns.insert(block, self.turn);
        self.queue.push_back((block, self.turn));
        while self.turns.len() > most {
            let Some((oldest, turn)) = self.queue.pop_front() else { break };
            if self.turns.get(&oldest) == Some(&turn) {
                self.turns.remove(&oldest);
            }
        }
        // Blocks that came back left their place in the queue behind.
        if self.queue.len() > 2 * most + 16 {
            let turns = &self.turns;
            self.queue.retain(|(block, turn)| turns.get(block) == Some(turn));
        }
    }

    fn recall(&mut self, block: u64) -> bool {
        self.turns.remove(&block).is_some()
    }
}

/// The blocks of one shard.
#[derive(Debug)]
pub struct Directory {
    index: Index,
    entries: Vec<Entry>,
    links: Vec<[Link; 2]>,
    /// When each slot became dirty.
    since: Vec<u32>,
    free: Vec<u32>,
    small: List,
    main: List,
    ghost: Ghost,
    dirty: List,
}

impl Default for Directory {
    fn default() -> Self {
        Directory {
            index: Index::default(),
            entries: Vec::new(),
            links: Vec::new(),
            since: Vec::new(),
            free: Vec::new(),
            small: List::new(Through::Queue),
            main: List::new(Through::Queue),
            ghost: Ghost::default(),
            dirty: List::new(Through::Dirty),
        }
    }
}

impl Directory {
    /// Slots there are.
    pub fn slots(&self) -> usize {
        self.entries.len()
    }

    /// Blocks that are in RAM.
    pub fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }

    /// Entries that are dirty.
    pub fn dirty_len(&self) -> usize {
        self.dirty.len()
    }

    /// Adds free slots; false when there is no memory for what is kept of them.
    pub fn grow(&mut self, count: usize) -> bool {
        let first = self.entries.len();
        let entries = &self.entries;
        let room = self.index.grow(first + count, |slot| entries[slot as usize].block)
            && self.entries.try_reserve(count).is_ok()
            && self.links.try_reserve(count).is_ok()
            && self.since.try_reserve(count).is_ok()
            && self.free.try_reserve(first + count).is_ok();
        if room {
            self.entries.resize(first + count, EMPTY);
            self.links.resize(first + count, [Link::new(); 2]);
            self.since.resize(first + count, 0);
            self.free.extend((first as u32..(first + count) as u32).rev());
        }
        room
    }

    /// Takes the last slots away, all of which are free.
    pub fn shrink(&mut self, count: usize) {
        let left = self.entries.len() - count;
        self.free.retain(|slot| (*slot as usize) < left);
        self.entries.truncate(left);
        self.links.truncate(left);
        self.since.truncate(left);
    }

    /// True when none of the last slots holds a block or is lent.
    pub fn last_are_free(&self, count: usize) -> bool {
        let left = self.entries.len() - count;
        self.free.iter().filter(|slot| **slot as usize >= left).count() == count
    }

    /// Blocks in the last slots, with their slots.
    pub fn last_blocks(&self, count: usize) -> Vec<(u64, u32)> {
        let left = self.entries.len() - count;
        let placed = |(_, entry): &(usize, &Entry)| entry.place != Place::Nowhere;
        let last = self.entries.iter().enumerate().skip(left).filter(placed);
        last.map(|(slot, entry)| (entry.block, slot as u32)).collect()
    }

    /// Where its index lies and how many places that has, for hints.
    pub fn table(&self) -> (*const u32, usize) {
        self.index.table()
    }

    /// The slot of a block.
    #[inline]
    pub fn find(&self, block: u64) -> Option<u32> {
        self.index.find(block, |slot| self.entries[slot as usize].block)
    }

    /// What is known of a slot.
    #[inline]
    pub fn entry(&self, slot: u32) -> &Entry {
        &self.entries[slot as usize]
    }

    /// Counts a use; gives whether it is a hit.
    #[inline]
    pub fn touch(&mut self, slot: u32) -> bool {
        let entry = &mut self.entries[slot as usize];
        match entry.fresh {
            Fresh::No if entry.uses == USES_MOST => {}
            Fresh::No => entry.uses += 1,
            Fresh::Wanted => {
                entry.fresh = Fresh::No;
                return false;
            }
            Fresh::Ahead => entry.fresh = Fresh::No,
        }
        true
    }

    /// Lends a free slot to somebody who fills it.
    pub fn lend(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Takes a lent slot back.
    pub fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Puts a block that is not there into a slot that was lent.
    pub fn insert(&mut self, block: u64, slot: u32, fresh: Fresh) {
        // Until something has to go there is no need to wait for a second use.
        let early = self.ghost.turn == 0 && self.small.len() >= self.small_most();
        let known = self.ghost.recall(block) || early;
        let place = if known { Place::Main } else { Place::Small };
        debug_assert!(self.find(block).is_none(), "block {block} is in two slots");
        self.entries[slot as usize] = Entry { block, place, fresh, ..EMPTY };
        let queue = if known { &mut self.main } else { &mut self.small };
        queue.push(&mut self.links, slot);
        self.index.insert(block, slot);
    }

    fn small_most(&self) -> usize {
        (self.slots() / SMALL_SHARE).max(1)
    }

    /// The block that goes next, if any may. What is `kept` stays and goes to the end of its queue.
    pub fn victim(&mut self, mut kept: impl FnMut(&Entry) -> bool) -> Option<u32> {
        let main_most = self.slots().saturating_sub(self.small_most());
        // An entry is passed over once a use in each queue, and once more where it is kept.
        let turns = self.len() * (2 + usize::from(USES_MOST));
        for _ in 0..turns {
            let from_main = self.main.len() > main_most || self.small.len() == 0;
            let queue = if from_main { &mut self.main } else { &mut self.small };
            let slot = queue.oldest()?;
            let entry = &mut self.entries[slot as usize];
            if from_main && entry.uses > 0 {
                entry.uses -= 1;
                queue.renew(&mut self.links, slot);
            } else if !from_main && entry.uses >= PROMOTE {
                entry.uses = 0;
                entry.place = Place::Main;
                queue.remove(&mut self.links, slot);
                self.main.push(&mut self.links, slot);
            } else if kept(entry) {
                queue.renew(&mut self.links, slot);
            } else {
                return Some(slot);
            }
        }
        None
    }

    /// Lets a victim go: its slot is free.
    pub fn evict(&mut self, slot: u32) {
        let entry = &self.entries[slot as usize];
        let (block, was_new) = (entry.block, entry.place == Place::Small);
        self.remove(slot);
        if was_new {
            let slots = self.slots();
            self.ghost.remember(block, slots - slots / SMALL_SHARE);
        }
    }

    /// Forgets a block, dirty or not: its slot is free.
    pub fn remove(&mut self, slot: u32) {
        self.set_clean(slot);
        let entry = &mut self.entries[slot as usize];
        let (block, place) = (entry.block, entry.place);
        entry.place = Place::Nowhere;
        match place {
            Place::Small => self.small.remove(&mut self.links, slot),
            Place::Main => self.main.remove(&mut self.links, slot),
            Place::Nowhere => return,
        }
        self.index.remove(block, |slot| self.entries[slot as usize].block);
        self.free.push(slot);
    }

    /// Marks lines as dirty; true when none of the entry's was before.
    #[inline]
    pub fn set_dirty(&mut self, slot: u32, lines: u16, since: impl FnOnce() -> u32) -> bool {
        let entry = &mut self.entries[slot as usize];
        let first = entry.dirty == 0 && lines != 0;
        entry.dirty |= lines;
        if first {
            self.since[slot as usize] = since();
            self.dirty.push(&mut self.links, slot);
        }
        first
    }

    /// Marks all lines as clean; gives those that were dirty.
    pub fn set_clean(&mut self, slot: u32) -> u16 {
        let lines = std::mem::take(&mut self.entries[slot as usize].dirty);
        if lines != 0 {
            self.dirty.remove(&mut self.links, slot);
        }
        lines
    }

    /// Dirty blocks and since when, the one that has been so longest first.
    pub fn dirty(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let slots = self.dirty.iter(&self.links);
        slots.map(|slot| (self.entry(slot).block, self.since[slot as usize]))
    }

    /// Blocks in RAM, in no order.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.index.slots().map(|slot| self.entry(slot).block)
    }

    /// Dirty blocks that go next as things stand, `most` at most, in no order. Gives up after a
    /// while where they are rare.
    pub fn coldest_dirty(&self, most: usize) -> impl Iterator<Item = u64> + '_ {
        let small = self.small.iter(&self.links).filter(|slot| self.entry(*slot).uses < PROMOTE);
        let main = self.main.iter(&self.links).filter(|slot| self.entry(*slot).uses == 0);
        let entries = small.chain(main).take(64 + 16 * most).map(|slot| self.entry(slot));
        entries.filter(|entry| entry.dirty != 0).map(|entry| entry.block).take(most)
    }

    /// Walks everything; gives what is wrong, in sentences.
    pub fn validate(&self, lent: usize) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut seen = vec![0u8; self.slots()];
        for (queue, place) in [(&self.small, Place::Small), (&self.main, Place::Main)] {
            let mut count = 0;
            for slot in queue.iter(&self.links).take(self.slots() + 1) {
                count += 1;
                seen[slot as usize] += 1;
                let entry = self.entry(slot);
                if entry.place != place || self.find(entry.block) != Some(slot) {
                    wrong.push(format!("slot {slot} is in {place:?} as {entry:?}"));
                }
            }
            if count != queue.len() {
                wrong.push(format!("{place:?} has {count} entries and counts {}", queue.len()));
            }
        }
        for slot in &self.free {
            seen[*slot as usize] += 1;
        }
        let twice = seen.iter().filter(|times| **times > 1).count();
        let missing = seen.iter().filter(|times| **times == 0).count();
        if twice != 0 || missing != lent {
            wrong.push(format!("{twice} slots are in two places, {missing} in none ({lent} lent)"));
        }
        if self.index.len() != self.len() {
            wrong.push(format!("{} blocks by name, {} queued", self.index.len(), self.len()));
        }
        let listed = self.dirty.iter(&self.links).take(self.slots() + 1).count();
        let marked = self.entries.iter().filter(|entry| entry.dirty != 0).count();
        if listed != marked || listed != self.dirty.len() {
            let counted = self.dirty.len();
            wrong.push(format!("{marked} slots are dirty, {listed} listed, {counted} counted"));
        }
        wrong
    }
}
