//! Counters of a medium that cost next to nothing: each thread has a place of its own.
//!
//! What is written is counted by its cause, which the thread that stores carries with it
//! ([`caused_by`]); and on request by block, exactly or every so many stores.
//!
//! Invariants:
//! 1. A place of its own belongs to one living thread, which alone adds to it, so a plain load and
//!    store suffice. Threads beyond that share the last place and add atomically.
//! 2. The sums over all places are exact once the threads that counted have been waited for.
//! 3. Each byte stored has exactly one cause. A cause that is not [`Cause::Data`] stays when the
//!    bytes stored are zeroes.
//!
//! What this does not do: count what is discarded, or what the media do by themselves.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::OnceLock;

use crate::error::{Error, Kind, Result};
use crate::place::{place, SHARED};

/// Bytes of a line, the unit in which writes are counted beside bytes.
pub const LINE_SIZE: u64 = 64;
/// Counts of blocks kept for one medium at most: 64 MiB of them.
const BLOCKS_MOST: u64 = 1 << 24;

/// Why bytes were stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// Somebody wrote them.
    #[default]
    Data,
    /// Entries of the map of mode sector.
    Map,
    /// Entries of its log.
    Log,
    /// Info blocks, labels and other descriptions.
    Info,
    /// Zeroes in place of data.
    Zeroing,
    /// What the cache had kept.
    WriteBack,
    /// Sectors moved so that blocks wear alike.
    Levelling,
}

impl Cause {
    /// All of them, in the order of the counters.
    pub const ALL: [Cause; 7] = [
        Cause::Data,
        Cause::Map,
        Cause::Log,
        Cause::Info,
        Cause::Zeroing,
        Cause::WriteBack,
        Cause::Levelling,
    ];

    /// The word used in JSON and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Data => "data",
            Cause::Map => "map",
            Cause::Log => "log",
            Cause::Info => "info",
            Cause::Zeroing => "zeroing",
            Cause::WriteBack => "write_back",
            Cause::Levelling => "levelling",
        }
    }
}

thread_local! {
    static CAUSE: Cell<Cause> = const { Cell::new(Cause::Data) };
}

/// What this thread stores has this cause from now on; the one before is given back.
#[inline]
pub fn exchange_cause(cause: Cause) -> Cause {
    CAUSE.replace(cause)
}

/// What this thread stores has this cause until the guard is dropped.
#[inline]
#[must_use]
pub fn caused_by(cause: Cause) -> CausedBy {
    CausedBy(exchange_cause(cause))
}

/// Gives the thread the cause back that it had before.
#[derive(Debug)]
pub struct CausedBy(Cause);

impl Drop for CausedBy {
    #[inline]
    fn drop(&mut self) {
        CAUSE.set(self.0);
    }
}

/// What was written for one cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub bytes: u64,
    /// Lines of [`LINE_SIZE`] bytes that they touched, each store for itself.
    pub lines: u64,
}

/// What was done to a medium since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// What was stored by us or reported as stored elsewhere, in the order of [`Cause::ALL`].
    pub written: [Written; Cause::ALL.len()],
    /// Ranges written back on request (stores that write back by themselves do not count).
    pub flushes: u64,
    /// Fences.
    pub fences: u64,
    /// Calls of `sync`, and of `persist` where that is an `msync`.
    pub syncs: u64,
}

impl Stats {
    /// Bytes of all causes.
    pub fn bytes_stored(&self) -> u64 {
        self.written.iter().map(|each| each.bytes).sum()
    }
}

/// One place: counters on cache lines of their own.
#[derive(Default)]
#[repr(align(64))]
struct Line {
    /// Bytes and lines of each cause, side by side.
    written: [[AtomicU64; 2]; Cause::ALL.len()],
    /// Stores that are left out before the next one is counted by block.
    left: AtomicU32,
    flushes: AtomicU64,
    fences: AtomicU64,
    /// Each counts as a flush and a fence: one store where the time of a store is felt.
    persists: AtomicU64,
    syncs: AtomicU64,
}

/// The counters of one medium.
pub struct Counters {
    places: Box<[Line; SHARED + 1]>,
    blocks: OnceLock<Blocks>,
    /// What is stored is not counted, so that the price of counting can be measured.
    silent: AtomicBool,
}

/// Lines written to each block.
struct Blocks {
    shift: u32,
    /// One in so many stores is counted, with so many times its lines.
    every: u32,
    counts: Box<[AtomicU32]>,
    pending: Box<[Pending; SHARED]>,
}

/// What a thread has still to add to the counts. An atomic addition waits until the non-temporal
/// stores before it are out, so one at a time would cost as much as a third of a write of 4 KiB.
#[derive(Default)]
#[repr(align(64))]
struct Pending {
    len: AtomicUsize,
    /// A block in the upper half, lines in the lower.
    noted: [AtomicU64; 31],
}

impl Default for Counters {
    fn default() -> Self {
        let places = Box::new(std::array::from_fn(|_| Line::default()));
        Counters { places, blocks: OnceLock::new(), silent: AtomicBool::new(false) }
    }
}

impl Counters {
    /// Counts bytes stored at `at` for the thread's cause.
    #[inline]
    pub fn stored(&self, at: u64, len: u64) {
        self.stored_for(CAUSE.get(), at, len);
    }

    /// Counts zeroes stored at `at`.
    pub fn zeroed(&self, at: u64, len: u64) {
        let cause = match CAUSE.get() {
            Cause::Data => Cause::Zeroing,
            other => other,
        };
        self.stored_for(cause, at, len);
    }

    #[inline]
    fn stored_for(&self, cause: Cause, at: u64, len: u64) {
        if self.silent.load(Ordering::Relaxed) {
            return;
        }
        let place = place();
        let [bytes, lines] = &self.places[place].written[cause as usize];
        add(place, bytes, len);
        add(place, lines, lines_of(at, len));
        if let Some(blocks) = self.blocks.get() {
            let left = &self.places[place].left;
            match left.load(Ordering::Relaxed) {
                0 => {
                    left.store(blocks.every - 1, Ordering::Relaxed);
                    blocks.stored(place, at, len);
                }
                more => left.store(more - 1, Ordering::Relaxed),
            }
        }
    }

    /// Counts what is stored, or does not: for whoever measures what counting costs.
    pub fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// From now on lines are counted by blocks of `block_size` bytes, a power of two of at least a
    /// line, for one in `every` stores. Once for a medium.
    pub fn count_blocks(&self, medium_size: u64, block_size: u64, every: u32) -> Result<()> {
        let refuse = |text: String| Err(Error::new(Kind::Invalid, "count", text));
        if !block_size.is_power_of_two() || block_size < LINE_SIZE || every == 0 {
            return refuse(format!("blocks of {block_size} bytes, one in {every} stores"));
        }
        let count = medium_size.div_ceil(block_size);
        if count > BLOCKS_MOST {
            return refuse(format!("{count} blocks are more than {BLOCKS_MOST}"));
        }
        let mut counts = Vec::new();
        if counts.try_reserve_exact(count as usize).is_err() {
            return Err(Error::new(
                Kind::NoSpace,
                "count",
                format!("no memory for {count} blocks"),
            ));
        }
        counts.resize_with(count as usize, AtomicU32::default);
        let blocks = Blocks {
            shift: block_size.trailing_zeros(),
            every,
            counts: counts.into_boxed_slice(),
            pending: Box::new(std::array::from_fn(|_| Pending::default())),
        };
        if self.blocks.set(blocks).is_err() {
            return refuse("blocks are counted already".into());
        }
        Ok(())
    }

    /// The size of a block, and the lines written to each of them, if they are counted. A count
    /// that reached its end stays there.
    pub fn block_counts(&self) -> Option<(u64, Vec<u32>)> {
        let blocks = self.blocks.get()?;
        let mut counts: Vec<u32> =
            blocks.counts.iter().map(|each| each.load(Ordering::Relaxed)).collect();
        for (block, lines) in blocks.pending.iter().flat_map(Pending::entries) {
            if let Some(count) = counts.get_mut(block) {
                *count = count.saturating_add(lines);
            }
        }
        Some((1 << blocks.shift, counts))
    }

    /// Counts a range written back.
    pub fn flushed(&self) {
        self.add(|line| &line.flushes, 1);
    }

    /// Counts a fence.
    pub fn fenced(&self) {
        self.add(|line| &line.fences, 1);
    }

    /// Counts a range written back and the fence after it.
    pub fn persisted(&self) {
        self.add(|line| &line.persists, 1);
    }

    /// Counts a wait for the file system.
    pub fn synced(&self) {
        self.add(|line| &line.syncs, 1);
    }

    /// The sums over all threads.
    pub fn sum(&self) -> Stats {
        let total = |field: fn(&Line) -> &AtomicU64| -> u64 {
            self.places.iter().map(|line| field(line).load(Ordering::Relaxed)).sum()
        };
        let persists = total(|line| &line.persists);
        let mut written = [Written::default(); Cause::ALL.len()];
        for line in self.places.iter() {
            for (sum, [bytes, lines]) in written.iter_mut().zip(&line.written) {
                sum.bytes += bytes.load(Ordering::Relaxed);
                sum.lines += lines.load(Ordering::Relaxed);
            }
        }
        Stats {
            written,
            flushes: total(|line| &line.flushes) + persists,
            fences: total(|line| &line.fences) + persists,
            syncs: total(|line| &line.syncs),
        }
    }

    fn add(&self, field: impl Fn(&Line) -> &AtomicU64, amount: u64) {
        let place = place();
        add(place, field(&self.places[place]), amount);
    }
}

#[inline]
fn add(place: usize, counter: &AtomicU64, amount: u64) {
    if place == SHARED {
        counter.fetch_add(amount, Ordering::Relaxed);
    } else {
        let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
        counter.store(sum, Ordering::Relaxed);
    }
}

/// The lines that a range touches.
#[inline]
pub(super) fn lines_of(at: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    (at + len - 1) / LINE_SIZE - at / LINE_SIZE + 1
}

impl Pending {
    fn entries(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.noted[..self.len.load(Ordering::Relaxed)].iter().map(|each| {
            let entry = each.load(Ordering::Relaxed);
            ((entry >> 32) as usize, entry as u32)
        })
    }
}

impl Blocks {
    #[inline]
    fn stored(&self, place: usize, at: u64, len: u64) {
        let lines = lines_of(at, len) * u64::from(self.every);
        let block = at >> self.shift;
        let ends_there = len != 0 && (at + len - 1) >> self.shift == block;
        let whole = ends_there && block < self.counts.len() as u64;
        match self.pending.get(place) {
            Some(pending) if whole && lines <= u64::from(u32::MAX) => {
                let held = pending.len.load(Ordering::Relaxed);
                pending.noted[held].store(block << 32 | lines, Ordering::Relaxed);
                pending.len.store(held + 1, Ordering::Relaxed);
                if held + 1 == pending.noted.len() {
                    pending.entries().for_each(|(block, lines)| self.add(block, lines));
                    pending.len.store(0, Ordering::Relaxed);
                }
            }
            _ => self.stored_to_several(at, len),
        }
    }

    fn stored_to_several(&self, at: u64, len: u64) {
        let (mut from, end) = (at, at + len);
        while from < end {
            let block = from >> self.shift;
            let to = end.min((block + 1) << self.shift);
            let lines = lines_of(from, to - from) * u64::from(self.every);
            self.add(block as usize, u32::try_from(lines).unwrap_or(u32::MAX));
            from = to;
        }
    }

    fn add(&self, block: usize, lines: u32) {
        // A medium may have grown since.
        if let Some(count) = self.counts.get(block) {
            if count.fetch_add(lines, Ordering::Relaxed).checked_add(lines).is_none() {
                count.store(u32::MAX, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use super::*;

    /// One of these tests takes every place there is.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn sums_are_exact_over_more_threads_than_places() {
        let _alone = ALONE.lock().unwrap();
        let counters = Counters::default();
        let barrier = Barrier::new(100);
        std::thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| {
                    barrier.wait();
                    for _ in 0..1000 {
                        counters.stored(62, 3);
                        counters.flushed();
                        counters.fenced();
                        counters.persisted();
                    }
                    counters.synced();
                });
            }
        });
        let mut written = [Written::default(); Cause::ALL.len()];
        written[Cause::Data as usize] = Written { bytes: 300_000, lines: 200_000 };
        let expected = Stats { written, flushes: 200_000, fences: 200_000, syncs: 100 };
        assert_eq!(counters.sum(), expected);
        assert_eq!(counters.sum().bytes_stored(), 300_000);
    }

    #[test]
    fn a_cause_holds_until_its_guard_is_gone() {
        let counters = Counters::default();
        counters.stored(0, 1);
        counters.zeroed(0, 2);
        {
            let _map = caused_by(Cause::Map);
            counters.stored(0, 4);
            {
                let _log = caused_by(Cause::Log);
                counters.stored(0, 8);
            }
            counters.zeroed(0, 16);
        }
        counters.stored(0, 32);
        let found = Cause::ALL.map(|each| counters.sum().written[each as usize].bytes);
        assert_eq!(found, [33, 20, 8, 0, 2, 0, 0]);
    }

    #[test]
    fn lines_are_counted_by_block() {
        let counters = Counters::default();
        assert_eq!(counters.block_counts(), None);
        counters.count_blocks(4 * 128 + 1, 128, 1).unwrap();
        counters.stored(120, 16);
        counters.stored(0, 0);
        counters.stored(256, 128);
        counters.stored(513, 1 << 20);
        assert_eq!(counters.block_counts(), Some((128, vec![1, 1, 2, 0, 2])));
        (0..100).for_each(|_| counters.stored(390, 8));
        assert_eq!(counters.block_counts().unwrap().1[3], 100);
        for _ in 0..2 {
            counters.blocks.get().unwrap().counts[0].store(u32::MAX - 1, Ordering::Relaxed);
            counters.stored(0, 128);
        }
        assert_eq!(counters.block_counts().unwrap().1[0], u32::MAX);
        assert!(counters.count_blocks(512, 128, 1).is_err(), "once");
    }

    #[test]
    fn one_in_so_many_stores_stands_for_all() {
        let counters = Counters::default();
        counters.count_blocks(4096, 4096, 61).unwrap();
        for _ in 0..610 {
            counters.stored(64, 64);
        }
        assert_eq!(counters.block_counts(), Some((4096, vec![610])));
    }

    #[test]
    fn senseless_blocks_are_refused() {
        for (block, every) in [(0, 1), (96, 1), (32, 1), (64, 0), (64, 1)] {
            assert!(Counters::default().count_blocks(1 << 40, block, every).is_err(), "{block}");
        }
    }

    #[test]
    fn places_are_given_back() {
        let _alone = ALONE.lock().unwrap();
        for _ in 0..200 {
            let place = std::thread::spawn(place);
            assert!(place.join().unwrap() < SHARED);
        }
    }
}
