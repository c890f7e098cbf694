//! Copy-on-write clones: a mapping that tracks writes, and the way of what was written.
//!
//! Invariants:
//! 1. A range is taken before it is read, so that a store during a commit makes it dirty again.
//! 2. A commit that fails leaves everything dirty that it did not write, and all of it where the
//!    flush failed.
//!
//! What this does not do: a commit that a crash leaves whole or undone: the target promises what
//! its mode promises, for each write.

use super::LazyMapping;
use crate::block::{Channel, Flags, Op, Request};
use crate::error::{Error, Kind, Result};
use crate::media::check_range;
use crate::sg::Sg;

/// Bytes of a write of a commit.
const PIECE: u64 = 1 << 20;

impl LazyMapping {
    /// Writes what is dirty to a device, from byte `at` on, and flushes it. Gives how many bytes.
    pub fn commit(&self, target: &Channel, at: u64) -> Result<u64> {
        check_range("commit", at, self.len(), target.info().size)?;
        let most = PIECE.min(u64::from(target.info().payload_size_max));
        if most < self.page_size().min(PIECE) {
            let text = format!("the target takes {most} bytes at once, less than a page");
            return Err(Error::new(Kind::NotSupported, "commit", text));
        }
        let ranges = self.take_dirty()?;
        let mut buffer = vec![0u8; most as usize];
        let mut written = 0;
        for (number, &(start, len)) in ranges.iter().enumerate() {
            if let Err(error) = self.write_out(target, at, (start, len), &mut buffer) {
                self.mark_dirty(&ranges[number..]);
                return Err(error);
            }
            written += len;
        }
        let flush = Request { op: Op::Flush, at: 0, len: 0, flags: Flags::empty(), sg: &Sg::new() };
        if let Err(error) = target.submit(&flush) {
            self.mark_dirty(&ranges);
            return Err(error);
        }
        Ok(written)
    }

    fn write_out(
        &self,
        target: &Channel,
        base: u64,
        (start, len): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(buffer.len() as u64);
            // SAFETY: the buffer is at least that long.
            unsafe { self.load(start + done, buffer.as_mut_ptr(), part) }?;
            // SAFETY: the list is used while the buffer is borrowed.
            let sg = unsafe { Sg::host(buffer.as_mut_ptr(), part) };
            let at = base + start + done;
            let request = Request { op: Op::Write, at, len: part, flags: Flags::empty(), sg: &sg };
            target.submit(&request)?;
            done += part;
        }
        Ok(())
    }
}
