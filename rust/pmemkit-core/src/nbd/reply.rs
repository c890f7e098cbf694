//! Replies, gathered into batches and sent with one call.
//!
//! Invariants:
//! 1. A batch owns its headers and its buffered payload, and points at mapped payload; both stay in
//!    place until [`Batch::send`] returns.
//! 2. Replies leave in the order they were added, none interleaved with another's bytes: whoever
//!    sends holds the connection's send lock.
//! 3. When the kernel cannot read a mapped payload (the file was truncated), no made-up byte is
//!    sent: the send fails and the connection ends.
//!
//! What this does not do: decide what to answer.

use std::os::fd::BorrowedFd;

use super::parse::{Errno, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use super::sys::{self, Io};

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 0x8001;

/// Room for the headers of a batch; a batch is sent before it overflows.
const HEADS_SIZE: usize = 32 << 10;
/// The longest header of a reply with payload: structured, with its offset.
const HEAD_SIZE_MAX: usize = 28;
/// Replies of a batch, at most: two ranges each stay well below the kernel's limit of 1024.
const REPLIES_MAX: usize = 256;

/// One piece of a batch.
enum Part {
    /// A range of `heads`.
    Head { start: usize, len: usize },
    /// Mapped bytes.
    Mapped { data: *mut u8, len: usize },
    /// A whole buffer of `owned`.
    Owned { index: usize, len: usize },
}

/// Replies waiting to be sent.
pub struct Batch {
    heads: Vec<u8>,
    owned: Vec<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    parts: Vec<Part>,
    iov: Vec<libc::iovec>,
    payload: usize,
    replies: usize,
}

// SAFETY: the raw pointers of `Part::Mapped` and `iov` name bytes of media that outlive the
// connection, and only the thread that holds the batch uses them.
unsafe impl Send for Batch {}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Batch {
            heads: Vec::with_capacity(HEADS_SIZE),
            owned: Vec::new(),
            spare: Vec::new(),
            parts: Vec::new(),
            iov: Vec::new(),
            payload: 0,
            replies: 0,
        }
    }

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
        self.replies >= REPLIES_MAX || self.heads.len() + 4 * HEAD_SIZE_MAX > HEADS_SIZE
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
    pub fn read_mapped(&mut self, data: *mut u8, len: usize) {
        self.parts.push(Part::Mapped { data, len });
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

    /// Sends everything and empties the batch. The caller holds the send lock.
    pub fn send(&mut self, fd: BorrowedFd<'_>) -> Result<(), i32> {
        self.iov.clear();
        for part in &self.parts {
            let (data, len) = match part {
                // SAFETY: the range lies inside `heads`, which does not change before the send.
                Part::Head { start, len } => (unsafe { self.heads.as_ptr().add(*start) }, *len),
                Part::Mapped { data, len } => (data.cast_const(), *len),
                Part::Owned { index, len } => (self.owned[*index].as_ptr(), *len),
            };
            if len > 0 {
                self.iov.push(libc::iovec { iov_base: data.cast_mut().cast(), iov_len: len });
            }
        }
        let result = send_all(fd, &mut self.iov);
        self.heads.clear();
        self.parts.clear();
        self.iov.clear();
        self.payload = 0;
        self.replies = 0;
        for buffer in self.owned.drain(..) {
            // Keep a few ordinary buffers for the next batch, not a rare huge one.
            if self.spare.len() < 64 && buffer.capacity() <= 1 << 20 {
                self.spare.push(buffer);
            }
        }
        result
    }
}

/// Sends all ranges, however many calls that takes.
fn send_all(fd: BorrowedFd<'_>, iov: &mut [libc::iovec]) -> Result<(), i32> {
    let mut first = 0;
    while first < iov.len() {
        // SAFETY: the batch that built the list keeps its ranges in place.
        match unsafe { sys::send(fd, &mut iov[first..]) } {
            Io::Moved(mut moved) => {
                while first < iov.len() && moved >= iov[first].iov_len {
                    moved -= iov[first].iov_len;
                    first += 1;
                }
                if moved > 0 {
                    let part = &mut iov[first];
                    // SAFETY: `moved` is less than the range's length here.
                    part.iov_base = unsafe { part.iov_base.cast::<u8>().add(moved) }.cast();
                    part.iov_len -= moved;
                }
            }
            Io::Fault => return Err(libc::EFAULT),
            Io::WouldBlock => return Err(libc::EAGAIN),
            Io::Failed(errno) => return Err(errno),
        }
    }
    Ok(())
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
