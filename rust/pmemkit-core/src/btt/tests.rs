//! The engine against an array, and against damage.

use super::engine::Options;
use super::fixture::{fresh, geometry, open, ranged, read, recording, write, Dice};
use super::lock::Lock;
use super::{ERROR, NORMAL, ZERO};
use crate::block::{Device, Op};
use crate::error::Kind;
use crate::media::{Granularity, Medium};

const SIZES: [u32; 7] = [512, 520, 528, 4096, 4104, 4160, 4224];

#[test]
fn random_requests_do_what_an_array_does() {
    for (seed, lbasize) in SIZES.into_iter().enumerate() {
        let geometry = geometry(lbasize, 40, 5);
        let medium = recording(&fresh(&geometry), Granularity::Cacheline);
        let mut device = open(&medium, &geometry, Options::default()).unwrap();
        let size = u64::from(geometry.sector_size());
        let mut model = vec![0u8; (40 * size) as usize];
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 + seed as u64);
        for step in 0..400u64 {
            let first = dice.roll(40);
            let count = 1 + dice.roll(40 - first);
            let range = (first * size) as usize..((first + count) * size) as usize;
            match dice.roll(10) {
                0..=4 => {
                    let data: Vec<u8> =
                        range.clone().map(|at| (at as u64 * 7 + step) as u8).collect();
                    write(&device, first * size, &data).unwrap();
                    model[range].copy_from_slice(&data);
                }
                5 => {
                    ranged(&device, Op::Zero, first * size, count * size).unwrap();
                    model[range].fill(0);
                }
                6 => device = open(&medium, &geometry, Options::default()).unwrap(),
                _ => {
                    let (skip, cut) = (dice.roll(size), dice.roll(size));
                    let from = first * size + skip.min(count * size - 1);
                    let len = ((first + count) * size - from).saturating_sub(cut).max(1);
                    let found = read(&device, from, len).unwrap();
                    assert!(found == model[from as usize..(from + len) as usize], "step {step}");
                }
            }
        }
        assert_eq!(device.validate().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn zeroed_sectors_are_holes_where_the_map_says_so() {
    let geometry = geometry(4096, 40, 3);
    let medium = recording(&fresh(&geometry), Granularity::Cacheline);
    let device = open(&medium, &geometry, Options::default()).unwrap();
    write(&device, 0, &[7; 40 * 4096]).unwrap();
    ranged(&device, Op::Zero, 4096, 20 * 4096).unwrap();
    let lens: Vec<_> =
        device.extents(0, 40 * 4096).unwrap().iter().map(|e| (e.len, e.hole)).collect();
    assert_eq!(lens, [(4096, false), (20 * 4096, true), (19 * 4096, false)]);
    let word = medium.load_u64(geometry.word_at(2)).unwrap();
    assert_eq!(word as u32 & NORMAL, ZERO);
    assert_eq!(
        read(&device, 0, 3 * 4096).unwrap()[4000..4200],
        [[7u8; 96].as_slice(), &[0; 104]].concat()
    );
}

#[test]
fn a_sector_in_error_fails_until_it_is_written() {
    for lbasize in [512, 4096] {
        let geometry = geometry(lbasize, 8, 2);
        let mut image = fresh(&geometry);
        let at = geometry.word_at(3) as usize + 4;
        image[at..at + 4].copy_from_slice(&(ERROR | 3).to_le_bytes());
        let medium = recording(&image, Granularity::Cacheline);
        let device = open(&medium, &geometry, Options::default()).unwrap();
        let size = u64::from(geometry.sector_size());
        assert_eq!(read(&device, 3 * size, 1).unwrap_err().kind, Kind::Media);
        read(&device, 2 * size, size).unwrap();
        if lbasize == 512 {
            write(&device, 3 * size, &vec![1; size as usize]).unwrap();
        } else {
            ranged(&device, Op::Zero, 2 * size, 3 * size).unwrap();
        }
        read(&device, 3 * size, size).unwrap();
        for _ in 0..4 {
            write(&device, 0, &vec![2; size as usize]).unwrap();
        }
        assert_eq!(device.validate().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn an_arena_in_error_and_a_read_only_one_are_not_written() {
    let geometry = geometry(512, 8, 2);
    let medium = recording(&fresh(&geometry), Granularity::Cacheline);
    let before = medium.event_count();
    let flagged = super::Geometry { in_error: true, ..geometry };
    let device = open(&medium, &flagged, Options::default()).unwrap();
    let refused = write(&device, 0, &[1; 512]).unwrap_err();
    assert!(refused.detail.contains("error flag"), "{refused}");
    let options = Options { read_only: true, ..Options::default() };
    let device = open(&medium, &geometry, options).unwrap();
    assert_eq!(write(&device, 0, &[1; 512]).unwrap_err().kind, Kind::ReadOnly);
    let stored = medium.log()[before..].iter().any(|each| each.event.name() == "store");
    assert!(!stored, "something was stored");
}

#[test]
fn damage_is_refused_with_what_is_wrong() {
    let geometry = geometry(512, 8, 3);
    let good = fresh(&geometry);
    let group = |lane: u32| geometry.group_at(lane) as usize;
    let cases: [(usize, u32, &str); 5] = [
        (group(1), 8, "lba is 8"),
        (group(1) + 4, 11, "old_map is 11"),
        (group(1) + 12, 2, "sequence numbers 2 and 0"),
        (group(1) + 48, 1, "entries are in use"),
        (group(1) + 4, 8, "free block of two lanes"),
    ];
    for (at, value, text) in cases {
        let mut image = good.clone();
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let medium = recording(&image, Granularity::Cacheline);
        let refused = open(&medium, &geometry, Options::default()).err().expect(text);
        assert_eq!(refused.kind, Kind::Corrupt);
        assert!(refused.detail.contains(text), "{refused}");
    }
    let mut image = good;
    let at = geometry.word_at(0) as usize;
    image[at..at + 4].copy_from_slice(&(NORMAL | 11).to_le_bytes());
    let medium = recording(&image, Granularity::Cacheline);
    let device = open(&medium, &geometry, Options::default()).unwrap();
    assert_eq!(read(&device, 0, 1).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(write(&device, 0, &[0; 512]).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(device.validate().unwrap(), ["arena 0: sector 0: there is no block 11"]);
}

#[test]
fn one_thread_at_a_time_counts() {
    let lock = Lock::new(0u64);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..20_000).for_each(|_| *lock.lock() += 1));
        }
    });
    assert_eq!(*lock.lock(), 80_000);
    let held = lock.lock();
    assert!(lock.try_lock().is_none());
    drop(held);
    assert!(lock.try_lock().is_some());
}
