//! The file: what reads, writes, `fsync` and `fallocate` do to the device behind it.
//!
//! Invariants:
//! 1. The size is that of the device and never changes. A read ends at it, a write that would go
//!    past it is refused whole (`ENOSPC`).
//! 2. A write is answered when the device says it is done; what was answered before an `fsync`
//!    began is durable when that returns.
//! 3. A punched range reads as zeroes. The loop device asks for it both when it discards and when
//!    it has to zero, and does not say which; so it is a zeroing, offered only by devices that
//!    have a quicker way than writing zeroes: a discard must not cost the media writes.
//! 4. Nothing here panics on what the kernel asks for: the channel checks every range.
//!
//! What this does not do: sub-sector writes (they are `EINVAL`, as with `O_DIRECT`), growing,
//! shrinking, preallocation.

use std::ops::Range;

use crate::block::{Caps, Channel, Flags, Op, Request};
use crate::error::{Error, Kind, Result};
use crate::sg::Sg;

/// Bits of the mode of `fallocate`.
pub mod mode {
    /// The size stays: it does in any case.
    pub const KEEP_SIZE: i32 = 0x01;
    /// Give the range back.
    pub const PUNCH_HOLE: i32 = 0x02;
    /// Make it read as zeroes, with its backing.
    pub const ZERO_RANGE: i32 = 0x10;
}

/// A channel with the manners of a file.
pub struct ExportFile {
    channel: Channel,
}

impl ExportFile {
    /// The file of a channel.
    pub fn new(channel: Channel) -> Self {
        ExportFile { channel }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.channel.info().size
    }

    /// True when it can be written to.
    pub fn writable(&self) -> bool {
        self.channel.info().caps.contains(Caps::WRITE)
    }

    /// The unit in which the device gives room back, in bytes.
    pub fn unit(&self) -> u32 {
        self.channel.info().block_size_preferred.max(self.channel.info().block_size_min)
    }

    /// The most bytes of one request that the device takes without it being cut.
    pub fn payload_size_max(&self) -> u32 {
        self.channel.info().payload_size_max
    }

    /// Reads up to `len` bytes into `buffer`, which grows as needed; gives where in it they are.
    pub fn read(&self, at: u64, len: u32, buffer: &mut Vec<u8>) -> Result<Range<usize>> {
        let end = at.saturating_add(u64::from(len)).min(self.size());
        if at >= end {
            return Ok(0..0);
        }
        // Whole sectors around the range; a device ends with a whole one.
        let unit = u64::from(self.channel.info().block_size_min);
        let first = at / unit * unit;
        let last = end.div_ceil(unit).saturating_mul(unit);
        let whole = usize_of("read", last - first)?;
        if buffer.len() < whole {
            buffer.resize(whole, 0);
        }
        // SAFETY: the buffer is ours alone and at least that long.
        unsafe { self.transfer(Op::Read, first, buffer.as_mut_ptr(), last - first)? };
        Ok(usize_of("read", at - first)?..usize_of("read", end - first)?)
    }

    /// Writes all of `data`.
    pub fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        let len = data.len() as u64;
        if at.checked_add(len).is_none_or(|end| end > self.size()) {
            let text = format!("{len} bytes would go past the end at {}", self.size());
            return Err(Error::new(Kind::NoSpace, "write", text).at(at));
        }
        // SAFETY: the slice is that long, and a write only reads it.
        unsafe { self.transfer(Op::Write, at, data.as_ptr().cast_mut(), len) }
    }

    /// A read or write of any length, in requests of at most the payload limit.
    ///
    /// # Safety
    /// `data` must be valid for `len` bytes: for writing where the op is a read, else for reading.
    unsafe fn transfer(&self, op: Op, at: u64, data: *mut u8, len: u64) -> Result<()> {
        let step = u64::from(self.payload_size_max());
        let mut done = 0;
        while done < len {
            let part = (len - done).min(step);
            // SAFETY: `done + part` stays inside the `len` bytes that the caller vouches for.
            let sg = unsafe { Sg::host(data.add(usize_of(op.name(), done)?), part) };
            let flags = Flags::empty();
            self.channel.submit(&Request { op, at: at + done, len: part, flags, sg: &sg })?;
            done += part;
        }
        Ok(())
    }

    /// Makes what was written durable. There is nothing to do where nothing can be written.
    pub fn flush(&self) -> Result<()> {
        if !self.channel.info().caps.contains(Caps::FLUSH) {
            return Ok(());
        }
        self.ranged(Op::Flush, 0, 0, Flags::empty())
    }

    /// `fallocate`: holes and zeroes. Anything else is not supported.
    pub fn allocate(&self, mode: i32, at: u64, len: u64) -> Result<()> {
        let caps = self.channel.info().caps;
        let (needed, flags) = match mode & !mode::KEEP_SIZE {
            mode::PUNCH_HOLE => (Caps::ZERO | Caps::FAST_ZERO, Flags::empty()),
            mode::ZERO_RANGE => (Caps::ZERO, Flags::NO_HOLE),
            other => {
                let text = format!("mode {other:#x} is neither a hole nor zeroes");
                return Err(Error::new(Kind::NotSupported, "fallocate", text).at(at));
            }
        };
        if self.writable() && !caps.contains(needed) {
            let text = "zeroing here is no quicker than writing";
            return Err(Error::new(Kind::NotSupported, "fallocate", text).at(at));
        }
        self.ranged(Op::Zero, at, len, flags)
    }

    fn ranged(&self, op: Op, at: u64, len: u64, flags: Flags) -> Result<()> {
        self.channel.submit(&Request { op, at, len, flags, sg: &Sg::new() })
    }
}

fn usize_of(op: &'static str, len: u64) -> Result<usize> {
    usize::try_from(len).map_err(|_| Error::new(Kind::Invalid, op, format!("{len} bytes")))
}
