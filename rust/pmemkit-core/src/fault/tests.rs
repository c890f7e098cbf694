//! Faults of real memory: what pages are, what failing ones say, and what many threads at once do.
//!
//! A kernel or machine that lacks something leaves it out, and the test prints what that was.
#![cfg(test)]
#![allow(clippy::print_stdout)] // What was left out, for who reads the output.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};

use super::{
    Answer, Ask, Assembled, Content, FromDevice, FromMedium, LazyMapping, Memory, Options, Part,
    PfnProvider, Reach,
};
use crate::block::{Raw, Stack};
use crate::error::{Error, Kind, Result};
use crate::media::{huge_page_size, memfd, FileOptions, Granularity, Mapped, Medium, Store};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn soak() -> bool {
    std::env::var_os("PMEMKIT_SOAK").is_some_and(|value| value == "1")
}

/// Bytes of each page that a [`Pattern`] fills.
const TOLD: usize = 4096;

/// The word at a byte of a mapping that a [`Pattern`] provides.
fn word_at(at: u64) -> u64 {
    (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Pages whose words tell where they are; some fail, some are zeroes, some may not be written to.
#[derive(Default)]
struct Pattern {
    failing: Mutex<BTreeSet<u64>>,
    panicking: BTreeSet<u64>,
    zero: BTreeSet<u64>,
    read_only: BTreeSet<u64>,
    /// Nobody gets an answer before this is opened.
    gate: Option<Arc<(Mutex<bool>, Condvar)>>,
    asked: AtomicU64,
}

impl PfnProvider for Pattern {
    fn provide(&self, ask: &Ask, into: &mut [u8]) -> Result<Answer> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if let Some(gate) = &self.gate {
            let mut open = gate.0.lock().unwrap();
            while !*open {
                open = gate.1.wait(open).unwrap();
            }
        }
        let page_size = into.len() as u64 / ask.run.count;
        for page in ask.run.first..ask.run.end() {
            if self.failing.lock().unwrap().contains(&page) {
                return Err(Error::new(Kind::Media, "read", format!("page {page} is bad")));
            }
            assert!(!self.panicking.contains(&page), "as it was told");
        }
        if ask.run.count == 1 && self.zero.contains(&ask.page) {
            return Ok(Answer { run: ask.run, content: Content::Zero });
        }
        into.fill(0);
        for page in (ask.run.first..ask.run.end()).filter(|page| !self.zero.contains(page)) {
            let start = ((page - ask.run.first) * page_size) as usize;
            let told = &mut into[start..start + TOLD];
            for (index, word) in (0..).zip(told.chunks_exact_mut(8)) {
                word.copy_from_slice(&word_at(page * page_size + index * 8).to_ne_bytes());
            }
        }
        Ok(Answer { run: ask.run, content: Content::Bytes })
    }

    fn has_read_only_pages(&self) -> bool {
        !self.read_only.is_empty()
    }

    fn may_write(&self, page: u64) -> Result<()> {
        if self.read_only.contains(&page) {
            return Err(Error::new(Kind::ReadOnly, "write", format!("page {page} is read-only")));
        }
        Ok(())
    }
}

fn load(mapping: &LazyMapping, at: u64) -> Result<u64> {
    let mut word = [0; 8];
    // SAFETY: the array has eight bytes.
    unsafe { mapping.load(at, word.as_mut_ptr(), 8) }.map(|()| u64::from_ne_bytes(word))
}

fn store(mapping: &LazyMapping, at: u64, word: u64) -> Result<()> {
    // SAFETY: the array has eight bytes.
    unsafe { mapping.store(at, word.to_ne_bytes().as_ptr(), 8) }
}

/// A mapping, or `None` and a word why this machine has no such thing.
fn make(provider: Pattern, len: u64, options: Options) -> Option<(Arc<Pattern>, LazyMapping)> {
    let (provider, what) = (Arc::new(provider), format!("{options:?}"));
    match LazyMapping::new(provider.clone(), len, options) {
        Ok(mapping) => Some((provider, mapping)),
        Err(error) if matches!(error.kind, Kind::NotSupported | Kind::NoSpace) => {
            println!("left out: {what}: {error}");
            None
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

fn shared(len: u64) -> Memory {
    let file = memfd("fault", false).unwrap();
    File::from(file.try_clone().unwrap()).set_len(len).unwrap();
    Memory::Shared(file)
}

#[test]
fn every_page_is_what_its_provider_says_in_every_kind_of_memory() {
    type Make = fn(u64) -> Memory;
    let kinds: [(&str, Make, u64); 4] = [
        ("private", |_| Memory::Private, PAGE),
        ("private, large", |_| Memory::Private, 2 * MIB),
        ("shared", shared, PAGE),
        ("huge", |_| Memory::Huge, huge_page_size()),
    ];
    for (name, memory, page_size) in kinds {
        for (fault_around, threads, track_writes) in [(1, 1, false), (8, 2, true), (1, 2, true)] {
            let len = 40 * page_size - if name == "huge" { 0 } else { 100 };
            let options = Options {
                page_size,
                memory: memory(40 * page_size),
                threads,
                fault_around,
                track_writes,
                ..Options::default()
            };
            let zero = BTreeSet::from([3, 17]);
            let pattern = Pattern { zero: zero.clone(), ..Pattern::default() };
            let Some((provider, mapping)) = make(pattern, len, options) else { continue };
            assert_eq!(mapping.len(), len);
            for page in (0..39).rev() {
                let at = page * page_size + 8 * (page % 500);
                let expected = if zero.contains(&page) { 0 } else { word_at(at) };
                assert_eq!(load(&mapping, at).unwrap(), expected, "{name} page {page}");
            }
            let asked = provider.asked.load(Ordering::Relaxed);
            assert!(
                asked <= 40 && (fault_around == 1 || asked <= 5),
                "{name}: asked {asked} times"
            );
            store(&mapping, 5 * page_size, 7).unwrap();
            store(&mapping, 6 * page_size + 16, 8).unwrap();
            assert_eq!(load(&mapping, 5 * page_size).unwrap(), 7);
            if track_writes {
                assert_eq!(mapping.dirty().unwrap(), [(5 * page_size, 2 * page_size)], "{name}");
                assert_eq!(mapping.take_dirty().unwrap().len(), 1);
                assert_eq!(mapping.dirty().unwrap(), []);
                store(&mapping, 9 * page_size, 9).unwrap();
                assert_eq!(mapping.dirty().unwrap(), [(9 * page_size, page_size)], "{name}");
                if !name.starts_with("shared") {
                    mapping.drop_dirty().unwrap();
                    let expected = word_at(9 * page_size);
                    assert_eq!(load(&mapping, 9 * page_size).unwrap(), expected, "{name}");
                }
            }
            assert_eq!(load(&mapping, 6 * page_size + 16).unwrap(), 8);
            assert_eq!(load(&mapping, len - 7).unwrap_err().kind, Kind::OutOfRange);
            mapping.close().unwrap();
            assert_eq!(load(&mapping, 0).unwrap_err().kind, Kind::Closed);
        }
    }
}

#[test]
fn what_the_page_cache_has_is_a_minor_fault() {
    let file = memfd("fault", false).unwrap();
    File::from(file.try_clone().unwrap()).set_len(16 * PAGE).unwrap();
    let other = {
        let options = FileOptions::new(Granularity::Byte);
        Mapped::file(file.as_fd(), 16 * PAGE, options).unwrap()
    };
    // SAFETY: a slice is valid for its length.
    unsafe { other.store(4 * PAGE, 77u64.to_ne_bytes().as_ptr(), 8, Store::Cached) }.unwrap();
    let options = Options { memory: Memory::Shared(file), ..Options::default() };
    let Some((_, mapping)) = make(Pattern::default(), 16 * PAGE, options) else { return };
    assert_eq!(load(&mapping, 4 * PAGE).unwrap(), 77);
    assert_eq!(load(&mapping, 5 * PAGE).unwrap(), word_at(5 * PAGE));
    store(&mapping, 4 * PAGE + 8, 78).unwrap();
    let mut seen = [0; 8];
    // SAFETY: the array has eight bytes.
    unsafe { other.load(4 * PAGE + 8, seen.as_mut_ptr(), 8) }.unwrap();
    assert_eq!(u64::from_ne_bytes(seen), 78);
    let stats = mapping.stats();
    assert_eq!((stats.minor_faults, stats.faults), (1, 1));
}

#[test]
fn a_page_that_fails_says_why_and_its_neighbours_do_not_mind() {
    for (poison, threads, fault_around, large) in [
        (true, 1, 1, false),
        (true, 2, 8, false),
        (false, 1, 8, false),
        (false, 2, 1, false),
        (true, 1, 1, true),
    ] {
        let page_size = if large { 64 << 10 } else { PAGE };
        let provider = Pattern {
            failing: Mutex::new(BTreeSet::from([2, 9])),
            panicking: BTreeSet::from([12]),
            ..Pattern::default()
        };
        let options = Options { page_size, poison, threads, fault_around, ..Options::default() };
        let Some((provider, mapping)) = make(provider, 16 * page_size, options) else { return };
        let mut all = vec![0u8; 16 * page_size as usize];
        // SAFETY: the vector has so many bytes.
        let error = unsafe { mapping.load(0, all.as_mut_ptr(), 16 * page_size) }.unwrap_err();
        assert_eq!(error.kind, Kind::Media);
        for page in 0..16 {
            let found = load(&mapping, page * page_size + 8);
            match page {
                2 | 9 => assert!(found.unwrap_err().detail.contains(&format!("{page} is bad"))),
                12 => assert!(found.unwrap_err().detail.contains("panicked")),
                _ => assert_eq!(found.unwrap(), word_at(page * page_size + 8)),
            }
        }
        assert_eq!(store(&mapping, 2 * page_size, 1).unwrap_err().kind, Kind::Media);
        provider.failing.lock().unwrap().clear();
        assert!(load(&mapping, 2 * page_size).is_err(), "it fails until somebody tries again");
        assert_eq!(mapping.retry(0, 10 * page_size).unwrap(), 2);
        assert_eq!(load(&mapping, 2 * page_size).unwrap(), word_at(2 * page_size));
        assert_eq!(load(&mapping, 9 * page_size).unwrap(), word_at(9 * page_size));
        assert!(load(&mapping, 12 * page_size).is_err());
        assert!(mapping.stats().failures >= 3);
    }
}

#[test]
fn a_page_that_may_not_be_written_to_is_read_all_the_same() {
    let provider = Pattern { read_only: BTreeSet::from([1]), ..Pattern::default() };
    let Some((_, mapping)) = make(provider, 4 * PAGE, Options::default()) else { return };
    for _ in 0..2 {
        assert_eq!(store(&mapping, PAGE, 1).unwrap_err().kind, Kind::ReadOnly);
        assert_eq!(load(&mapping, PAGE).unwrap(), word_at(PAGE));
        store(&mapping, 2 * PAGE, 2).unwrap();
    }
    let all = Options { read_only: true, ..Options::default() };
    let Some((_, mapping)) = make(Pattern::default(), 4 * PAGE, all) else { return };
    assert_eq!(store(&mapping, 0, 1).unwrap_err().kind, Kind::ReadOnly);
    assert_eq!(load(&mapping, PAGE).unwrap(), word_at(PAGE));
}

#[test]
fn who_waits_hears_of_the_end() {
    for threads in [1, 3] {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let provider = Pattern { gate: Some(gate.clone()), ..Pattern::default() };
        let options = Options { threads, ..Options::default() };
        let Some((_, mapping)) = make(provider, 64 * PAGE, options) else { return };
        std::thread::scope(|scope| {
            let mut waiting = Vec::new();
            for page in 0..8 {
                let mapping = &mapping;
                waiting.push(scope.spawn(move || load(mapping, page * PAGE).unwrap_err().kind));
            }
            while mapping.stats().faults == 0 {
                std::thread::yield_now();
            }
            let closing = scope.spawn(|| mapping.close());
            let ended: Vec<Kind> = waiting.into_iter().map(|each| each.join().unwrap()).collect();
            assert_eq!(ended, [Kind::Closed; 8]);
            // The provider has still to answer: closing waits for its threads.
            *gate.0.lock().unwrap() = true;
            gate.1.notify_all();
            closing.join().unwrap().unwrap();
        });
    }
}

#[test]
fn what_is_cut_off_fails_and_the_rest_stays() {
    let Some((_, mapping)) = make(Pattern::default(), 64 * PAGE, Options::default()) else {
        return;
    };
    store(&mapping, 3 * PAGE, 5).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (mapping, stop) = (&mapping, &stop);
            scope.spawn(move || {
                let mut page = thread;
                while !stop.load(Ordering::Relaxed) {
                    page = (page * 5 + 1) % 64;
                    match load(mapping, page * PAGE + 8) {
                        Ok(word) => assert_eq!(word, word_at(page * PAGE + 8)),
                        Err(error) => {
                            assert!(page >= 10, "{error}");
                            assert!(
                                matches!(error.kind, Kind::Truncated | Kind::OutOfRange),
                                "{error}"
                            );
                        }
                    }
                }
            });
        }
        for len in [50, 20, 10] {
            std::thread::sleep(std::time::Duration::from_millis(5));
            mapping.shrink(len * PAGE).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(load(&mapping, 10 * PAGE).unwrap_err().kind, Kind::OutOfRange);
    assert_eq!(load(&mapping, 3 * PAGE).unwrap(), 5);
    assert_eq!(mapping.shrink(11 * PAGE).unwrap_err().kind, Kind::Invalid);
    mapping.pin(0, PAGE).unwrap();
    assert_eq!(mapping.shrink(PAGE).unwrap_err().kind, Kind::Busy);
    assert_eq!(mapping.close().unwrap_err().kind, Kind::Busy);
    mapping.unpin();
    mapping.close().unwrap();
}

/// A number that looks random.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn threads_that_touch_anything_lose_nothing() {
    const THREADS: u64 = 8;
    let touches = if soak() { 200_000 } else { 3000 };
    let len = 8 << 30;
    for (handlers, track_writes, memory) in
        [(1, false, Memory::Private), (2, true, Memory::Private), (2, false, shared(len))]
    {
        let options = Options { threads: handlers, track_writes, memory, ..Options::default() };
        let Some((_, mapping)) = make(Pattern::default(), len, options) else { continue };
        let start = Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (mapping, start) = (&mapping, &start);
                scope.spawn(move || {
                    let mut last = HashMap::new();
                    start.wait();
                    // All have the same pages in the same order, so that they meet in their faults.
                    let mut state = 42;
                    for round in 0..touches {
                        let at = next(&mut state) % (len / PAGE) * PAGE + thread * 8;
                        let expected = last.insert(at, round).unwrap_or_else(|| word_at(at));
                        assert_eq!(load(mapping, at).unwrap(), expected);
                        store(mapping, at, round).unwrap();
                    }
                    for (at, round) in last {
                        assert_eq!(load(mapping, at).unwrap(), round, "a store was lost");
                    }
                });
            }
        });
        if track_writes {
            let dirty: u64 = mapping.dirty().unwrap().iter().map(|(_, len)| len / PAGE).sum();
            let mut state = 42;
            let pages: BTreeSet<u64> =
                (0..touches).map(|_| next(&mut state) % (len / PAGE)).collect();
            assert_eq!(dirty, pages.len() as u64);
        }
        mapping.close().unwrap();
    }
}

#[test]
fn no_store_is_forgotten_between_two_looks() {
    let options = Options { track_writes: true, threads: 2, ..Options::default() };
    let Some((_, mapping)) = make(Pattern::default(), 64 * PAGE, options) else { return };
    let mut mirror = vec![0u64; 64];
    let copy = |mirror: &mut Vec<u64>| {
        for (at, len) in mapping.take_dirty().unwrap() {
            for page in at / PAGE..(at + len) / PAGE {
                mirror[page as usize] = load(&mapping, page * PAGE).unwrap();
            }
        }
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (mapping, stop) = (&mapping, &stop);
            scope.spawn(move || {
                let mut state = thread;
                for round in 1.. {
                    // Each page has one writer.
                    store(mapping, (next(&mut state) % 16 * 4 + thread) * PAGE, round).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        (0..if soak() { 5000 } else { 200 }).for_each(|_| copy(&mut mirror));
        stop.store(true, Ordering::Relaxed);
    });
    copy(&mut mirror);
    for (page, &seen) in (0..).zip(&mirror) {
        let now = load(&mapping, page * PAGE).unwrap();
        assert!(seen == now || (seen == 0 && now == word_at(page * PAGE)), "page {page}");
    }
}

#[test]
fn without_privilege_the_program_itself_is_served() {
    let options = Options { user_only: true, ..Options::default() };
    let Some((_, mapping)) = make(Pattern::default(), 4 * PAGE, options) else { return };
    assert_eq!(mapping.reach(), Reach::User);
    assert_eq!(load(&mapping, PAGE).unwrap(), word_at(PAGE));
}

fn medium(pages: u64) -> Arc<Mapped> {
    let file = memfd("source", false).unwrap();
    File::from(file.try_clone().unwrap()).set_len(pages * PAGE).unwrap();
    let options = FileOptions::new(Granularity::Cacheline);
    Arc::new(Mapped::file(file.as_fd(), pages * PAGE, options).unwrap())
}

fn put(medium: &dyn Medium, at: u64, word: u64) {
    // SAFETY: the array has eight bytes.
    unsafe { medium.store(at, word.to_ne_bytes().as_ptr(), 8, Store::Cached) }.unwrap();
}

fn get(medium: &dyn Medium, at: u64) -> u64 {
    let mut word = [0; 8];
    // SAFETY: the array has eight bytes.
    unsafe { medium.load(at, word.as_mut_ptr(), 8) }.unwrap();
    u64::from_ne_bytes(word)
}

#[test]
fn extents_of_several_media_lie_side_by_side() {
    let (first, second) = (medium(8), medium(8));
    put(&*first, 2 * PAGE, 21);
    put(&*second, 5 * PAGE, 52);
    let part = |medium: &Arc<Mapped>, at, len, bad| Part {
        medium: medium.clone(),
        at: at * PAGE,
        len: len * PAGE,
        bad,
    };
    let bad = vec![(4 * PAGE + 512, 512)];
    let parts = vec![part(&first, 1, 3, Vec::new()), part(&second, 3, 5, bad)];
    let provider = Arc::new(Assembled::new(parts, PAGE).unwrap());
    let len = provider.len();
    assert_eq!(len, 8 * PAGE);
    let mapping = match LazyMapping::new(provider, len, Options::default()) {
        Ok(mapping) => mapping,
        Err(error) if error.kind == Kind::NotSupported => return println!("left out: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(load(&mapping, PAGE).unwrap(), 21);
    assert_eq!(load(&mapping, 5 * PAGE).unwrap(), 52);
    assert_eq!(load(&mapping, 4 * PAGE).unwrap_err().kind, Kind::Media);
    store(&mapping, 7 * PAGE + 8, 99).unwrap();
    assert_eq!(get(&*second, 7 * PAGE + 8), 99, "the very bytes, not a copy");
    put(&*first, 3 * PAGE, 33);
    assert_eq!(load(&mapping, 2 * PAGE).unwrap(), 33);
    for (at, len) in [(0, PAGE + 1), (1, PAGE), (0, 0), (PAGE, 8 * PAGE)] {
        let part = Part { medium: first.clone(), at, len, bad: Vec::new() };
        assert!(Assembled::new(vec![part], PAGE).is_err(), "{len} bytes at {at}");
    }
}

#[test]
fn a_clone_goes_its_own_way_until_it_is_committed() {
    let (source, target) = (medium(32), medium(40));
    put(&*source, 3 * PAGE, 3);
    let provider = Arc::new(FromMedium::new(source.clone(), 0, 32 * PAGE - 10).unwrap());
    let options = Options { track_writes: true, fault_around: 4, ..Options::default() };
    let mapping = match LazyMapping::new(provider, 32 * PAGE - 10, options) {
        Ok(mapping) => mapping,
        Err(error) if error.kind == Kind::NotSupported => return println!("left out: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(load(&mapping, 3 * PAGE).unwrap(), 3);
    store(&mapping, 3 * PAGE, 4).unwrap();
    store(&mapping, 31 * PAGE, 5).unwrap();
    assert_eq!(get(&*source, 3 * PAGE), 3);
    let stack = Stack::new(Arc::new(Raw::new(target.clone(), false)));
    assert_eq!(mapping.commit(&stack.channel(false), 8 * PAGE).unwrap(), 2 * PAGE - 10);
    assert_eq!((get(&*target, 11 * PAGE), get(&*target, 39 * PAGE)), (4, 5));
    assert_eq!(mapping.commit(&stack.channel(false), 8 * PAGE).unwrap(), 0);
    store(&mapping, 0, 6).unwrap();
    assert!(mapping.commit(&stack.channel(true), 0).is_err());
    assert_eq!(mapping.dirty().unwrap(), [(0, PAGE)], "what was not written is still dirty");
    assert_eq!(mapping.commit(&stack.channel(false), 9 * PAGE).unwrap_err().kind, Kind::OutOfRange);
}

#[test]
fn a_device_is_loaded_as_it_is_touched() {
    let source = medium(16);
    put(&*source, 7 * PAGE, 7);
    let stack = Stack::new(Arc::new(Raw::new(source, true)));
    let provider = Arc::new(FromDevice::new(stack.channel(true), PAGE, 15 * PAGE - 100).unwrap());
    let options = Options { fault_around: 2, ..Options::default() };
    let mapping = match LazyMapping::new(provider, 15 * PAGE - 100, options) {
        Ok(mapping) => mapping,
        Err(error) if error.kind == Kind::NotSupported => return println!("left out: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(load(&mapping, 6 * PAGE).unwrap(), 7);
    assert_eq!(load(&mapping, 14 * PAGE).unwrap(), 0);
    assert_eq!(mapping.stats().asked, 2);
    assert!(FromDevice::new(stack.channel(true), PAGE, 16 * PAGE).is_err());
}

#[test]
fn what_was_tried_is_said() {
    let abilities = super::probe();
    assert!(abilities.iter().all(|each| each.refused.as_deref() != Some("")));
    for each in &abilities {
        println!("{}: {}", each.name, each.refused.as_deref().unwrap_or("yes"));
    }
    let private = abilities.iter().find(|each| each.name == "missing, private").unwrap();
    let user = abilities.iter().find(|each| each.name == "user faults").unwrap();
    assert!(user.refused.is_some() || private.refused.is_none());
}
