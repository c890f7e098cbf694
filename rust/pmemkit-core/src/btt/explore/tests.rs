//! The exploration, and the proof that it can fail.
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

use super::sequences::{levelled, random, settings, short, BAD};
use super::{Explorer, Options, Report, Setting, Step};
use crate::block::Op;
use crate::btt::concurrency::{interrupted_reads, interrupted_relocations};
use crate::btt::fixture::soak;
use crate::btt::{Levelling, Plant, Victim};
use crate::media::Granularity;

/// Every setting in a soak run. Otherwise every sector size on media of granularity `cacheline`,
/// and on the others one of each class, with a sector in error.
fn chosen() -> Vec<Setting> {
    let main = |each: &Setting| match (each.granularity, each.in_error) {
        (Granularity::Cacheline, in_error) => each.warm || in_error.is_none(),
        (_, in_error) => each.warm && in_error.is_some() && matches!(each.sector_size, 512 | 4096),
    };
    settings().into_iter().filter(|each| soak() || main(each)).collect()
}

/// Explores in several settings, on both cores, and adds the reports up.
fn explore(
    name: &str,
    settings: Vec<Setting>,
    go: impl Fn(&mut Explorer) -> Result<(), String> + Sync,
) -> Report {
    let (next, total) = (AtomicUsize::new(0), Mutex::new(Report::default()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(setting) = settings.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut explorer = Explorer::new(*setting);
                    go(&mut explorer).unwrap_or_else(|text| panic!("{text}; {setting:?}"));
                    total.lock().unwrap().add(&explorer.report);
                }
            });
        }
    });
    let (report, seconds) = (total.into_inner().unwrap(), began.elapsed().as_secs_f64());
    let images = report.images + report.recoveries;
    let rate = images as f64 / seconds;
    println!("{name}, {} settings:\n{report}", settings.len());
    println!("  {images} images in {seconds:.1} s: {rate:.0} a second");
    report
}

/// All sequences of one and two operations, at every point, every choice.
#[test]
fn short_sequences_are_old_or_new_at_every_point() {
    let report = explore("sequences of one and two operations", chosen(), |explorer| {
        short().try_for_each(|steps| explorer.run(&steps))
    });
    assert_eq!(report.sampled, 0, "some points were only sampled");
    assert!(report.images >= if soak() { 2_000_000 } else { 100_000 }, "{}", report.images);
}

#[test]
fn random_sequences_are_old_or_new_at_every_point() {
    let (seed, count) = (20_261_123, if soak() { 200 } else { 12 });
    let name = format!("random sequences of three to eight operations, seed {seed}");
    explore(&name, chosen(), |explorer| {
        random(seed).take(count).try_for_each(|steps| explorer.run(&steps))
    });
}

/// The same where every write moves another sector as well: that one shows what it did before, at
/// every point.
#[test]
fn levelled_sequences_are_old_or_new_at_every_point() {
    let (seed, [apart, count]) = (20_261_124, if soak() { [1, 200] } else { [7, 12] });
    let report = explore("levelled sequences", levelled(), |explorer| {
        short().step_by(apart).try_for_each(|steps| explorer.run(&steps))?;
        random(seed).take(count).try_for_each(|steps| explorer.run(&steps))
    });
    assert_eq!(report.sampled, 0, "some points were only sampled");
    assert!(report.images >= 40_000, "{}", report.images);
}

/// What the exploration says about an engine with a fault: in an arena of each class, in use.
fn found_by_exploration(plant: Plant) -> Option<String> {
    let of_size = |sector_size, in_error| {
        let plain = settings()[0];
        let options = Options { plant, ..Options::default() };
        let mut explorer =
            Explorer::new(Setting { sector_size, in_error, warm: true, options, ..plain });
        short().find_map(|steps| explorer.run(&steps).err())
    };
    of_size(512, None).or_else(|| of_size(4096, Some(BAD)))
}

/// What it says where sectors are moved, zeroed ones among them, with victims of several seeds.
fn found_among_relocations(plant: Plant) -> Option<String> {
    let zero_first = |steps: &Vec<Step>| steps.len() == 2 && steps[0].op == Op::Zero;
    (1..=16).find_map(|seed| {
        let levelling = Some(Levelling { period: 1, victim: Victim::Random, seed });
        let options = Options { plant, levelling, ..Options::default() };
        let plain = settings()[0];
        let mut explorer =
            Explorer::new(Setting { sector_size: 4096, warm: true, options, ..plain });
        short().filter(zero_first).find_map(|steps| explorer.run(&steps).err())
    })
}

#[test]
fn every_planted_fault_is_caught() {
    let mut missed = Vec::new();
    for plant in Plant::ALL {
        // What readers do leaves no trace on media, nor does what happens at the same time.
        let caught = match plant {
            Plant::NoReadTracking | Plant::NoSecondLook => {
                interrupted_reads(plant, None).err().map(|text| ("interrupted reads", text))
            }
            Plant::RelocationIgnoresReaders => {
                let found = interrupted_reads(plant, levelled()[0].options.levelling);
                found.err().map(|text| ("interrupted reads", text))
            }
            Plant::RelocationReadsUnlocked => {
                let found = interrupted_relocations(plant);
                found.err().map(|text| ("interrupted relocations", text))
            }
            Plant::RelocationMapFirst
            | Plant::RelocationCutsShort
            | Plant::RelocationSkipsZeroes => {
                found_among_relocations(plant).map(|text| ("exploration", text))
            }
            _ => found_by_exploration(plant).map(|text| ("exploration", text)),
        };
        match caught {
            Some((by, text)) => println!("{plant:?}: caught by {by}: {text}"),
            None => missed.push(plant),
        }
    }
    println!("{} planted faults, {} missed", Plant::ALL.len(), missed.len());
    assert_eq!(missed, []);
}
