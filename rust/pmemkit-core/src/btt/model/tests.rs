//! What loom tries: the lock, and readers and writers of one sector.
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64 as Plain, Ordering as PlainOrdering};
use std::sync::Arc as Counted;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::engine::{Arena, Options};
use super::lock::Lock;
use super::sync::{sit, AtomicU64, Ordering, SLOTS};
use super::{word, Modelled, Plant};
use crate::btt::fixture::{geometry, soak};

/// How a reader of a scenario reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// As the device does: looks first, and says what it reads where that did not hold.
    Looking,
    /// Says what it reads from the start, in a slot of its own.
    InSlot,
    /// The same in a counter that threads share.
    InCounter,
}

/// Who does what at the same time.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    plant: Plant,
    reading: Reading,
    /// How often each writer writes.
    writers: &'static [u64],
    /// Switches away from a thread that could go on; `None` for any number.
    preemptions: Option<usize>,
}

/// Tries every interleaving; gives how many there were, or what went wrong.
fn try_all(
    preemptions: Option<usize>,
    body: impl Fn() + Sync + Send + 'static,
) -> Result<u64, String> {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    let count = Counted::new(Plain::new(0));
    let counted = count.clone();
    let run = move || {
        builder.check(move || {
            counted.fetch_add(1, PlainOrdering::Relaxed);
            body();
        });
    };
    let result = catch_unwind(AssertUnwindSafe(run));
    let text = |panic: Box<dyn std::any::Any + Send>| {
        let owned = panic.downcast_ref::<String>().cloned();
        owned.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    };
    result.map(|()| count.load(PlainOrdering::Relaxed)).map_err(text)
}

const SECTOR: usize = 512;

/// What the threads of a scenario share.
struct Shared {
    arena: Arena,
    medium: Modelled,
    /// The last write that was acknowledged, by each writer.
    acknowledged: AtomicU64,
}

impl Shared {
    fn new(plant: Plant) -> Shared {
        let geometry = geometry(SECTOR as u32, 2, 2);
        let medium = Modelled::new(geometry);
        let options = Options { plant, ..Options::default() };
        let arena = Arena::open(&medium, geometry, options).expect("a fresh arena");
        Shared { arena, medium, acknowledged: AtomicU64::new(0) }
    }

    fn write(&self, value: u64) {
        let bytes = value.to_le_bytes().repeat(SECTOR / 8);
        // SAFETY: the source has the bytes of a sector.
        let written = unsafe { self.arena.write(&self.medium, 0, &[bytes.as_ptr()]) };
        assert_eq!(written, Ok(1));
    }

    fn read(&self, reading: Reading) -> u64 {
        let (mut bytes, len) = ([0xee; SECTOR], SECTOR as u32);
        // SAFETY: the target has the bytes of a sector.
        let result = unsafe {
            match reading {
                Reading::Looking => self.arena.read(&self.medium, 0, 0, bytes.as_mut_ptr(), len),
                _ => self.arena.read_tracked(&self.medium, 0, 0, bytes.as_mut_ptr(), len),
            }
        };
        result.expect("nothing fails");
        let (first, last) = (word(&bytes[..8]), word(&bytes[SECTOR - 8..]));
        assert_eq!(first, last, "torn: the reader saw a block that was written again");
        first
    }
}

/// One reader, and writers of the same sector. One writer alone counts up, and the reader must find
/// nothing older than what was acknowledged before it began.
fn run(scenario: Scenario) -> Result<u64, String> {
    let Scenario { plant, reading, writers, preemptions } = scenario;
    let result = try_all(preemptions, move || {
        let shared = Arc::new(Shared::new(plant));
        let each = |(number, count): (usize, &u64)| {
            let (shared, count) = (shared.clone(), *count);
            thread::spawn(move || {
                for round in 1..=count {
                    shared.write(16 * number as u64 + round);
                    shared.acknowledged.store(round, Ordering::Release);
                }
            })
        };
        let threads: Vec<_> = writers.iter().enumerate().map(each).collect();
        sit(if reading == Reading::InCounter { SLOTS } else { 0 });
        let floor = shared.acknowledged.load(Ordering::Acquire);
        let found = shared.read(reading);
        assert!(writers.len() > 1 || found >= floor, "stale: {found}, after {floor}");
        for thread in threads {
            thread.join().expect("a writer that ends");
        }
        let last = shared.read(Reading::Looking);
        assert!(writers.len() > 1 || last == writers[0], "lost: {last} is the last");
        assert_eq!(shared.arena.validate(&shared.medium), Ok(Vec::new()));
    });
    match &result {
        Ok(count) => println!("{scenario:?}: {count} interleavings"),
        Err(text) => println!("{scenario:?}: found: {text}"),
    }
    result
}

#[test]
fn the_lock_has_one_user() {
    for (threads, preemptions) in [(2, None), (3, Some(1))] {
        let count = try_all(preemptions, move || {
            let lock = Arc::new(Lock::new(UnsafeCell::new(0u32)));
            let add = |lock: &Lock<UnsafeCell<u32>>| {
                // SAFETY: loom says so where another thread uses it too.
                lock.lock().with_mut(|value| unsafe { *value += 1 });
            };
            let others: Vec<_> = (1..threads)
                .map(|_| {
                    let lock = lock.clone();
                    thread::spawn(move || add(&lock))
                })
                .collect();
            add(&lock);
            others.into_iter().for_each(|other| other.join().expect("it ends"));
            // SAFETY: the others have ended.
            lock.lock().with(|value| assert_eq!(unsafe { *value }, threads));
        });
        println!("lock, {threads} threads: {} interleavings", count.unwrap());
    }
}

#[test]
fn no_reader_sees_a_block_that_is_written_again() {
    let bound = Some(if soak() { 4 } else { 3 });
    let scenarios: [(Reading, &'static [u64], _); 6] = [
        (Reading::InSlot, &[2], None),
        (Reading::InCounter, &[2], None),
        (Reading::Looking, &[2], None),
        (Reading::Looking, &[3], bound),
        (Reading::InSlot, &[1, 1], bound),
        (Reading::Looking, &[1, 1], bound),
    ];
    for (reading, writers, preemptions) in scenarios {
        run(Scenario { plant: Plant::None, reading, writers, preemptions }).unwrap();
    }
}

#[test]
fn loom_finds_what_is_planted() {
    for (plant, reading) in [
        (Plant::NoReadTracking, Reading::InSlot),
        (Plant::NoReadTracking, Reading::InCounter),
        (Plant::NoSecondLook, Reading::Looking),
    ] {
        let scenario = Scenario { plant, reading, writers: &[2], preemptions: Some(3) };
        let text = run(scenario).unwrap_err();
        assert!(text.contains("torn"), "{text}");
    }
}
