//! Goes through the buffers of a request, some bytes at a time.
//!
//! Invariants:
//! 1. It never gives out a byte twice, and none behind the end of the request.
//!
//! What this does not do: hold on to memory; whoever made the segments vouches for it.

use crate::error::{Error, Kind, Result};
use crate::sg::{Segment, Sg};

/// Where in a request's buffers the next byte is.
pub struct Cursor<'a> {
    segments: &'a [Segment],
    offset: u64,
}

impl<'a> Cursor<'a> {
    /// The start of the request.
    pub fn new(sg: &'a Sg) -> Self {
        Cursor { segments: sg.segments(), offset: 0 }
    }

    /// Hands the next `len` bytes to `each`, as they lie in memory: address, length, how many came
    /// before.
    #[inline]
    fn advance(&mut self, len: u64, mut each: impl FnMut(*mut u8, u64, u64)) -> Result<()> {
        let mut done = 0;
        while done < len {
            let Some(segment) = self.segments.first() else {
                let text = format!("{} bytes are missing", len - done);
                return Err(Error::new(Kind::Invalid, "cache", text));
            };
            let here = (segment.len - self.offset).min(len - done);
            if here > 0 {
                let address = Sg::host_address(segment)?;
                // SAFETY: inside the segment, for which its maker vouches.
                each(unsafe { address.add(self.offset as usize) }, here, done);
                self.offset += here;
                done += here;
            }
            if self.offset == segment.len {
                (self.segments, self.offset) = (&self.segments[1..], 0);
            }
        }
        Ok(())
    }

    /// Copies into the request's buffers.
    ///
    /// # Safety
    /// `source` is valid for reads of `len` bytes.
    #[inline]
    pub unsafe fn put(&mut self, source: *const u8, len: u64) -> Result<()> {
        self.advance(len, |target, here, done| {
            // SAFETY: the caller vouches for the source, the request's maker for the target.
            unsafe { source.add(done as usize).copy_to_nonoverlapping(target, here as usize) };
        })
    }

    /// Copies out of the request's buffers.
    ///
    /// # Safety
    /// `target` is valid for writes of `len` bytes.
    #[inline]
    pub unsafe fn get(&mut self, target: *mut u8, len: u64) -> Result<()> {
        self.advance(len, |source, here, done| {
            // SAFETY: the caller vouches for the target, the request's maker for the source.
            unsafe { target.add(done as usize).copy_from_nonoverlapping(source, here as usize) };
        })
    }

    /// The next `len` bytes as a list of their own.
    pub fn part(&mut self, len: u64) -> Result<Sg> {
        let mut part = Sg::new();
        self.advance(len, |address, here, _| {
            // SAFETY: a part of the request's segments, vouched for as they are.
            unsafe { part.push_host(address, here) };
        })?;
        Ok(part)
    }
}
