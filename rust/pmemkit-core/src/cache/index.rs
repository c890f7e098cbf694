//! Finds the slot of a block: a table of 4 bytes a place, so that a look costs no memory access
//! beyond it and the slot itself.
//!
//! Invariants:
//! 1. A place is 0 or holds a slot plus 1 and a byte of its block's hash.
//! 2. No empty place lies between where a block's search starts and where its slot is.
//! 3. At most half of the places are taken.
//!
//! What this does not do: know blocks; its owner says which block a slot has.

/// Slots that a shard can have at most.
pub const SLOTS_MOST: usize = (1 << SLOT_BITS) - 2;
const SLOT_BITS: u32 = 24;

/// A bijection that makes every bit of the result depend on every bit of the number.
#[inline]
pub fn spread(number: u64) -> u64 {
    let mixed = (number ^ (number >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The table.
#[derive(Debug, Default)]
pub struct Index {
    places: Vec<u32>,
    len: usize,
}

#[inline]
fn tagged(hash: u64, slot: u32) -> u32 {
    // The high bits: those below choose the shard and the place.
    ((hash >> 56) as u32) << SLOT_BITS | (slot + 1)
}

#[inline]
fn slot_of(place: u32) -> u32 {
    (place & ((1 << SLOT_BITS) - 1)) - 1
}

/// Where the search for a hash starts in a table of so many places.
#[inline]
pub fn start_among(hash: u64, places: usize) -> usize {
    (hash >> 16) as usize & places.wrapping_sub(1)
}

impl Index {
    /// Slots in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes it large enough for so many slots; false when there is no memory.
    pub fn grow(&mut self, slots: usize, block_of: impl Fn(u32) -> u64) -> bool {
        let wanted = (2 * slots).next_power_of_two();
        if wanted <= self.places.len() {
            return true;
        }
        let mut places = Vec::new();
        if places.try_reserve_exact(wanted).is_err() {
            return false;
        }
        places.resize(wanted, 0);
        let before = std::mem::replace(&mut self.places, places);
        self.len = 0;
        for place in before.into_iter().filter(|place| *place != 0) {
            self.insert(block_of(slot_of(place)), slot_of(place));
        }
        true
    }

    #[inline]
    fn start(&self, hash: u64) -> usize {
        start_among(hash, self.places.len())
    }

    /// The table, as a place to look soon, and how many places it has.
    pub fn table(&self) -> (*const u32, usize) {
        (self.places.as_ptr(), self.places.len())
    }

    /// The slot of a block.
    #[inline]
    pub fn find(&self, block: u64, block_of: impl Fn(u32) -> u64) -> Option<u32> {
        if self.places.is_empty() {
            return None;
        }
        let hash = spread(block);
        let (mut at, wanted) = (self.start(hash), tagged(hash, 0) >> SLOT_BITS);
        loop {
            let place = self.places[at];
            if place == 0 {
                return None;
            }
            if place >> SLOT_BITS == wanted && block_of(slot_of(place)) == block {
                return Some(slot_of(place));
            }
            at = (at + 1) & (self.places.len() - 1);
        }
    }

    /// Adds a block that is not in it.
    pub fn insert(&mut self, block: u64, slot: u32) {
        let hash = spread(block);
        let mut at = self.start(hash);
        while self.places[at] != 0 {
            at = (at + 1) & (self.places.len() - 1);
        }
        self.places[at] = tagged(hash, slot);
        self.len += 1;
    }

    /// Takes a block out that is in it.
    pub fn remove(&mut self, block: u64, block_of: impl Fn(u32) -> u64) {
        let mask = self.places.len() - 1;
        let mut hole = self.start(spread(block));
        while self.places[hole] == 0 || block_of(slot_of(self.places[hole])) != block {
            if self.places[hole] == 0 {
                return;
            }
            hole = (hole + 1) & mask;
        }
        self.len -= 1;
        // What follows moves up, unless its search starts behind the hole.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let place = self.places[at];
            if place == 0 {
                self.places[hole] = 0;
                return;
            }
            let start = self.start(spread(block_of(slot_of(place))));
            if (at.wrapping_sub(start) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.places[hole] = place;
                hole = at;
            }
        }
    }

    /// Every slot in it.
    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.places.iter().filter(|place| **place != 0).map(|place| slot_of(*place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn it_agrees_with_a_hash_map() {
        let (mut index, mut model) = (Index::default(), HashMap::new());
        let mut blocks = vec![0u64; 300];
        let mut free: Vec<u32> = Vec::new();
        let mut state = 7u64;
        for round in 0..20_000u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = (state >> 33) % 500;
            if round % 100 == 0 && round < 30_00 {
                let slots = (round / 100 + 1) * 10;
                free.extend(slots - 10..slots);
                assert!(index.grow(slots as usize, |slot| blocks[slot as usize]));
            }
            assert_eq!(index.find(block, |s| blocks[s as usize]), model.get(&block).copied());
            if let Some(slot) = model.remove(&block) {
                index.remove(block, |s| blocks[s as usize]);
                free.push(slot);
            } else if let Some(slot) = free.pop() {
                blocks[slot as usize] = block;
                index.insert(block, slot);
                model.insert(block, slot);
            }
            assert_eq!((index.len(), index.slots().count()), (model.len(), model.len()));
        }
        assert!(model.len() > 100);
    }
}
