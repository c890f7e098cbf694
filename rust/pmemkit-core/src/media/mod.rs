//! Media: mapped bytes with a store, a flush and a fence. Everything that stores to media, from
//! Rust or ordered from Python, goes through a [`Medium`]: one recording medium can test it all.
//!
//! The persistence vocabulary is libpmem2's:
//! - granularity `byte`: a store is durable once it is visible (eADR, or memory that is not
//!   durable at all and says so): flushing is a fence;
//! - granularity `cacheline`: a store is durable once its line was written back and a fence passed;
//! - granularity `page`: a store is durable once the file system says so (`fdatasync`, `msync`).
//!
//! Invariants:
//! 1. No reference or slice to mapped bytes exists: they are copied in and out by raw pointer.
//!    Another process may change them at any time.
//! 2. Every range is checked against the length before any byte moves; `offset + len` is computed
//!    with overflow checks.
//! 3. A fault while touching the mapping (truncated file, poison, no space for a hole) is an
//!    `Err`, never a dead process.
//! 4. `fence` orders the stores of the calling thread only. Whoever acknowledges a write fences on
//!    the thread that stored.
//!
//! What this does not do: retry, cache, count sectors, know about block devices.

mod backing;
mod badblocks;
mod choice;
pub mod crash;
pub(crate) mod guard;
mod mapped;
pub mod port;
pub mod recording;
mod stats;
pub(crate) mod sys;

use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Kind, Result};
use crate::sg::{RegionId, Segment};

pub use badblocks::{BadBlocks, BadRun, Record, BAD_SECTOR_SIZE};
pub(crate) use guard::install as install_guard;
pub use mapped::{map_sync_granted, FileOptions, Mapped};
pub use stats::{caused_by, exchange_cause, Cause, CausedBy, Stats, Written, LINE_SIZE};
pub use sys::memfd;
pub(crate) use sys::{huge_page_size, set_length};

/// How much the platform must be told before a store is durable; the finest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Granularity {
    /// Visible is durable; only a fence is needed.
    Byte,
    /// Write back the cache lines, then fence.
    Cacheline,
    /// Ask the file system: `fdatasync` or `msync`.
    Page,
}

impl Granularity {
    /// The word used in options, JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Granularity::Byte => "byte",
            Granularity::Cacheline => "cacheline",
            Granularity::Page => "page",
        }
    }
}

/// How [`Medium::store`] puts bytes on media.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// Choose by length: cached stores below the threshold, non-temporal ones above it.
    Auto,
    /// Plain cached stores; durable after `flush` and `fence`.
    Cached,
    /// Stores that go around the cache; durable after `fence`. The ragged ends of the range are
    /// stored through the cache and written back, so a fence covers them too.
    NonTemporal,
}

/// A run of the medium and whether the backing holds data for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the run.
    pub len: u64,
    /// True for a hole: no backing is allocated and the bytes read as zeroes.
    pub hole: bool,
}

/// Bytes that a device or a file lends us, with a store, a flush and a fence.
///
/// All offsets and lengths are bytes from the start of the medium. Every method may be called
/// from any thread. `store`, `zero` and `store_u64` make bytes visible; they are durable only after
/// the steps that [`Granularity`] names, which [`Medium::persist`] takes for one range and
/// [`Medium::sync`] for everything.
pub trait Medium: Send + Sync {
    /// The number that sg segments name this medium by.
    fn region(&self) -> RegionId;

    /// Length in bytes. It changes only through [`Medium::resize`].
    fn len(&self) -> u64;

    /// What it takes to make a store durable.
    fn granularity(&self) -> Granularity;

    /// Copies `len` bytes at `at` to `target`.
    ///
    /// # Safety
    /// `target` must be valid for writes of `len` bytes.
    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()>;

    /// Copies `len` bytes from `source` to the medium at `at`. With granularity `cacheline` the
    /// stored lines are also written back (or were non-temporal), so that a fence makes them
    /// durable, unless `how` is [`Store::Cached`].
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    unsafe fn store(&self, at: u64, source: *const u8, len: u64, how: Store) -> Result<()>;

    /// Fills `len` bytes at `at` with zeroes, written back like `store` with [`Store::Auto`].
    fn zero(&self, at: u64, len: u64) -> Result<()>;

    /// Loads the aligned little-endian u64 at `at`: 8 bytes that cannot be torn.
    fn load_u64(&self, at: u64) -> Result<u64>;

    /// Stores an aligned little-endian u64 at `at` with one store, power-fail atomic. Not flushed.
    fn store_u64(&self, at: u64, value: u64) -> Result<()>;

    /// Says that bytes of this range were stored by somebody else: the kernel receiving into the
    /// mapping, a program with a view. They count as cached stores that were not flushed.
    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()>;

    /// Bytes of the pages that it is mapped in: what mappings of it start and end at.
    fn map_unit(&self) -> u64 {
        sys::page_size()
    }

    /// True when storing through [`Medium::address`] is as good as [`Medium::store`]. False for a
    /// file behind a page cache, where it costs a fault a page and more data at the next sync.
    fn stores_by_mapping(&self) -> bool {
        true
    }

    /// True when loading through [`Medium::address`] is as good as [`Medium::load`]. False where
    /// some of the bytes must not be read.
    fn loads_by_mapping(&self) -> bool {
        true
    }

    /// True when loads and stores may wait for somebody else, a peer for one: whoever must not wait
    /// makes them on another thread.
    fn blocks(&self) -> bool {
        false
    }

    /// Starts writing the cache lines of the range back. A no-op unless granularity is `cacheline`.
    fn flush(&self, at: u64, len: u64) -> Result<()>;

    /// Waits until the write-backs and non-temporal stores this thread issued are durable
    /// (`cacheline`), or orders them (`byte`). A no-op for `page`.
    fn fence(&self);

    /// Makes one range durable: flush and fence, or `msync` for `page`.
    fn persist(&self, at: u64, len: u64) -> Result<()>;

    /// Makes every store that completed before this call durable, whichever thread made it,
    /// provided that thread flushed and fenced (`cacheline`): a fence, or `fdatasync` for `page`.
    fn sync(&self) -> Result<()>;

    /// True when [`Medium::sync`] may wait for a device and should not run on a busy thread.
    fn sync_blocks(&self) -> bool {
        self.granularity() == Granularity::Page
    }

    /// Gives the backing of whole blocks in the range back. Afterwards the range reads as zeroes
    /// if this returned `Ok(true)`; `Ok(false)` means the backing cannot and nothing changed.
    fn punch(&self, at: u64, len: u64) -> Result<bool>;

    /// Data and holes of the range, in order, adding up to exactly `len` bytes.
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>>;

    /// The address of a segment of this medium, for handing to the kernel only (`sendmsg`,
    /// `recvmsg`), which answers `EFAULT` where a load of ours would fault.
    fn address(&self, segment: &Segment) -> Result<*mut u8>;

    /// Grows or shrinks the medium and its backing to `len` bytes.
    fn resize(&self, len: u64) -> Result<()>;

    /// What was done to the medium since it was made; zeroes where nobody counts.
    fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Whether what is stored is counted: for whoever measures what counting costs.
    fn set_counting(&self, _on: bool) {}

    /// From now on counts the lines of [`LINE_SIZE`] bytes written to each block of `block_size`
    /// bytes, for one in `every` stores, which stands for all. Can be asked for once.
    fn count_blocks(&self, _block_size: u64, _every: u32) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "count", "this medium does not count blocks"))
    }

    /// The size of a block and what was counted for each, if it was asked for.
    fn block_counts(&self) -> Option<(u64, Vec<u32>)> {
        None
    }

    /// True when the medium has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The next free region number; [`RegionId::HOST`] is never given out.
pub fn next_region() -> RegionId {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    RegionId(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Checks that `at .. at + len` lies within `size` bytes.
#[inline(always)]
pub fn check_range(op: &'static str, at: u64, len: u64, size: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(out_of_range(op, at, len, size)),
    }
}

#[cold]
#[inline(never)]
fn out_of_range(op: &'static str, at: u64, len: u64, size: u64) -> Error {
    let text = format!("{len} bytes do not fit: the end is at byte {size}");
    Error::new(Kind::OutOfRange, op, text).at(at)
}
