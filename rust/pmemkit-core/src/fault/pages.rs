//! What a mapping knows of its pages: which are dirty, which failed, which are being asked for.
//!
//! Invariants:
//! 1. A set of pages takes memory for what was put into it, not for what could be.
//! 2. `Failures::count` is not below the number of failures: where it is 0, there are none.
//! 3. A run that is asked for stands in [`Asked`] once, and is taken out by who put it in.
//!
//! What this does not do: lock two of them together; who needs that holds a lock of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::Run;
use crate::error::{Error, Kind};

/// Pages of a chunk of a [`PageSet`]: 4 KiB of bits.
const CHUNK_PAGES: u64 = 1 << 15;
const CHUNK_WORDS: usize = (CHUNK_PAGES / 64) as usize;

/// Failures that are kept with their error. Of the others it is known that they failed.
const FAILURES_MOST: usize = 1 << 16;

type Chunk = Box<[AtomicU64; CHUNK_WORDS]>;

/// A set of pages.
pub struct PageSet {
    chunks: Box<[OnceLock<Chunk>]>,
}

impl PageSet {
    /// An empty set of pages below `pages`.
    pub fn new(pages: u64) -> PageSet {
        let chunks = pages.div_ceil(CHUNK_PAGES);
        PageSet { chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    /// Puts a page in.
    pub fn insert(&self, page: u64) {
        if let Some(slot) = self.chunks.get((page / CHUNK_PAGES) as usize) {
            let chunk = slot.get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]));
            let word = &chunk[(page % CHUNK_PAGES / 64) as usize];
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    /// The runs of pages in a range, in order.
    pub fn runs(&self, range: Run) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        self.each_word(range, |first, word, mask| {
            let mut bits = word.load(Ordering::Relaxed) & mask;
            while bits != 0 {
                let page = first + u64::from(bits.trailing_zeros());
                match runs.last_mut() {
                    Some(last) if last.end() == page => last.count += 1,
                    _ => runs.push(Run::one(page)),
                }
                bits &= bits - 1;
            }
        });
        runs
    }

    /// Takes a range of pages out.
    pub fn remove(&self, range: Run) {
        self.each_word(range, |_, word, mask| {
            word.fetch_and(!mask, Ordering::Relaxed);
        });
    }

    /// Calls `visit` with the first page of each word that there is, the word, and which of its
    /// bits are of the range.
    fn each_word(&self, range: Run, mut visit: impl FnMut(u64, &AtomicU64, u64)) {
        let mut page = range.first;
        while page < range.end() {
            let Some(slot) = self.chunks.get((page / CHUNK_PAGES) as usize) else { return };
            let Some(chunk) = slot.get() else {
                page = (page / CHUNK_PAGES + 1) * CHUNK_PAGES;
                continue;
            };
            let first = page / 64 * 64;
            let behind = range.end().min(first + 64);
            let low = u64::MAX << (page - first);
            let high = u64::MAX >> (first + 64 - behind);
            visit(first, &chunk[(first % CHUNK_PAGES / 64) as usize], low & high);
            page = behind;
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pages that failed, and why.
#[derive(Default)]
pub struct Failures {
    count: AtomicUsize,
    pages: Mutex<BTreeMap<u64, Option<Error>>>,
}

impl Failures {
    /// Notes why a page fails.
    pub fn insert(&self, page: u64, error: Error) {
        let mut pages = locked(&self.pages);
        let kept = (pages.len() < FAILURES_MOST).then_some(error);
        pages.insert(page, kept);
        self.count.store(pages.len(), Ordering::Release);
    }

    /// Why a page fails, if it does.
    pub fn get(&self, page: u64) -> Option<Error> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let found = locked(&self.pages).get(&page).cloned()?;
        Some(found.unwrap_or_else(|| Error::new(Kind::Media, "read", "one of many that failed")))
    }

    /// The pages of a range that failed.
    pub fn of(&self, range: Run) -> Vec<u64> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        locked(&self.pages).range(range.first..range.end()).map(|(page, _)| *page).collect()
    }

    /// Takes a page out; false where it was not one that fails.
    pub fn take(&self, page: u64) -> bool {
        let mut pages = locked(&self.pages);
        let was = pages.remove(&page).is_some();
        self.count.store(pages.len(), Ordering::Release);
        was
    }

    /// Pages of a range do not fail any more.
    #[inline]
    pub fn remove(&self, range: Run) {
        if self.count.load(Ordering::Acquire) != 0 {
            self.remove_some(range);
        }
    }

    #[cold]
    fn remove_some(&self, range: Run) {
        let mut pages = locked(&self.pages);
        let gone: Vec<u64> = pages.range(range.first..range.end()).map(|(page, _)| *page).collect();
        for page in gone {
            pages.remove(&page);
        }
        self.count.store(pages.len(), Ordering::Release);
    }
}

/// The runs that handlers are asking for.
#[derive(Default)]
pub struct Asked {
    runs: Mutex<Vec<Run>>,
}

impl Asked {
    /// True when nobody asks for this page, and the caller asks for its run from now on.
    pub fn begin(&self, page: u64, run: Run) -> bool {
        let mut runs = locked(&self.runs);
        if runs.iter().any(|other| other.has(page)) {
            return false;
        }
        runs.push(run);
        true
    }

    /// Ends what [`Asked::begin`] began.
    pub fn end(&self, run: Run) {
        let mut runs = locked(&self.runs);
        if let Some(position) = runs.iter().position(|other| *other == run) {
            runs.swap_remove(position);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_gives_runs_and_takes_ranges_out() {
        let set = PageSet::new(CHUNK_PAGES * 3);
        let edge = CHUNK_PAGES - 1;
        for page in [0, 1, 63, 64, 65, edge, edge + 1, CHUNK_PAGES * 3 - 1, CHUNK_PAGES * 9] {
            set.insert(page);
        }
        let all = Run { first: 0, count: CHUNK_PAGES * 3 };
        let runs = |set: &PageSet| {
            set.runs(all).iter().map(|run| (run.first, run.count)).collect::<Vec<_>>()
        };
        let last = CHUNK_PAGES * 3 - 1;
        assert_eq!(runs(&set), [(0, 2), (63, 3), (edge, 2), (last, 1)]);
        assert_eq!(set.runs(Run { first: 64, count: 1 }), [Run::one(64)]);
        set.remove(Run { first: 1, count: 63 });
        assert_eq!(runs(&set), [(0, 1), (64, 2), (edge, 2), (last, 1)]);
        set.remove(all);
        assert_eq!(runs(&set), []);
    }

    #[test]
    fn a_run_is_asked_for_once() {
        let asked = Asked::default();
        let run = Run { first: 8, count: 8 };
        assert!(asked.begin(9, run));
        assert!(!asked.begin(15, run));
        assert!(asked.begin(16, Run::one(16)));
        asked.end(run);
        assert!(asked.begin(15, run));
    }
}
