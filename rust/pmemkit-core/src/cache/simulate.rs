//! A cache without bytes: the same directory and shards, for hit ratios and media writes of traces.
//!
//! Invariants:
//! 1. What is kept and what goes is decided by the code that the cache runs, not by a copy of it.
//! 2. Each block that is written to media is counted once, those dirty at the end included.
//!
//! What this does not do: time, read-ahead, concurrency; a victim that is dirty is written alone.

use super::directory::{Directory, Fresh};
use super::index::spread;
use super::{shard_of, shards_of};
use crate::error::{Error, Kind, Result};

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

/// One use of a block.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// The block.
    pub block: u64,
    /// It is changed.
    pub write: bool,
    /// When, in seconds.
    pub second: u32,
}

/// Runs a trace through a cache of `slots` blocks, written back `flush_age` seconds after they
/// became dirty, where that is given.
pub fn simulate(
    trace: impl Iterator<Item = Use>,
    slots: usize,
    flush_age: Option<u32>,
) -> Result<Simulated> {
    if slots == 0 || slots >= u32::MAX as usize {
        return Err(Error::new(Kind::Invalid, "simulate", format!("a cache of {slots} blocks")));
    }
    let shards = shards_of(slots as u64);
    let mut directories: Vec<Directory> = (0..shards).map(|_| Directory::default()).collect();
    for (number, directory) in directories.iter_mut().enumerate() {
        directory.grow(slots / shards + usize::from(number < slots % shards));
    }
    let (mut result, mut swept) = (Simulated::default(), 0);
    for Use { block, write, second } in trace {
        if let Some(age) = flush_age.filter(|_| second > swept) {
            let until = second.saturating_sub(age);
            let written = directories.iter_mut().map(|directory| sweep(directory, until));
            result.blocks_written += written.sum::<u64>();
            swept = second;
        }
        result.requests += 1;
        let directory = &mut directories[shard_of(spread(block), shards)];
        let slot = match directory.find(block) {
            Some(slot) => {
                result.hits += u64::from(directory.touch(slot));
                slot
            }
            None => insert(directory, block, &mut result),
        };
        if write {
            directory.set_dirty(slot, 1, || second);
        }
    }
    result.blocks_written += directories.iter().map(|each| each.dirty_len() as u64).sum::<u64>();
    Ok(result)
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

/// Writes back what became dirty before `until`.
fn sweep(directory: &mut Directory, until: u32) -> u64 {
    let since = directory.dirty().take_while(|(_, since)| *since < until);
    let slots: Vec<u32> = since.filter_map(|(block, _)| directory.find(block)).collect();
    for slot in &slots {
        directory.set_clean(*slot);
    }
    slots.len() as u64
}
