//! What loom tries: threads that take the same frames, and a visitor at a magazine.
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64 as Plain, Ordering as PlainOrdering};
use std::sync::Arc as Counted;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::areas::{Areas, FRAMES};
use super::plant::Plant;
use super::slot::Slot;
use super::sync::plant;

fn soak() -> bool {
    std::env::var_os("PMEMKIT_SOAK").is_some_and(|value| value == "1")
}

/// Tries every interleaving with at most so many preemptions; gives how many there were, or what
/// went wrong.
fn try_all(
    which: Plant,
    preemptions: usize,
    body: impl Fn() + Sync + Send + 'static,
) -> Result<u64, String> {
    plant(which);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
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
    plant(Plant::None);
    let text = |panic: Box<dyn std::any::Any + Send>| {
        let owned = panic.downcast_ref::<String>().cloned();
        owned.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    };
    result.map(|()| count.load(PlainOrdering::Relaxed)).map_err(text)
}

/// Who owns a few frames, found out by whoever takes one.
struct Owners(Vec<AtomicU32>);

impl Owners {
    fn new() -> Owners {
        Owners((0..8).map(|_| AtomicU32::new(0)).collect())
    }

    /// The first four frames of each word are known.
    fn of(&self, frame: u64) -> &AtomicU32 {
        assert!(frame % 64 < 4);
        &self.0[(frame / 64 * 4 + frame % 64) as usize]
    }

    fn take(&self, frame: u64) {
        let before = self.of(frame).swap(1, Ordering::Relaxed);
        assert_eq!(before, 0, "frame {frame} has two owners");
    }

    fn give(&self, frame: u64) {
        assert_eq!(self.of(frame).swap(0, Ordering::Relaxed), 1);
    }
}

/// What one thread of a scenario does to an area of which the frames from the third on are taken,
/// or none.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Takes one frame and gives it back.
    One,
    /// Takes a pair and gives it back.
    Two,
    /// Takes all of the area as one and gives it back.
    Whole,
    /// Takes these very two frames and gives them back.
    Span,
}

impl Act {
    fn run(self, areas: &Areas, owners: &Owners) {
        let (first, count) = match self {
            Act::One => {
                let Some((word, mask)) = areas.take_some(0, 1) else { return };
                (word * 64 + u64::from(mask.trailing_zeros()), 1)
            }
            Act::Two => {
                let Some(first) = areas.take_order(0, 1) else { return };
                (first, 2)
            }
            Act::Whole if areas.take_span(0, FRAMES, false) => (0, 2),
            Act::Span if areas.take_span(0, 2, false) => (0, 2),
            Act::Whole | Act::Span => return,
        };
        let more = if matches!(self, Act::Whole) { 64..66 } else { 0..0 };
        (first..first + count).chain(more.clone()).for_each(|frame| owners.take(frame));
        (first..first + count).chain(more).for_each(|frame| owners.give(frame));
        match self {
            Act::Whole => areas.give_span(0, FRAMES),
            _ => areas.give_word(first / 64, ((1 << count) - 1) << (first % 64)),
        }
    }
}

fn area(which: Plant, acts: &'static [Act], preemptions: usize) -> Result<u64, String> {
    try_all(which, preemptions, move || {
        let areas = Arc::new(Areas::new(FRAMES, true).expect("memory"));
        let owners = Arc::new(Owners::new());
        // Where nobody wants the whole area, there is little of it.
        let taken = if acts.iter().any(|act| matches!(act, Act::Whole)) { 0 } else { FRAMES - 2 };
        assert!(taken == 0 || areas.take_span(2, taken, false));
        let others: Vec<_> = acts[1..]
            .iter()
            .map(|act| {
                let (areas, owners) = (areas.clone(), owners.clone());
                thread::spawn(move || act.run(&areas, &owners))
            })
            .collect();
        acts[0].run(&areas, &owners);
        others.into_iter().for_each(|other| other.join().expect("it ends"));
        assert_eq!(areas.entry(0).count, taken, "an area forgets frames");
        let bits: u32 = areas.words(0).map(u64::count_ones).sum();
        assert_eq!(u64::from(bits), taken, "an area forgets bits");
    })
}

#[test]
fn a_frame_of_an_area_has_one_owner() {
    let bound = if soak() { 4 } else { 2 };
    let scenarios: [&'static [Act]; 6] = [
        &[Act::One, Act::Whole],
        &[Act::Two, Act::Whole],
        &[Act::Whole, Act::Whole],
        &[Act::One, Act::Two],
        &[Act::Span, Act::One, Act::Two],
        &[Act::One, Act::One, Act::Whole],
    ];
    for acts in scenarios {
        let count = area(Plant::None, acts, bound).unwrap();
        println!("area, {acts:?}: {count} interleavings");
    }
}

/// A thread that takes from its magazine and puts back, while somebody empties it.
fn magazine(which: Plant, preemptions: usize) -> Result<u64, String> {
    try_all(which, preemptions, || {
        let slot = Arc::new(Slot::empty());
        let owners = Arc::new(Owners::new());
        slot.fill(0, 0b11);
        let visitor = {
            let (slot, owners) = (slot.clone(), owners.clone());
            thread::spawn(move || {
                let mut all = 0;
                slot.visit(false, || slot.drain(2, |_, mask| all |= mask));
                (0..2).filter(|frame| all & (1 << frame) != 0).for_each(|frame| owners.take(frame));
            })
        };
        for _ in 0..2 {
            if !slot.enter(false) {
                break;
            }
            let frame = slot.pop();
            slot.leave();
            let Some(frame) = frame else { break };
            owners.take(frame);
            owners.give(frame);
            if !slot.enter(false) {
                break;
            }
            slot.push_at(slot.count(), frame);
            slot.leave();
        }
        visitor.join().expect("it ends");
    })
}

#[test]
fn a_frame_of_a_magazine_has_one_owner() {
    let count = magazine(Plant::None, if soak() { 5 } else { 3 }).unwrap();
    println!("magazine: {count} interleavings");
}

#[test]
fn loom_finds_what_is_planted() {
    for (which, acts) in [
        (Plant::BitsBeforeCount, &[Act::One, Act::Whole][..]),
        (Plant::LookThenTake, &[Act::One, Act::Whole][..]),
        (Plant::LookThenTake, &[Act::Whole, Act::Whole][..]),
    ] {
        let text = area(which, acts, 3).unwrap_err();
        let known = ["two owners", "forgets", "before & "];
        assert!(known.iter().any(|each| text.contains(each)), "{text}");
    }
    for which in [Plant::NoLookAtTheDoor, Plant::NoWaitAtTheDoor] {
        let text = magazine(which, 3).unwrap_err();
        assert!(text.contains("two owners"), "{text}");
    }
}
