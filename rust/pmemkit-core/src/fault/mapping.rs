//! A range of addresses whose pages a provider brings when they are touched.
//!
//! Invariants:
//! 1. Whoever is inside a method that touches the range is counted; closing makes every touch fail,
//!    wakes who waits for a page, and gives the range back when the count is 0.
//! 2. A pinned mapping is not closed: it says that it is busy.
//! 3. Touching happens by the routines of the CPU port, so that a page that fails is an error.
//! 4. After [`LazyMapping::shrink`] every touch behind the new end fails.
//!
//! Lock order: `gate`, then those of the handler.
//!
//! What this does not do: make anything durable.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::handler::{locked, Counters, Frames, Shared};
use super::pages::{Asked, Failures, PageSet};
use super::probe::{self, Wanted};
use super::sys::{self, Ground};
use super::{Memory, Options, PfnProvider, Run};
use crate::error::{Error, Kind, Result};
use crate::media::port::{Outcome, Port};
use crate::media::{check_range, huge_page_size, install_guard, memfd};
use crate::uffd::{self, Reach};

/// Set in `users` when the mapping is closed.
const CLOSED: u64 = 1 << 63;
/// Times that a page which failed for a reason that is gone is touched once more.
const TRIES: usize = 4;
/// The most bytes that are asked for at once.
const ASKED_MOST: u64 = 64 << 20;

/// What was done since the mapping was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Faults of pages that were not there.
    pub faults: u64,
    /// First writes to protected pages.
    pub write_faults: u64,
    /// Faults of pages that the page cache had.
    pub minor_faults: u64,
    /// How often the provider was asked.
    pub asked: u64,
    /// Bytes that were put in place.
    pub bytes_placed: u64,
    /// Pages that failed.
    pub failures: u64,
}

#[derive(Default)]
struct Gate {
    pins: usize,
    closed: bool,
}

/// A lazily filled range of addresses.
pub struct LazyMapping {
    shared: Arc<Shared>,
    port: &'static Port,
    reach: Reach,
    users: AtomicU64,
    gate: Mutex<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Counts a caller that touches the range.
struct User<'a>(&'a AtomicU64);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

fn invalid(text: String) -> Error {
    Error::new(Kind::Invalid, "map", text)
}

/// Checks the numbers; gives the page of the memory.
fn check(len: u64, options: &Options) -> Result<u64> {
    let small = match &options.memory {
        Memory::Private => sys::page_size(),
        Memory::Huge => huge_page_size(),
        Memory::Shared(fd) => sys::page_of(fd.as_fd())?.0,
    };
    let (page, around) = (options.page_size, options.fault_around);
    if !page.is_power_of_two() || page < small {
        let text = format!("pages of {page} bytes: a power of two, {small} or more");
        return Err(invalid(text));
    }
    if !around.is_power_of_two() || around.saturating_mul(page) > ASKED_MOST {
        let text = format!("{around} pages at once: a power of two, {} at most", ASKED_MOST / page);
        return Err(invalid(text));
    }
    if len == 0 || len > i64::MAX as u64 / 2 {
        return Err(invalid(format!("a mapping of {len} bytes")));
    }
    if options.threads == 0 || options.threads > 64 {
        return Err(invalid(format!("{} handler threads: 1 to 64", options.threads)));
    }
    Ok(small)
}

impl LazyMapping {
    /// Makes a mapping of `len` bytes and starts its handler threads.
    pub fn new(provider: Arc<dyn PfnProvider>, len: u64, options: Options) -> Result<LazyMapping> {
        let small = check(len, &options)?;
        install_guard()?;
        let tracked = options.track_writes || provider.has_read_only_pages();
        let wanted = Wanted { memory: &options.memory, tracked, user_only: options.user_only };
        let opened = probe::open(&wanted)?;
        let (page, whole) = (options.page_size, len.next_multiple_of(options.page_size));
        let ground = match &options.memory {
            Memory::Private => Ground::Private,
            Memory::Huge => Ground::Huge,
            Memory::Shared(fd) => Ground::Shared(fd.as_fd()),
        };
        let nothing = memfd("pmemkit-nothing", false)?;
        let bell = uffd::bell("fault")?;
        let base = sys::map(ground, whole, page, options.read_only)? as u64;
        let huge = small > sys::page_size();
        let shared = Shared {
            uffd: opened.uffd,
            bell,
            nothing,
            provider,
            base,
            whole,
            len: AtomicU64::new(len),
            page,
            small,
            around: options.fault_around,
            threads: options.threads,
            poll_ns: options.poll_ns,
            read_only: options.read_only,
            tracked,
            replaceable: matches!(options.memory, Memory::Private),
            private: !matches!(options.memory, Memory::Shared(_)),
            zeroes: !huge,
            poison: options.poison && opened.poison,
            mode: opened.mode,
            stopping: AtomicBool::new(false),
            lost: OnceLock::new(),
            asked: Asked::default(),
            failures: Failures::default(),
            dirty: PageSet::new(if tracked { whole / page } else { 0 }),
            protecting: Mutex::default(),
            placing: Mutex::default(),
            counters: Counters::default(),
        };
        // From here on dropping it gives the range back.
        let mapping = LazyMapping {
            shared: Arc::new(shared),
            port: Port::get(),
            reach: opened.reach,
            users: AtomicU64::new(0),
            gate: Mutex::default(),
            threads: Mutex::default(),
        };
        mapping.shared.uffd.register(base, whole, opened.mode)?;
        for number in 0..options.threads {
            let shared = mapping.shared.clone();
            let thread = std::thread::Builder::new().name(format!("pmemkit-fault-{number}"));
            let started = thread.spawn(move || shared.serve()).map_err(|cause| {
                let errno = cause.raw_os_error().unwrap_or(libc::EAGAIN);
                Error::from_errno("map", errno, "starting a handler thread")
            })?;
            locked(&mapping.threads).push(started);
        }
        Ok(mapping)
    }

    /// Bytes that there are.
    pub fn len(&self) -> u64 {
        self.shared.len.load(Ordering::Acquire)
    }

    /// Never: a mapping has a byte at least until it is cut.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a page.
    pub fn page_size(&self) -> u64 {
        self.shared.page
    }

    /// Whose faults are handled.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// True where writes are tracked.
    pub fn tracked(&self) -> bool {
        self.shared.tracked
    }

    /// True where nothing can be stored.
    pub fn read_only(&self) -> bool {
        self.shared.read_only
    }

    /// True after [`LazyMapping::close`].
    pub fn closed(&self) -> bool {
        locked(&self.gate).closed
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            faults: get(&counters.faults),
            write_faults: get(&counters.write_faults),
            minor_faults: get(&counters.minor_faults),
            asked: get(&counters.asked),
            bytes_placed: get(&counters.bytes_placed),
            failures: get(&counters.failures),
        }
    }

    fn enter(&self, op: &'static str) -> Result<User<'_>> {
        let before = self.users.fetch_add(1, Ordering::Acquire);
        let user = User(&self.users);
        if before & CLOSED != 0 {
            return Err(closed(op));
        }
        Ok(user)
    }

    /// Copies `len` bytes at `at` to `target`. The page that fails is the error of its provider.
    ///
    /// # Safety
    /// `target` must be valid for writes of `len` bytes, and must not be in a mapping that waits
    /// for the calling thread.
    pub unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        let _user = self.enter("read")?;
        check_range("read", at, len, self.len())?;
        let place = self.address(at);
        // SAFETY: the range lies within the mapping, which stays while a user is counted; the
        // caller vouches for the target.
        self.touch("read", at, len, || unsafe { self.port.copy_bulk(target, place, len) })
    }

    /// Copies `len` bytes from `source` to the mapping at `at`.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes, and must not be in a mapping that waits for
    /// the calling thread.
    pub unsafe fn store(&self, at: u64, source: *const u8, len: u64) -> Result<()> {
        let _user = self.enter("write")?;
        check_range("write", at, len, self.len())?;
        if self.shared.read_only {
            return Err(Error::new(Kind::ReadOnly, "write", "the mapping is read-only").at(at));
        }
        if self.shared.provider.has_read_only_pages() && len > 0 {
            let run = self.run_of(at, len);
            (run.first..run.end()).try_for_each(|page| {
                self.shared.provider.may_write(page).map_err(|error| error.at(at))
            })?;
        }
        let place = self.address(at);
        // SAFETY: as for `load`.
        self.touch("write", at, len, || unsafe { self.port.copy_bulk(place, source, len) })
    }

    fn address(&self, at: u64) -> *mut u8 {
        (self.shared.base + at) as *mut u8
    }

    /// Runs a routine of the port over a range, and says why where it faulted.
    #[inline]
    fn touch(
        &self,
        op: &'static str,
        at: u64,
        len: u64,
        routine: impl Fn() -> Outcome,
    ) -> Result<()> {
        let mut tries = 0;
        loop {
            let outcome = routine();
            if !outcome.is_fault() {
                return self.still_open(op);
            }
            tries += 1;
            self.explain(op, at, len, outcome.value, tries)?;
        }
    }

    /// A mapping that was closed meanwhile may have shown anything.
    fn still_open(&self, op: &'static str) -> Result<()> {
        if self.users.load(Ordering::Acquire) & CLOSED != 0 {
            return Err(closed(op));
        }
        Ok(())
    }

    /// Why a touch faulted; `Ok` where it is worth another try.
    #[cold]
    fn explain(
        &self,
        op: &'static str,
        at: u64,
        len: u64,
        address: u64,
        tries: usize,
    ) -> Result<()> {
        let shared = &self.shared;
        let offset = address.wrapping_sub(shared.base);
        // A failing page may be named by its start.
        if !(at / shared.page * shared.page..at + len).contains(&offset) {
            let text = format!("the buffer faulted at address {address:#x}");
            return Err(Error::new(Kind::Media, op, text).at(at));
        }
        self.still_open(op)?;
        let page = offset / shared.page;
        let at = offset.max(at);
        if page * shared.page >= self.len() {
            return Err(Error::new(Kind::Truncated, op, "the mapping was cut meanwhile").at(at));
        }
        let heard = |error: Error| {
            let text = format!("page {page}: {}", error.detail);
            let mut told = Error::new(error.kind, op, text).at(at);
            told.source_errno = error.source_errno;
            told
        };
        match shared.failures.get(page) {
            // A store that was refused took the page away from its readers.
            Some(error) if error.kind == Kind::ReadOnly && op == "read" && tries < TRIES => {
                shared.retry(page, &mut Frames::new(shared))
            }
            Some(error) => Err(heard(error)),
            None if tries < TRIES => Ok(()),
            None => Err(shared.lost.get().cloned().unwrap_or_else(|| {
                let text = format!("page {page} cannot be touched: its media ended or failed");
                Error::new(Kind::Truncated, op, text).at(at)
            })),
        }
    }

    /// Brings a range in, so that nobody waits for it later.
    pub fn populate(&self, at: u64, len: u64) -> Result<()> {
        check_range("populate", at, len, self.len())?;
        let mut byte = 0u8;
        let mut next = at;
        while next < at + len {
            // SAFETY: the target is one local byte.
            unsafe { self.load(next, &mut byte, 1) }?;
            next = (next / self.shared.small + 1) * self.shared.small;
        }
        Ok(())
    }

    fn run_of(&self, at: u64, len: u64) -> Run {
        let first = at / self.shared.page;
        Run { first, count: (at + len).div_ceil(self.shared.page) - first }
    }

    fn all(&self) -> Run {
        Run { first: 0, count: self.shared.whole / self.shared.page }
    }

    /// Asks once more for the pages of a range that failed; how many there were.
    pub fn retry(&self, at: u64, len: u64) -> Result<usize> {
        let _user = self.enter("retry")?;
        check_range("retry", at, len, self.len())?;
        if len == 0 {
            return Ok(0);
        }
        let pages = self.shared.failures.of(self.run_of(at, len));
        let mut frames = Frames::new(&self.shared);
        pages.iter().try_for_each(|page| self.shared.retry(*page, &mut frames))?;
        Ok(pages.len())
    }

    /// The ranges that were stored to, in bytes from the start.
    pub fn dirty(&self) -> Result<Vec<(u64, u64)>> {
        self.require_tracking("dirty")?;
        Ok(self.ranges(&self.shared.dirty.runs(self.all())))
    }

    /// The same; from now on they count as clean, and the next store to each is noticed.
    pub fn take_dirty(&self) -> Result<Vec<(u64, u64)>> {
        let _user = self.enter("dirty")?;
        self.require_tracking("dirty")?;
        let shared = &self.shared;
        let _protecting = locked(&shared.protecting);
        let runs = shared.dirty.runs(self.all());
        for run in &runs {
            let start = shared.base + run.first * shared.page;
            shared.uffd.protect(start, run.count * shared.page, true)?;
        }
        runs.iter().for_each(|run| shared.dirty.remove(*run));
        Ok(self.ranges(&runs))
    }

    /// Says that ranges are dirty after all: what was to be done with them failed.
    pub fn mark_dirty(&self, ranges: &[(u64, u64)]) {
        let _protecting = locked(&self.shared.protecting);
        for (at, len) in ranges.iter().filter(|(_, len)| *len > 0) {
            let run = self.run_of(*at, *len);
            (run.first..run.end()).for_each(|page| self.shared.dirty.insert(page));
        }
    }

    /// Throws away what was stored: the provider is asked again. Private memory only.
    pub fn drop_dirty(&self) -> Result<()> {
        let _user = self.enter("drop")?;
        self.require_tracking("drop")?;
        let shared = &self.shared;
        if !shared.private {
            let text = "what is stored in shared memory is not this mapping's to drop";
            return Err(Error::new(Kind::NotSupported, "drop", text));
        }
        let _protecting = locked(&shared.protecting);
        for run in shared.dirty.runs(self.all()) {
            let start = shared.base + run.first * shared.page;
            // SAFETY: pages of the mapping whose bytes the caller wants gone.
            unsafe { sys::forget(start, run.count * shared.page) }?;
            shared.dirty.remove(run);
        }
        Ok(())
    }

    fn require_tracking(&self, op: &'static str) -> Result<()> {
        if self.shared.tracked {
            return Ok(());
        }
        Err(Error::new(Kind::NotSupported, op, "writes to this mapping are not tracked"))
    }

    fn ranges(&self, runs: &[Run]) -> Vec<(u64, u64)> {
        let (page, len) = (self.shared.page, self.len());
        let range = |run: &Run| (run.first * page, (run.end() * page).min(len));
        runs.iter()
            .map(range)
            .filter(|(at, end)| at < end)
            .map(|(at, end)| (at, end - at))
            .collect()
    }

    /// Cuts the mapping to `len` bytes: what lies behind is gone, and who waits there is told.
    pub fn shrink(&self, len: u64) -> Result<()> {
        let _user = self.enter("shrink")?;
        let gate = locked(&self.gate);
        if gate.pins > 0 {
            let text = format!("{} views of the mapping are still in use", gate.pins);
            return Err(Error::new(Kind::Busy, "shrink", text));
        }
        let now = self.len();
        if len > now || len == 0 {
            return Err(Error::new(Kind::Invalid, "shrink", format!("{now} bytes to {len}")));
        }
        self.shared.len.store(len, Ordering::Release);
        let end = self.shared.reachable();
        if end < self.shared.whole && !self.shared.sweep(end, self.shared.whole - end) {
            return Err(Error::new(
                Kind::NoSpace,
                "shrink",
                "the kernel has no room for a mapping",
            ));
        }
        Ok(())
    }

    /// The address of a range, which stays until [`LazyMapping::unpin`].
    pub fn pin(&self, at: u64, len: u64) -> Result<*mut u8> {
        let mut gate = locked(&self.gate);
        if gate.closed {
            return Err(closed("view"));
        }
        check_range("view", at, len, self.len())?;
        gate.pins += 1;
        Ok(self.address(at))
    }

    /// Ends one pin.
    pub fn unpin(&self) {
        let mut gate = locked(&self.gate);
        gate.pins = gate.pins.saturating_sub(1);
    }

    /// How many pins there are.
    pub fn pins(&self) -> usize {
        locked(&self.gate).pins
    }

    /// Ends it: who waits for a page gets an error, and the range is given back. Returns when the
    /// handler threads have ended, hence when the provider has answered what it was asked. `Busy`
    /// while something is pinned. May be called again.
    pub fn close(&self) -> Result<()> {
        {
            let mut gate = locked(&self.gate);
            if gate.pins > 0 && !gate.closed {
                let text = format!("{} views of the mapping are still in use", gate.pins);
                return Err(Error::new(Kind::Busy, "close", text));
            }
            if std::mem::replace(&mut gate.closed, true) {
                return Ok(());
            }
        }
        self.end();
        Ok(())
    }

    fn end(&self) {
        let shared = &self.shared;
        self.users.fetch_or(CLOSED, Ordering::AcqRel);
        shared.stopping.store(true, Ordering::Release);
        uffd::ring(&shared.bell);
        if !shared.sweep(0, shared.whole) {
            // Without room for a mapping what stays is to unmap under who waits: their touch
            // finds nothing, and it is a SIGSEGV. Poison one by one is what a handler would do.
            self.poison_all();
        }
        while self.users.load(Ordering::Acquire) & !CLOSED != 0 {
            // Rare and short: they are on their way out.
            std::thread::sleep(Duration::from_micros(100));
        }
        for thread in locked(&self.threads).drain(..) {
            // A thread that panicked is gone all the same.
            let _ended = thread.join();
        }
        // SAFETY: nobody is inside, and no handler is left.
        unsafe { sys::unmap(shared.base, shared.whole) };
    }

    /// Makes every page that is not there fail.
    fn poison_all(&self) {
        let shared = &self.shared;
        let mut at = 0;
        while at < shared.whole {
            let progress = shared.uffd.poison(shared.base + at, shared.whole - at);
            at += progress.done;
            match progress.errno {
                0 => {}
                libc::EEXIST => at += shared.small,
                libc::EAGAIN => std::thread::yield_now(),
                _ => break,
            }
        }
        shared.wake_range(shared.base, shared.whole);
    }
}

impl Drop for LazyMapping {
    fn drop(&mut self) {
        let closed = std::mem::replace(&mut locked(&self.gate).closed, true);
        if !closed {
            self.end();
        }
    }
}

#[cold]
fn closed(op: &'static str) -> Error {
    Error::new(Kind::Closed, op, "the mapping is closed")
}
