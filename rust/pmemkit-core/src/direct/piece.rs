//! One piece of a transfer: from where to where, and what the outcome of a call means for it.
//!
//! States: fresh -> (called -> again)* -> done or failed. A piece that was refused direct I/O goes
//! through the page cache; one whose mapping faulted starts over with a buffer.
//!
//! Invariants:
//! 1. The memory that a call is given is inside the mapping of the medium or a buffer of the piece,
//!    which live as long as the piece.

use std::alloc::{alloc, dealloc, Layout};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::{Copier, Direct, Way};
use crate::error::{Error, Kind, Result};
use crate::media::{Medium, Store};
use crate::sg::{Segment, FRAME_SIZE};

/// A transfer that failed: bytes moved from its start, and why no more.
pub type Failure = (u64, Error);

/// What is the same for all pieces of a transfer.
pub struct Job<'a> {
    pub copier: &'a Copier,
    pub medium: &'a dyn Medium,
    pub file_at: u64,
    pub at: u64,
    pub len: u64,
    /// The kernel is handed the mapping itself.
    pub mapped: bool,
    /// How the page cache is gone around, if it is.
    pub direct: Option<&'a Direct>,
}

/// Memory that starts at a page boundary.
struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(len: u64) -> Result<Buffer> {
        let too_large = || Error::new(Kind::NoSpace, "copy", format!("a buffer of {len} bytes"));
        let layout = Layout::from_size_align(len.max(1) as usize, FRAME_SIZE as usize);
        let layout = layout.map_err(|_| too_large())?;
        // SAFETY: the layout has a size.
        let start = unsafe { alloc(layout) };
        NonNull::new(start).map(|start| Buffer { start, layout }).ok_or_else(too_large)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody else knows it.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// A run of bytes that one call at a time moves.
pub struct Piece {
    /// Where it starts, from the start of the transfer. Bytes.
    pub start: u64,
    len: u64,
    done: u64,
    direct: bool,
    buffer: Option<Buffer>,
}

/// A call for the kernel to make.
pub struct Call<'a> {
    pub fd: BorrowedFd<'a>,
    pub memory: *mut u8,
    pub len: usize,
    pub file_at: u64,
}

/// What is left to do for a piece after a call.
pub enum Next {
    Again,
    Done,
}

impl<'a> Job<'a> {
    /// The piece that starts at `start`, which is less than the length.
    pub fn piece(&self, start: u64) -> Piece {
        let (from, left) = (self.file_at + start, self.len - start);
        let size = self.copier.options.piece;
        let whole = left.min(size - from % size);
        let (len, direct) = match self.direct.filter(|_| !self.copier.refused_so_far()) {
            None => (whole, false),
            Some(direct) => {
                let unit = direct.offset_align;
                match from % unit {
                    0 if whole >= unit => (whole / unit * unit, true),
                    0 => (whole, false),
                    into => (whole.min(unit - into), false),
                }
            }
        };
        Piece { start, len, done: 0, direct, buffer: None }
    }

    /// Gets a piece ready for its next call.
    pub fn prepare(&self, piece: &mut Piece) -> Result<Call<'a>> {
        if !self.mapped && piece.buffer.is_none() {
            self.take_buffer(piece)?;
        }
        let memory = match &piece.buffer {
            Some(buffer) => buffer.start.as_ptr(),
            None => {
                let at = self.at + piece.start;
                self.medium.address(&Segment::new(self.medium.region(), at, piece.len))?
            }
        };
        let fd = match self.direct.filter(|_| piece.direct) {
            Some(direct) => direct.file.as_fd(),
            None => self.copier.plain.as_fd(),
        };
        Ok(Call {
            fd,
            memory: memory.wrapping_add(piece.done as usize),
            len: (piece.len - piece.done) as usize,
            file_at: self.file_at + piece.start + piece.done,
        })
    }

    /// Gives a piece a buffer, with the medium's bytes in it if they are to go out.
    fn take_buffer(&self, piece: &mut Piece) -> Result<()> {
        let buffer = Buffer::new(piece.len)?;
        if self.copier.way == Way::Out {
            let at = self.at + piece.start;
            // SAFETY: the buffer has `len` bytes.
            unsafe { self.medium.load(at, buffer.start.as_ptr(), piece.len)? };
        }
        piece.buffer = Some(buffer);
        Ok(())
    }

    /// What the outcome of a call means: bytes moved, or minus the errno.
    pub fn settle(&self, piece: &mut Piece, outcome: i64) -> Result<Next> {
        match i32::try_from(-outcome).unwrap_or(0) {
            libc::EINTR | libc::EAGAIN => Ok(Next::Again),
            libc::EINVAL if piece.direct => {
                self.copier.refuse(libc::EINVAL);
                piece.direct = false;
                Ok(Next::Again)
            }
            libc::EFAULT | libc::EHWPOISON if piece.buffer.is_none() => {
                piece.done = 0;
                self.take_buffer(piece).map(|()| Next::Again)
            }
            errno @ 1.. => {
                let what = if self.copier.way == Way::In { "reading" } else { "writing" };
                let at = self.file_at + piece.start + piece.done;
                Err(Error::from_errno("copy", errno, format!("{what} the file")).at(at))
            }
            _ if outcome == 0 => Err(self.at_the_end(piece)),
            _ => {
                piece.done += outcome as u64;
                if piece.done < piece.len {
                    let unit = self.direct.map_or(1, |direct| direct.offset_align);
                    piece.direct &= piece.done.is_multiple_of(unit);
                    return Ok(Next::Again);
                }
                self.finish(piece).map(|()| Next::Done)
            }
        }
    }

    fn at_the_end(&self, piece: &Piece) -> Error {
        let at = self.file_at + piece.start + piece.done;
        match self.copier.way {
            Way::In => {
                let text = format!("the file ends at byte {at}, before what is to be copied");
                Error::new(Kind::Truncated, "copy", text).at(at)
            }
            Way::Out => Error::from_errno("copy", libc::ENOSPC, "writing the file").at(at),
        }
    }

    /// All bytes of the piece were moved by the kernel.
    fn finish(&self, piece: &Piece) -> Result<()> {
        let at = self.at + piece.start;
        if self.copier.way == Way::In {
            match &piece.buffer {
                // SAFETY: the buffer has `len` bytes, all of them filled.
                Some(buffer) => unsafe {
                    self.medium.store(at, buffer.start.as_ptr(), piece.len, Store::Auto)?;
                },
                None => {
                    self.medium.stored_elsewhere(at, piece.len)?;
                    self.medium.flush(at, piece.len)?;
                }
            }
        }
        let counters = &self.copier.counters;
        let counter = if piece.direct { &counters.direct } else { &counters.cached };
        counter.fetch_add(piece.len, Ordering::Relaxed);
        if piece.buffer.is_some() {
            counters.buffered.fetch_add(piece.len, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Piece {
    /// Where the next piece starts.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

impl Copier {
    fn refused_so_far(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}
