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

/// Every chunk that is in use, with how many of its frames were used while `act` ran.
fn used_while(pool: &Pool, heat: Heat, act: impl FnOnce()) -> Vec<(u64, u64)> {
    let (count, _) = pool.sample_begin(0, 1000, heat).unwrap();
    act();
    let found = pool.sample_end().unwrap();
    assert_eq!(found.len(), count);
    found.iter().map(|sample| (sample.at, sample.used)).collect()
}

#[test]
fn samples_show_what_was_touched() {
    let pool = pool(true);
    let region = add(&pool, 32 * MIB);
    let extent = pool.allocate(8 * MIB, only(region)).unwrap();
    let words: Vec<_> = (0..4).map(|chunk| word(extent + chunk * 2 * MIB, 0)).collect();
    words.iter().for_each(|word| word.store(1, Ordering::Relaxed));
    let used = used_while(&pool, Heat::Accesses, || {
        words[1].load(Ordering::Relaxed);
        words[2].store(7, Ordering::Relaxed);
    });
    let hot: Vec<u64> = used.iter().filter(|(_, used)| *used > 0).map(|(at, _)| *at).collect();
    assert_eq!(hot, [extent + 2 * MIB, extent + 4 * MIB]);
    assert!(used_while(&pool, Heat::Accesses, || ()).iter().all(|(_, used)| *used == 0));
    assert_eq!(words[2].load(Ordering::Relaxed), 7);
}

#[test]
fn samples_of_writes_show_no_loads() {
    let pool = pool(true);
    let region = add(&pool, 32 * MIB);
    let extent = pool.allocate(4 * MIB, only(region)).unwrap();
    let words = [word(extent, 0), word(extent + 2 * MIB, 0)];
    words.iter().for_each(|word| word.store(1, Ordering::Relaxed));
    if let Err(missing) = pool.sample_begin(0, 1, Heat::Writes) {
        assert_eq!(missing.kind, Kind::NotSupported);
        return;
    }
    pool.sample_end().unwrap();
    let used = used_while(&pool, Heat::Writes, || {
        words[0].load(Ordering::Relaxed);
        words[1].store(2, Ordering::Relaxed);
    });
    assert_eq!(used, [(extent, 0), (extent + 2 * MIB, 1)]);
}

#[test]
fn samples_go_on_where_they_ended_and_come_around() {
    let pool = pool(true);
    let region = add(&pool, 32 * MIB);
    let extent = pool.allocate(6 * MIB, only(region)).unwrap();
    let mut seen = Vec::new();
    let mut after = 0;
    for _ in 0..4 {
        let (count, next) = pool.sample_begin(after, 2, Heat::Accesses).unwrap();
        assert_eq!(count, 2);
        after = next;
        seen.extend(pool.sample_end().unwrap().iter().map(|sample| (sample.at - extent) / MIB));
    }
    assert_eq!(seen, [0, 2, 4, 0, 2, 4, 0, 2]);
    let (all, _) = pool.sample_begin(extent + 2 * MIB, 100, Heat::Accesses).unwrap();
    assert_eq!(all, 3, "none of them twice");
}

#[test]
fn a_migration_ends_samples_and_freed_chunks_are_left_out() {
    for heat in [Heat::Accesses, Heat::Writes] {
        let pool = pool(true);
        let (first, second) = (add(&pool, 16 * MIB), add(&pool, 16 * MIB));
        let kept = pool.allocate(2 * MIB, only(first)).unwrap();
        let freed = pool.allocate(2 * MIB, only(first)).unwrap();
        word(kept, 3).store(3, Ordering::Relaxed);
        if pool.sample_begin(0, 100, heat).is_err() {
            continue;
        }
        pool.free(freed);
        let samples = pool.sample_end().unwrap();
        assert_eq!(samples.iter().map(|sample| sample.at).collect::<Vec<_>>(), [kept]);
        assert_eq!(samples[0].places, [(first, 512)]);

        pool.sample_begin(0, 100, heat).unwrap();
        let work = Work::Ranges { ranges: vec![(kept, kept + MIB)], to: second };
        assert_eq!(run(&pool, &work).unwrap().bytes, MIB);
        assert_eq!(pool.sample_end().unwrap(), []);
        pool.sample_begin(0, 100, heat).unwrap();
        assert_eq!(pool.sample_end().unwrap()[0].places, [(second, 256), (first, 256)]);
        assert_eq!(word(kept, 3).load(Ordering::Relaxed), 3);
        assert_eq!(pool.validate(), Vec::<String>::new());
    }
}

#[test]
fn ranges_leave_what_is_held_and_must_not_overlap() {
    let pool = pool(true);
    let (first, second) = (add(&pool, 16 * MIB), add(&pool, 16 * MIB));
    let (free, held) =
        (pool.allocate(MIB, only(first)).unwrap(), pool.allocate(MIB, only(first)).unwrap());
    pool.pin(held).unwrap();
    let both = (free.min(held), free.max(held) + MIB);
    let work = |ranges| Work::Ranges { ranges, to: second };
    assert_eq!(run(&pool, &work(vec![both])).unwrap().bytes, MIB);
    assert_eq!(pool.place_of(free).unwrap().0, second);
    assert_eq!(pool.place_of(held).unwrap().0, first);
    let refused = run(&pool, &work(vec![both, (free, free + 4096)])).unwrap_err();
    assert_eq!(refused.kind, Kind::Invalid);
    assert_eq!(run(&pool, &work(vec![both])).unwrap().bytes, 0, "it is there already");
}

#[test]
fn neighbours_that_came_one_by_one_go_back_together() {
    let pool = pool(true);
    let (first, second) = (add(&pool, 16 * MIB), add(&pool, 16 * MIB));
    let extent = pool.allocate(8 * MIB, only(first)).unwrap();
    for part in 0..4 {
        let start = extent + part * 2 * MIB;
        let work = Work::Ranges { ranges: vec![(start, start + 2 * MIB)], to: second };
        run(&pool, &work).unwrap();
    }
    assert!(pool.extents()[0].pieces.len() < 4, "neighbours are one piece");
    assert_eq!(pool.validate(), Vec::<String>::new());
    pool.free(extent);
    assert_eq!(pool.stats().1, 0);
    assert_eq!(pool.validate(), Vec::<String>::new());
    assert!(pool.members().iter().all(|member| member.free_frames == member.frames));
}
