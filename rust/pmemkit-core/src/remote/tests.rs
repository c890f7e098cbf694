//! A region served to this very process: what it promises, what it refuses, peers that misbehave.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::wire::*;
use super::*;
use crate::error::{Error, Kind};
use crate::media::{memfd, BadBlocks, BadRun, FileOptions, Granularity, Mapped, Medium, Store};
use crate::sg::{Access, Pfn, Registry, Segment, Sg};

const LEN: u64 = 5 << 20;

fn target() -> (File, Arc<dyn Medium>) {
    let file = File::from(memfd("remote", false).unwrap());
    file.set_len(LEN).unwrap();
    let options = FileOptions::new(Granularity::Cacheline);
    let medium = Mapped::file(file.as_fd(), LEN, options).unwrap();
    (file, Arc::new(medium))
}

fn terms() -> Terms {
    let patience = Duration::from_millis(400);
    Terms { size: LEN, read_only: false, punches: true, patience }
}

fn served(medium: Arc<dyn Medium>, read_only: bool) -> (Remote, Arc<Server>, JoinHandle<Totals>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Arc::new(Server::new(theirs.into(), medium, read_only).unwrap());
    let thread = std::thread::spawn({
        let server = server.clone();
        move || server.serve()
    });
    (Remote::new(ours.into(), terms()).unwrap(), server, thread)
}

/// The client's end, and a peer that we play ourselves.
fn played() -> (Remote, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Remote::new(ours.into(), terms()).unwrap(), theirs)
}

fn write(medium: &dyn Medium, at: u64, bytes: &[u8]) -> Result<(), Error> {
    // SAFETY: a slice is valid for its length.
    unsafe { medium.store(at, bytes.as_ptr(), bytes.len() as u64, Store::Auto) }
}

fn read(medium: &dyn Medium, at: u64, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xee; len as usize];
    // SAFETY: a vector is valid for its length.
    unsafe { medium.load(at, bytes.as_mut_ptr(), len) }.map(|()| bytes)
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at ^ at >> 9 ^ at >> 17) as u8).collect()
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 20
    }
}

#[test]
fn what_is_stored_here_is_there() {
    let (_file, below) = target();
    let (remote, server, thread) = served(below.clone(), false);
    let bytes = pattern(3 << 20);
    write(&remote, 12_345, &bytes).unwrap();
    assert!(read(&*below, 12_345, 3 << 20).unwrap() == bytes);
    assert!(read(&remote, 12_345, 3 << 20).unwrap() == bytes);
    assert_eq!(read(&remote, 7, 0).unwrap(), []);
    remote.store_u64(4096, 0x0123_4567_89ab_cdef).unwrap();
    assert_eq!(
        (below.load_u64(4096), remote.load_u64(4096)),
        (remote.load_u64(4096), Ok(0x0123_4567_89ab_cdef))
    );
    remote.zero(20_000, 2 << 20).unwrap();
    assert!(read(&*below, 20_000, 2 << 20).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(remote.punch(0, LEN), Ok(true));
    let runs = remote.extents(0, LEN).unwrap();
    assert_eq!(runs, below.extents(0, LEN).unwrap());
    assert!(runs[0].hole);
    remote.persist(0, 100).unwrap();
    remote.sync().unwrap();
    server.stop();
    let totals = thread.join().unwrap();
    assert_eq!((totals.errors, totals.reason.as_str()), (0, "stopped"));
    assert_eq!(totals.bytes_in, (3 << 20) + 8);
}

#[test]
fn a_commit_is_a_commit_there() {
    let (_file, below) = target();
    let (remote, _server, _thread) = served(below.clone(), false);
    write(&remote, 0, &[1; 100]).unwrap();
    let before = below.stats();
    remote.sync().unwrap();
    assert_eq!(below.stats().syncs, before.syncs + 1);
    remote.persist(0, 100).unwrap();
    assert_eq!(below.stats().flushes, before.flushes + 1);
    assert!(remote.sync_blocks());
    assert_eq!(remote.granularity(), Granularity::Page);
}

#[test]
fn refusals_are_answers_and_the_connection_goes_on() {
    let (_file, below) = target();
    let runs = vec![BadRun { offset: 8, length: 1 }];
    let judged: Arc<dyn Medium> = Arc::new(BadBlocks::new(below, runs, None));
    let (remote, _server, _thread) = served(judged.clone(), false);
    let error = read(&remote, 0, 3 << 20).unwrap_err();
    assert_eq!(error.kind, Kind::Media, "{error}");
    assert!(error.detail.contains("bad media"), "{error}");
    assert_eq!(read(&remote, 1 << 20, 5).unwrap(), [0; 5]);
    write(&remote, 8 * 512, &[3; 512]).unwrap();
    assert_eq!(read(&remote, 8 * 512, 512).unwrap(), [3; 512]);
    for error in [
        write(&remote, LEN - 1, &[0; 2]).unwrap_err(),
        read(&remote, u64::MAX, 2).unwrap_err(),
        remote.zero(LEN, 1).unwrap_err(),
    ] {
        assert_eq!(error.kind, Kind::OutOfRange);
    }
    assert_eq!(remote.load_u64(3).unwrap_err().kind, Kind::Invalid);
    assert_eq!(remote.resize(1).unwrap_err().kind, Kind::NotSupported);
    let segment = Segment::new(remote.region(), 0, 1);
    assert_eq!(remote.address(&segment).unwrap_err().kind, Kind::NotSupported);
    // One whose terms speak of more than there is gets no further than the peer.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(theirs.into(), judged, true).unwrap();
    let thread = std::thread::spawn(move || server.serve());
    let greedy = Remote::new(ours.into(), Terms { size: 2 * LEN, ..terms() }).unwrap();
    assert_eq!(read(&greedy, 2 * LEN - 9, 9).unwrap_err().kind, Kind::OutOfRange);
    for refused in [write(&greedy, 0, &[1; 9]), greedy.zero(0, 9), greedy.punch(0, 9).map(|_| ())] {
        assert_eq!(refused.unwrap_err().kind, Kind::ReadOnly);
    }
    drop(greedy);
    let totals = thread.join().unwrap();
    assert_eq!((totals.errors, totals.reason.as_str()), (4, "eof"));
}

#[test]
fn segments_of_a_remote_region_are_copied_like_others() {
    let (_file, below) = target();
    let (remote, _server, _thread) = served(below.clone(), false);
    let remote: Arc<dyn Medium> = Arc::new(remote);
    let local: Arc<dyn Medium> = Arc::new(Mapped::anonymous(LEN, false).unwrap());
    let registry = Registry::default();
    registry.add(remote.clone(), Access::all());
    registry.add(local.clone(), Access::all());
    let bytes = pattern(LEN);
    write(&*local, 0, &bytes).unwrap();
    let list = |medium: &Arc<dyn Medium>, at, len| {
        let mut sg = Sg::new();
        sg.push(Segment::new(medium.region(), at, len)).unwrap();
        sg
    };
    registry.copy(&list(&local, 0, LEN), &list(&remote, 0, LEN), true).unwrap();
    assert!(read(&*below, 0, LEN).unwrap() == bytes);
    registry.copy(&list(&remote, 100, 2 << 20), &list(&local, 77, 2 << 20), true).unwrap();
    assert!(read(&*local, 77, 2 << 20).unwrap() == bytes[100..100 + (2 << 20)]);
    registry.copy(&list(&remote, 0, 4096), &list(&remote, 1 << 20, 4096), true).unwrap();
    assert!(read(&*below, 1 << 20, 4096).unwrap() == bytes[..4096]);
}

#[test]
fn many_threads_share_a_connection() {
    let (_file, below) = target();
    let (remote, _server, _thread) = served(below, false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let remote = &remote;
            scope.spawn(move || {
                for round in 0..50u64 {
                    let at = thread * (1 << 20) + round * 1000;
                    write(remote, at, &[(thread * 50 + round) as u8; 900]).unwrap();
                    assert_eq!(read(remote, at, 900).unwrap(), [(thread * 50 + round) as u8; 900]);
                }
            });
        }
    });
}

#[test]
fn a_peer_that_dies_in_the_middle_is_an_error_at_once_and_for_good() {
    for cut in [0, 10, HEADER_SIZE, HEADER_SIZE + 1000] {
        let (remote, mut peer) = played();
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; HEADER_SIZE];
            peer.read_exact(&mut bytes).unwrap();
            let asked = Header::parse(&bytes).unwrap();
            let mut answer = asked.answer(asked.len as u32).encode().to_vec();
            answer.extend(vec![7; 4096]);
            peer.write_all(&answer[..cut]).unwrap();
        });
        let began = Instant::now();
        let error = read(&remote, 0, 4096).unwrap_err();
        assert_eq!((error.kind, error.errno()), (Kind::System, libc::ECONNRESET), "{cut} {error}");
        let later = write(&remote, 0, &[1]).unwrap_err();
        assert_eq!(later.kind, Kind::Closed, "{later}");
        assert!(later.detail.contains("lost"), "{later}");
        assert_eq!(remote.sync().unwrap_err().kind, Kind::Closed);
        assert!(began.elapsed() < Duration::from_secs(5));
        thread.join().unwrap();
    }
}

#[test]
fn a_peer_that_is_silent_is_given_up() {
    let (remote, peer) = played();
    let error = remote.sync().unwrap_err();
    assert_eq!(error.errno(), libc::ETIMEDOUT, "{error}");
    assert_eq!(read(&remote, 0, 1).unwrap_err().kind, Kind::Closed);
    // One that takes nothing more, too.
    let (remote, _peer) = played();
    let error = write(&remote, 0, &vec![1; 4 << 20]).unwrap_err();
    assert_eq!(error.errno(), libc::ETIMEDOUT, "{error}");
    drop(peer);
}

#[test]
fn answers_to_something_else_break_the_connection() {
    let wrong: [fn(Header) -> Header; 5] = [
        |header| Header { tag: header.tag + 1, ..header },
        |header| Header { op: Op::Zero, payload: 0, ..header },
        |header| Header { reply: false, payload: 0, ..header },
        |header| Header { len: header.len - 1, payload: header.payload - 1, ..header },
        |header| Header { version: 2, ..header },
    ];
    for change in wrong {
        let (remote, mut peer) = played();
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; HEADER_SIZE];
            peer.read_exact(&mut bytes).unwrap();
            let answer = change(Header::parse(&bytes).unwrap().answer(64));
            peer.write_all(&answer.encode()).unwrap();
            let _ = peer.write_all(&[0; 64]);
            peer
        });
        assert_eq!(read(&remote, 0, 64).unwrap_err().kind, Kind::Protocol);
        assert_eq!(read(&remote, 0, 64).unwrap_err().kind, Kind::Closed);
        thread.join().unwrap();
    }
    let (remote, mut peer) = played();
    let thread = std::thread::spawn(move || {
        let mut bytes = [0; HEADER_SIZE];
        peer.read_exact(&mut bytes).unwrap();
        let answer = Header { len: 4096, ..Header::parse(&bytes).unwrap().answer(16) };
        peer.write_all(&answer.encode()).unwrap();
        peer.write_all(&[255; 16]).unwrap();
        peer
    });
    assert_eq!(remote.extents(0, LEN).unwrap_err().kind, Kind::Protocol);
    thread.join().unwrap();
}

#[test]
fn a_client_that_dies_in_a_message_changed_nothing_with_it() {
    let (_file, below) = target();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(theirs.into(), below.clone(), false).unwrap();
    let thread = std::thread::spawn(move || server.serve());
    let mut ours = ours;
    ours.write_all(&Header::request(Op::CopyIn, 1, 0, 8192).encode()).unwrap();
    ours.write_all(&[9; 5000]).unwrap();
    drop(ours);
    let totals = thread.join().unwrap();
    assert_eq!(totals.requests, 0, "{totals:?}");
    assert_eq!(read(&*below, 0, 8192).unwrap(), vec![0; 8192]);
}

#[test]
fn a_header_is_parsed_or_refused_and_gives_its_bytes_back() {
    let mut dice = Dice(2026);
    let mut accepted = 0;
    for _ in 0..60_000 {
        let header = Header {
            version: dice.roll() as u16,
            op: Op::from_number((dice.roll() % 7 + 1) as u16).unwrap(),
            reply: dice.roll().is_multiple_of(2),
            status: (dice.roll() % 16) as u32 * (dice.roll() % 3 / 2) as u32,
            tag: dice.roll() << 20 ^ dice.roll(),
            pfn: Pfn((dice.roll() << 30 ^ dice.roll()) >> (dice.roll() % 64)),
            offset: (dice.roll() % 5000) as u32,
            payload: (dice.roll() >> 12) as u32 >> (dice.roll() % 33).min(31),
            len: dice.roll() >> (dice.roll() % 44),
        };
        let mut bytes = header.encode();
        match (header.check(), Header::parse(&bytes)) {
            (Ok(()), Ok(parsed)) => {
                accepted += 1;
                assert_eq!((parsed, parsed.encode()), (header, bytes));
                assert!(parsed.payload <= PAYLOAD_MAX && parsed.at().checked_add(0).is_some());
            }
            (Err(one), Err(other)) => {
                assert_eq!((one.kind, other.kind), (Kind::Protocol, Kind::Protocol))
            }
            disagree => panic!("{disagree:?}"),
        }
        // One bit off is never taken for a header.
        let bit = (dice.roll() % 512) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::parse(&bytes).is_err());
    }
    assert!(accepted > 3000, "{accepted}");
}

#[test]
fn whatever_comes_over_the_wire_the_server_ends_or_answers() {
    let (_file, below) = target();
    let mut dice = Dice(7);
    for round in 0..300 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let server = Server::new(theirs.into(), below.clone(), round % 2 == 0).unwrap();
        let thread = std::thread::spawn(move || server.serve());
        let mut stream = Vec::new();
        for tag in 0..dice.roll() % 4 + 1 {
            let op = Op::from_number((dice.roll() % 7 + 1) as u16).unwrap();
            let at = dice.roll() >> (dice.roll() % 44);
            let header = Header::request(op, tag, at, dice.roll() % 3000);
            let mut bytes = header.encode();
            if dice.roll().is_multiple_of(4) {
                let at = dice.roll() as usize % HEADER_SIZE;
                bytes[at] = dice.roll() as u8;
            }
            stream.extend(bytes);
            stream.extend((0..header.payload).map(|_| dice.roll() as u8));
        }
        stream.truncate(stream.len() - dice.roll() as usize % 40);
        // The server may be gone before all of it is sent.
        let _ = ours.write_all(&stream);
        ours.shutdown(std::net::Shutdown::Write).unwrap_or(());
        let mut answers = Vec::new();
        let _ = ours.read_to_end(&mut answers);
        let totals = thread.join().unwrap();
        assert!(totals.requests <= 4 && !totals.reason.is_empty());
    }
}

#[test]
fn the_checksum_is_the_known_one() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        assert_eq!((status_of(kind), kind_of(index as u32 + 1)), (index as u32 + 1, Some(kind)));
    }
    assert_eq!((kind_of(0), kind_of(99)), (None, None));
}
