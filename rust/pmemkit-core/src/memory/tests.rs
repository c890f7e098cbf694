//! Pools over memfds: what is handed out, moved under its writers and taken back.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::error::Kind;
use crate::media;

const MIB: u64 = 1 << 20;

fn pool(userfault: bool) -> Pool {
    Pool::new(Options {
        block_frames: 512,
        placement: Placement::Preferred,
        zeroing: Zeroing::Asked,
        limit_frames: None,
        share_with_children: false,
        chunk: 2 * MIB,
        userfault,
        report_every: Duration::ZERO,
    })
    .unwrap()
}

fn memory(len: u64) -> OwnedFd {
    let fd = media::memfd("pool", false).unwrap();
    media::set_length(fd.as_fd(), len).unwrap();
    fd
}

fn add(pool: &Pool, len: u64) -> u32 {
    let options = RegionOptions {
        name: "memory".to_owned(),
        offset: 0,
        len,
        rank: 0,
        weight: 1,
        sealed: true,
        large_pages: false,
        claimed: Vec::new(),
        map: None,
    };
    pool.add(memory(len).as_fd(), options).unwrap()
}

fn only(region: u32) -> Request {
    Request { region: Some(region), ..Request::default() }
}

fn run(pool: &Pool, work: &Work) -> crate::error::Result<Outcome> {
    pool.migrate(work, None, &mut |_| Flow::Continue)
}

fn remove(region: u32) -> Work {
    Work::Remove { region, abandoned: Vec::new() }
}

fn word(address: u64, index: u64) -> &'static AtomicU64 {
    // SAFETY: tests touch extents that they did not free.
    unsafe { &*((address + index * 8) as *const AtomicU64) }
}

/// Threads count words up and see at once when a count is lost.
fn under_fire(userfault: bool) {
    let pool = pool(userfault);
    let large = add(&pool, 32 * MIB);
    let mut small = add(&pool, 8 * MIB);
    let extents: Vec<u64> =
        (0..4).map(|_| pool.allocate(MIB + 512 * 1024, only(small)).unwrap()).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = extents
        .iter()
        .map(|&address| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    for index in 0..(MIB + 512 * 1024) / 8 {
                        // A plain store between two loads, and an atomic step.
                        let was = word(address, index).load(Ordering::Relaxed);
                        assert_eq!(was, rounds * 2, "word {index} of {address:#x}");
                        word(address, index).store(was + 1, Ordering::Relaxed);
                        word(address, index).fetch_add(1, Ordering::Relaxed);
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    for _ in 0..6 {
        run(&pool, &remove(small)).unwrap();
        small = add(&pool, 8 * MIB);
        run(&pool, &Work::Move { addresses: extents.clone(), to: small }).unwrap();
        assert_eq!(pool.validate(), Vec::<String>::new());
    }
    stop.store(true, Ordering::Relaxed);
    for (thread, &address) in writers.into_iter().zip(&extents) {
        let rounds = thread.join().unwrap();
        assert_eq!(word(address, 0).load(Ordering::Relaxed), rounds * 2);
    }
    run(&pool, &remove(large)).unwrap();
    for address in extents {
        assert!(pool.free(address));
    }
    assert_eq!(pool.stats().1, 0);
}

#[test]
fn writers_that_userfaultfd_holds_lose_nothing() {
    under_fire(true);
}

#[test]
fn writers_that_a_signal_holds_lose_nothing() {
    under_fire(false);
}

#[test]
fn a_migration_that_stops_anywhere_puts_everything_back() {
    for stop_after in 0..6 {
        let pool = pool(stop_after % 2 == 0);
        let small = add(&pool, 16 * MIB);
        let large = add(&pool, 32 * MIB);
        let extents: Vec<u64> =
            (0..4).map(|_| pool.allocate(3 * MIB, only(small)).unwrap()).collect();
        for (number, &address) in extents.iter().enumerate() {
            (0..3 * MIB / 8).for_each(|at| {
                word(address, at).store((at + (number as u64)) << 32, Ordering::Relaxed);
            });
        }
        let before: Vec<_> = pool.extents().into_iter().map(|each| each.pieces).collect();
        let mut calls = 0;
        let stopped = pool.migrate(&remove(small), None, &mut |_| {
            calls += 1;
            if calls > stop_after {
                Flow::Cancel
            } else {
                Flow::Continue
            }
        });
        assert_eq!(stopped.unwrap_err().source_errno, Some(libc::ECANCELED));
        let after: Vec<_> = pool.extents().into_iter().map(|each| each.pieces).collect();
        assert_eq!(before, after);
        let free = |id| pool.members().iter().find(|each| each.id == id).unwrap().free_frames;
        assert_eq!((free(small), free(large)), (1024, 8192));
        assert_eq!(pool.validate(), Vec::<String>::new());
        for (number, &address) in extents.iter().enumerate() {
            (0..3 * MIB / 8).for_each(|at| {
                let found = word(address, at).load(Ordering::Relaxed);
                assert_eq!(found, (at + (number as u64)) << 32);
            });
        }
    }
}

#[test]
fn what_cannot_be_done_is_said_and_changes_nothing() {
    let pool = pool(true);
    let small = add(&pool, 4 * MIB);
    let address = pool.allocate(3 * MIB, only(small)).unwrap();
    let kind = |work| run(&pool, &work).unwrap_err().kind;
    assert_eq!(kind(remove(small)), Kind::NoSpace);
    assert_eq!(kind(remove(7)), Kind::Invalid);
    assert_eq!(kind(Work::Offline { region: small, first: 1, count: 2 }), Kind::OutOfRange);
    assert_eq!(kind(Work::Offline { region: small, first: 0, count: 0 }), Kind::OutOfRange);
    assert_eq!(kind(Work::Move { addresses: vec![1], to: small }), Kind::Invalid);
    add(&pool, 4 * MIB);
    pool.pin(address).unwrap();
    assert_eq!(kind(remove(small)), Kind::Busy);
    pool.unpin(address);
    let late = pool.migrate(&remove(small), Some(Instant::now()), &mut |_| Flow::Continue);
    assert_eq!(late.unwrap_err().source_errno, Some(libc::ETIMEDOUT));
    assert_eq!(pool.validate(), Vec::<String>::new());
    run(&pool, &remove(small)).unwrap();
    assert!(pool.free(address));
    assert!(!pool.free(address));
    assert_eq!(pool.ghosts(), (0, 0));
}
