//! Every image that a power failure could leave of a page map that survives, opened and checked.
//!
//! A sequence takes and puts at random and flushes now and then. At every point between two stores,
//! write-backs and fences, each image must open to a map that holds the allocations of the last
//! flush that returned or of the one that was in progress: every one that both have, and none that
//! neither has. Then recovery is told what anybody still wants, and nothing may be left over; what
//! is taken and flushed afterwards must be found again.
//!
//! Invariants:
//! 1. The same seed gives the same sequence and the same images.
//!
//! What this does not do: threads at the same time (a flush keeps them all out).
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::collections::hash_map::DefaultHasher;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::plant::Plant;
use super::tests::Random;
use super::{Allocator, Live, Options, Place};
use crate::media::crash::{CrashImage, Wanted};
use crate::media::recording::Recording;
use crate::media::Granularity;

const FRAMES: u64 = 700;
const IMAGES_AT_A_POINT: usize = 256;

#[derive(Clone, Copy, Debug)]
struct Setting {
    granularity: Granularity,
    plant: Plant,
    /// The medium holds something else at first.
    used_before: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Report {
    sequences: u64,
    images: u64,
    distinct: u64,
}

fn open(medium: Arc<Recording>, plant: Plant) -> Result<Allocator, String> {
    let length = Allocator::map_size(FRAMES);
    let place = Place { medium, offset: 0, length, persistent: true };
    let made = Allocator::over_planted(place, FRAMES, Options::default(), plant);
    made.map_err(|error| error.to_string())
}

fn live(made: &Allocator) -> Vec<Live> {
    made.allocated(0, FRAMES).expect("the range is right")
}

/// Takes or puts something.
fn step(made: &Allocator, random: &mut Random) {
    let all = live(made);
    if random.below(2) == 0 && !all.is_empty() {
        let Live { first, frames } = all[random.below(all.len() as u64) as usize];
        made.put_run(first, frames).expect("it is allocated");
        return;
    }
    let count = match random.below(3) {
        0 => 1,
        1 => 1 << random.below(8),
        _ => 3 + random.below(200),
    };
    // There may be no room.
    let _ = made.get_run(count);
}

/// The map after each flush of a sequence, which is recorded.
fn record(setting: Setting, seed: u64) -> Result<(Arc<Recording>, Vec<Vec<Live>>), String> {
    let length = Allocator::map_size(FRAMES);
    let initial = vec![if setting.used_before { 0x11 } else { 0 }; length as usize];
    let medium = Recording::new(length, setting.granularity, &initial).map(Arc::new);
    let medium = medium.map_err(|error| error.to_string())?;
    let made = open(medium.clone(), setting.plant)?;
    let mut random = Random(seed);
    let mut states = vec![live(&made)];
    for number in 0..5 {
        for _ in 0..=random.below(6) {
            step(&made, &mut random);
        }
        states.push(live(&made));
        medium.mark(2 * number + 1);
        made.flush().map_err(|error| error.to_string())?;
        medium.mark(2 * number + 2);
    }
    Ok((medium, states))
}

fn check(setting: Setting, image: &CrashImage<'_>, states: &[Vec<Live>]) -> Result<(), String> {
    let mark = image.mark().unwrap_or(0) as usize;
    let (before, after) = (&states[mark / 2], &states[mark.div_ceil(2)]);
    let medium = Recording::of(image, setting.granularity).map(Arc::new);
    let medium = medium.map_err(|error| error.to_string())?;
    let made = open(medium.clone(), setting.plant)?;
    let found = live(&made);
    for each in before.iter().filter(|each| after.contains(each)) {
        if !found.contains(each) {
            return Err(format!("{each:?} is lost; found {found:?}"));
        }
    }
    for each in &found {
        if !before.contains(each) && !after.contains(each) {
            return Err(format!("{each:?} is in neither {before:?} nor {after:?}"));
        }
    }
    sound(&made, "recovered")?;
    // The caller wants what was there before.
    let released = made.retain(before).map_err(|error| error.to_string())?;
    let extra = found.iter().filter(|each| !before.contains(each)).count() as u64;
    let wanted: u64 = before.iter().map(|each| each.frames).sum();
    if released != extra || live(&made) != *before || made.free_frames() != FRAMES - wanted {
        return Err(format!("{released} released of {extra}; {} free", made.free_frames()));
    }
    let mut random = Random(mark as u64);
    (0..4).for_each(|_| step(&made, &mut random));
    made.flush().map_err(|error| error.to_string())?;
    sound(&made, "written on")?;
    let expected = live(&made);
    drop(made);
    let again = open(medium, setting.plant)?;
    if live(&again) != expected {
        return Err(format!("written on: {:?} instead of {expected:?}", live(&again)));
    }
    sound(&again, "opened again")
}

fn sound(made: &Allocator, when: &str) -> Result<(), String> {
    match made.validate().first() {
        Some(text) => Err(format!("{when}: {text}")),
        None => Ok(()),
    }
}

fn explore(setting: Setting, seeds: std::ops::Range<u64>) -> Result<Report, String> {
    let mut report = Report::default();
    let wanted = Wanted { limit: IMAGES_AT_A_POINT, seed: 7, torn_pages: true, only: None };
    for seed in seeds {
        let (medium, states) = record(setting, seed)?;
        let mut seen = HashSet::new();
        report.sequences += 1;
        let ran = medium.explore().wanted(wanted.clone()).run(|image| {
            let mut hasher = DefaultHasher::new();
            (image.to_vec(), image.mark()).hash(&mut hasher);
            if !seen.insert(hasher.finish()) {
                return Ok(());
            }
            report.distinct += 1;
            check(setting, image, &states)
        });
        report.images += ran.map_err(|violation| format!("seed {seed}: {violation}"))?;
    }
    Ok(report)
}

#[test]
fn no_power_failure_loses_an_allocation_or_leaks_one() {
    let soak = std::env::var_os("PMEMKIT_SOAK").is_some_and(|value| value == "1");
    let seeds = if soak { 100 } else { 4 };
    for granularity in [Granularity::Cacheline, Granularity::Byte, Granularity::Page] {
        for used_before in [false, true] {
            let setting = Setting { granularity, plant: Plant::None, used_before };
            let report = explore(setting, 0..seeds).unwrap();
            println!("page map, {}: {report:?}", granularity.name());
        }
    }
}

#[test]
fn exploration_finds_what_is_planted() {
    for plant in Plant::ON_MEDIA {
        let setting = Setting { granularity: Granularity::Cacheline, plant, used_before: true };
        let text = explore(setting, 0..200).expect_err("a planted mistake is found");
        println!("{plant:?}: {text}");
    }
}
