//! The least that a hit in a cache can cost: a copy between a random block and a hot buffer.
//!
//! Invariants:
//! 1. The memory is asked for as that of a cache is, and touched before anything is timed.
//!
//! What this does not do: find the block, or keep it from changing meanwhile.

use super::Sectors;
use crate::cache::{MappedChunk, BLOCK};
use crate::error::{Error, Kind, Result};

/// Populated private memory, block by block.
pub struct PlainCopy {
    memory: MappedChunk,
    count: u64,
}

impl PlainCopy {
    /// Memory for `len` bytes of blocks, all of it written once.
    pub fn new(len: u64) -> Result<PlainCopy> {
        let count = len / BLOCK as u64;
        let memory = MappedChunk::new(count as usize * BLOCK).filter(|_| count > 0);
        let Some(memory) = memory else {
            let text = format!("no memory for {count} blocks of {BLOCK} bytes");
            return Err(Error::new(Kind::NoSpace, "bench", text));
        };
        // SAFETY: the chunk has so many bytes, and nobody else knows it yet.
        unsafe { memory.start().write_bytes(0x5a, count as usize * BLOCK) };
        Ok(PlainCopy { memory, count })
    }
}

impl Sectors for PlainCopy {
    fn count(&self) -> u64 {
        self.count
    }

    fn size(&self) -> usize {
        BLOCK
    }

    fn read(&self, sector: u64, target: &mut [u8]) -> Result<()> {
        // SAFETY: the block lies in the chunk. Another thread may write it at the same time; what
        // is read then is some mixture, which nobody looks at.
        unsafe {
            let source = self.memory.start().add(sector as usize * BLOCK);
            source.copy_to_nonoverlapping(target.as_mut_ptr(), target.len());
        }
        Ok(())
    }

    fn write(&self, sector: u64, source: &[u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe {
            let target = self.memory.start().add(sector as usize * BLOCK);
            target.copy_from_nonoverlapping(source.as_ptr(), source.len());
        }
        Ok(())
    }
}
