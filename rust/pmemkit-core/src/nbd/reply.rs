//! Replies, gathered into batches and sent with one call.
//!
//! Invariants:
//! 1. A batch owns its headers and its buffered payload, and points at mapped payload; both stay in
//!    place until [`Batch::send`] returns.
//! 2. Replies leave in the order they were added, none interleaved with another's bytes: whoever
//!    sends holds the connection's send lock.
//! 3. When the kernel cannot read a mapped payload (the file was truncated), no made-up byte is
//!    sent: a reply of which nothing left yet becomes an I/O error; one that was begun ends the
//!    connection.
//!
//! What this does not do: decide what to answer.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::parse::{Errno, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use super::sys::{self, Io};
use crate::media::Medium;
use crate::sg::Segment;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 0x8001;

/// Room for the headers of a batch; a batch is sent before it overflows.
const HEADS_SIZE: usize = 32 << 10;
/// The header of a simple reply.
const SIMPLE_HEAD_SIZE: usize = 16;
/// The header of a structured reply to a read, with its offset: the longest of a reply.
const STRUCTURED_HEAD_SIZE: usize = 28;
/// Payload buffers kept for the next batch.
const SPARE_BUFFERS_MAX: usize = 64;
/// The largest buffer that is kept.
const SPARE_SIZE_MAX: usize = 1 << 20;
/// Replies of a batch, at most: two ranges each stay well below the kernel's limit of 1024.
const REPLIES_MAX: usize = 256;

/// One piece of a batch.
#[derive(Clone, Copy)]
enum Part {
    /// A range of `heads`.
    Head { start: usize, len: usize },
    /// Mapped bytes, where they are, and how long the header is that ends the part before; 0 where
    /// that part is payload of the same reply.
    Mapped { data: *mut u8, segment: Segment, head_len: usize },
    /// A whole buffer of `owned`.
    Owned { index: usize, len: usize },
}

/// Replies waiting to be sent.
#[derive(Default)]
pub struct Batch {
    heads: Vec<u8>,
    owned: Vec<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    parts: Vec<Part>,
    iov: Vec<libc::iovec>,
    payload: usize,
    replies: usize,
    last_head_len: usize,
}

// SAFETY: the raw pointers of `Part::Mapped` and `iov` name bytes of media that outlive the
// connection, and only the thread that holds the batch uses them.
unsafe impl Send for Batch {}

impl Batch {
    /// True when there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Replies in the batch.
    pub fn replies(&self) -> usize {
        self.replies
    }

    /// Payload bytes in the batch.
    pub fn payload(&self) -> usize {
        self.payload
    }

    /// True when no further reply should be added before sending.
    pub fn is_full(&self) -> bool {
        self.replies >= REPLIES_MAX || self.heads.len() + 4 * STRUCTURED_HEAD_SIZE > HEADS_SIZE
    }

    /// A buffer for `len` payload bytes, to be handed back through [`Batch::read_owned`].
    pub fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        // Old bytes are overwritten by the read; only growth needs filling.
        buffer.resize(len, 0);
        buffer
    }

    /// A reply without payload: success, or an error. `offset` and `len` are those of the request
    /// and do not matter here; a structured session answers reads and block status in chunks.
    pub fn done(&mut self, cookie: u64, structured: bool, result: Result<(), Errno>) {
        match (structured, result) {
            (false, result) => {
                let errno = result.err().map_or(0, |errno| errno as u32);
                self.head(|heads| simple(heads, errno, cookie));
            }
            (true, Ok(())) => {
                self.head(|heads| chunk(heads, CHUNK_DONE, CHUNK_NONE, cookie, 0));
            }
            (true, Err(errno)) => self.head(|heads| {
                chunk(heads, CHUNK_DONE, CHUNK_ERROR, cookie, 6);
                heads.extend_from_slice(&(errno as u32).to_be_bytes());
                heads.extend_from_slice(&0u16.to_be_bytes());
            }),
        }
        self.replies += 1;
    }

    /// The header of a successful read of `len` bytes; the payload must follow.
    pub fn read_head(&mut self, cookie: u64, structured: bool, offset: u64, len: u32) {
        self.last_head_len = if structured { STRUCTURED_HEAD_SIZE } else { SIMPLE_HEAD_SIZE };
        self.head(|heads| {
            if structured {
                chunk(heads, CHUNK_DONE, CHUNK_OFFSET_DATA, cookie, 8 + u64::from(len));
                heads.extend_from_slice(&offset.to_be_bytes());
            } else {
                simple(heads, 0, cookie);
            }
        });
        self.replies += 1;
        self.payload += len as usize;
    }

    /// Mapped payload that belongs to the header before it.
    pub fn read_mapped(&mut self, data: *mut u8, segment: Segment) {
        let head_len = match self.parts.last() {
            Some(Part::Head { .. }) => self.last_head_len,
            // A later segment of the same reply: its header has no error to become any more.
            _ => 0,
        };
        self.parts.push(Part::Mapped { data, segment, head_len });
    }

    /// Buffered payload that belongs to the header before it.
    pub fn read_owned(&mut self, buffer: Vec<u8>) {
        self.parts.push(Part::Owned { index: self.owned.len(), len: buffer.len() });
        self.owned.push(buffer);
    }

    /// The answer to a block status request: extents of one context, lengths already clamped.
    pub fn block_status(&mut self, cookie: u64, context: u32, extents: &[(u32, u32)]) {
        let mut data = Vec::with_capacity(4 + 8 * extents.len());
        data.extend_from_slice(&context.to_be_bytes());
        for (len, flags) in extents {
            data.extend_from_slice(&len.to_be_bytes());
            data.extend_from_slice(&flags.to_be_bytes());
        }
        let len = data.len() as u64;
        self.head(|heads| chunk(heads, CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, len));
        self.read_owned(data);
        self.replies += 1;
    }

    fn head(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.heads.len();
        write(&mut self.heads);
        let len = self.heads.len() - start;
        match self.parts.last_mut() {
            // Neighbouring headers leave as one range.
            Some(Part::Head { len: before, .. }) => *before += len,
            _ => self.parts.push(Part::Head { start, len }),
        }
    }

    /// Sends everything and empties the batch; returns how many replies had to become errors. The
    /// caller holds the send lock; `media` are those that mapped payload lies on.
    pub fn send(&mut self, fd: BorrowedFd<'_>, media: &[Arc<dyn Medium>]) -> Result<u64, i32> {
        let result = self.send_all(fd, media);
        self.heads.clear();
        self.parts.clear();
        self.iov.clear();
        self.payload = 0;
        self.replies = 0;
        for buffer in self.owned.drain(..) {
            // Keep a few ordinary buffers for the next batch, not a rare huge one.
            if self.spare.len() < SPARE_BUFFERS_MAX && buffer.capacity() <= SPARE_SIZE_MAX {
                self.spare.push(buffer);
            }
        }
        result
    }

    /// Sends all parts, however many calls that takes.
    fn send_all(&mut self, fd: BorrowedFd<'_>, media: &[Arc<dyn Medium>]) -> Result<u64, i32> {
        let mut mended = 0;
        self.point();
        let mut first = 0;
        while first < self.iov.len() {
            // SAFETY: the parts stay in place until `send` returns.
            match unsafe { sys::send(fd, &mut self.iov[first..]) } {
                Io::Moved(moved) => first = self.advance(first, moved),
                Io::Fault => {
                    mended += self.mend(first, media)?;
                }
                Io::WouldBlock => return Err(libc::EAGAIN),
                Io::Failed(errno) => return Err(errno),
            }
        }
        Ok(mended)
    }

    /// Builds the list of ranges, one a part.
    fn point(&mut self) {
        self.iov.clear();
        for part in &self.parts {
            let (data, len) = match part {
                // SAFETY: the range lies inside `heads`, which does not change before the send.
                Part::Head { start, len } => (unsafe { self.heads.as_ptr().add(*start) }, *len),
                Part::Mapped { data, segment, .. } => (data.cast_const(), segment.len as usize),
                Part::Owned { index, len } => (self.owned[*index].as_ptr(), *len),
            };
            self.iov.push(libc::iovec { iov_base: data.cast_mut().cast(), iov_len: len });
        }
    }

    /// Takes `moved` sent bytes off the list; returns the first range with something left.
    fn advance(&mut self, mut first: usize, mut moved: usize) -> usize {
        while first < self.iov.len() && moved >= self.iov[first].iov_len {
            moved -= self.iov[first].iov_len;
            first += 1;
        }
        if moved > 0 {
            let part = &mut self.iov[first];
            // SAFETY: `moved` is less than the range's length here.
            part.iov_base = unsafe { part.iov_base.cast::<u8>().add(moved) }.cast();
            part.iov_len -= moved;
        }
        first
    }

    /// Turns the unsent replies whose media cannot be read into I/O errors.
    fn mend(&mut self, first: usize, media: &[Arc<dyn Medium>]) -> Result<u64, i32> {
        let mut mended = 0;
        for index in first..self.parts.len() {
            let Part::Mapped { segment, head_len, .. } = self.parts[index] else { continue };
            if self.iov[index].iov_len == 0 || readable(&segment, media) {
                continue;
            }
            // The header is the tail of the part before; it must be unsent to the last byte.
            if head_len == 0 || index == first || self.iov[index - 1].iov_len < head_len {
                return Err(libc::EFAULT);
            }
            let Part::Head { start, len } = self.parts[index - 1] else {
                return Err(libc::EFAULT);
            };
            into_error(&mut self.heads[start + len - head_len..start + len]);
            self.iov[index].iov_len = 0;
            mended += 1;
        }
        if mended == 0 {
            // Readable for us, not for the kernel, just now: nothing to mend, nothing to trust.
            return Err(libc::EFAULT);
        }
        Ok(mended)
    }
}

/// True when every byte of a segment can be loaded.
fn readable(segment: &Segment, media: &[Arc<dyn Medium>]) -> bool {
    let Some(medium) = media.iter().find(|medium| medium.region() == segment.region) else {
        return false;
    };
    let mut scratch = [0u8; 16 << 10];
    let mut done = 0;
    while done < segment.len {
        let len = (segment.len - done).min(scratch.len() as u64);
        // SAFETY: the target is a local of at least `len` bytes.
        if unsafe { medium.load(segment.at() + done, scratch.as_mut_ptr(), len) }.is_err() {
            return false;
        }
        done += len;
    }
    true
}

/// Rewrites the header of a successful read into an I/O error of the same length.
fn into_error(head: &mut [u8]) {
    let errno = (Errno::Io as u32).to_be_bytes();
    if head.len() == SIMPLE_HEAD_SIZE {
        head[4..8].copy_from_slice(&errno);
        return;
    }
    // A structured header is followed by an 8-byte offset: room for errno, length and a word.
    head[4..6].copy_from_slice(&CHUNK_DONE.to_be_bytes());
    head[6..8].copy_from_slice(&CHUNK_ERROR.to_be_bytes());
    head[16..20].copy_from_slice(&8u32.to_be_bytes());
    head[20..24].copy_from_slice(&errno);
    head[24..28].copy_from_slice(b"\0\x02IO");
}

fn simple(heads: &mut Vec<u8>, errno: u32, cookie: u64) {
    heads.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    heads.extend_from_slice(&errno.to_be_bytes());
    heads.extend_from_slice(&cookie.to_be_bytes());
}

fn chunk(heads: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, len: u64) {
    let len = u32::try_from(len).expect("a chunk is shorter than the payload limit");
    heads.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    heads.extend_from_slice(&flags.to_be_bytes());
    heads.extend_from_slice(&kind.to_be_bytes());
    heads.extend_from_slice(&cookie.to_be_bytes());
    heads.extend_from_slice(&len.to_be_bytes());
}
