//! A mapping: a range of a medium with the verbs of libpmem2, dirty tracking and snapshots.
//!
//! Invariants:
//! 1. Offsets are bytes from the start of the mapping and are checked before anything moves.
//! 2. `open` is a [`Gate`]: whoever uses the medium passes it; closing, and fixing the moment of a
//!    snapshot, shut it. So no store of ours is half before that moment. Nobody waits for anything
//!    else but media inside.
//! 3. A mapping with views is not closed: their addresses would lead nowhere.
//! 4. After [`Mapping::sync`] everything is durable that was stored before the call: with the
//!    tracker `explicit` that is what our methods stored, what was marked, and the ranges of
//!    writable views. Calls take turns, so none returns while another still writes its part back.
//!
//! Lock order: `syncing` or `copying`, `open`, then the tracker's, then `views`.
//!
//! What this does not do: tell a file from a device; whoever opens it knows which tracker fits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gate::{Gate, Passed};
use super::handler::{Handler, Span};
use super::plant::Plant;
use super::snapshot::{self, Snapshot};
use super::sys;
use super::tracker::{Handover, Source, Tracker};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Granularity, Medium, Store};
use crate::sg::Segment;

/// Bytes that `set_persist` stores at once.
const FILL_BYTES: u64 = 64 << 10;

/// How it is found out what is dirty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tracking {
    /// The best there is.
    #[default]
    Automatic,
    /// The kernel knows, and is asked to sync.
    Kernel,
    /// What our methods store, and the ranges of writable views.
    Explicit,
    /// A thread hears of the first store to each page.
    WriteProtect,
    /// The page table remembers (Linux 6.7).
    WriteProtectAsync,
}

/// How a medium is mapped.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Where in the medium it starts: whole pages.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Refuse every store, and give out no writable view.
    pub read_only: bool,
    /// Who knows what is dirty.
    pub tracking: Tracking,
    /// Memory of this process that no file is behind.
    pub private: bool,
    /// For tests.
    pub plant: Plant,
}

/// What there is while it is open. Dropped in this order: no protection outlives the mapping.
pub(super) struct Open {
    /// Handles faults for a snapshot only.
    handler: Option<Handler>,
    pub tracker: Tracker,
    snapshot: Option<Arc<Snapshot>>,
    /// The snapshot hears of stores from our methods, and only from those.
    by_methods: bool,
    medium: Arc<dyn Medium>,
}

/// Views that are alive.
#[derive(Default)]
struct Views {
    count: usize,
    /// The ranges of writable ones.
    writable: Vec<(u64, u64)>,
}

/// Mapped bytes of a region.
pub struct Mapping {
    open: Gate<Option<Open>>,
    views: Mutex<Views>,
    syncing: Mutex<()>,
    copying: Mutex<()>,
    offset: u64,
    len: u64,
    /// Pages of the mapping have this many bytes.
    unit: u64,
    granularity: Granularity,
    read_only: bool,
    /// Where the page table can be used.
    span: Option<Span>,
    sees_stores: bool,
    plant: Plant,
}

// SAFETY: the span is numbers; the address in it is used by the kernel, and by views, which pin the
// mapping. Everything else is Send and Sync by itself.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mapping {
    /// Maps a range of a medium.
    pub fn new(medium: Arc<dyn Medium>, options: Options) -> Result<Mapping> {
        let Options { offset, len, read_only, tracking, private, plant } = options;
        check_range("map", offset, len, medium.len())?;
        let unit = medium.map_unit();
        if !offset.is_multiple_of(unit) {
            let text = format!("offset {offset} is not a multiple of {unit} bytes");
            return Err(Error::new(Kind::Invalid, "map", text).at(offset));
        }
        let segment = Segment::new(medium.region(), offset, len);
        let whole = len.next_multiple_of(unit);
        let span = (medium.loads_by_mapping() && len > 0 && !read_only)
            .then(|| medium.address(&segment))
            .transpose()?
            .map(|start| Span { start: start as u64, len: whole, unit, private });
        // Stores that go by a call do not pass the page table of this mapping.
        let span = span.filter(|_| medium.stores_by_mapping());
        let possible = tracking != Tracking::Explicit && span.is_some_and(Handler::possible);
        let granularity = medium.granularity();
        let tracker = Tracker::new(tracking, granularity, span)?;
        let open = Open { handler: None, tracker, snapshot: None, by_methods: false, medium };
        Ok(Mapping {
            open: Gate::new(Some(open)),
            views: Mutex::default(),
            syncing: Mutex::default(),
            copying: Mutex::default(),
            offset,
            len,
            unit,
            granularity,
            read_only,
            span,
            sees_stores: possible,
            plant,
        })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it takes to make a store durable.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// True once it was closed.
    pub fn closed(&self) -> bool {
        self.open().is_none()
    }

    /// True when it refuses every store.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Bytes of its pages: what offsets of mappings are multiples of.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// Who knows what is dirty: `fence`, `kernel`, `explicit`, `write-protect-async` or
    /// `write-protect`.
    pub fn tracker(&self) -> Result<&'static str> {
        self.used("track", |open| Ok(open.tracker.name()))
    }

    /// True when a snapshot sees every store, false when it sees those of our methods only.
    pub fn snapshot_sees_stores(&self) -> bool {
        self.sees_stores
    }

    #[inline]
    fn open(&self) -> Passed<'_, Option<Open>> {
        self.open.pass()
    }

    /// Does something with what is open.
    #[inline]
    pub(super) fn used<T>(
        &self,
        op: &'static str,
        work: impl FnOnce(&Open) -> Result<T>,
    ) -> Result<T> {
        match &*self.open() {
            Some(open) => work(open),
            None => Err(closed(op)),
        }
    }

    /// Checks a range, and that it may be stored to.
    #[inline]
    fn check(&self, op: &'static str, at: u64, len: u64, store: bool) -> Result<()> {
        if store && self.read_only {
            return Err(Error::new(Kind::ReadOnly, op, "the mapping is read-only").at(at));
        }
        check_range(op, at, len, self.len)
    }

    /// An error of the medium, with an offset of ours.
    #[inline]
    fn ours<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|mut error| {
            error.offset = error.offset.map(|at| at.saturating_sub(self.offset));
            error
        })
    }

    /// Copies `len` bytes at `at` to `target`.
    ///
    /// # Safety
    /// `target` must be valid for writes of `len` bytes.
    pub unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        self.check("read", at, len, false)?;
        self.used("read", |open| {
            // SAFETY: the caller vouches for the target.
            self.ours(unsafe { open.medium.load(self.offset + at, target, len) })
        })
    }

    /// Stores within the gate, with the snapshot told first and the tracker afterwards.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    #[inline]
    unsafe fn put(
        &self,
        open: &Open,
        at: u64,
        source: *const u8,
        len: u64,
        how: Store,
    ) -> Result<()> {
        if let Some(snapshot) = &open.snapshot {
            if open.by_methods {
                snapshot.preserve(at, len);
            }
        }
        // SAFETY: the caller vouches for the source.
        self.ours(unsafe { open.medium.store(self.offset + at, source, len, how) })
    }

    /// Stores through the cache; durable after [`Mapping::persist`] or [`Mapping::sync`], on
    /// whichever thread.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    pub unsafe fn write(&self, at: u64, source: *const u8, len: u64) -> Result<()> {
        self.check("write", at, len, true)?;
        self.used("write", |open| {
            // SAFETY: the caller vouches for the source.
            let done = unsafe { self.put(open, at, source, len, Store::Cached) };
            open.tracker.stored(at, len);
            done
        })
    }

    /// Stores, around the cache where that is faster, and returns when it is durable.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    pub unsafe fn copy_persist(&self, at: u64, source: *const u8, len: u64) -> Result<()> {
        self.check("write", at, len, true)?;
        self.used("write", |open| {
            // SAFETY: the caller vouches for the source.
            let done = unsafe { self.put(open, at, source, len, Store::Auto) };
            let done = done.and_then(|()| self.settle(open, at, len));
            if done.is_err() {
                open.tracker.stored(at, len);
            }
            done
        })
    }

    /// Waits for what was stored with [`Store::Auto`].
    #[inline]
    fn settle(&self, open: &Open, at: u64, len: u64) -> Result<()> {
        if self.granularity == Granularity::Page {
            return self.ours(open.medium.persist(self.offset + at, len));
        }
        if !self.plant.is(Plant::CopyForgetsFence) {
            open.medium.fence();
        }
        Ok(())
    }

    /// Fills a range with a byte and returns when that is durable.
    pub fn set_persist(&self, at: u64, len: u64, value: u8) -> Result<()> {
        self.check("write", at, len, true)?;
        let filling = vec![value; len.min(FILL_BYTES) as usize];
        self.used("write", |open| {
            let mut done = 0;
            while done < len {
                let part = (len - done).min(FILL_BYTES);
                // SAFETY: the vector has at least `part` bytes.
                let stored =
                    unsafe { self.put(open, at + done, filling.as_ptr(), part, Store::Auto) };
                if stored.is_err() {
                    open.tracker.stored(at, len);
                    return stored;
                }
                done += part;
            }
            self.settle(open, at, len)
        })
    }

    /// Starts writing a range back. Of granularity `page` this waits for the file system, as
    /// nothing else could be begun.
    pub fn flush(&self, at: u64, len: u64) -> Result<()> {
        self.check("flush", at, len, false)?;
        self.used("flush", |open| self.write_back(open, at, len))
    }

    fn write_back(&self, open: &Open, at: u64, len: u64) -> Result<()> {
        let at = self.offset + at;
        self.ours(match self.granularity {
            Granularity::Page => open.medium.persist(at, len),
            _ => open.medium.flush(at, len),
        })
    }

    /// Waits for what this thread flushed.
    pub fn drain(&self) -> Result<()> {
        self.used("drain", |open| {
            open.medium.fence();
            Ok(())
        })
    }

    /// Makes a range durable.
    pub fn persist(&self, at: u64, len: u64) -> Result<()> {
        self.check("persist", at, len, false)?;
        self.used("persist", |open| {
            if self.plant.is(Plant::PersistForgetsFlush) {
                open.medium.fence();
                return Ok(());
            }
            open.tracker.persisting(at, len);
            let done = match self.plant.is(Plant::PersistForgetsFence) {
                true => open.medium.flush(self.offset + at, len),
                false => open.medium.persist(self.offset + at, len),
            };
            if done.is_err() {
                open.tracker.stored(at, len);
            }
            self.ours(done)
        })
    }

    /// Counts a range as dirty: somebody stored to it through an address of ours.
    pub fn mark_dirty(&self, at: u64, len: u64) -> Result<()> {
        self.check("mark", at, len, true)?;
        self.used("mark", |open| {
            open.tracker.note(at, len);
            Ok(())
        })
    }

    /// Makes everything durable that was stored before, and returns how many bytes were asked to be
    /// written back for that.
    pub fn sync(&self) -> Result<u64> {
        let _turn = locked(&self.syncing);
        self.used("sync", |open| match open.tracker.source {
            Source::Fence => self.ours(open.medium.sync()).map(|()| 0),
            Source::Kernel if self.granularity == Granularity::Page => {
                self.ours(open.medium.persist(self.offset, self.len)).map(|()| self.len)
            }
            Source::Kernel => self.ask_kernel(open, 0, self.len).map(|()| self.len),
            _ => self.sync_dirty(open),
        })
    }

    /// Has the file system make a range durable, metadata and all.
    pub fn kernel_sync(&self, at: u64, len: u64) -> Result<()> {
        self.check("sync", at, len, false)?;
        self.used("sync", |open| self.ask_kernel(open, at, len))
    }

    fn ask_kernel(&self, open: &Open, at: u64, len: u64) -> Result<()> {
        let first = at - at % self.unit;
        let segment = Segment::new(open.medium.region(), self.offset + first, at - first + len);
        let start = self.ours(open.medium.address(&segment))?;
        // SAFETY: the medium is mapped as long as it is open.
        unsafe { sys::kernel_sync(start, at - first + len) }
    }

    fn sync_dirty(&self, open: &Open) -> Result<u64> {
        let mut dirty = open.tracker.take()?;
        if matches!(open.tracker.source, Source::Explicit)
            && !self.plant.is(Plant::SyncForgetsViews)
        {
            locked(&self.views).writable.iter().for_each(|&(at, len)| dirty.insert(at, len));
        }
        let kept =
            dirty.len() - usize::from(self.plant.is(Plant::SyncForgetsRange)).min(dirty.len());
        let clip = |(at, len): (u64, u64)| (at, len.min(self.len.saturating_sub(at)));
        let ranges = || dirty.iter().take(kept).map(clip).filter(|(_, len)| *len > 0);
        let mut done = ranges().try_for_each(|(at, len)| self.write_back(open, at, len));
        if done.is_ok() && !self.plant.is(Plant::SyncForgetsFence) {
            done = self.ours(open.medium.sync());
        }
        if done.is_err() {
            ranges().for_each(|(at, len)| open.tracker.note(at, len));
        }
        done.map(|()| ranges().map(|(_, len)| len).sum())
    }

    /// The address of a range, which stays what it is until [`Mapping::unpin`].
    pub fn pin(&self, at: u64, len: u64, writable: bool) -> Result<*mut u8> {
        self.check("view", at, len, writable)?;
        self.used("view", |open| {
            if !open.medium.loads_by_mapping() {
                let text = "there is bad media in it, which a view could not tell: use read()";
                return Err(Error::new(Kind::NotSupported, "view", text));
            }
            if writable && open.by_methods {
                let text = "a snapshot is being made, and would not see what the view stores";
                return Err(Error::new(Kind::Busy, "view", text));
            }
            let segment = Segment::new(open.medium.region(), self.offset + at, len);
            let address = self.ours(open.medium.address(&segment))?;
            let mut views = locked(&self.views);
            views.count += 1;
            if writable {
                views.writable.push((at, len));
            }
            Ok(address)
        })
    }

    /// Ends a pin, told with the same arguments.
    pub fn unpin(&self, at: u64, len: u64, writable: bool) {
        let ended = self.used("view", |open| {
            if writable {
                // The medium hears of it first: what it did not hear of, it cannot lose.
                self.ours(open.medium.stored_elsewhere(self.offset + at, len))?;
                open.tracker.stored(at, len);
            }
            Ok(())
        });
        debug_assert!(ended.is_ok(), "{ended:?}");
        let mut views = locked(&self.views);
        views.count -= 1;
        if writable {
            if let Some(place) = views.writable.iter().position(|&range| range == (at, len)) {
                views.writable.swap_remove(place);
            }
        }
    }

    /// How many views are alive.
    pub fn view_count(&self) -> usize {
        locked(&self.views).count
    }

    /// Says whether huge pages are wanted.
    pub fn advise_huge(&self, wanted: bool) -> Result<()> {
        let address = self.pin(0, self.len, false)?;
        // SAFETY: pinned, hence mapped.
        let done =
            unsafe { sys::advise_huge(address, self.len.next_multiple_of(self.unit), wanted) };
        self.unpin(0, self.len, false);
        done
    }

    /// Lets the medium go. Refused while there are views or a snapshot is being made.
    pub fn close(&self) -> Result<()> {
        let mut open = self.open.shut()?;
        let busy = |text: String| Err(Error::new(Kind::Busy, "close", text));
        let views = self.view_count();
        if views > 0 {
            return busy(format!("{views} views of the mapping are alive: release them first"));
        }
        if open.as_ref().is_some_and(|open| open.snapshot.is_some()) {
            return busy("a snapshot is being made".to_owned());
        }
        *open = None;
        Ok(())
    }

    /// Copies the mapping, as it is at one moment of this call, into a target that holds zeroes and
    /// is durable afterwards as its own granularity has it.
    pub fn snapshot(&self, target: Arc<dyn Medium>) -> Result<()> {
        let running = self.begin_snapshot(target)?;
        while running.copy_some()? {}
        running.finish()
    }

    /// Fixes the moment of a snapshot.
    pub fn begin_snapshot(&self, target: Arc<dyn Medium>) -> Result<Running<'_>> {
        let turn = locked(&self.copying);
        let mut gate = self.open.shut()?;
        let open = gate.as_mut().ok_or_else(|| closed("snapshot"))?;
        let source = snapshot::Source {
            medium: open.medium.clone(),
            offset: self.offset,
            len: self.len,
            unit: self.unit,
        };
        let snapshot = Arc::new(Snapshot::new(source, target, self.plant)?);
        let mut unseen = false;
        match self.span.filter(|_| self.sees_stores) {
            Some(span) => match open.tracker.begin(span, snapshot.clone())? {
                Handover::None => {}
                Handover::Unseen => unseen = true,
                Handover::Temporary(handler) => open.handler = Some(handler),
            },
            None => {
                let writable = locked(&self.views).writable.len();
                if writable > 0 {
                    let text = format!(
                        "{writable} writable views are alive, and a snapshot of this backing \
                         would not see what they store"
                    );
                    return Err(Error::new(Kind::Busy, "snapshot", text));
                }
                open.by_methods = true;
            }
        }
        open.snapshot = Some(snapshot.clone());
        drop(gate);
        let running = Running { mapping: self, snapshot, unseen, _turn: turn };
        running.snapshot.skip_holes()?;
        Ok(running)
    }

    /// For the log: stores and leaves it to the caller to make that durable.
    pub(super) fn stage(&self, at: u64, bytes: &[u8], how: Store) -> Result<()> {
        self.check("write", at, bytes.len() as u64, true)?;
        self.used("write", |open| {
            // SAFETY: a slice is valid for its length.
            unsafe { self.put(open, at, bytes.as_ptr(), bytes.len() as u64, how) }
        })
    }

    /// For the log: a word that cannot be torn, stored and written back.
    pub(super) fn stage_word(&self, at: u64, value: u64) -> Result<()> {
        self.check("write", at, 8, true)?;
        self.used("write", |open| {
            if let Some(snapshot) = open.snapshot.as_ref().filter(|_| open.by_methods) {
                snapshot.preserve(at, 8);
            }
            self.ours(open.medium.store_u64(self.offset + at, value))?;
            self.ours(open.medium.flush(self.offset + at, 8))
        })
    }

    /// For the log: waits until what was staged in these ranges is durable.
    pub(super) fn settle_ranges(&self, ranges: impl Iterator<Item = (u64, u64)>) -> Result<()> {
        self.used("write", |open| {
            if self.granularity != Granularity::Page {
                open.medium.fence();
                return Ok(());
            }
            for (at, len) in ranges {
                self.ours(open.medium.persist(self.offset + at, len))?;
            }
            Ok(())
        })
    }

    /// For the log: the word at an offset.
    pub(super) fn load_word(&self, at: u64) -> Result<u64> {
        self.check("read", at, 8, false)?;
        self.used("read", |open| self.ours(open.medium.load_u64(self.offset + at)))
    }
}

/// A snapshot whose moment is fixed and whose copy is being made. Dropped, it is given up.
pub struct Running<'a> {
    mapping: &'a Mapping,
    snapshot: Arc<Snapshot>,
    /// Stores just before the moment were seen by no tracker.
    unseen: bool,
    _turn: MutexGuard<'a, ()>,
}

impl Running<'_> {
    /// Copies some of what is left; false when there is nothing more.
    pub fn copy_some(&self) -> Result<bool> {
        self.snapshot.copy_some()
    }

    /// Waits until the copy is durable.
    pub fn finish(mut self) -> Result<()> {
        self.end();
        if std::mem::take(&mut self.unseen) {
            self.mapping.write_everything_back()?;
        }
        self.snapshot.finish()
    }

    /// Writers need not wait any more.
    fn end(&self) {
        // Refused, the snapshot goes on listening, and the mapping cannot be closed.
        let Ok(mut gate) = self.mapping.open.shut() else { return };
        if let Some(open) = gate.as_mut() {
            open.tracker.end();
            open.handler = None;
            open.snapshot = None;
            open.by_methods = false;
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.end();
        if self.unseen {
            // Nobody waits for it, so the next sync does it.
            let _marked = self.mapping.mark_dirty(0, self.mapping.len);
        }
    }
}

impl Mapping {
    /// Makes durable what a tracker did not see.
    fn write_everything_back(&self) -> Result<()> {
        let done = self.used("sync", |open| {
            self.write_back(open, 0, self.len)?;
            self.ours(open.medium.sync())
        });
        if done.is_err() {
            self.mark_dirty(0, self.len)?;
        }
        done
    }
}

#[cold]
#[inline(never)]
fn closed(op: &'static str) -> Error {
    Error::new(Kind::Closed, op, "the mapping is closed")
}
