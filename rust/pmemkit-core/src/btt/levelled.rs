//! Levelling in small arenas: which sectors are moved, what they hold, what fails with them.
//!
//! Invariants:
//! 1. The same seed, the same victims: nothing here depends on luck.
//!
//! What this does not do: lose power (`explore`), threads (`concurrency`).
#![cfg(test)]

use std::sync::Arc;

use super::engine::Options;
use super::fixture::{fresh, geometry, open, ranged, read, recording, write, Dice};
use super::{Arena, Btt, Geometry, Levelling, Victim, ERROR};
use crate::bench::lifetime;
use crate::block::{Device, Op};
use crate::error::Kind;
use crate::media::crash::Event;
use crate::media::{BadBlocks, BadRun};
use crate::media::{Granularity, Medium};

const SECTORS: u64 = 40;

fn options(period: u32, victim: Victim) -> Options {
    let levelling = Some(Levelling { period, victim, seed: 1 });
    Options { levelling, ..Options::default() }
}

fn moved(device: &Btt) -> u64 {
    device.arenas().map(Arena::relocations).sum()
}

fn block_of(medium: &dyn Medium, geometry: &Geometry, lba: u32) -> u32 {
    (medium.load_u64(geometry.word_at(lba)).unwrap() >> (32 * (lba % 2))) as u32
}

/// Sectors keep what they hold, metadata included, and those that read as zeroes stay holes.
#[test]
fn a_sector_that_is_moved_holds_what_it_did() {
    for sector_size in [520, 4096, 4224] {
        let geometry = geometry(sector_size, SECTORS as u32, 3);
        let mut image = fresh(&geometry);
        let metadata = u64::from(sector_size - geometry.sector_size());
        for lba in 0..SECTORS as u32 {
            let at = geometry.block_at(lba) as usize;
            image[at..at + sector_size as usize].fill(lba as u8 + 1);
        }
        let medium = recording(&image, Granularity::Cacheline);
        let device = open(&medium, &geometry, options(1, Victim::Random)).unwrap();
        let size = u64::from(geometry.sector_size());
        let zeroes = device.info().caps.contains(crate::block::Caps::FAST_ZERO);
        if zeroes {
            ranged(&device, Op::Zero, 8 * size, 8 * size).unwrap();
        }
        let before: Vec<_> =
            (0..SECTORS as u32).map(|lba| block_of(&*medium, &geometry, lba)).collect();
        for round in 0..200u64 {
            write(&device, 0, &vec![round as u8; size as usize]).unwrap();
        }
        assert!(moved(&device) >= 190, "{}", moved(&device));
        assert_eq!(device.validate().unwrap(), Vec::<String>::new());
        for lba in 1..SECTORS as u32 {
            let zero = zeroes && (8..16).contains(&lba);
            let wanted = if zero { 0 } else { lba as u8 + 1 };
            let found = read(&device, u64::from(lba) * size, size).unwrap();
            assert!(found.iter().all(|byte| *byte == wanted), "sector {lba}");
            let entry = block_of(&*medium, &geometry, lba);
            assert!(zero == (entry >> 30 == 2), "sector {lba}: {entry:#x}");
            let block = if entry >> 30 == 0 { lba } else { entry & super::MAP_MASK };
            let mut rest = vec![0; metadata as usize];
            // SAFETY: the target is a live vector.
            unsafe {
                let at = geometry.block_at(block) + size;
                medium.load(at, rest.as_mut_ptr(), metadata).unwrap();
            }
            assert!(zero || rest.iter().all(|byte| *byte == wanted), "metadata of {lba}");
        }
        let after = (0..SECTORS as u32).map(|lba| block_of(&*medium, &geometry, lba));
        assert!(before.iter().zip(after).filter(|(was, is)| *was != is).count() > 30);
    }
}

/// Where victims cannot be read, they stay where they are, and nobody's write fails.
#[test]
fn bad_media_under_a_victim_fail_no_write() {
    let geometry = geometry(512, SECTORS as u32, 4);
    let mut image = fresh(&geometry);
    let at = geometry.word_at(20) as usize;
    image[at..at + 4].copy_from_slice(&(ERROR | 20).to_le_bytes());
    // Blocks do not begin where bad blocks do: sectors 3 to 12, and the free blocks of two lanes.
    let run = |block, length| BadRun { offset: geometry.block_at(block) / 512, length };
    let bad = vec![run(4, 9), run(41, 1)];
    for victim in [Victim::Random, Victim::LeastWorn] {
        let below: Arc<dyn Medium> = recording(&image, Granularity::Cacheline);
        let medium = Arc::new(BadBlocks::new(below, bad.clone(), None));
        let device = Btt::open(medium.clone(), &[geometry], options(2, victim)).unwrap();
        for round in 0..400u64 {
            write(&device, 512 * (round % 2), &[round as u8; 512]).unwrap();
        }
        assert!(moved(&device) > 20, "{}", moved(&device));
        assert_eq!(device.validate().unwrap(), Vec::<String>::new());
        assert_eq!(block_of(&*medium, &geometry, 20), ERROR | 20);
        let kind = |lba: u64| read(&device, 512 * lba, 512).err().map(|error| error.kind);
        for lba in 0..SECTORS {
            let lost = (3..13).contains(&lba) || lba == 20;
            assert_eq!(kind(lba), lost.then_some(Kind::Media), "sector {lba}");
        }
    }
}

/// The simulation of lifetimes counts what a real arena is written.
#[test]
fn a_real_arena_is_written_as_the_simulated_one() {
    let geometry = geometry(512, SECTORS as u32, 3);
    let mut dice = Dice(7);
    let workload: Vec<u64> =
        (0..3000).map(|_| if dice.roll(4) == 0 { dice.roll(SECTORS) } else { 5 }).collect();
    for victim in [Victim::Random, Victim::LeastWorn] {
        let options = options(4, victim);
        let simulated = lifetime(&[geometry], options, u32::MAX, workload.iter().copied()).unwrap();
        let medium = recording(&fresh(&geometry), Granularity::Cacheline);
        let device = open(&medium, &geometry, options).unwrap();
        workload.iter().for_each(|lba| write(&device, 512 * lba, &[1; 512]).unwrap());
        let mut counts = vec![0; geometry.internal_nlba as usize];
        for each in medium.log().iter().filter(|each| matches!(each.event, Event::Store { .. })) {
            let (at, _) = each.event.range();
            if (geometry.dataoff..geometry.mapoff).contains(&at) {
                counts[((at - geometry.dataoff) / 512) as usize] += 1;
            }
        }
        assert_eq!(counts, simulated.counts);
        assert_eq!(moved(&device), simulated.relocations);
        assert!(simulated.relocations > 400, "{}", simulated.relocations);
    }
}

#[test]
fn a_period_of_nothing_is_refused() {
    let geometry = geometry(512, 8, 3);
    let medium = recording(&fresh(&geometry), Granularity::Cacheline);
    let refused = open(&medium, &geometry, options(0, Victim::Random)).err().unwrap();
    assert_eq!(refused.kind, Kind::Invalid);
}
