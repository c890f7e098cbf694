//! Every way, both engines, through the cache and around it, at odd and even offsets.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use super::*;
use crate::media::{memfd, BadBlocks, BadRun, FileOptions, Granularity, Mapped};

const LEN: u64 = 300_000;

fn bytes_of(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A file on a disk, already without a name.
fn file_of(bytes: &[u8]) -> File {
    let name = format!("pmemkit-direct-{}-{:p}", std::process::id(), &bytes);
    let path = std::env::temp_dir().join(name);
    let mut options = File::options();
    let mut file = options.read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn medium_of(len: u64, granularity: Granularity) -> (File, Arc<Mapped>) {
    let file = File::from(memfd("direct", false).unwrap());
    file.set_len(len).unwrap();
    let mapped = Mapped::file(file.as_fd(), len, FileOptions::new(granularity)).unwrap();
    (file, Arc::new(mapped))
}

fn options(around: Around, ring: bool) -> Options {
    Options { depth: 4, piece: 16 << 10, around, ring }
}

fn each(mut check: impl FnMut(Options)) {
    for around in [Around::Never, Around::Uncached, Around::Always] {
        for ring in [false, true] {
            check(options(around, ring));
        }
    }
}

const PLACES: [(u64, u64, u64); 6] = [
    (0, 0, LEN),
    (0, 0, 1),
    (4096, 8192, 65536),
    (100, 100, 100_000),
    (4097, 3, 50_001),
    (511, 1023, 70_000),
];

#[test]
fn bytes_go_in_and_no_others_change() {
    let bytes = bytes_of(LEN, 1);
    let file = file_of(&bytes);
    each(|options| {
        for granularity in [Granularity::Byte, Granularity::Cacheline, Granularity::Page] {
            for (file_at, at, len) in PLACES {
                let (_, medium) = medium_of(LEN + 4096, granularity);
                let copier = Copier::new(file.as_fd(), Way::In, options).unwrap();
                copier.transfer(&*medium, file_at, at, len).unwrap();
                let mut expected = vec![0; LEN as usize + 4096];
                let taken = &bytes[file_at as usize..][..len as usize];
                expected[at as usize..][..len as usize].copy_from_slice(taken);
                let mut found = vec![1; expected.len()];
                // SAFETY: the vector has that many bytes.
                unsafe { medium.load(0, found.as_mut_ptr(), found.len() as u64).unwrap() };
                assert!(found == expected, "{options:?} {file_at} {at} {len}");
                let totals = copier.totals();
                assert_eq!((totals.direct + totals.cached, totals.buffered), (len, 0));
                assert_eq!(medium.stats().bytes_stored(), len);
            }
        }
    });
}

#[test]
fn bytes_go_out_and_no_others_change() {
    let bytes = bytes_of(LEN, 2);
    let (_, medium) = medium_of(LEN, Granularity::Cacheline);
    // SAFETY: a vector is valid for its length.
    unsafe { medium.store(0, bytes.as_ptr(), LEN, crate::media::Store::Auto).unwrap() };
    let before = bytes_of(LEN + 4096, 3);
    each(|options| {
        for (at, file_at, len) in PLACES {
            let file = file_of(&before);
            let copier = Copier::new(file.as_fd(), Way::Out, options).unwrap();
            copier.transfer(&*medium, file_at, at, len).unwrap();
            let mut expected = before.clone();
            expected[file_at as usize..][..len as usize]
                .copy_from_slice(&bytes[at as usize..][..len as usize]);
            assert!(contents(&file) == expected, "{options:?} {file_at} {at} {len}");
        }
    });
}

#[test]
fn around_the_cache_where_the_disk_lets_us() {
    let file = file_of(&bytes_of(LEN, 4));
    let (_, medium) = medium_of(LEN, Granularity::Byte);
    let copier = Copier::new(file.as_fd(), Way::In, options(Around::Always, true)).unwrap();
    copier.transfer(&*medium, 0, 0, LEN).unwrap();
    let totals = copier.totals();
    match copier.notice() {
        None => assert_eq!((totals.direct, totals.cached), (LEN / 4096 * 4096, LEN % 4096)),
        Some(_) => assert_eq!(totals.direct, 0),
    }
    let apart = Copier::new(file.as_fd(), Way::In, options(Around::Always, true)).unwrap();
    apart.transfer(&*medium, 4096, 1, 8192).unwrap();
    assert_eq!(apart.totals().direct, 0);
    assert!(apart.notice().is_some());
}

#[test]
fn a_file_that_ends_early_says_how_much_was_moved() {
    let bytes = bytes_of(100_000, 5);
    let file = file_of(&bytes);
    each(|options| {
        let (_, medium) = medium_of(LEN, Granularity::Byte);
        let copier = Copier::new(file.as_fd(), Way::In, options).unwrap();
        let error = copier.transfer(&*medium, 0, 0, LEN).unwrap_err();
        assert_eq!(error.kind, Kind::Truncated, "{error}");
        let moved = error.moved.unwrap();
        assert!((81_920..=100_000).contains(&moved), "{moved}");
        let mut found = vec![0; moved as usize];
        // SAFETY: the vector has that many bytes.
        unsafe { medium.load(0, found.as_mut_ptr(), moved).unwrap() };
        assert!(found == bytes[..moved as usize]);
    });
}

#[test]
fn bad_blocks_are_cleared_by_going_in_and_refused_going_out() {
    let bytes = bytes_of(LEN, 6);
    let file = file_of(&bytes);
    each(|options| {
        let (_, below) = medium_of(LEN, Granularity::Cacheline);
        let runs = vec![BadRun { offset: 200, length: 2 }];
        let medium = BadBlocks::new(below, runs, None);
        let out = Copier::new(file.as_fd(), Way::Out, options).unwrap();
        let error = out.transfer(&medium, 0, 0, LEN).unwrap_err();
        assert_eq!(error.kind, Kind::Media, "{error}");
        assert!(error.moved.unwrap() <= 200 * 512);
        let file = file_of(&bytes);
        let copier = Copier::new(file.as_fd(), Way::In, options).unwrap();
        copier.transfer(&medium, 0, 0, LEN).unwrap();
        assert_eq!(copier.totals().buffered, LEN);
        let mut found = vec![0; LEN as usize];
        // SAFETY: the vector has that many bytes.
        unsafe { medium.load(0, found.as_mut_ptr(), LEN).unwrap() };
        assert!(found == bytes);
    });
}

#[test]
fn a_mapping_that_was_cut_short_is_an_error_and_not_a_crash() {
    let file = file_of(&bytes_of(LEN, 7));
    each(|options| {
        for way in [Way::In, Way::Out] {
            let (behind, medium) = medium_of(LEN, Granularity::Cacheline);
            behind.set_len(40_960).unwrap();
            let copier = Copier::new(file.as_fd(), way, options).unwrap();
            let error = copier.transfer(&*medium, 0, 0, LEN).unwrap_err();
            assert_eq!(error.kind, Kind::Truncated, "{error}");
            assert!(error.moved.unwrap() <= 40_960, "{error}");
        }
    });
}

#[test]
fn what_does_not_fit_or_may_not_be_written_is_refused_first() {
    let file = file_of(&bytes_of(8192, 8));
    let (behind, medium) = medium_of(8192, Granularity::Byte);
    let copier = Copier::new(file.as_fd(), Way::In, Options::default()).unwrap();
    for (file_at, at, len) in [(0, 1, 8192), (0, u64::MAX, 2), (u64::MAX, 0, 2)] {
        let error = copier.transfer(&*medium, file_at, at, len).unwrap_err();
        assert_eq!(error.kind, Kind::OutOfRange);
    }
    copier.transfer(&*medium, 0, 8192, 0).unwrap();
    let read_only = FileOptions { read_only: true, ..FileOptions::new(Granularity::Byte) };
    let sealed = Mapped::file(behind.as_fd(), 8192, read_only).unwrap();
    assert_eq!(copier.transfer(&sealed, 0, 0, 8192).unwrap_err().kind, Kind::ReadOnly);
    assert_eq!(copier.totals(), Totals::default());
    for (depth, piece) in [(0, 4096), (1, 0), (1, 100)] {
        let options = Options { depth, piece, ..Options::default() };
        let error = Copier::new(file.as_fd(), Way::In, options).err().unwrap();
        assert_eq!(error.kind, Kind::Invalid);
    }
}
