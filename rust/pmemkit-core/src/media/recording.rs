//! The recording medium: private memory that writes every store, flush and fence into a log, and
//! shows every image that a power failure could leave.
//!
//! It is the crash test of everything that stores to media: run the code on a [`Recording`], then
//! let an [`Explorer`] walk through the crash points and check each [`CrashImage`], for example by
//! opening it as another `Recording` and running recovery on it. What can be lost, and when, is
//! told by the model in [`super::crash`].
//!
//! Invariants:
//! 1. The order of the log is the order in which bytes became visible: memory and log change
//!    together, under one lock.
//! 2. The log alone gives back every byte: the initial image and the stores in it are all there is.
//! 3. The same calls give the same log on every machine: whether a store goes around the cache
//!    depends on its length and [`Recording::set_movnt_threshold`], not on the CPU.
//!
//! Lock order: `cursor` before `state`.
//!
//! What this does not do: lose power in the middle of a load, find out about stores through
//! [`Medium::address`] that nobody reports, change its length.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::crash::{CrashImage, Entry, Event, Model, Wanted, LINE_SIZE, PAGE_SIZE};
use super::stats::lines_of;
use super::{check_range, next_region, port, Extent, Granularity, Medium, Stats, Store};
use crate::error::{Error, Kind, Result};
use crate::sg::{RegionId, Segment};

/// Page-aligned zeroed memory of this process.
struct Memory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory belongs to this value alone; who touches it holds the lock around it.
unsafe impl Send for Memory {}

impl Memory {
    fn new(len: u64) -> Result<Self> {
        let refuse = || Error::new(Kind::NoSpace, "record", format!("no memory for {len} bytes"));
        let size = usize::try_from(len).map_err(|_| refuse())?.max(1);
        let layout = Layout::from_size_align(size, PAGE_SIZE as usize).map_err(|_| refuse())?;
        // SAFETY: the layout has at least one byte.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refuse)?;
        Ok(Memory { base, layout })
    }

    /// Copies bytes out. The caller has checked the range.
    fn get(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        // SAFETY: the range is inside the memory, which nobody else frees; a fresh vector does not
        // overlap it.
        unsafe { self.at(at).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Copies bytes in. The caller has checked the range.
    fn put(&mut self, at: u64, bytes: &[u8]) {
        // SAFETY: as for `get`.
        unsafe { self.at(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// # Safety
    /// `at` must be at most the length.
    unsafe fn at(&self, at: u64) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.base.as_ptr().add(at as usize) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

struct State {
    memory: Memory,
    log: Vec<Entry>,
    /// True while a hole waits for the file system.
    unsettled: bool,
}

impl State {
    fn note(&mut self, event: Event) {
        match event {
            Event::Punch { .. } => self.unsettled = true,
            Event::Sync | Event::Persist { .. } => self.unsettled = false,
            _ => {}
        }
        self.log.push(Entry { thread: thread_number(), event });
    }

    fn store(&mut self, at: u64, bytes: &[u8], around: bool) {
        if !bytes.is_empty() {
            self.memory.put(at, bytes);
            self.note(Event::Store { at, data: bytes.into(), around });
        }
    }

    /// A cached store whose lines are written back at once.
    fn store_back(&mut self, at: u64, bytes: &[u8]) {
        self.store(at, bytes, false);
        if !bytes.is_empty() {
            self.note(Event::Flush { at, len: bytes.len() as u64 });
        }
    }
}

/// A small number for the calling thread.
fn thread_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static NUMBER: u32 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

/// A medium in private memory that records what is done to it.
pub struct Recording {
    region: RegionId,
    len: u64,
    granularity: Granularity,
    movnt_threshold: AtomicU64,
    initial: Arc<[u8]>,
    state: Mutex<State>,
    /// The model as of the last question, so that questions in ascending order cost one replay.
    cursor: Mutex<Option<Model>>,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recording({} bytes, {})", self.len, self.granularity.name())
    }
}

impl Recording {
    /// A medium of `len` bytes that start as `initial`, with zeroes behind; all of it durable.
    pub fn new(len: u64, granularity: Granularity, initial: &[u8]) -> Result<Self> {
        check_range("record", 0, initial.len() as u64, len)?;
        let mut memory = Memory::new(len)?;
        memory.put(0, initial);
        let initial = memory.get(0, len).into();
        Ok(Recording {
            region: next_region(),
            len,
            granularity,
            movnt_threshold: AtomicU64::new(port::MOVNT_THRESHOLD),
            initial,
            state: Mutex::new(State { memory, log: Vec::new(), unsettled: false }),
            cursor: Mutex::new(None),
        })
    }

    /// A medium that holds what a power failure left, for running recovery on it.
    pub fn of(image: &CrashImage<'_>, granularity: Granularity) -> Result<Self> {
        Recording::new(image.len(), granularity, &image.to_vec())
    }

    /// Stores of at least this many bytes go around the cache from now on; `u64::MAX` for none.
    pub fn set_movnt_threshold(&self, len: u64) {
        self.movnt_threshold.store(len, Ordering::Relaxed);
    }

    /// Puts a number into the log and returns the index of that event.
    pub fn mark(&self, number: u64) -> usize {
        let mut state = self.state();
        state.note(Event::Mark(number));
        state.log.len() - 1
    }

    /// How many events were recorded.
    pub fn event_count(&self) -> usize {
        self.state().log.len()
    }

    /// A copy of the log.
    pub fn log(&self) -> Vec<Entry> {
        self.state().log.clone()
    }

    /// The initial bytes.
    pub fn initial(&self) -> &[u8] {
        &self.initial
    }

    /// Asks the model as of the first `event` events. Asking in ascending order is cheap.
    pub fn with_model<T>(
        &self,
        event: usize,
        torn_pages: bool,
        ask: impl FnOnce(&Model) -> T,
    ) -> Result<T> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = cursor.take();
        let usable = |model: &Model| model.event() <= event && model.torn_pages() == torn_pages;
        let mut model = kept
            .filter(usable)
            .unwrap_or_else(|| Model::new(&self.initial, self.granularity, torn_pages));
        {
            let state = self.state();
            let Some(entries) = state.log.get(model.event()..event) else {
                let text = format!("event {event} of a log of {}", state.log.len());
                return Err(Error::new(Kind::OutOfRange, "replay", text));
            };
            entries.iter().for_each(|entry| model.apply(entry));
        }
        let answer = ask(&model);
        *cursor = Some(model);
        Ok(answer)
    }

    /// Walks through all crash points of what was recorded so far.
    pub fn explore(&self) -> Explorer {
        Explorer {
            initial: self.initial.clone(),
            granularity: self.granularity,
            log: self.log(),
            wanted: Wanted::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores like the CPU port does.
    fn record(&self, at: u64, bytes: &[u8], how: Store) {
        let mut state = self.state();
        let len = bytes.len() as u64;
        let threshold = self.movnt_threshold.load(Ordering::Relaxed);
        let around = match (self.granularity, how) {
            (_, Store::Cached) | (Granularity::Page, _) => return state.store(at, bytes, false),
            (Granularity::Byte, Store::Auto) => return state.store(at, bytes, false),
            (_, Store::Auto) => len >= threshold,
            (_, Store::NonTemporal) => threshold != u64::MAX,
        };
        if !around {
            return state.store_back(at, bytes);
        }
        let head = (at.wrapping_neg() % LINE_SIZE).min(len);
        let body = (len - head) / LINE_SIZE * LINE_SIZE;
        let (first, rest) = bytes.split_at(head as usize);
        let (middle, end) = rest.split_at(body as usize);
        state.store_back(at, first);
        state.store(at + head, middle, true);
        state.store_back(at + head + body, end);
    }

    fn note_range(&self, op: &'static str, at: u64, len: u64, event: Event) -> Result<()> {
        check_range(op, at, len, self.len)?;
        if len > 0 {
            self.state().note(event);
        }
        Ok(())
    }

    fn check_word(&self, op: &'static str, at: u64) -> Result<()> {
        check_range(op, at, 8, self.len)?;
        if !at.is_multiple_of(8) {
            let text = format!("byte {at} is not a multiple of 8");
            return Err(Error::new(Kind::Invalid, op, text).at(at));
        }
        Ok(())
    }
}

impl Medium for Recording {
    fn region(&self) -> RegionId {
        self.region
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn granularity(&self) -> Granularity {
        self.granularity
    }

    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        check_range("read", at, len, self.len)?;
        let state = self.state();
        // SAFETY: the caller vouches for the target; the range was checked.
        unsafe { state.memory.at(at).copy_to_nonoverlapping(target, len as usize) };
        Ok(())
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, how: Store) -> Result<()> {
        check_range("write", at, len, self.len)?;
        let mut bytes = vec![0; len as usize];
        // SAFETY: the caller vouches for the source; a fresh vector does not overlap it.
        unsafe { source.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        self.record(at, &bytes, how);
        Ok(())
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        check_range("zero", at, len, self.len)?;
        self.record(at, &vec![0; len as usize], Store::Auto);
        Ok(())
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        self.check_word("load", at)?;
        let mut word = [0; 8];
        // SAFETY: the target is a local array of 8 bytes.
        unsafe { self.load(at, word.as_mut_ptr(), 8)? };
        Ok(u64::from_le_bytes(word))
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        self.check_word("store", at)?;
        self.state().store(at, &value.to_le_bytes(), false);
        Ok(())
    }

    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()> {
        check_range("write", at, len, self.len)?;
        let mut state = self.state();
        let bytes = state.memory.get(at, len);
        state.store(at, &bytes, false);
        Ok(())
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        self.note_range("flush", at, len, Event::Flush { at, len })
    }

    fn fence(&self) {
        self.state().note(Event::Fence);
    }

    fn persist(&self, at: u64, len: u64) -> Result<()> {
        self.note_range("persist", at, len, Event::Persist { at, len })
    }

    fn sync(&self) -> Result<()> {
        self.state().note(Event::Sync);
        Ok(())
    }

    fn sync_blocks(&self) -> bool {
        self.granularity == Granularity::Page || self.state().unsettled
    }

    /// Whole pages become a hole, as the file system sees it; the rest is zeroed by stores.
    fn punch(&self, at: u64, len: u64) -> Result<bool> {
        check_range("punch", at, len, self.len)?;
        let end = at + len;
        let first = at.next_multiple_of(PAGE_SIZE).min(end);
        let last = (end - end % PAGE_SIZE).max(first);
        self.zero(at, first - at)?;
        if last > first {
            let mut state = self.state();
            state.memory.put(first, &vec![0; (last - first) as usize]);
            state.note(Event::Punch { at: first, len: last - first });
        }
        self.zero(last, end - last)?;
        Ok(true)
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        check_range("extents", at, len, self.len)?;
        let data = (len > 0).then_some(Extent { len, hole: false });
        Ok(data.into_iter().collect())
    }

    fn address(&self, segment: &Segment) -> Result<*mut u8> {
        if segment.region != self.region {
            let text = format!("region {} is not {}", segment.region.0, self.region.0);
            return Err(Error::new(Kind::Invalid, "address", text));
        }
        check_range("address", segment.at(), segment.len, self.len)?;
        // SAFETY: the range was checked.
        Ok(unsafe { self.state().memory.at(segment.at()) })
    }

    fn resize(&self, len: u64) -> Result<()> {
        let text = format!("a recording of {} bytes cannot have {len}", self.len);
        Err(Error::new(Kind::NotSupported, "resize", text))
    }

    fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for entry in &self.state().log {
            match &entry.event {
                // A recording does not know causes.
                Event::Store { at, data, .. } => {
                    stats.written[0].bytes += data.len() as u64;
                    stats.written[0].lines += lines_of(*at, data.len() as u64);
                }
                Event::Flush { .. } => stats.flushes += 1,
                Event::Fence => stats.fences += 1,
                Event::Sync | Event::Persist { .. } => stats.syncs += 1,
                Event::Punch { .. } | Event::Mark(_) => {}
            }
        }
        stats
    }
}

/// A crash image that its checker did not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// How many events had happened.
    pub event: usize,
    /// The last mark before it.
    pub mark: Option<u64>,
    /// The seed of the sample that the image came from.
    pub seed: u64,
    /// What the checker said.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { event, mark, seed, detail } = self;
        write!(f, "after {event} events (mark {mark:?}, seed {seed}): {detail}")
    }
}

/// Walks through the crash points of a recording, in one pass over its log.
#[derive(Clone, Debug)]
pub struct Explorer {
    initial: Arc<[u8]>,
    granularity: Granularity,
    log: Vec<Entry>,
    wanted: Wanted,
}

impl Explorer {
    /// Which images are wanted at each point.
    #[must_use]
    pub fn wanted(mut self, wanted: Wanted) -> Self {
        self.wanted = wanted;
        self
    }

    /// Calls `check` with each crash image of each point, from none of the events to all of them,
    /// until it does not accept one. Returns how many it was called with.
    pub fn run(
        &self,
        mut check: impl FnMut(&CrashImage<'_>) -> std::result::Result<(), String>,
    ) -> std::result::Result<u64, Violation> {
        let mut model = Model::new(&self.initial, self.granularity, self.wanted.torn_pages);
        let mut images = 0;
        for event in 0..=self.log.len() {
            if let Some(entry) = event.checked_sub(1).and_then(|last| self.log.get(last)) {
                model.apply(entry);
            }
            let checked = model.images(&self.wanted, |image| {
                check(image).map_err(|detail| Violation {
                    event,
                    mark: image.mark(),
                    seed: self.wanted.seed,
                    detail,
                })
            })?;
            images += checked as u64;
        }
        Ok(images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(len: u64) -> Recording {
        Recording::new(len, Granularity::Cacheline, &[]).unwrap()
    }

    fn write(medium: &Recording, at: u64, bytes: &[u8], how: Store) {
        // SAFETY: a slice is valid for its length.
        unsafe { medium.store(at, bytes.as_ptr(), bytes.len() as u64, how) }.unwrap();
    }

    fn events(medium: &Recording) -> Vec<(&'static str, u64, u64)> {
        let log = medium.log();
        let shape = |entry: &Entry| {
            let (at, len) = entry.event.range();
            (entry.event.name(), at, len)
        };
        log.iter().map(shape).collect()
    }

    #[test]
    fn stores_are_logged_as_the_port_makes_them() {
        let medium = recording(8192);
        write(&medium, 10, &[1; 255], Store::Auto);
        assert_eq!(events(&medium), [("store", 10, 255), ("flush", 10, 255)]);
        let medium = recording(8192);
        write(&medium, 10, &[1; 256], Store::Auto);
        assert_eq!(
            events(&medium),
            [
                ("store", 10, 54),
                ("flush", 10, 54),
                ("store_nt", 64, 192),
                ("store", 256, 10),
                ("flush", 256, 10)
            ]
        );
        let medium = recording(8192);
        write(&medium, 0, &[1; 4096], Store::Cached);
        medium.zero(0, 4096).unwrap();
        medium.store_u64(8, 5).unwrap();
        medium.stored_elsewhere(4, 8).unwrap();
        assert_eq!(
            events(&medium),
            [("store", 0, 4096), ("store_nt", 0, 4096), ("store", 8, 8), ("store", 4, 8)]
        );
        medium.set_movnt_threshold(u64::MAX);
        write(&medium, 0, &[1; 4096], Store::NonTemporal);
        assert_eq!(events(&medium)[4..], [("store", 0, 4096), ("flush", 0, 4096)]);
    }

    #[test]
    fn only_cacheline_media_write_back_by_themselves() {
        for (granularity, expected) in [
            (Granularity::Byte, vec![("store", 0, 512)]),
            (Granularity::Page, vec![("store", 0, 512)]),
            (Granularity::Cacheline, vec![("store_nt", 0, 512)]),
        ] {
            let medium = Recording::new(4096, granularity, &[]).unwrap();
            write(&medium, 0, &[1; 512], Store::Auto);
            assert_eq!(events(&medium), expected);
        }
    }

    #[test]
    fn every_step_is_logged_once_and_in_order() {
        let medium = recording(16384);
        medium.flush(1, 2).unwrap();
        medium.fence();
        medium.persist(3, 4).unwrap();
        assert_eq!(medium.mark(99), 3);
        medium.sync().unwrap();
        assert_eq!(medium.punch(4096, 8192), Ok(true));
        medium.flush(0, 0).unwrap();
        write(&medium, 0, &[], Store::Auto);
        assert_eq!(medium.punch(0, 0), Ok(true));
        assert_eq!(
            events(&medium),
            [
                ("flush", 1, 2),
                ("fence", 0, 0),
                ("persist", 3, 4),
                ("mark", 99, 0),
                ("sync", 0, 0),
                ("punch", 4096, 8192)
            ]
        );
        let stats = Stats { flushes: 1, fences: 1, syncs: 2, ..Stats::default() };
        assert_eq!(medium.stats(), stats);
    }

    #[test]
    fn a_punch_of_odd_edges_zeroes_exactly_its_range() {
        for (at, len) in [(100, 200), (4000, 200), (4000, 9000), (4096, 4096), (0, 16384)] {
            let medium = Recording::new(16384, Granularity::Page, &[7; 16384]).unwrap();
            medium.punch(at, len).unwrap();
            let visible = medium.with_model(medium.event_count(), false, Model::visible_image);
            let inside = |byte: usize| (at..at + len).contains(&(byte as u64));
            let expected: Vec<u8> = (0..16384).map(|byte| u8::from(!inside(byte)) * 7).collect();
            assert_eq!(visible.unwrap(), expected);
            assert_eq!(medium.state().memory.get(0, 16384), expected);
        }
    }

    #[test]
    fn a_hole_waits_for_the_file_system_until_it_is_settled() {
        for settle in [Medium::sync, |medium: &Recording| medium.persist(0, 8)] {
            let medium = recording(8192);
            medium.punch(0, 100).unwrap();
            assert!(!medium.sync_blocks());
            medium.punch(0, 4096).unwrap();
            medium.fence();
            assert!(medium.sync_blocks());
            settle(&medium).unwrap();
            assert!(!medium.sync_blocks());
        }
        assert!(Recording::new(1, Granularity::Page, &[]).unwrap().sync_blocks());
    }

    #[test]
    fn bytes_that_the_kernel_stored_are_logged_when_reported() {
        let medium = recording(4096);
        let address = medium.address(&Segment::new(medium.region(), 128, 8)).unwrap();
        assert!((address as usize).is_multiple_of(128));
        // SAFETY: the address is inside the recording's memory, which nobody else uses now.
        unsafe { address.copy_from_nonoverlapping([5u8; 8].as_ptr(), 8) };
        assert_eq!(medium.event_count(), 0);
        medium.stored_elsewhere(128, 8).unwrap();
        assert_eq!(medium.load_u64(128).unwrap(), 0x0505_0505_0505_0505);
        let visible = medium.with_model(1, false, Model::visible_image).unwrap();
        assert_eq!(&visible[128..136], [5; 8]);
        let other = Segment::new(next_region(), 0, 1);
        assert_eq!(medium.address(&other).unwrap_err().kind, Kind::Invalid);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_not_logged() {
        let medium = recording(100);
        let out = |result: Result<()>| result.unwrap_err().kind == Kind::OutOfRange;
        assert!(out(medium.zero(50, 51)));
        assert!(out(medium.flush(u64::MAX, 2)));
        assert!(out(medium.persist(101, 0)));
        assert!(out(medium.stored_elsewhere(99, 2)));
        assert!(out(medium.punch(0, 101).map(|_| ())));
        assert!(out(medium.store_u64(96, 0)));
        assert_eq!(medium.store_u64(4, 0).unwrap_err().kind, Kind::Invalid);
        assert_eq!(medium.resize(8).unwrap_err().kind, Kind::NotSupported);
        assert_eq!(medium.event_count(), 0);
        let past = medium.with_model(1, false, |_| ());
        assert_eq!(past.unwrap_err().kind, Kind::OutOfRange);
        let long = Recording::new(4, Granularity::Byte, &[0; 5]);
        assert_eq!(long.unwrap_err().kind, Kind::OutOfRange);
    }

    #[test]
    fn questions_may_come_in_any_order() {
        let medium = recording(64);
        for value in 1..=5 {
            medium.store_u64(0, value).unwrap();
            medium.persist(0, 8).unwrap();
        }
        let durable = |event| medium.with_model(event, false, Model::durable_image).unwrap()[0];
        assert_eq!([10, 2, 4, 9, 3, 0].map(durable), [5, 1, 2, 4, 1, 0]);
    }

    /// Two records of 8 bytes each, the second of which commits the first.
    fn append(medium: &Recording, flush_payload: bool) {
        for round in 1..=3 {
            medium.store_u64(0, round).unwrap();
            if flush_payload {
                medium.persist(0, 8).unwrap();
            }
            medium.store_u64(64, round).unwrap();
            medium.persist(64, 8).unwrap();
            medium.mark(round);
        }
    }

    fn committed_is_there(image: &CrashImage<'_>) -> std::result::Result<(), String> {
        let again = Recording::of(image, Granularity::Cacheline).unwrap();
        let (payload, commit) = (again.load_u64(0).unwrap(), again.load_u64(64).unwrap());
        let acknowledged = image.mark().unwrap_or(0);
        if payload < commit || commit < acknowledged {
            return Err(format!("payload {payload}, commit {commit}, mark {acknowledged}"));
        }
        Ok(())
    }

    #[test]
    fn the_explorer_accepts_right_code_at_every_point() {
        let medium = recording(128);
        append(&medium, true);
        let images = medium.explore().run(committed_is_there).unwrap();
        assert!(images > medium.event_count() as u64);
    }

    #[test]
    fn the_explorer_finds_a_payload_that_was_not_flushed() {
        let medium = recording(128);
        append(&medium, false);
        let violation = medium.explore().run(committed_is_there).unwrap_err();
        assert_eq!((violation.event, violation.mark), (2, None));
        assert!(violation.to_string().contains("payload 0, commit 1"), "{violation}");
    }

    #[test]
    fn threads_keep_log_and_memory_in_step() {
        let medium = recording(4096);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let medium = &medium;
                scope.spawn(move || {
                    for round in 0..100u8 {
                        write(medium, u64::from(round) * 7, &[thread; 300], Store::Auto);
                    }
                    medium.fence();
                });
            }
        });
        let count = medium.event_count();
        let visible = medium.with_model(count, false, Model::visible_image).unwrap();
        assert_eq!(visible, medium.state().memory.get(0, 4096));
        assert_eq!(medium.with_model(count, false, Model::durable_image).unwrap(), visible);
    }
}
