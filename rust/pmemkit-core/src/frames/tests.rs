//! The allocator against the reference, and what it refuses.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use super::reference::Reference;
use super::*;
use crate::error::Kind;
use crate::media::recording::Recording;
use crate::media::{Granularity, Mapped};

pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn soak() -> bool {
    std::env::var_os("PMEMKIT_SOAK").is_some_and(|value| value == "1")
}

fn kinds() -> [fn(u64, Options) -> Allocator; 3] {
    fn anonymous(frames: u64) -> Place {
        let length = Allocator::map_size(frames);
        let medium = Arc::new(Mapped::anonymous(length, false).unwrap());
        Place { medium, offset: 0, length, persistent: false }
    }
    [
        |frames, options| Allocator::new(frames, options).unwrap(),
        |frames, options| Allocator::over(anonymous(frames), frames, options).unwrap(),
        |frames, options| {
            let place = Place { persistent: true, ..anonymous(frames) };
            Allocator::over(place, frames, options).unwrap()
        },
    ]
}

/// An allocator and its reference, side by side.
struct Pair {
    fast: Allocator,
    slow: Reference,
    live: Vec<Live>,
    random: Random,
}

impl Pair {
    fn took(&mut self, result: Result<u64>, frames: u64, align: u64) {
        match result {
            Ok(first) => {
                assert!(self.slow.is_free(first, frames), "{frames} from {first} are not free");
                assert_eq!(first % align, 0);
                self.slow.claim(first, frames).unwrap();
                self.live.push(Live { first, frames });
            }
            Err(error) => {
                assert_eq!(error.kind, Kind::NoSpace);
                assert!(!self.slow.has_run(frames, align), "there was room for {frames}");
            }
        }
    }

    fn step(&mut self, areas: u64) {
        let frames = self.slow.frames();
        match self.random.below(20) {
            0..=5 => self.get(0),
            6..=8 => {
                let order = self.random.below(11) as u32;
                self.get(order);
            }
            9 => {
                let count = 1 + self.random.below(1500.min(frames));
                let align = order_of(count).map_or(1, |order| 1 << order);
                let got = self.fast.get_run(count);
                self.took(got, count, align);
            }
            10..=15 => self.put(),
            16 => {
                let area = self.random.below(areas);
                let count = AREA.min(frames - area * AREA);
                let close = self.random.below(2) == 0;
                if close {
                    let both = (
                        self.fast.offline(area * AREA, count),
                        self.slow.offline(area * AREA, count),
                    );
                    assert_eq!(both.0.unwrap(), both.1.unwrap());
                } else {
                    self.fast.online(area * AREA, count).unwrap();
                    self.slow.online(area * AREA, count).unwrap();
                }
            }
            17 => {
                let first = self.random.below(frames);
                let count = 1 + self.random.below(600.min(frames - first));
                let both = (self.fast.claim(first, count), self.slow.claim(first, count));
                assert_eq!(both.0.as_ref().err().map(|e| e.kind), both.1.err().map(|e| e.kind));
                if both.0.is_ok() {
                    self.live.push(Live { first, frames: count });
                }
            }
            18 => {
                let frame = self.random.below(frames);
                assert_eq!(
                    self.fast.descriptor(frame).unwrap(),
                    self.slow.descriptor(frame).unwrap()
                );
            }
            _ => self.wrong(frames),
        }
    }

    fn get(&mut self, order: u32) {
        let got = self.fast.get(order);
        self.took(got, 1 << order, 1 << order);
    }

    fn put(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let index = self.random.below(self.live.len() as u64) as usize;
        let Live { first, frames } = self.live[index];
        if self.random.below(8) == 0 {
            let (pinned, tag) = (self.random.below(2) == 0, self.random.below(4) as u8);
            self.fast.set_flags(first, Some(pinned), None, Some(tag)).unwrap();
            self.slow.set_flags(first, |flags| (flags.pinned, flags.tag) = (pinned, tag)).unwrap();
            return;
        }
        let both = match order_of(frames) {
            Some(order) => (self.fast.put(first, order), self.slow.put(first, order)),
            None => (self.fast.put_run(first, frames), self.slow.put_run(first, frames)),
        };
        assert_eq!(both.0, both.1);
        if both.0.is_ok() {
            self.live.swap_remove(index);
        }
    }

    /// What is said wrongly is refused alike, and changes nothing.
    fn wrong(&mut self, frames: u64) {
        let (first, order) = (self.random.below(frames + 2), self.random.below(11) as u32);
        if !self.live.contains(&Live { first, frames: 1 << order }) {
            let both = (self.fast.put(first, order), self.slow.put(first, order));
            assert_eq!(both.0.unwrap_err(), both.1.unwrap_err());
        }
    }

    fn compare(&mut self) {
        let frames = self.slow.frames();
        assert_eq!(self.fast.validate(), Vec::<String>::new());
        assert_eq!(self.fast.free_frames(), self.slow.free_frames());
        assert_eq!(
            self.fast.allocated(0, frames).unwrap(),
            self.slow.allocated(0, frames).unwrap()
        );
        let first = self.random.below(frames);
        let count = 1 + self.random.below(frames - first);
        let both = (self.fast.allocated(first, count), self.slow.allocated(first, count));
        assert_eq!(both.0.unwrap(), both.1.unwrap());
        let stats = self.fast.stats();
        assert_eq!(stats.free, self.slow.free_frames());
        for (order, runs) in stats.runs {
            assert_eq!(runs > 0, self.slow.has_run(1 << order, 1 << order), "order {order}");
        }
    }
}

#[test]
fn it_does_what_the_reference_does() {
    let (rounds, steps) = if soak() { (10, 8000) } else { (4, 1500) };
    let mut seed = 0;
    for frames in [1, 7, 512, 600, 1023, 4096, 40_000, 70_001] {
        for (make, magazines) in kinds().into_iter().flat_map(|make| [(make, true), (make, false)])
        {
            for _ in 0..rounds {
                seed += 1;
                let options = Options { magazines, ..Options::default() };
                let fast = make(frames, options);
                let slow = Reference::new(frames, true);
                let mut pair = Pair { fast, slow, live: Vec::new(), random: Random(seed) };
                for step in 0..steps / 4 {
                    pair.step(frames.div_ceil(AREA));
                    if step % 100 == 0 {
                        pair.compare();
                    }
                }
                pair.compare();
                let live: Vec<Live> = pair.live.iter().copied().step_by(2).collect();
                let others = (pair.live.len() - live.len()) as u64;
                assert_eq!(pair.fast.retain(&live).unwrap(), others);
                let mut sorted = live.clone();
                sorted.sort_unstable();
                assert_eq!(pair.fast.allocated(0, frames).unwrap(), sorted);
                assert_eq!(pair.fast.validate(), Vec::<String>::new());
            }
        }
    }
}

#[test]
fn all_frames_of_a_region_can_be_had_and_put_back() {
    for magazines in [false, true] {
        let frames = 3 * 32768 + 700;
        let made = Allocator::new(frames, Options { magazines, online: true }).unwrap();
        for order in [0, 3, 9, 10] {
            let mut all = Vec::new();
            while let Ok(frame) = made.get(order) {
                all.push(frame);
            }
            assert_eq!(all.len() as u64, frames >> order);
            assert!(all.iter().all(|frame| frame.is_multiple_of(1 << order)));
            all.iter().for_each(|&frame| made.put(frame, order).unwrap());
            assert_eq!(made.free_frames(), frames);
        }
        assert_eq!(made.validate(), Vec::<String>::new());
    }
}

#[test]
fn gigantic_runs_come_from_a_terabyte_that_costs_nothing() {
    let frames = 1 << 28;
    let made = Allocator::new(frames, Options::default()).unwrap();
    let first = made.get(0).unwrap();
    let gigantic: Vec<_> = (0..1023).map(|_| made.get(GIGANTIC).unwrap()).collect();
    assert_eq!(made.get(GIGANTIC).unwrap_err().kind, Kind::NoSpace);
    assert_eq!(made.stats().runs.last(), Some(&(GIGANTIC, 0)));
    assert!(made.get_run((1 << 18) - 512).is_ok());
    assert!(gigantic.iter().all(|&frame| made.put(frame, GIGANTIC).is_ok()));
    assert_eq!(made.put(first, GIGANTIC).unwrap_err().kind, Kind::Invalid);
    assert!(made.metadata_bytes() * 1000 < frames * 4096);
}

#[test]
fn what_is_wrong_is_said_with_its_number() {
    let made = Allocator::new(1024, Options::default()).unwrap();
    let frame = made.get(0).unwrap();
    made.put(frame, 0).unwrap();
    let says = |result: Result<()>, kind: Kind, text: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.kind, kind);
        assert!(error.detail.contains(text), "{}", error.detail);
    };
    says(made.put(frame, 0), Kind::Invalid, &format!("frame {frame}"));
    says(made.put(4000, 0), Kind::OutOfRange, "4000");
    says(made.put(u64::MAX, 3), Kind::OutOfRange, "18446744073709551615");
    says(made.put(0, 12), Kind::Invalid, "order 12");
    let block = made.get(3).unwrap();
    says(made.put(block, 2), Kind::Invalid, "has 8 frames, not 4");
    says(made.put_run(block, 7), Kind::Invalid, "has 8 frames, not 7");
    made.set_flags(block, Some(true), Some(false), Some(2)).unwrap();
    says(made.put(block, 3), Kind::Busy, "pinned");
    says(made.set_flags(block, None, None, Some(4)), Kind::Invalid, "tag 4");
    says(made.set_flags(block + 1, None, None, None), Kind::Invalid, "frame");
    says(made.offline(0, 100).map(|_| ()), Kind::Invalid, "100 frames");
    says(made.offline(512, 1024).map(|_| ()), Kind::OutOfRange, "1024");
    says(made.get_run(0).map(|_| ()), Kind::Invalid, "at least one");
    says(made.get(11).map(|_| ()), Kind::Invalid, "order 11");
    says(Allocator::new(0, Options::default()).map(|_| ()), Kind::Invalid, "not 0");
}

#[test]
fn nothing_comes_out_of_what_is_offline() {
    let made = Allocator::new(2048, Options { magazines: true, online: false }).unwrap();
    assert_eq!(made.free_frames(), 0);
    assert_eq!(made.get(0).unwrap_err().kind, Kind::NoSpace);
    made.online(512, 512).unwrap();
    let all: Vec<_> = (0..512).map(|_| made.get(0).unwrap()).collect();
    assert!(all.iter().all(|frame| (512..1024).contains(frame)));
    assert!(!made.offline(512, 512).unwrap());
    all.iter().for_each(|&frame| made.put(frame, 0).unwrap());
    assert!(made.get(0).is_err());
    assert!(made.offline(512, 512).unwrap());
}

/// Threads that take and put at random, each writing who it is to every frame that it owns.
#[test]
fn every_frame_has_one_owner() {
    let (threads, time) = (8, Duration::from_millis(if soak() { 60_000 } else { 600 }));
    for magazines in if soak() { vec![true] } else { vec![true, false] } {
        let frames = 3000;
        let made = Allocator::new(frames, Options { magazines, online: true }).unwrap();
        let owners: Vec<_> = (0..frames).map(|_| std::sync::atomic::AtomicU32::new(0)).collect();
        let start = Barrier::new(threads);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (made, owners, start) = (&made, &owners, &start);
                scope.spawn(move || {
                    start.wait();
                    own(made, owners, thread as u32 + 1, Instant::now() + time);
                });
            }
        });
        assert_eq!(made.free_frames(), frames);
        assert_eq!(made.validate(), Vec::<String>::new());
        assert!(made.offline(0, frames).unwrap());
    }
}

fn own(made: &Allocator, owners: &[std::sync::atomic::AtomicU32], me: u32, until: Instant) {
    use std::sync::atomic::Ordering::Relaxed;
    let (mut random, mut mine) = (Random(u64::from(me)), Vec::new());
    let change = |first: u64, count: u64, from: u32, to: u32| {
        for owner in &owners[first as usize..(first + count) as usize] {
            assert_eq!(owner.swap(to, Relaxed), from, "a frame has two owners");
        }
    };
    while Instant::now() < until {
        for _ in 0..100 {
            let count = match random.below(16) {
                0 => 1 + random.below(700),
                1 => 512,
                2..=4 => 1 << random.below(9),
                _ => 1,
            };
            if random.below(2) == 0 && mine.len() < 60 {
                if let Ok(first) = made.get_run(count) {
                    change(first, count, 0, me);
                    mine.push((first, count));
                }
            } else if !mine.is_empty() {
                let (first, count) = mine.swap_remove(random.below(mine.len() as u64) as usize);
                change(first, count, me, 0);
                made.put_run_or_block(first, count);
            }
        }
        if random.below(50) == 0 {
            let area = random.below(5) * 512;
            made.offline(area, 512).unwrap();
            made.online(area, 512).unwrap();
        }
    }
    for (first, count) in mine {
        change(first, count, me, 0);
        made.put_run_or_block(first, count);
    }
}

impl Allocator {
    fn put_run_or_block(&self, first: u64, count: u64) {
        match order_of(count) {
            Some(order) => self.put(first, order).unwrap(),
            None => self.put_run(first, count).unwrap(),
        }
    }
}

#[test]
fn a_map_on_media_is_found_again() {
    let frames = 5000;
    let length = Allocator::map_size(frames);
    let medium = Arc::new(Recording::new(length, Granularity::Cacheline, &[]).unwrap());
    let place = Place { medium, offset: 0, length, persistent: true };
    let open = || Allocator::over(place.clone(), frames, Options::default()).unwrap();
    let made = open();
    let runs = BTreeMap::from([(1, ()), (3, ()), (700, ()), (1024, ()), (8, ())]);
    let runs: Vec<_> = runs.keys().map(|&count| (made.get_run(count).unwrap(), count)).collect();
    made.set_flags(runs[0].0, Some(true), Some(false), Some(3)).unwrap();
    made.flush().unwrap();
    let unflushed = made.get(0).unwrap();
    drop(made);
    let again = open();
    let mut expected: Vec<_> = runs.iter().map(|&(first, frames)| Live { first, frames }).collect();
    expected.sort_unstable();
    assert_eq!(again.allocated(0, frames).unwrap(), expected);
    assert!(again.put(unflushed, 0).is_err());
    assert_eq!(again.validate(), Vec::<String>::new());
    let flags = again.descriptor(runs[0].0).unwrap().flags;
    assert_eq!(flags, Flags { pinned: false, movable: false, tag: 3 });
    let other = Allocator::over(place.clone(), frames - 1, Options::default());
    assert_eq!(other.err().map(|error| error.kind), Some(Kind::Invalid));
}
