//! The real medium: a shared mapping of a file, memfd, device DAX or block device, or private
//! memory, touched only through the CPU port and guarded against SIGBUS.
//!
//! Invariants:
//! 1. `view` points to a [`View`] that lives until the medium is dropped, as does every mapping
//!    that a view was ever taken of: an operation in flight goes on through the addresses it began
//!    with. Shared mappings of one file show the same bytes, so it does the right thing.
//! 2. `view.len` is never more than the mapping it points into; a range that passed the check
//!    against it can be touched without leaving the mapping.
//! 3. Shrinking publishes the new length before the file is truncated; growing extends the file
//!    before the new length is published.
//! 4. `changed` counts changes of the file that only the file system can make durable (holes, a new
//!    length); `settled` is the count that the last successful `fdatasync` covered.
//!
//! Lock order: `retained` is the only lock, taken by `resize` alone.
//!
//! What this does not do: find the granularity out (its maker says it), copy between ranges that
//! overlap, lock the file against other processes.

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::backing::{append, Backing};
use super::port::{Outcome, Port, CACHELINE_SIZE};
use super::stats::{Counters, Stats};
use super::sys::{self, FileKind, Sharing};
use super::{check_range, guard, next_region, Extent, Granularity, Medium, Store};
use crate::error::{Error, Kind, Result};
use crate::sg::{RegionId, Segment};

/// How a file becomes a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Where in the file the medium starts, in bytes.
    pub offset: u64,
    /// What it takes to make a store durable.
    pub granularity: Granularity,
    /// Ask for `MAP_SYNC`; an error where it is not granted.
    pub map_sync: bool,
    /// Refuse every store.
    pub read_only: bool,
    /// Allow [`Medium::resize`].
    pub resizable: bool,
}

impl FileOptions {
    /// The whole file from its start, writable and resizable.
    pub fn new(granularity: Granularity) -> Self {
        let (offset, map_sync, read_only, resizable) = (0, false, false, true);
        FileOptions { offset, granularity, map_sync, read_only, resizable }
    }
}

/// Where the bytes are and how many there are: what an operation reads once, at its start.
#[derive(Clone, Copy, Debug)]
struct View {
    base: *mut u8,
    len: u64,
    /// How many views came before this one: tells whether the medium was resized since.
    number: usize,
}

/// A mapping of ours, undone when dropped.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: u64,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: made by `sys::map`; a medium drops its mappings when it is dropped itself.
            unsafe { sys::unmap(self.base, self.len) };
        }
    }
}

/// What must live as long as the medium. The last mapping is the one in use.
#[derive(Default)]
struct Retained {
    mappings: Vec<Mapping>,
    views: Vec<NonNull<View>>,
}

/// Mapped bytes.
pub struct Mapped {
    region: RegionId,
    granularity: Granularity,
    read_only: bool,
    resizable: bool,
    /// None for private memory.
    backing: Option<Backing>,
    /// Mappings start and end at multiples of this many bytes.
    map_unit: u64,
    port: &'static Port,
    view: AtomicPtr<View>,
    retained: Mutex<Retained>,
    changed: AtomicU64,
    settled: AtomicU64,
    counters: Counters,
}

// SAFETY: the raw pointers lead to mappings and views that live as long as the medium and may be
// used from any thread; everything else is Send by itself.
unsafe impl Send for Mapped {}
// SAFETY: as above; `view` is swapped atomically and the rest changes under a lock or atomically.
unsafe impl Sync for Mapped {}

/// True when the kernel grants a `MAP_SYNC` mapping of this file.
pub fn map_sync_granted(fd: BorrowedFd<'_>) -> Result<bool> {
    let unit = sys::inspect(fd)?.map_unit;
    match sys::map(fd, 0, unit, true, Sharing::Synchronous) {
        Ok(base) => {
            drop(Mapping { base, len: unit });
            Ok(true)
        }
        Err(error) if matches!(error.source_errno, Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

impl Mapped {
    /// Maps `len` bytes of an open file. The descriptor is duplicated.
    pub fn file(fd: BorrowedFd<'_>, len: u64, options: FileOptions) -> Result<Mapped> {
        let backing = Backing::new(fd, len, &options)?;
        let info = backing.info;
        let mut medium = Mapped::bare(options.granularity, Some(backing), info.map_unit);
        medium.read_only = options.read_only;
        medium.resizable =
            options.resizable && matches!(info.kind, FileKind::Regular | FileKind::Hugetlb);
        medium.map(len)?;
        Ok(medium)
    }

    /// Private memory: what is stored is as durable as it gets at once, and gone with the process.
    pub fn anonymous(len: u64, hugetlb: bool) -> Result<Mapped> {
        Mapped::anonymous_as(len, hugetlb, Granularity::Byte)
    }

    /// Private memory that is treated as if it had another granularity, for measuring.
    pub(crate) fn anonymous_as(
        len: u64,
        hugetlb: bool,
        granularity: Granularity,
    ) -> Result<Mapped> {
        let unit = if hugetlb { sys::huge_page_size() } else { sys::page_size() };
        let mut medium = Mapped::bare(granularity, None, unit);
        medium.map(len)?;
        Ok(medium)
    }

    fn bare(granularity: Granularity, backing: Option<Backing>, map_unit: u64) -> Mapped {
        Mapped {
            region: next_region(),
            granularity,
            read_only: false,
            resizable: false,
            backing,
            map_unit,
            port: Port::get(),
            view: AtomicPtr::new(null_mut()),
            retained: Mutex::default(),
            changed: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// Takes the first view of `len` bytes.
    fn map(&mut self, len: u64) -> Result<()> {
        let mut retained = Retained::default();
        self.remap(&mut retained, len)?;
        self.retained = Mutex::new(retained);
        Ok(())
    }

    /// Publishes a view of `len` bytes, over a new mapping unless the last one is long enough.
    fn remap(&self, retained: &mut Retained, len: u64) -> Result<()> {
        let mapped = retained.mappings.last().map_or(0, |mapping| mapping.len);
        if len > mapped {
            guard::install()?;
            let whole = len.checked_next_multiple_of(self.map_unit).ok_or_else(|| {
                Error::new(Kind::Invalid, "map", format!("{len} bytes are too many to map"))
            })?;
            let base = match &self.backing {
                Some(file) => {
                    sys::map(file.fd.as_fd(), file.offset, whole, self.read_only, file.sharing)?
                }
                None => sys::map_anonymous(whole, self.map_unit > sys::page_size())?,
            };
            retained.mappings.push(Mapping { base, len: whole });
        }
        let base = retained.mappings.last().map_or(NonNull::dangling().as_ptr(), |last| last.base);
        let view = Box::into_raw(Box::new(View { base, len, number: retained.views.len() }));
        // SAFETY: a Box is never null.
        retained.views.push(unsafe { NonNull::new_unchecked(view) });
        self.view.store(view, Ordering::Release);
        Ok(())
    }

    /// The current view.
    #[inline(always)]
    fn view(&self) -> View {
        // SAFETY: set before the constructor returns; views live until `drop`.
        unsafe { *self.view.load(Ordering::Acquire) }
    }

    /// The view, when the range lies within it.
    ///
    /// Always inlined, like what is called beside it: a view that goes through memory on the way
    /// is read back wider than it was written, which waits until every older store is done, those
    /// of a copy that still misses the cache among them. Reads then do not overlap any more.
    #[inline(always)]
    fn readable(&self, op: &'static str, at: u64, len: u64) -> Result<View> {
        let view = self.view();
        check_range(op, at, len, view.len)?;
        Ok(view)
    }

    /// The view, when the range lies within it and may be stored to.
    #[inline(always)]
    fn writable(&self, op: &'static str, at: u64, len: u64) -> Result<View> {
        if self.read_only {
            return Err(read_only(op).at(at));
        }
        self.readable(op, at, len)
    }

    /// How a store is carried out with this granularity.
    fn how(&self, how: Store) -> Store {
        match (self.granularity, how) {
            (Granularity::Cacheline, _) | (Granularity::Byte, Store::NonTemporal) => how,
            _ => Store::Cached,
        }
    }

    /// Turns a fault into an error with its cause.
    #[inline(always)]
    fn settle(
        &self,
        op: &'static str,
        view: View,
        at: u64,
        len: u64,
        outcome: Outcome,
    ) -> Result<()> {
        if outcome.is_fault() {
            return Err(self.fault(op, view, at, len, outcome.value));
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn fault(&self, op: &'static str, view: View, at: u64, len: u64, address: u64) -> Error {
        // A touch of a line may fault at its start, a touch of memory at any byte of it.
        let offset = address.wrapping_sub(view.base as u64);
        let first_line = at / CACHELINE_SIZE * CACHELINE_SIZE;
        if !(first_line..at + len).contains(&offset) {
            let text = format!("the buffer faulted at address {address:#x}");
            return Error::new(Kind::Media, op, text).at(at);
        }
        let (kind, text) = match &self.backing {
            // The file may be long enough again by now.
            Some(_) if self.view().number != view.number => {
                (Kind::Truncated, "the medium was resized meanwhile".to_owned())
            }
            Some(file) => file.why(at, len),
            None if self.map_unit > sys::page_size() => {
                (Kind::NoSpace, "the pool of huge pages is empty".to_owned())
            }
            None => (Kind::Media, "memory failed".to_owned()),
        };
        Error::new(kind, op, text).at(offset)
    }

    /// Starts writing lines back, where that is what this granularity takes.
    fn write_back(&self, op: &'static str, view: View, at: u64, len: u64) -> Result<()> {
        if self.granularity != Granularity::Cacheline {
            return Ok(());
        }
        // SAFETY: the range lies within the view.
        let outcome = unsafe { self.port.flush(view.base.add(at as usize), len) };
        self.settle(op, view, at, len, outcome)
    }

    /// Makes the pages of a range durable.
    fn persist_pages(&self, view: View, at: u64, len: u64) -> Result<()> {
        self.counters.synced();
        if len == 0 {
            return Ok(());
        }
        let start = at / sys::page_size() * sys::page_size();
        // SAFETY: the address lies within the view.
        let address = unsafe { view.base.add(start as usize) };
        sys::map_sync(address, at - start + len).map_err(|error| error.at(at))
    }

    /// Makes holes and a new length durable, where a fence alone would not.
    fn settle_metadata(&self) -> Result<()> {
        let changed = self.changed.load(Ordering::Acquire);
        if self.settled.load(Ordering::Acquire) >= changed {
            return Ok(());
        }
        if let Some(file) = &self.backing {
            sys::data_sync(file.fd.as_fd())?;
        }
        self.settled.fetch_max(changed, Ordering::Release);
        Ok(())
    }

    /// True while [`Mapped::settle_metadata`] has something to do.
    fn unsettled(&self) -> bool {
        self.settled.load(Ordering::Acquire) < self.changed.load(Ordering::Acquire)
    }

    /// Gives whole units back. The caller zeroes what is left of the range.
    fn punch_whole(&self, view: View, at: u64, len: u64) -> Result<bool> {
        match &self.backing {
            Some(file) => {
                let done = sys::punch(file.fd.as_fd(), file.offset + at, len)?;
                self.changed.fetch_add(u64::from(done), Ordering::Release);
                Ok(done)
            }
            // SAFETY: the range is whole pages of our private memory, inside the view.
            None => unsafe { sys::forget(view.base.add(at as usize), len) },
        }
    }

    /// True when the backing can give units back at all.
    fn can_punch(&self) -> Result<bool> {
        match &self.backing {
            Some(file) => file.can_punch(),
            None => Ok(true),
        }
    }

    fn file_to_resize(&self, len: u64) -> Result<&Backing> {
        if self.read_only {
            return Err(read_only("resize"));
        }
        match &self.backing {
            Some(file) if self.resizable => file.check_resize(len).map(|()| file),
            _ => {
                let text = "this medium was made with a fixed length";
                Err(Error::new(Kind::NotSupported, "resize", text))
            }
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let retained = self.retained.get_mut().unwrap_or_else(PoisonError::into_inner);
        for view in retained.views.drain(..) {
            // SAFETY: made by `Box::into_raw`; nobody can hold a borrow of the medium any more.
            drop(unsafe { Box::from_raw(view.as_ptr()) });
        }
    }
}

#[inline(always)]
fn require_aligned(op: &'static str, at: u64) -> Result<()> {
    if at.is_multiple_of(8) {
        return Ok(());
    }
    Err(misaligned(op, at))
}

#[cold]
#[inline(never)]
fn misaligned(op: &'static str, at: u64) -> Error {
    Error::new(Kind::Invalid, op, format!("byte {at} is not a multiple of 8")).at(at)
}

#[cold]
#[inline(never)]
fn read_only(op: &'static str) -> Error {
    Error::new(Kind::ReadOnly, op, "the medium was mapped read-only")
}

impl Medium for Mapped {
    fn region(&self) -> RegionId {
        self.region
    }

    fn len(&self) -> u64 {
        self.view().len
    }

    fn granularity(&self) -> Granularity {
        self.granularity
    }

    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        let view = self.readable("read", at, len)?;
        // SAFETY: the range lies within the view; the caller vouches for the target.
        let outcome = unsafe { self.port.copy_bulk(target, view.base.add(at as usize), len) };
        self.settle("read", view, at, len, outcome)
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, how: Store) -> Result<()> {
        let view = self.writable("write", at, len)?;
        self.counters.stored(at, len);
        if let Some(file) = self.backing.as_ref().filter(|file| file.stores_by_call) {
            // SAFETY: the caller vouches for the source.
            return unsafe { file.store(at, source, len) };
        }
        // SAFETY: the range lies within the view; the caller vouches for the source.
        let outcome = unsafe {
            let target = view.base.add(at as usize);
            match self.granularity {
                Granularity::Page if how == Store::NonTemporal => {
                    let outcome = self.port.store(target, source, len, how);
                    // `fence` does nothing here, and others must see these stores in order.
                    self.port.fence();
                    outcome
                }
                Granularity::Page => self.port.copy_bulk(target, source, len),
                _ => self.port.store(target, source, len, self.how(how)),
            }
        };
        self.settle("write", view, at, len, outcome)
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        let view = self.writable("zero", at, len)?;
        self.counters.zeroed(at, len);
        if let Some(file) = self.backing.as_ref().filter(|file| file.stores_by_call) {
            return file.zero(at, len);
        }
        let how = self.how(Store::Auto);
        // SAFETY: the range lies within the view.
        let outcome = unsafe { self.port.zero(view.base.add(at as usize), len, how) };
        self.settle("zero", view, at, len, outcome)
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        require_aligned("read", at)?;
        let view = self.readable("read", at, 8)?;
        // SAFETY: the aligned word lies within the view, whose base is a page boundary.
        let outcome = unsafe { self.port.load_u64(view.base.add(at as usize)) };
        self.settle("read", view, at, 8, outcome).map(|()| u64::from_le(outcome.value))
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        require_aligned("write", at)?;
        let view = self.writable("write", at, 8)?;
        self.counters.stored(at, 8);
        // SAFETY: the aligned word lies within the view, whose base is a page boundary.
        let outcome = unsafe { self.port.store_u64(view.base.add(at as usize), value.to_le()) };
        self.settle("write", view, at, 8, outcome)
    }

    fn map_unit(&self) -> u64 {
        self.map_unit
    }

    fn stores_by_mapping(&self) -> bool {
        self.backing.as_ref().is_none_or(|file| !file.stores_by_call)
    }

    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()> {
        self.writable("write", at, len)?;
        self.counters.stored(at, len);
        Ok(())
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        let view = self.readable("flush", at, len)?;
        self.counters.flushed();
        self.write_back("flush", view, at, len)
    }

    fn fence(&self) {
        self.counters.fenced();
        if self.granularity != Granularity::Page {
            self.port.fence();
        }
    }

    // Whatever is not the write-back and the fence comes before them: stores that wait behind
    // them in the store buffer cost up to a tenth of the call.
    fn persist(&self, at: u64, len: u64) -> Result<()> {
        let view = self.readable("persist", at, len)?;
        if self.granularity == Granularity::Page {
            return self.persist_pages(view, at, len);
        }
        let unsettled = self.unsettled();
        self.counters.persisted();
        self.write_back("persist", view, at, len)?;
        self.port.fence();
        if unsettled {
            return self.settle_metadata();
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.counters.synced();
        match (&self.backing, self.granularity) {
            (Some(file), Granularity::Page) => sys::data_sync(file.fd.as_fd()),
            _ => {
                self.port.fence();
                self.settle_metadata()
            }
        }
    }

    fn sync_blocks(&self) -> bool {
        self.granularity == Granularity::Page || self.unsettled()
    }

    fn punch(&self, at: u64, len: u64) -> Result<bool> {
        let view = self.writable("punch", at, len)?;
        if len == 0 {
            return self.can_punch();
        }
        let unit = self.backing.as_ref().map_or(self.map_unit, |file| file.info.hole_unit);
        // Units are counted from the start of the file, where offsets are multiples of them or of
        // a page that is smaller.
        let origin = self.backing.as_ref().map_or(0, |file| file.offset);
        let (first, last) = (origin + at, origin + at + len);
        let start = first.next_multiple_of(unit).min(last) - origin;
        let end = (last / unit * unit).max(start + origin) - origin;
        let whole = if end > start { self.punch_whole(view, start, end - start)? } else { false };
        if !whole && (end > start || !self.can_punch()?) {
            return Ok(false);
        }
        self.zero(at, start - at)?;
        self.zero(end, at + len - end)?;
        Ok(true)
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        self.readable("extents", at, len)?;
        match &self.backing {
            Some(file) if file.info.kind != FileKind::DeviceDax => {
                file.extents(file.offset + at, len)
            }
            _ => {
                let mut runs = Vec::new();
                append(&mut runs, len, false);
                Ok(runs)
            }
        }
    }

    fn address(&self, segment: &Segment) -> Result<*mut u8> {
        if segment.region != self.region {
            let text = format!("region {} is not region {}", segment.region.0, self.region.0);
            return Err(Error::new(Kind::Invalid, "address", text).at(segment.at()));
        }
        let view = self.readable("address", segment.at(), segment.len)?;
        Ok(view.base.wrapping_add(segment.at() as usize))
    }

    fn resize(&self, len: u64) -> Result<()> {
        let file = self.file_to_resize(len)?;
        let mut retained = self.retained.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, fd) = (self.view().len, file.fd.as_fd());
        let size = sys::size_bytes(fd, file.info.kind)?;
        // The last huge page of a file may be longer than what was asked for of it.
        if size > (file.offset + before).next_multiple_of(file.granule()) {
            let text = format!("the file has {size} bytes: it goes on behind this medium");
            return Err(Error::new(Kind::NotSupported, "resize", text));
        }
        let done = if len <= before {
            self.remap(&mut retained, len)?;
            let done = sys::set_length(fd, file.offset + len);
            done.or_else(|error| self.remap(&mut retained, before).and(Err(error)))
        } else {
            sys::set_length(fd, file.offset + len)?;
            let done = self.remap(&mut retained, len);
            done.or_else(|error| sys::set_length(fd, size).and(Err(error)))
        };
        self.changed.fetch_add(1, Ordering::Release);
        done
    }

    fn stats(&self) -> Stats {
        self.counters.sum()
    }

    fn set_counting(&self, on: bool) {
        self.counters.set_silent(!on);
    }

    fn count_blocks(&self, block_size: u64, every: u32) -> Result<()> {
        self.counters.count_blocks(self.len(), block_size, every)
    }

    fn block_counts(&self) -> Option<(u64, Vec<u32>)> {
        self.counters.block_counts()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::media::{Cause, Written};

    const PAGE: u64 = 4096;

    fn memfd_of(len: u64) -> File {
        let file = File::from(sys::memfd("medium", false).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn medium_of(file: &File, len: u64, granularity: Granularity) -> Mapped {
        Mapped::file(file.as_fd(), len, FileOptions::new(granularity)).unwrap()
    }

    fn write(medium: &Mapped, at: u64, bytes: &[u8], how: Store) -> Result<()> {
        // SAFETY: a slice is valid for its length.
        unsafe { medium.store(at, bytes.as_ptr(), bytes.len() as u64, how) }
    }

    fn read(medium: &Mapped, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0xee; len as usize];
        // SAFETY: a vector is valid for its length.
        unsafe { medium.load(at, bytes.as_mut_ptr(), len) }.map(|()| bytes)
    }

    const ALL: [Granularity; 3] = [Granularity::Byte, Granularity::Cacheline, Granularity::Page];

    #[test]
    fn what_was_stored_is_read_back_at_every_granularity() {
        for granularity in ALL {
            let medium = medium_of(&memfd_of(4 * PAGE), 4 * PAGE, granularity);
            for how in [Store::Auto, Store::Cached, Store::NonTemporal] {
                let bytes: Vec<u8> = (0..5000u32).map(|index| index as u8 ^ how as u8).collect();
                write(&medium, 77, &bytes, how).unwrap();
                medium.persist(77, 5000).unwrap();
                assert_eq!(read(&medium, 77, 5000).unwrap(), bytes);
            }
            medium.zero(100, 4000).unwrap();
            assert_eq!(read(&medium, 100, 4000).unwrap(), vec![0; 4000]);
            assert_ne!(read(&medium, 99, 1).unwrap(), [0]);
            medium.store_u64(8, u64::MAX - 1).unwrap();
            assert_eq!(medium.load_u64(8), Ok(u64::MAX - 1));
            medium.sync().unwrap();
        }
    }

    #[test]
    fn ranges_are_checked_before_anything_moves() {
        let medium = Mapped::anonymous(100, false).unwrap();
        let out = |result: Result<()>| result.unwrap_err().kind == Kind::OutOfRange;
        assert!(out(write(&medium, 99, &[1, 2], Store::Auto)));
        assert!(out(write(&medium, u64::MAX, &[1, 2], Store::Auto)));
        assert!(out(read(&medium, 101, 0).map(|_| ())));
        assert!(out(medium.zero(0, 101)));
        assert!(out(medium.flush(u64::MAX, 2)));
        assert!(out(medium.persist(1, 100)));
        assert!(out(medium.punch(100, 1).map(|_| ())));
        assert!(out(medium.stored_elsewhere(0, 101)));
        assert!(out(medium.extents(1, 100).map(|_| ())));
        assert!(out(medium.store_u64(96, 1)));
        assert_eq!(medium.load_u64(4).unwrap_err().kind, Kind::Invalid);
        assert_eq!(read(&medium, 0, 100).unwrap(), vec![0; 100]);
    }

    #[test]
    fn a_read_only_mapping_refuses_every_change() {
        let file = memfd_of(PAGE);
        let options = FileOptions { read_only: true, ..FileOptions::new(Granularity::Page) };
        let medium = Mapped::file(file.as_fd(), PAGE, options).unwrap();
        let refused = |result: Result<()>| assert_eq!(result.unwrap_err().kind, Kind::ReadOnly);
        refused(write(&medium, 0, &[1], Store::Auto));
        refused(medium.zero(0, 1));
        refused(medium.store_u64(0, 1));
        refused(medium.stored_elsewhere(0, 1));
        refused(medium.punch(0, PAGE).map(|_| ()));
        refused(medium.resize(0));
        medium.sync().unwrap();
        assert_eq!(read(&medium, 0, 8).unwrap(), [0; 8]);
    }

    #[test]
    fn a_file_cut_short_by_somebody_else_is_an_error_of_each_call() {
        for granularity in ALL {
            let file = memfd_of(2 * PAGE);
            let medium = medium_of(&file, 2 * PAGE, granularity);
            file.set_len(PAGE).unwrap();
            let cut = |result: Result<()>| {
                let error = result.unwrap_err();
                assert_eq!(error.kind, Kind::Truncated, "{error}");
                assert!(error.offset.is_some_and(|at| (PAGE..2 * PAGE).contains(&at)), "{error}");
                assert!(error.detail.contains("4096"), "{error}");
            };
            for how in [Store::Auto, Store::Cached, Store::NonTemporal] {
                cut(write(&medium, PAGE - 100, &[1; 300], how));
                cut(write(&medium, PAGE - 1, &[1; 2], how));
            }
            cut(read(&medium, PAGE - 100, 3000).map(|_| ()));
            cut(medium.zero(PAGE - 1, 2));
            cut(medium.load_u64(PAGE).map(|_| ()));
            cut(medium.store_u64(2 * PAGE - 8, 1));
            if granularity == Granularity::Cacheline {
                cut(medium.flush(PAGE - 1, 2));
                cut(medium.persist(PAGE + 3, 1));
            }
            write(&medium, 0, &[7; 100], Store::Auto).unwrap();
            assert_eq!(read(&medium, 0, 100).unwrap(), [7; 100]);
        }
    }

    #[test]
    fn growing_and_shrinking_keep_the_bytes_that_stay() {
        let file = memfd_of(PAGE);
        let medium = medium_of(&file, PAGE, Granularity::Cacheline);
        write(&medium, 0, &[3; 4096], Store::Auto).unwrap();
        medium.resize(100 * PAGE).unwrap();
        assert_eq!((medium.len(), file.metadata().unwrap().len()), (100 * PAGE, 100 * PAGE));
        write(&medium, 99 * PAGE, &[4; 4096], Store::Auto).unwrap();
        medium.resize(PAGE + 5).unwrap();
        assert_eq!((medium.len(), file.metadata().unwrap().len()), (PAGE + 5, PAGE + 5));
        assert_eq!(read(&medium, PAGE, 6).unwrap_err().kind, Kind::OutOfRange);
        medium.resize(100 * PAGE).unwrap();
        assert_eq!(read(&medium, 0, PAGE).unwrap(), vec![3; 4096]);
        assert_eq!(read(&medium, 99 * PAGE, PAGE).unwrap(), vec![0; 4096]);
        medium.resize(0).unwrap();
        assert!(medium.is_empty());
        medium.resize(PAGE).unwrap();
        assert_eq!(read(&medium, 0, PAGE).unwrap(), vec![0; 4096]);
        assert!(medium.sync_blocks());
        medium.sync().unwrap();
        assert!(!medium.sync_blocks());
    }

    #[test]
    fn resizing_while_others_copy_gives_bytes_or_an_error() {
        let file = memfd_of(64 * PAGE);
        let medium = medium_of(&file, 64 * PAGE, Granularity::Cacheline);
        std::thread::scope(|scope| {
            let copies = scope.spawn(|| {
                let mut done = 0;
                for round in 0..4000u64 {
                    let at = round % 60 * PAGE;
                    let wrote = write(&medium, at, &[9; 8000], Store::Auto);
                    let kind = wrote.as_ref().err().map(|error| error.kind);
                    let fine = [None, Some(Kind::OutOfRange), Some(Kind::Truncated)];
                    assert!(fine.contains(&kind), "{wrote:?}");
                    done += u64::from(kind.is_none());
                }
                done
            });
            for round in 0..300 {
                medium.resize([4, 64, 32, 128][round % 4] * PAGE).unwrap();
            }
            assert!(copies.join().unwrap() > 0);
        });
    }

    #[test]
    fn a_resize_that_would_cut_other_bytes_off_is_refused() {
        let file = memfd_of(4 * PAGE);
        let medium = medium_of(&file, PAGE, Granularity::Byte);
        assert_eq!(medium.resize(2 * PAGE).unwrap_err().kind, Kind::NotSupported);
        assert_eq!(file.metadata().unwrap().len(), 4 * PAGE);
        let fixed = FileOptions { resizable: false, ..FileOptions::new(Granularity::Byte) };
        let fixed = Mapped::file(file.as_fd(), 4 * PAGE, fixed).unwrap();
        assert_eq!(fixed.resize(8 * PAGE).unwrap_err().kind, Kind::NotSupported);
        let memory = Mapped::anonymous(PAGE, false).unwrap();
        assert_eq!(memory.resize(8 * PAGE).unwrap_err().kind, Kind::NotSupported);
        let huge = medium_of(&file, 4 * PAGE, Granularity::Byte).resize(u64::MAX);
        assert_eq!(huge.unwrap_err().kind, Kind::Invalid);
    }

    #[test]
    fn a_medium_may_start_inside_a_file() {
        let file = memfd_of(4 * PAGE);
        let options = FileOptions { offset: PAGE, ..FileOptions::new(Granularity::Cacheline) };
        let part = Mapped::file(file.as_fd(), 3 * PAGE, options).unwrap();
        let whole = medium_of(&file, 4 * PAGE, Granularity::Cacheline);
        write(&part, 10, &[5; 20], Store::Auto).unwrap();
        assert_eq!(read(&whole, PAGE + 10, 20).unwrap(), [5; 20]);
        part.resize(5 * PAGE).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 6 * PAGE);
        let odd = FileOptions { offset: 100, ..options };
        assert_eq!(Mapped::file(file.as_fd(), 1, odd).err().unwrap().kind, Kind::Invalid);
        let past = Mapped::file(file.as_fd(), 6 * PAGE, options);
        assert_eq!(past.err().unwrap().kind, Kind::OutOfRange);
    }

    fn runs(medium: &Mapped, at: u64, len: u64) -> Vec<(u64, bool)> {
        medium.extents(at, len).unwrap().iter().map(|run| (run.len, run.hole)).collect()
    }

    #[test]
    fn holes_are_found_and_made() {
        let file = memfd_of(64 * PAGE);
        let medium = medium_of(&file, 64 * PAGE, Granularity::Cacheline);
        assert_eq!(runs(&medium, 0, 64 * PAGE), [(64 * PAGE, true)]);
        write(&medium, 10 * PAGE, &vec![1; 20 * PAGE as usize], Store::Auto).unwrap();
        let expected = [(10 * PAGE, true), (20 * PAGE, false), (34 * PAGE, true)];
        assert_eq!(runs(&medium, 0, 64 * PAGE), expected);
        assert_eq!(runs(&medium, 29 * PAGE + 1, PAGE), [(PAGE - 1, false), (1, true)]);
        assert_eq!(medium.punch(15 * PAGE - 1, 2 * PAGE + 2), Ok(true));
        let expected = [(5 * PAGE, false), (2 * PAGE, true), (13 * PAGE, false)];
        assert_eq!(runs(&medium, 10 * PAGE, 20 * PAGE), expected);
        let around = read(&medium, 15 * PAGE - 2, 2 * PAGE + 4).unwrap();
        assert_eq!((around[0], around[around.len() - 1]), (1, 1));
        assert!(around[1..around.len() - 1].iter().all(|&byte| byte == 0));
        assert_eq!(runs(&medium, 5, 0), []);
    }

    #[test]
    fn a_small_punch_zeroes_and_no_more() {
        for granularity in ALL {
            let medium = medium_of(&memfd_of(2 * PAGE), 2 * PAGE, granularity);
            write(&medium, 0, &[1; 8192], Store::Auto).unwrap();
            assert_eq!(medium.punch(0, 0), Ok(true));
            assert_eq!(medium.punch(10, 20), Ok(true));
            assert_eq!(medium.punch(PAGE - 5, 10), Ok(true));
            let bytes = read(&medium, 0, 2 * PAGE).unwrap();
            let zero = |at: u64| (10..30).contains(&at) || (PAGE - 5..PAGE + 5).contains(&at);
            assert!((0..2 * PAGE).all(|at| (bytes[at as usize] == 0) == zero(at)));
        }
    }

    #[test]
    fn private_memory_is_punched_too() {
        let medium = Mapped::anonymous(8 * PAGE, false).unwrap();
        write(&medium, 0, &[1; 8 * 4096], Store::Auto).unwrap();
        assert_eq!(medium.punch(100, 4 * PAGE), Ok(true));
        assert!(read(&medium, 100, 4 * PAGE).unwrap().iter().all(|&byte| byte == 0));
        assert_eq!(read(&medium, 99, 1).unwrap(), [1]);
        assert_eq!(read(&medium, 100 + 4 * PAGE, 1).unwrap(), [1]);
        assert_eq!(runs(&medium, 0, 8 * PAGE), [(8 * PAGE, false)]);
    }

    #[test]
    fn bytes_behind_the_end_of_a_cut_file_are_not_called_a_hole() {
        let file = memfd_of(4 * PAGE);
        let medium = medium_of(&file, 4 * PAGE, Granularity::Page);
        file.set_len(PAGE).unwrap();
        assert_eq!(runs(&medium, 0, 4 * PAGE), [(PAGE, true), (3 * PAGE, false)]);
    }

    #[test]
    fn asking_for_holes_leaves_the_position_of_the_descriptor_alone() {
        use std::io::{Seek, SeekFrom};
        let mut file = memfd_of(4 * PAGE);
        file.seek(SeekFrom::Start(77)).unwrap();
        let medium = medium_of(&file, 4 * PAGE, Granularity::Page);
        assert_eq!(runs(&medium, 0, 4 * PAGE), [(4 * PAGE, true)]);
        assert_eq!(file.stream_position().unwrap(), 77);
    }

    #[test]
    fn a_punched_hole_waits_for_the_file_system_once() {
        let medium = medium_of(&memfd_of(4 * PAGE), 4 * PAGE, Granularity::Cacheline);
        assert!(!medium.sync_blocks());
        medium.punch(0, PAGE).unwrap();
        assert!(medium.sync_blocks());
        medium.persist(0, PAGE).unwrap();
        assert!(!medium.sync_blocks());
    }

    #[test]
    fn map_sync_is_granted_or_refused_cleanly() {
        let file = memfd_of(PAGE);
        assert_eq!(map_sync_granted(file.as_fd()), Ok(false));
        let options = FileOptions { map_sync: true, ..FileOptions::new(Granularity::Cacheline) };
        let refused = Mapped::file(file.as_fd(), PAGE, options).err().unwrap();
        assert_eq!(refused.kind, Kind::NotSupported);
    }

    #[test]
    fn files_that_are_no_media_are_refused() {
        for path in ["/dev/null", "/proc"] {
            let file = File::open(path).unwrap();
            let refused = Mapped::file(file.as_fd(), 0, FileOptions::new(Granularity::Page));
            assert_eq!(refused.err().unwrap().kind, Kind::NotSupported, "{path}");
        }
    }

    #[test]
    fn huge_pages_are_given_or_there_is_no_space() {
        let len = sys::huge_page_size();
        match Mapped::anonymous(len, true) {
            Ok(medium) => write(&medium, len - 3, &[1; 3], Store::Auto).unwrap(),
            Err(error) => assert_eq!(error.kind, Kind::NoSpace, "{error}"),
        }
    }

    #[test]
    fn addresses_are_given_for_ranges_of_this_medium_only() {
        let medium = Mapped::anonymous(2 * PAGE, false).unwrap();
        write(&medium, 5000, &[8], Store::Auto).unwrap();
        let address = medium.address(&Segment::new(medium.region(), 5000, 10)).unwrap();
        // SAFETY: private memory of the medium, which nobody else uses.
        assert_eq!(unsafe { address.read() }, 8);
        let past = medium.address(&Segment::new(medium.region(), 5000, 2 * PAGE));
        assert_eq!(past.unwrap_err().kind, Kind::OutOfRange);
        let other = medium.address(&Segment::new(next_region(), 0, 1));
        assert_eq!(other.unwrap_err().kind, Kind::Invalid);
    }

    #[test]
    fn what_was_done_is_counted() {
        let medium = medium_of(&memfd_of(PAGE), PAGE, Granularity::Cacheline);
        write(&medium, 0, &[1; 100], Store::Auto).unwrap();
        medium.store_u64(0, 1).unwrap();
        medium.stored_elsewhere(0, 7).unwrap();
        medium.persist(0, 8).unwrap();
        medium.fence();
        medium.sync().unwrap();
        let stats = medium.stats();
        assert_eq!((stats.flushes, stats.fences, stats.syncs), (1, 2, 1));
        assert_eq!(stats.written[Cause::Data as usize], Written { bytes: 115, lines: 4 });
        assert_eq!(stats.bytes_stored(), 115);
    }
}
