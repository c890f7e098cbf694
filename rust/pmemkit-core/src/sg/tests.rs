//! Copies between all kinds of regions, what is refused, and regions that go away.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::*;
use crate::media::{memfd, BadBlocks, BadRun, FileOptions, Granularity, Mapped, Medium, Store};

const LEN: u64 = 64 << 10;

fn pattern(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) ^ (at >> 8) as u8).collect()
}

fn fill(medium: &dyn Medium, bytes: &[u8]) {
    // SAFETY: a slice is valid for its length.
    unsafe { medium.store(0, bytes.as_ptr(), bytes.len() as u64, Store::Auto).unwrap() };
}

fn read(medium: &dyn Medium, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    // SAFETY: a vector is valid for its length.
    unsafe { medium.load(at, bytes.as_mut_ptr(), len).unwrap() };
    bytes
}

fn file_medium(granularity: Granularity) -> (File, Arc<dyn Medium>) {
    let file = File::from(memfd("sg", false).unwrap());
    file.set_len(LEN).unwrap();
    let mapped = Mapped::file(file.as_fd(), LEN, FileOptions::new(granularity)).unwrap();
    (file, Arc::new(mapped))
}

/// A file behind a page cache, stored to by calls.
fn disk_medium(name: &str) -> Arc<dyn Medium> {
    let path = std::env::temp_dir().join(format!("pmemkit-sg-{}-{name}", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(LEN).unwrap();
    Arc::new(Mapped::file(file.as_fd(), LEN, FileOptions::new(Granularity::Page)).unwrap())
}

/// One of each kind: memory, lines to write back, a page cache, and a list of bad blocks.
fn kinds() -> Vec<Arc<dyn Medium>> {
    let bad = vec![BadRun { offset: 0, length: 1 }];
    let judged = BadBlocks::new(file_medium(Granularity::Cacheline).1, bad, None);
    fill(&judged, &[0; 512]);
    vec![
        Arc::new(Mapped::anonymous(LEN, false).unwrap()),
        file_medium(Granularity::Cacheline).1,
        file_medium(Granularity::Page).1,
        disk_medium("kinds"),
        Arc::new(judged),
    ]
}

fn list(segments: &[(&Arc<dyn Medium>, u64, u64)]) -> Sg {
    let mut sg = Sg::new();
    for (medium, at, len) in segments {
        sg.push(Segment::new(medium.region(), *at, *len)).unwrap();
    }
    sg
}

#[test]
fn bytes_go_from_every_kind_to_every_kind() {
    let registry = Registry::default();
    for source in kinds() {
        for target in kinds() {
            registry.add(source.clone(), Access::READ);
            registry.add(target.clone(), Access::WRITE);
            let bytes = pattern(LEN, 5);
            fill(&*source, &bytes);
            let from = list(&[(&source, 100, 5000), (&source, 0, 0), (&source, 40_000, 7)]);
            let to = list(&[(&target, 4095, 1), (&target, 8192, 5005), (&target, 1, 1)]);
            assert_eq!(registry.copy(&from, &to, true), Ok(5007));
            let mut expected = bytes[100..5100].to_vec();
            expected.extend(&bytes[40_000..40_007]);
            assert_eq!(read(&*target, 4095, 1), expected[..1]);
            assert_eq!(read(&*target, 8192, 5005), expected[1..5006]);
            assert_eq!(read(&*target, 1, 1), expected[5006..]);
            assert_eq!(read(&*target, 8191, 1), [0]);
            assert_eq!(read(&*target, 8192 + 5005, 1), [0]);
            assert!(registry.remove(source.region()) && registry.remove(target.region()));
        }
    }
    assert_eq!(registry.count(), 0);
}

#[test]
fn buffers_are_sources_and_targets_too() {
    let registry = Registry::default();
    for medium in kinds() {
        registry.add(medium.clone(), Access::all());
        let mut bytes = pattern(9000, 9);
        let mut back = vec![0u8; 9000];
        // SAFETY: both vectors stay where they are until the copies are done.
        let (source, target) =
            unsafe { (Sg::host(bytes.as_mut_ptr(), 9000), Sg::host(back.as_mut_ptr(), 9000)) };
        registry.copy(&source, &list(&[(&medium, 333, 9000)]), false).unwrap();
        registry.copy(&list(&[(&medium, 333, 9000)]), &target, true).unwrap();
        assert_eq!(back, bytes);
        let mut twin = vec![0u8; 9000];
        // SAFETY: as above.
        let twin_list = unsafe { Sg::host(twin.as_mut_ptr(), 9000) };
        registry.copy(&source, &twin_list, true).unwrap();
        assert_eq!(twin, bytes);
    }
}

#[test]
fn what_cannot_be_is_refused_before_a_byte_moves() {
    let registry = Registry::default();
    let (source, target) = (file_medium(Granularity::Byte).1, file_medium(Granularity::Byte).1);
    registry.add(source.clone(), Access::READ);
    registry.add(target.clone(), Access::WRITE);
    fill(&*source, &pattern(LEN, 1));
    let unknown = file_medium(Granularity::Byte).1;
    let check =
        |from: &[(&Arc<dyn Medium>, u64, u64)], to: &[(&Arc<dyn Medium>, u64, u64)], kind| {
            let error = registry.copy(&list(from), &list(to), true).unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.moved.is_none());
            assert_eq!(read(&*target, 0, LEN), vec![0; LEN as usize]);
        };
    check(&[(&source, 0, 10)], &[(&target, 0, 11)], Kind::Invalid);
    check(&[(&source, 0, 10)], &[(&target, 0, 5), (&target, 4, 5)], Kind::Invalid);
    check(&[(&source, 0, 10)], &[(&target, LEN - 9, 10)], Kind::OutOfRange);
    check(&[(&source, LEN - 9, 10)], &[(&target, 0, 10)], Kind::OutOfRange);
    check(&[(&source, 0, 10)], &[(&unknown, 0, 10)], Kind::Closed);
    check(&[(&unknown, 0, 10)], &[(&target, 0, 10)], Kind::Closed);
    check(&[(&target, 0, 10)], &[(&target, 100, 10)], Kind::NotSupported);
    check(&[(&source, 0, 10)], &[(&source, 100, 10)], Kind::ReadOnly);
    let past = Segment::new(source.region(), u64::MAX - 4, 10);
    let mut wraps = Sg::new();
    wraps.push(past).unwrap();
    let error = registry.copy(&wraps, &list(&[(&target, 0, 10)]), false).unwrap_err();
    assert_eq!(error.kind, Kind::OutOfRange);
}

#[test]
fn ranges_may_touch_and_be_read_twice_but_not_overlap_what_is_written() {
    let registry = Registry::default();
    let medium = file_medium(Granularity::Byte).1;
    registry.add(medium.clone(), Access::all());
    fill(&*medium, &pattern(LEN, 3));
    let copy = |from: &[(u64, u64)], to: &[(u64, u64)]| {
        let list = |ranges: &[(u64, u64)]| {
            list(&ranges.iter().map(|&(at, len)| (&medium, at, len)).collect::<Vec<_>>())
        };
        registry.copy(&list(from), &list(to), false)
    };
    assert_eq!(copy(&[(0, 100), (0, 100)], &[(100, 100), (200, 100)]), Ok(200));
    assert_eq!(read(&*medium, 100, 100), read(&*medium, 200, 100));
    for (from, to) in [(0, 99), (99, 0), (0, 0), (50, 40), (40, 50)] {
        assert_eq!(copy(&[(from, 100)], &[(to, 100)]).unwrap_err().kind, Kind::Invalid);
    }
    assert_eq!(
        copy(&[(0, 10), (500, 10)], &[(505, 5), (600, 15)]).unwrap_err().kind,
        Kind::Invalid
    );
    assert_eq!(copy(&[(7, 0)], &[(7, 0)]), Ok(0));
}

#[test]
fn a_failure_says_how_much_was_moved_and_whose_it_is() {
    let registry = Registry::default();
    let bad = vec![BadRun { offset: 4, length: 1 }];
    let source: Arc<dyn Medium> =
        Arc::new(BadBlocks::new(file_medium(Granularity::Byte).1, bad, None));
    let target = file_medium(Granularity::Cacheline).1;
    registry.add(source.clone(), Access::all());
    registry.add(target.clone(), Access::all());
    let from = list(&[(&source, 0, 1000), (&source, 1024, 3000)]);
    let error = registry.copy(&from, &list(&[(&target, 0, 4000)]), true).unwrap_err();
    assert_eq!((error.kind, error.moved), (Kind::Media, Some(1000)));
    // A mapping that lends its addresses and then faults: the source is named, not the target.
    let (file, cut) = file_medium(Granularity::Byte);
    registry.add(cut.clone(), Access::READ);
    file.set_len(4096).unwrap();
    let from = list(&[(&cut, 0, 4096), (&cut, 4096, 4096)]);
    let error = registry.copy(&from, &list(&[(&target, 0, 8192)]), true).unwrap_err();
    assert_eq!((error.kind, error.moved), (Kind::Truncated, Some(4096)));
}

#[test]
fn a_durable_copy_syncs_each_region_once() {
    let registry = Registry::default();
    let (source, target) = (file_medium(Granularity::Byte).1, file_medium(Granularity::Page).1);
    registry.add(source.clone(), Access::READ);
    registry.add(target.clone(), Access::WRITE);
    let from = list(&[(&source, 0, 100)]);
    let to = list(&[(&target, 0, 50), (&target, 500, 50)]);
    registry.copy(&from, &to, false).unwrap();
    assert_eq!(target.stats().syncs, 0);
    registry.copy(&from, &to, true).unwrap();
    assert_eq!((target.stats().syncs, target.stats().bytes_stored()), (1, 200));
}

#[test]
fn a_region_that_goes_away_ends_the_copies_that_use_it() {
    let registry = Registry::default();
    let len = 64 << 20;
    let source: Arc<dyn Medium> = Arc::new(Mapped::anonymous(len, false).unwrap());
    let target: Arc<dyn Medium> = Arc::new(Mapped::anonymous(len, false).unwrap());
    for round in 0..6 {
        registry.add(source.clone(), Access::READ);
        registry.add(target.clone(), Access::WRITE);
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let copies = scope.spawn(|| loop {
                let from = list(&[(&source, 0, len)]);
                started.store(true, Ordering::Release);
                if let Err(error) = registry.copy(&from, &list(&[(&target, 0, len)]), false) {
                    return error;
                }
            });
            while !started.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let leaving = if round % 2 == 0 { &source } else { &target };
            assert!(registry.remove(leaving.region()));
            assert!(!registry.remove(leaving.region()));
            let error = copies.join().unwrap();
            assert_eq!(error.kind, Kind::Closed, "{error}");
            assert!(error.moved.is_none_or(|moved| moved < len && moved % (1 << 20) == 0));
        });
    }
}

#[test]
fn a_segment_keeps_its_byte_offset() {
    for at in [0, 1, 4095, 4096, 4097, 1 << 40, (1 << 52) - 1] {
        assert_eq!(Segment::new(RegionId(7), at, 1).at(), at);
    }
}

#[test]
fn length_is_the_sum_of_the_segments() {
    let mut sg = Sg::new();
    sg.push(Segment::new(RegionId(1), 10, 20)).unwrap();
    sg.push(Segment::new(RegionId(1), 8192, 5000)).unwrap();
    assert_eq!(sg.len(), 5020);
    sg.clear();
    assert!(sg.is_empty() && sg.segments().is_empty());
}

#[test]
fn host_segments_need_a_voucher() {
    let error = Sg::new().push(Segment::new(RegionId::HOST, 4096, 1)).unwrap_err();
    assert_eq!(error.kind, Kind::Invalid);
}
