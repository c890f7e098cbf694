//! A cache without bytes: the same directory and shards, for hit ratios and media writes of traces.
//!
//! What this does not do: time, read-ahead, concurrency; a victim that is dirty is written alone.

use super::directory::{spread, Directory, Fresh};
use super::shards_of;

/// What a trace came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    /// Uses of blocks.
    pub requests: u64,
    /// Those of blocks that were there.
    pub hits: u64,
    /// Blocks written to media, those still dirty at the end included.
    pub blocks_written: u64,
}

/// Runs a trace of blocks through a cache of `slots` blocks. `writes` says which uses change their
/// block; the time of a use in seconds, where there is one, drives write-back after `flush_age`.
pub fn simulate(
    blocks: &[u64],
    writes: &[bool],
    seconds: &[f64],
    slots: usize,
    flush_age: Option<f64>,
) -> Simulated {
    let shards = shards_of(slots as u64);
    let mut directories: Vec<Directory> = (0..shards).map(|_| Directory::default()).collect();
    for (number, directory) in directories.iter_mut().enumerate() {
        directory.grow(slots / shards + usize::from(number < slots % shards));
    }
    let mut result = Simulated { requests: blocks.len() as u64, ..Simulated::default() };
    let mut swept = 0.0;
    for (place, block) in blocks.iter().enumerate() {
        let now = seconds.get(place).copied().unwrap_or(0.0);
        if let Some(age) = flush_age.filter(|_| now > swept) {
            let old = (now - age).max(0.0) as u32;
            result.blocks_written +=
                directories.iter_mut().map(|directory| sweep(directory, old)).sum::<u64>();
            swept = now;
        }
        let directory = &mut directories[(spread(*block) >> 7) as usize & (shards - 1)];
        let slot = match directory.find(*block) {
            Some(slot) => {
                result.hits += u64::from(directory.touch(slot));
                slot
            }
            None => insert(directory, *block, &mut result),
        };
        if writes.get(place) == Some(&true) {
            directory.set_dirty(slot, 1, || now as u32);
        }
    }
    result.blocks_written += directories.iter().map(|each| each.dirty_len() as u64).sum::<u64>();
    result
}

fn insert(directory: &mut Directory, block: u64, result: &mut Simulated) -> u32 {
    let slot = directory.lend().unwrap_or_else(|| {
        let victim = directory.victim(|_| false).expect("nothing is kept, so something goes");
        result.blocks_written += u64::from(directory.set_clean(victim) != 0);
        directory.evict(victim);
        directory.lend().expect("a block has just gone")
    });
    directory.insert(block, slot, Fresh::No);
    slot
}

/// Writes back what has been dirty since `old` or longer.
fn sweep(directory: &mut Directory, old: u32) -> u64 {
    let since = directory.dirty().take_while(|entry| entry.since <= old);
    let slots: Vec<u32> = since.filter_map(|entry| directory.find(entry.block)).collect();
    for slot in &slots {
        directory.set_clean(*slot);
    }
    slots.len() as u64
}
