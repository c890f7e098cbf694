//! Mappings of real memory: trackers, snapshots under writers, views, closing; and damaged logs.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::{Log, LogOptions, Mapping, Options, Tracking};
use crate::error::{Kind, Result};
use crate::media::{memfd, FileOptions, Granularity, Mapped, Medium};

const PAGE: u64 = 4096;

fn medium(pages: u64, granularity: Granularity) -> Arc<Mapped> {
    let file = File::from(memfd("dax", false).unwrap());
    file.set_len(pages * PAGE).unwrap();
    let options = FileOptions::new(granularity);
    Arc::new(Mapped::file(file.as_fd(), pages * PAGE, options).unwrap())
}

fn map(pages: u64, tracking: Tracking) -> Result<Mapping> {
    let options = Options { len: pages * PAGE, tracking, ..Options::default() };
    Mapping::new(medium(pages, Granularity::Cacheline), options)
}

/// The mapping with this tracker, unless this kernel has not got it.
fn tracked(pages: u64, tracking: Tracking) -> Option<Mapping> {
    match map(pages, tracking) {
        Err(error) if error.kind == Kind::NotSupported => None,
        other => Some(other.unwrap()),
    }
}

const TRACKERS: [Tracking; 3] =
    [Tracking::Explicit, Tracking::WriteProtect, Tracking::WriteProtectAsync];

fn write(mapping: &Mapping, at: u64, data: &[u8]) -> Result<()> {
    // SAFETY: a slice is valid for its length.
    unsafe { mapping.write(at, data.as_ptr(), data.len() as u64) }
}

fn read(mapping: &dyn Medium, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    // SAFETY: the vector has `len` bytes.
    unsafe { mapping.load(at, bytes.as_mut_ptr(), len) }.unwrap();
    bytes
}

#[test]
fn sync_costs_what_was_dirtied() {
    for tracking in TRACKERS {
        let Some(mapping) = tracked(1000, tracking) else { continue };
        // Where the page table is asked, pages that were only mapped count once.
        mapping.sync().unwrap();
        assert_eq!(mapping.sync(), Ok(0));
        write(&mapping, 5 * PAGE + 10, &[1; 20]).unwrap();
        write(&mapping, 900 * PAGE - 8, &[2; 16]).unwrap();
        let expected = if tracking == Tracking::Explicit { 64 + 128 } else { 3 * PAGE };
        assert_eq!(mapping.sync(), Ok(expected), "{tracking:?}");
        assert_eq!(mapping.sync(), Ok(0));
        write(&mapping, 5 * PAGE, &[1; 20]).unwrap();
        assert_ne!(mapping.sync(), Ok(0));
        mapping.mark_dirty(7 * PAGE, 64).unwrap();
        assert_eq!(mapping.sync(), Ok(64));
    }
}

#[test]
fn what_views_store_is_found_or_assumed() {
    for tracking in TRACKERS {
        let Some(mapping) = tracked(64, tracking) else { continue };
        let address = mapping.pin(0, 64 * PAGE, true).unwrap();
        mapping.sync().unwrap();
        // SAFETY: the range is pinned.
        unsafe { address.add(10 * PAGE as usize).write_volatile(1) };
        let all = tracking == Tracking::Explicit;
        assert_eq!(mapping.sync(), Ok(if all { 64 * PAGE } else { PAGE }));
        mapping.unpin(0, 64 * PAGE, true);
        assert_eq!(mapping.sync(), Ok(if all { 64 * PAGE } else { 0 }));
        assert_eq!(mapping.sync(), Ok(0));
    }
}

#[test]
fn stores_of_many_threads_are_all_found() {
    for tracking in [Tracking::WriteProtect, Tracking::WriteProtectAsync] {
        let Some(mapping) = tracked(512, tracking) else { continue };
        mapping.sync().unwrap();
        let address = mapping.pin(0, 512 * PAGE, true).unwrap() as usize;
        let mut found = BTreeSet::new();
        let mut take = || {
            let dirty = mapping.used("sync", |open| open.tracker.take()).unwrap();
            found.extend(dirty.iter().flat_map(|(at, len)| at / PAGE..(at + len) / PAGE));
        };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for page in (thread..512).step_by(4) {
                        // SAFETY: the range is pinned; each thread has pages of its own.
                        unsafe { ((address + page * PAGE as usize) as *mut u64).write_volatile(1) };
                    }
                });
            }
            (0..20).for_each(|_| take());
        });
        take();
        assert_eq!(found.len(), 512, "{tracking:?}");
        mapping.unpin(0, 512 * PAGE, true);
    }
}

/// Each writer stores a number to one page and then the same number to another: in a copy of one
/// moment the first is equal to the second or one ahead.
fn pairs_in_snapshots(mapping: &Mapping, pages: u64, rounds: usize) {
    let address = mapping.pin(0, pages * PAGE, true).unwrap() as usize;
    let stop = AtomicBool::new(false);
    let place = |page: u64| (address + (page * PAGE) as usize) as *mut u64;
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let stop = &stop;
            scope.spawn(move || {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    // From back to front in one pair, from front to back in the others.
                    let (one, two) = (writer * 7 + number % 5, pages - 1 - writer * 7 - number % 5);
                    let (one, two) = if writer == 0 { (two, one) } else { (one, two) };
                    // SAFETY: the range is pinned; each writer has pages of its own.
                    unsafe {
                        place(one).write_volatile(number);
                        place(two).write_volatile(number);
                    }
                }
            });
        }
        for _ in 0..rounds {
            let copy = Arc::new(Mapped::anonymous(pages * PAGE, false).unwrap());
            mapping.snapshot(copy.clone()).unwrap();
            for writer in 0..3 {
                for step in 0..5 {
                    let (one, two) = (writer * 7 + step, pages - 1 - writer * 7 - step);
                    let (one, two) = if writer == 0 { (two, one) } else { (one, two) };
                    let first = copy.load_u64(one * PAGE).unwrap();
                    let second = copy.load_u64(two * PAGE).unwrap();
                    assert!(
                        first == second || first == second + 5 || second == 0,
                        "{first} {second}"
                    );
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    mapping.unpin(0, pages * PAGE, true);
}

#[test]
fn a_snapshot_is_of_one_moment_while_threads_store() {
    for tracking in [Tracking::Kernel, Tracking::WriteProtect, Tracking::WriteProtectAsync] {
        let Some(mapping) = tracked(256, tracking) else { continue };
        if mapping.snapshot_sees_stores() {
            pairs_in_snapshots(&mapping, 256, 15);
        }
    }
}

#[test]
fn after_a_snapshot_dirty_pages_are_still_found() {
    let Some(mapping) = tracked(64, Tracking::WriteProtectAsync) else { return };
    if !mapping.snapshot_sees_stores() {
        return;
    }
    write(&mapping, 0, &[1; 8]).unwrap();
    let copy = Arc::new(Mapped::anonymous(64 * PAGE, false).unwrap());
    mapping.snapshot(copy.clone()).unwrap();
    assert_eq!(read(&*copy, 0, 8), [1; 8]);
    assert_eq!(mapping.tracker(), Ok("write-protect"));
    mapping.sync().unwrap();
    write(&mapping, 9 * PAGE, &[1; 8]).unwrap();
    assert_eq!(mapping.sync(), Ok(PAGE));
}

#[test]
fn a_snapshot_by_methods_refuses_writable_views() {
    let mapping = map(8, Tracking::Explicit).unwrap();
    let target = || Arc::new(Mapped::anonymous(8 * PAGE, false).unwrap());
    mapping.pin(0, 8, true).unwrap();
    assert_eq!(mapping.snapshot(target()).unwrap_err().kind, Kind::Busy);
    mapping.unpin(0, 8, true);
    let running = mapping.begin_snapshot(target()).unwrap();
    assert_eq!(mapping.pin(0, 8, true).unwrap_err().kind, Kind::Busy);
    assert_eq!(mapping.close().unwrap_err().kind, Kind::Busy);
    drop(running);
    let short = Arc::new(Mapped::anonymous(PAGE, false).unwrap());
    assert_eq!(mapping.snapshot(short).unwrap_err().kind, Kind::Invalid);
    mapping.snapshot(target()).unwrap();
}

#[test]
fn a_view_pins_its_mapping() {
    let mapping = map(4, Tracking::Automatic).unwrap();
    mapping.pin(0, 10, false).unwrap();
    let error = mapping.close().unwrap_err();
    assert_eq!(error.kind, Kind::Busy);
    assert!(error.detail.contains("1 views"), "{error}");
    mapping.unpin(0, 10, false);
    mapping.close().unwrap();
    mapping.close().unwrap();
    assert_eq!(write(&mapping, 0, &[1]).unwrap_err().kind, Kind::Closed);
    assert_eq!(mapping.sync().unwrap_err().kind, Kind::Closed);
    assert_eq!(mapping.pin(0, 1, false).unwrap_err().kind, Kind::Closed);
}

#[test]
fn ranges_offsets_and_permissions_are_checked() {
    let whole = medium(4, Granularity::Byte);
    let options = Options { offset: PAGE, len: 2 * PAGE, ..Options::default() };
    let part = Mapping::new(whole.clone(), options).unwrap();
    write(&part, 5, &[7; 3]).unwrap();
    assert_eq!(read(&*whole, PAGE + 5, 3), [7; 3]);
    assert_eq!(write(&part, 2 * PAGE, &[1]).unwrap_err().kind, Kind::OutOfRange);
    assert_eq!(part.persist(u64::MAX, 2).unwrap_err().kind, Kind::OutOfRange);
    assert_eq!(part.pin(1, 2 * PAGE, false).unwrap_err().kind, Kind::OutOfRange);
    let kind = |options| Mapping::new(whole.clone(), options).err().unwrap().kind;
    assert_eq!(kind(Options { offset: 100, len: 1, ..options }), Kind::Invalid);
    assert_eq!(kind(Options { len: 4 * PAGE, ..options }), Kind::OutOfRange);
    let reader = Mapping::new(whole, Options { read_only: true, ..options }).unwrap();
    assert_eq!(write(&reader, 0, &[1]).unwrap_err().kind, Kind::ReadOnly);
    assert_eq!(reader.pin(0, 1, true).unwrap_err().kind, Kind::ReadOnly);
    reader.pin(0, 1, false).unwrap();
}

// --- logs ----------------------------------------------------------------------------------------

fn log_on(mapping: &Arc<Mapping>) -> Result<Log> {
    Log::open(mapping.clone(), 4 * PAGE, PAGE, LogOptions::default())
}

#[test]
fn a_transaction_that_does_not_fit_changes_nothing() {
    let mapping = Arc::new(map(8, Tracking::Explicit).unwrap());
    let log = log_on(&mapping).unwrap();
    let large = vec![1; log.capacity() as usize - 15];
    assert_eq!(log.commit(&[(0, &large)]).unwrap_err().kind, Kind::NoSpace);
    log.commit(&[(0, &large[1..])]).unwrap();
    log.commit(&[]).unwrap();
    let kind = |at, data: &[u8]| log.commit(&[(0, &[9]), (at, data)]).unwrap_err().kind;
    assert_eq!(kind(5 * PAGE - 1, &[1]), Kind::Invalid);
    assert_eq!(kind(4 * PAGE - 1, &[1, 2]), Kind::Invalid);
    assert_eq!(kind(8 * PAGE, &[1]), Kind::OutOfRange);
    log.commit(&[(5 * PAGE, &[1]), (4 * PAGE - 1, &[2])]).unwrap();
}

#[test]
fn what_is_no_log_is_refused_and_never_laid_out_anew() {
    let mapping = Arc::new(map(8, Tracking::Explicit).unwrap());
    let open = |at, len| Log::open(mapping.clone(), at, len, LogOptions::default()).err();
    for (at, len) in [(1, 256), (0, 255), (0, 192), (8 * PAGE, 256), (u64::MAX - 63, 256)] {
        assert_eq!(open(at, len).unwrap().kind, Kind::Invalid, "{at} {len}");
    }
    drop(log_on(&mapping).unwrap());
    for at in [0, 8, 16, 24, 40, 56] {
        let mut word = [0; 8];
        // SAFETY: eight bytes.
        unsafe { mapping.load(4 * PAGE + at, word.as_mut_ptr(), 8) }.unwrap();
        write(&mapping, 4 * PAGE + at, &[word[0] ^ 0x40]).unwrap();
        let error = log_on(&mapping).err().unwrap();
        assert_eq!(error.kind, Kind::Corrupt, "{at}");
        write(&mapping, 4 * PAGE + at, &word).unwrap();
    }
    log_on(&mapping).unwrap();
    assert_eq!(open(4 * PAGE, 2 * PAGE).unwrap().kind, Kind::Corrupt);
    let anew = LogOptions { create: true, ..LogOptions::default() };
    Log::open(mapping.clone(), 4 * PAGE, 2 * PAGE, anew).unwrap();
}

#[test]
fn a_log_that_failed_is_latched_until_it_is_opened_again() {
    let file = File::from(memfd("dax", false).unwrap());
    file.set_len(8 * PAGE).unwrap();
    let options = FileOptions::new(Granularity::Cacheline);
    let medium = Arc::new(Mapped::file(file.as_fd(), 8 * PAGE, options).unwrap());
    let options = Options { len: 8 * PAGE, tracking: Tracking::Explicit, ..Options::default() };
    let mapping = Arc::new(Mapping::new(medium, options).unwrap());
    let log = log_on(&mapping).unwrap();
    file.set_len(6 * PAGE).unwrap();
    let changes: [(u64, &[u8]); 2] = [(0, &[5; 100]), (7 * PAGE, &[5; 100])];
    assert_eq!(log.commit(&changes).unwrap_err().kind, Kind::Truncated);
    file.set_len(8 * PAGE).unwrap();
    assert_eq!(log.commit(&changes).unwrap_err().kind, Kind::Latched);
    let log = log_on(&mapping).unwrap();
    assert_eq!(log.recovered(), 2);
    let mut bytes = [0; 100];
    // SAFETY: a hundred bytes.
    unsafe { mapping.load(7 * PAGE, bytes.as_mut_ptr(), 100) }.unwrap();
    assert_eq!(bytes, [5; 100]);
    log.commit(&changes).unwrap();
}
