//! Direct I/O: a range of a file goes into a range of media or out of it, around the page cache
//! and without a buffer of ours in between, several pieces at a time.
//!
//! The kernel moves the bytes into the mapping by itself, so they count as stored elsewhere and
//! their lines are written back afterwards. A buffer is taken only where the medium says that its
//! mapping will not do: a file behind a page cache, a list of bad blocks, a region of another
//! process, or a mapping that faulted, to learn why.
//!
//! Invariants:
//! 1. When a transfer returns, nothing is in flight: no piece reads or fills memory any more.
//! 2. Pieces begin in order. After a failure no further one begins, so that all bytes before the
//!    first piece that failed were moved; the error says how many those are.
//! 3. The stores of a transfer that returned were flushed and fenced, each by the thread that
//!    flushed; who wants them durable syncs the medium.
//! 4. Whatever the kernel refuses to do around the page cache (a file system without direct I/O, a
//!    ragged end) is done through it, and [`Copier::notice`] says why.
//!
//! What this does not do: holes, streams, making the file durable, compare.

mod piece;
mod ring;
mod sys;
#[cfg(test)]
mod tests;
mod threads;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::IoUring;

use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Medium};
use crate::sg::FRAME_SIZE;
use piece::Job;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the file into the medium.
    In,
    /// From the medium into the file.
    Out,
}

/// When the page cache is gone around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Around {
    /// Never.
    Never,
    /// Unless it has half of the range or more already.
    Uncached,
    /// Wherever the kernel lets us.
    Always,
}

/// How a transfer is carried out.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Pieces in flight.
    pub depth: u32,
    /// Bytes of a piece, a multiple of a page.
    pub piece: u64,
    /// Whether to go around the page cache.
    pub around: Around,
    /// Let io_uring keep the pieces in flight, where the kernel allows it; otherwise threads do.
    pub ring: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { depth: 8, piece: 1 << 20, around: Around::Uncached, ring: true }
    }
}

/// What a copier did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes that went around the page cache.
    pub direct: u64,
    /// Bytes that went through it.
    pub cached: u64,
    /// Bytes, of those, that needed a buffer on their way.
    pub buffered: u64,
}

#[derive(Default)]
struct Counters {
    direct: AtomicU64,
    cached: AtomicU64,
    buffered: AtomicU64,
}

/// The descriptor that goes around the page cache, and what it asks of addresses and offsets.
struct Direct {
    file: File,
    memory_align: u64,
    offset_align: u64,
}

/// One file, opened for transfers one way.
pub struct Copier {
    way: Way,
    options: Options,
    plain: OwnedFd,
    direct: Option<Direct>,
    /// Set once the kernel refused a piece that should have gone around the page cache.
    refused: AtomicBool,
    ring: Option<Mutex<IoUring>>,
    counters: Counters,
    notice: OnceLock<String>,
}

impl Copier {
    /// A copier of this file, which it opens for itself.
    pub fn new(fd: BorrowedFd<'_>, way: Way, options: Options) -> Result<Copier> {
        if options.depth == 0 || options.piece == 0 || !options.piece.is_multiple_of(FRAME_SIZE) {
            let Options { depth, piece, .. } = options;
            let text = format!("{depth} pieces of {piece} bytes: pieces are whole pages");
            return Err(Error::new(Kind::Invalid, "copy", text));
        }
        // Opened anew, so that a lock on the caller's descriptor goes when the caller closes it.
        let plain = sys::reopen(fd, way, false).map(OwnedFd::from);
        let plain = plain.or_else(|_| fd.try_clone_to_owned()).map_err(|cause| {
            let errno = cause.raw_os_error().unwrap_or(libc::EBADF);
            Error::from_errno("copy", errno, "opening the file")
        })?;
        let entries = options.depth.next_power_of_two();
        let ring = if options.ring { IoUring::new(entries).ok().map(Mutex::new) } else { None };
        let mut copier = Copier {
            way,
            options,
            plain,
            direct: None,
            refused: AtomicBool::new(false),
            ring,
            counters: Counters::default(),
            notice: OnceLock::new(),
        };
        if options.around != Around::Never {
            copier.direct = copier.open_direct();
        }
        Ok(copier)
    }

    fn open_direct(&self) -> Option<Direct> {
        let (memory_align, offset_align) = match sys::alignment(self.plain.as_fd()) {
            Some((0, _) | (_, 0)) => {
                self.note("the file system has no direct I/O for this file");
                return None;
            }
            Some((memory, offset)) => (u64::from(memory), u64::from(offset)),
            None => (512, 512),
        };
        match sys::reopen(self.plain.as_fd(), self.way, true) {
            // Whole pages, so that no page is written through the cache and around it.
            Ok(file) => {
                Some(Direct { file, memory_align, offset_align: offset_align.max(FRAME_SIZE) })
            }
            Err(cause) => {
                self.note(&format!("opening the file for direct I/O: {cause}"));
                None
            }
        }
    }

    /// The first reason why bytes went through the page cache that were to go around it.
    pub fn notice(&self) -> Option<&str> {
        self.notice.get().map(String::as_str)
    }

    /// What keeps pieces in flight: `io_uring` or `threads`.
    pub fn engine(&self) -> &'static str {
        if self.ring.is_some() {
            "io_uring"
        } else {
            "threads"
        }
    }

    /// What was moved so far.
    pub fn totals(&self) -> Totals {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { direct, cached, buffered } = &self.counters;
        Totals { direct: read(direct), cached: read(cached), buffered: read(buffered) }
    }

    fn note(&self, text: &str) {
        // The first reason is the one that is told.
        let _ = self.notice.set(text.to_owned());
    }

    /// Moves `len` bytes between `file_at` of the file and `at` of the medium.
    pub fn transfer(&self, medium: &dyn Medium, file_at: u64, at: u64, len: u64) -> Result<()> {
        let op = if self.way == Way::In { "write" } else { "read" };
        check_range(op, at, len, medium.len())?;
        check_range("copy", file_at, len, i64::MAX as u64)?;
        if len == 0 {
            return Ok(());
        }
        if self.way == Way::In {
            // Refused here where nothing may be stored, before a byte moves.
            medium.stored_elsewhere(at, 0)?;
        }
        let mapped = match self.way {
            Way::In => medium.stores_by_mapping(),
            Way::Out => medium.loads_by_mapping(),
        };
        let direct = self.direct_for(file_at, at, len, mapped);
        let job = Job { copier: self, medium, file_at, at, len, mapped, direct };
        let done = match &self.ring {
            Some(ring) => {
                let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
                ring::run(&mut ring, &job)
            }
            None => threads::run(&job),
        };
        medium.fence();
        done.map_err(|(moved, mut error)| {
            error.moved = Some(moved);
            error
        })
    }

    /// The descriptor that goes around the page cache, where this range is to.
    fn direct_for(&self, file_at: u64, at: u64, len: u64, mapped: bool) -> Option<&Direct> {
        let direct = self.direct.as_ref()?;
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        let cached = match self.options.around {
            Around::Uncached => sys::cached_bytes(self.plain.as_fd(), file_at, len, FRAME_SIZE),
            _ => None,
        };
        if cached.is_some_and(|bytes| bytes >= len.div_ceil(2)) {
            return None;
        }
        if mapped && !file_at.abs_diff(at).is_multiple_of(direct.memory_align) {
            let unit = direct.memory_align;
            self.note(&format!("file and region are not in step by units of {unit} bytes"));
            return None;
        }
        Some(direct)
    }

    fn refuse(&self, errno: i32) {
        self.refused.store(true, Ordering::Relaxed);
        let cause = std::io::Error::from_raw_os_error(errno);
        self.note(&format!("the kernel refuses direct I/O: {cause}"));
    }
}
