//! Objects smaller than a page or a few: slabs of one size class each.
//!
//! A slab is an extent of 64 KiB at a multiple of that, so an object's address names its slab.
//! Which objects are in use stands in bits beside the pool, not in its memory: a pool's bytes are
//! content only, and a stray store cannot break the allocator.
//!
//! Invariants:
//! 1. `partial[class]` lists the slabs of the class that have a free object, each once.
//! 2. A slab without objects is given back, unless it is the last of its class with room.
//!
//! What this does not do: scale over many threads (one lock), move (its extent does).

use std::collections::HashMap;

use super::pool::{locked, Pool, Request};
use crate::error::Result;

/// Objects up to this many bytes lie in slabs.
pub const SMALL_MAX: u64 = 16 << 10;

/// Bytes of a slab; its address is a multiple of them.
pub(super) const SLAB_SIZE: u64 = 64 << 10;

/// Sizes of the classes: four to each doubling, so at most a fifth of an object is unused.
fn class_of(bytes: u64) -> usize {
    let bytes = bytes.max(1).next_multiple_of(16);
    if bytes <= 128 {
        return (bytes / 16 - 1) as usize;
    }
    // 2^k < bytes <= 2^(k+1), in quarters.
    let power = (bytes - 1).ilog2();
    let quarter = (bytes - 1 - (1 << power)) >> (power - 2);
    8 + (power as usize - 7) * 4 + quarter as usize
}

fn size_of_class(class: usize) -> u64 {
    if class < 8 {
        return (class as u64 + 1) * 16;
    }
    let (power, quarter) = ((class - 8) / 4 + 7, (class - 8) % 4);
    (1 << power) + ((quarter as u64 + 1) << (power - 2))
}

struct Slab {
    class: usize,
    /// One bit an object; set when it is in use.
    used: Vec<u64>,
    count: u64,
    room: u64,
}

impl Slab {
    fn new(class: usize) -> Slab {
        let room = SLAB_SIZE / size_of_class(class);
        let mut used = vec![0; room.div_ceil(64) as usize];
        if !room.is_multiple_of(64) {
            if let Some(last) = used.last_mut() {
                *last = !0 << (room % 64);
            }
        }
        Slab { class, used, count: 0, room }
    }

    fn take(&mut self) -> Option<u64> {
        let index = self.used.iter().position(|&word| word != !0)?;
        let bit = self.used[index].trailing_ones();
        self.used[index] |= 1 << bit;
        self.count += 1;
        Some(index as u64 * 64 + u64::from(bit))
    }

    fn give(&mut self, object: u64) -> bool {
        let Some(word) = self.used.get_mut((object / 64) as usize) else { return false };
        let bit = 1u64 << (object % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= u64::from(was);
        was
    }
}

/// The slabs of a pool.
#[derive(Default)]
pub(super) struct Slabs {
    slabs: HashMap<u64, Slab>,
    partial: HashMap<usize, Vec<u64>>,
}

impl Slabs {
    fn take(&mut self, class: usize) -> Option<u64> {
        let partial = self.partial.get_mut(&class)?;
        let base = *partial.last()?;
        let slab = self.slabs.get_mut(&base)?;
        let object = slab.take()?;
        if slab.count == slab.room {
            partial.pop();
        }
        Some(base + object * size_of_class(class))
    }

    /// Size of the object at an address.
    pub fn size_of(&self, address: u64) -> Option<u64> {
        let slab = self.slabs.get(&(address & !(SLAB_SIZE - 1)))?;
        Some(size_of_class(slab.class))
    }

    /// Objects in use, bytes of them, slabs.
    pub fn stats(&self) -> (u64, u64, u64) {
        let each =
            self.slabs.values().map(|slab| (slab.count, slab.count * size_of_class(slab.class)));
        let (objects, bytes) = each.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        (objects, bytes, self.slabs.len() as u64)
    }

    /// What is wrong.
    pub fn validate(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (base, slab) in &self.slabs {
            let padding = slab.used.len() as u64 * 64 - slab.room;
            let set: u64 = slab.used.iter().map(|word| u64::from(word.count_ones())).sum();
            if set - padding != slab.count {
                wrong.push(format!(
                    "the slab at {base:#x} counts {} of {} objects",
                    slab.count,
                    set - padding
                ));
            }
            let listed = self
                .partial
                .get(&slab.class)
                .map_or(0, |list| list.iter().filter(|at| *at == base).count());
            if listed != usize::from(slab.count < slab.room) {
                wrong.push(format!("the slab at {base:#x} is listed {listed} times"));
            }
        }
        wrong
    }
}

impl Pool {
    pub(super) fn allocate_small(&self, bytes: u64) -> Result<u64> {
        let class = class_of(bytes);
        let mut slabs = locked(&self.slabs);
        if let Some(address) = slabs.take(class) {
            return Ok(address);
        }
        let base = self.allocate_extent(SLAB_SIZE, Request::default(), true)?;
        slabs.slabs.insert(base, Slab::new(class));
        slabs.partial.entry(class).or_default().push(base);
        Ok(slabs.take(class).unwrap_or(base))
    }

    /// False for an address that is no small object's.
    pub(super) fn free_small(&self, address: u64) -> bool {
        let base = address & !(SLAB_SIZE - 1);
        let mut slabs = locked(&self.slabs);
        let slabs = &mut *slabs;
        let Some(slab) = slabs.slabs.get_mut(&base) else { return false };
        let size = size_of_class(slab.class);
        let class = slab.class;
        if !(address - base).is_multiple_of(size) || !slab.give((address - base) / size) {
            return false;
        }
        let partial = slabs.partial.entry(class).or_default();
        if slab.count + 1 == slab.room {
            partial.push(base);
        }
        if slab.count == 0 && partial.len() > 1 {
            partial.retain(|&at| at != base);
            slabs.slabs.remove(&base);
            self.free_extent(base);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_cover_every_size_and_waste_a_fifth_at_most() {
        for bytes in 1..=SMALL_MAX {
            let size = size_of_class(class_of(bytes));
            assert!(size >= bytes && size.is_multiple_of(16), "{bytes} in {size}");
            assert!(bytes <= 128 || (size - bytes) * 5 <= size + 5 * 16, "{bytes} in {size}");
            assert!(class_of(size) == class_of(bytes));
        }
    }
}
