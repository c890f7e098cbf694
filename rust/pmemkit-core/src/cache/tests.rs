//! Threads on overlapping blocks, failures below, memory that is not there, and planted mistakes.
//!
//! Every 256 bytes of the device say what they are: a sector number, a version, and a sum of both.
//! A thread writes the sectors of its own residue class and knows their versions; everybody reads
//! everything and accepts no version older than the newest that was acknowledged before.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{flusher::Pressure, Cache, Mode, Options, Plant, BLOCK};
use crate::block::{Caps, Device, Extent, Flags, Info, Op, OpSet, Request, Stack};
use crate::error::{Error, Kind, Result};
use crate::media::Medium;
use crate::sg::Sg;

const SECTOR: usize = 256;

/// A device in memory that remembers, that can be made to fail, and that takes its time.
struct Below {
    info: Info,
    bytes: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
    failing: AtomicBool,
    flushes: AtomicUsize,
    wait: Duration,
    written: Mutex<Vec<(u64, u64, bool)>>,
}

impl Below {
    fn new(size: usize, wait: Duration) -> Arc<Below> {
        let caps = Caps::WRITE | Caps::FLUSH | Caps::FUA | Caps::DISCARD | Caps::ZERO;
        let info = Info {
            size: size as u64,
            block_size_min: SECTOR as u32,
            block_size_preferred: 4096,
            payload_size_max: 1 << 20,
            caps,
            blocking: OpSet::empty(),
            blocking_fua: false,
        };
        Arc::new(Below {
            info,
            bytes: Mutex::new(vec![0; size]),
            durable: Mutex::new(vec![0; size]),
            failing: AtomicBool::new(false),
            flushes: AtomicUsize::new(0),
            wait,
            written: Mutex::default(),
        })
    }

    fn written(&self) -> Vec<(u64, u64, bool)> {
        std::mem::take(&mut self.written.lock().unwrap())
    }
}

impl Device for Below {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        None
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        let (at, end) = (request.at as usize, (request.at + request.len) as usize);
        if !self.wait.is_zero() {
            std::thread::sleep(self.wait);
        }
        if request.op != Op::Read && self.failing.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Media, "write", "it is worn out").at(request.at));
        }
        let mut bytes = self.bytes.lock().unwrap();
        let mut cursor = super::cursor::Cursor::new(request.sg);
        let fua = request.flags.contains(Flags::FUA);
        match request.op {
            // SAFETY: both ranges have that many bytes.
            Op::Read => unsafe { cursor.put(bytes[at..end].as_ptr(), request.len)? },
            Op::Write => {
                // SAFETY: as above.
                unsafe { cursor.get(bytes[at..end].as_mut_ptr(), request.len)? };
                self.written.lock().unwrap().push((request.at, request.len, fua));
            }
            Op::Zero | Op::Discard => bytes[at..end].fill(0),
            Op::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                self.durable.lock().unwrap().copy_from_slice(&bytes);
            }
            Op::Cache => {}
        }
        if fua {
            self.durable.lock().unwrap()[at..end].copy_from_slice(&bytes[at..end]);
        }
        Ok(())
    }

    fn extents(&self, _at: u64, len: u64) -> Result<Vec<Extent>> {
        Ok(vec![Extent { len, hole: true }])
    }

    fn map(&self, _request: &Request<'_>, _out: &mut Sg) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "map", "there is no mapping"))
    }

    fn commit(&self, _request: &Request<'_>) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "commit", "there is no mapping"))
    }

    fn media(&self) -> Vec<Arc<dyn Medium>> {
        Vec::new()
    }
}

/// Nothing by itself: no age, no thresholds, no read-ahead, no look at the machine's memory.
fn quiet(blocks: u64) -> Options {
    Options {
        read_ahead: 0,
        dirty_background: 100,
        dirty_most: 100,
        flush_age: None,
        heed_pressure: false,
        ..Options::new(blocks * BLOCK as u64)
    }
}

fn submit(device: &dyn Device, op: Op, at: u64, bytes: &mut [u8], flags: Flags) -> Result<()> {
    let len = bytes.len() as u64;
    // SAFETY: the bytes outlive the request.
    let sg = unsafe { Sg::host(bytes.as_mut_ptr(), len) };
    device.submit(&Request { op, at, len, flags, sg: &sg })
}

fn write(device: &dyn Device, at: u64, bytes: &[u8]) -> Result<()> {
    submit(device, Op::Write, at, &mut bytes.to_vec(), Flags::empty())
}

fn read(device: &dyn Device, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    submit(device, Op::Read, at, &mut bytes, Flags::empty()).map(|()| bytes)
}

fn ranged(device: &dyn Device, op: Op, at: u64, len: u64) -> Result<()> {
    device.submit(&Request { op, at, len, flags: Flags::empty(), sg: &Sg::new() })
}

fn flush(device: &dyn Device) -> Result<()> {
    ranged(device, Op::Flush, 0, 0)
}

// --- one thread ----------------------------------------------------------------------------------

#[test]
fn it_writes_dirty_lines_only_neighbours_together_and_in_order() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let cache = Cache::new(below.clone(), quiet(64)).unwrap();
    for block in [9u64, 3, 4, 2] {
        write(&cache, block * 4096, &[7; 4096]).unwrap();
    }
    write(&cache, 20 * 4096 + 512, &[8; 256]).unwrap();
    assert!(below.written().is_empty());
    flush(&cache).unwrap();
    let expected = [(8192, 12288, false), (36864, 4096, false), (20 * 4096 + 512, 256, false)];
    assert_eq!(below.written(), expected);
    flush(&cache).unwrap();
    assert!(below.written().is_empty());
    assert_eq!(cache.validate(), Vec::<String>::new());
    let stats = cache.stats();
    assert_eq!((stats.blocks_written, stats.writes, stats.bytes_written), (5, 3, 16640));
    assert_eq!((stats.dirty, below.flushes.load(Ordering::Relaxed)), (0, 2));
}

#[test]
fn fua_and_write_through_reach_media_before_the_answer() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let cache = Cache::new(below.clone(), quiet(64)).unwrap();
    submit(&cache, Op::Write, 4096, &mut [1; 512], Flags::FUA).unwrap();
    assert_eq!(below.written(), [(4096, 512, true)]);
    assert_eq!(below.durable.lock().unwrap()[4096..4608], [1; 512]);
    let through = Options { mode: Mode::WriteThrough, ..quiet(64) };
    let cache = Cache::new(below.clone(), through).unwrap();
    write(&cache, 8192, &[2; 4096]).unwrap();
    assert_eq!(below.written(), [(8192, 4096, false)]);
    assert_eq!(read(&cache, 8192, 4096).unwrap(), [2; 4096]);
    assert_eq!(cache.stats().read_hits, 1);
}

#[test]
fn a_failure_of_media_is_kept_told_and_what_is_dirty_stays_readable() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let stack = Stack::new(below.clone());
    let cache = Arc::new(Cache::new(stack.top().clone(), quiet(8)).unwrap());
    let channel = stack.layer(|_| cache.clone()).channel(false);
    for block in 0..8u64 {
        write(&*cache, block * 4096, &[block as u8 + 1; 4096]).unwrap();
    }
    below.failing.store(true, Ordering::Relaxed);
    let told = channel.submit(&Request {
        op: Op::Flush,
        at: 0,
        len: 0,
        flags: Flags::empty(),
        sg: &Sg::new(),
    });
    assert_eq!(told.unwrap_err().kind, Kind::Media);
    below.failing.store(false, Ordering::Relaxed);
    for error in [
        write(&*cache, 0, &[0; 4096]).unwrap_err(),
        flush(&*cache).unwrap_err(),
        ranged(&*cache, Op::Zero, 0, 8192).unwrap_err(),
        ranged(&*cache, Op::Discard, 0, 8192).unwrap_err(),
    ] {
        assert_eq!((error.kind, error.detail.as_str()), (Kind::Media, "it is worn out"));
    }
    // Reads of what has no room go around it: nothing dirty may leave.
    for block in (0..64u64).chain(0..8) {
        let expected = if block < 8 { block as u8 + 1 } else { 0 };
        assert_eq!(read(&*cache, block * 4096, 4096).unwrap(), [expected; 4096], "block {block}");
    }
    assert_eq!((cache.stats().dirty, cache.validate()), (8, Vec::new()));
    assert_eq!(below.written(), []);
}

#[test]
fn a_failed_eviction_is_told_by_the_next_flush() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let cache = Cache::new(below.clone(), quiet(4)).unwrap();
    for block in 0..4u64 {
        write(&cache, block * 4096, &[5; 4096]).unwrap();
    }
    below.failing.store(true, Ordering::Relaxed);
    // The read needs room, which nobody can make; it is answered all the same.
    assert_eq!(read(&cache, 40960, 4096).unwrap(), [0; 4096]);
    below.failing.store(false, Ordering::Relaxed);
    assert_eq!(flush(&cache).unwrap_err().detail, "it is worn out");
    assert_eq!(read(&cache, 0, 4096).unwrap(), [5; 4096]);
}

#[test]
fn without_memory_it_is_smaller() {
    let below = Below::new(16 << 20, Duration::ZERO);
    let cache = Cache::new(below, Options { plant: Plant::NoMemory, ..quiet(2048) }).unwrap();
    for block in 0..4096u64 {
        write(&cache, block * 4096, &block.to_le_bytes().repeat(512)).unwrap();
    }
    for block in 0..4096u64 {
        assert_eq!(read(&cache, block * 4096, 8).unwrap(), block.to_le_bytes());
    }
    assert_eq!((cache.stats().memory, cache.validate()), (4 << 20, Vec::new()));
}

#[test]
fn it_shrinks_to_nothing_under_pressure_and_grows_back() {
    let below = Below::new(16 << 20, Duration::ZERO);
    let cache = Cache::new(below, quiet(2048)).unwrap();
    let content = |block: u64| block.to_le_bytes().repeat(512);
    for block in 0..2000u64 {
        write(&cache, block * 4096, &content(block)).unwrap();
    }
    let mut before = cache.stats().memory;
    assert_eq!(before, 8 << 20);
    while before > 0 {
        cache.engine.fit(Pressure::High);
        let stats = cache.stats();
        assert!(stats.memory < before && cache.validate().is_empty());
        before = stats.memory;
    }
    for block in 0..2000u64 {
        assert_eq!(read(&cache, block * 4096, 4096).unwrap(), content(block));
    }
    write(&cache, 0, &content(77)).unwrap();
    assert_eq!((cache.stats().blocks, cache.stats().memory), (0, 0));
    (0..16).for_each(|_| cache.engine.fit(Pressure::None));
    for block in 0..2000u64 {
        let expected = content(if block == 0 { 77 } else { block });
        assert_eq!(read(&cache, block * 4096, 4096).unwrap(), expected);
    }
    assert_eq!((cache.stats().memory, cache.validate()), (8 << 20, Vec::new()));
}

#[test]
fn what_is_old_or_much_goes_to_media_by_itself() {
    let below = Below::new(4 << 20, Duration::ZERO);
    let aged = Options { flush_age: Some(Duration::from_millis(200)), ..quiet(512) };
    let crowded = Options { dirty_background: 10, ..quiet(512) };
    for (options, left) in [(aged, 0), (crowded, 51)] {
        let cache = Cache::new(below.clone(), options).unwrap();
        for block in 0..300u64 {
            write(&cache, block * 4096, &[1; 4096]).unwrap();
        }
        while cache.stats().dirty > left {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(cache.validate(), Vec::<String>::new());
    }
}

#[test]
fn a_stream_is_read_ahead_and_a_scan_does_not_push_out_what_is_used() {
    let below = Below::new(16 << 20, Duration::ZERO);
    let cache = Cache::new(below, Options { read_ahead: 32, ..quiet(1024) }).unwrap();
    for _ in 0..4 {
        (0..50u64).for_each(|block| drop(read(&cache, block * 4096, 4096)));
    }
    let before = cache.stats();
    (100..4000u64).for_each(|block| drop(read(&cache, block * 4096, 4096)));
    let scanned = cache.stats();
    assert!(scanned.reads - before.reads < 3900 / 20, "{scanned:?}");
    assert!(scanned.blocks_ahead > 3000);
    (0..50u64).for_each(|block| drop(read(&cache, block * 4096, 4096)));
    assert_eq!(cache.stats().read_hits - scanned.read_hits, 50);
}

#[test]
fn dropping_it_flushes() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let cache = Cache::new(below.clone(), quiet(16)).unwrap();
    write(&cache, 512, &[9; 256]).unwrap();
    drop(cache);
    assert_eq!(below.durable.lock().unwrap()[512..768], [9; 256]);
}

#[test]
fn units_that_do_not_fit_are_refused_and_so_are_senseless_options() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let mut large = Below::new(1 << 20, Duration::ZERO);
    Arc::get_mut(&mut large).unwrap().info.block_size_min = 8192;
    let error = Cache::new(large, quiet(16)).err().unwrap();
    assert_eq!(error.detail, "units of 8192 bytes do not fit into blocks of 4096");
    for options in [
        Options::new(4095),
        Options::new(u64::MAX),
        Options { dirty_background: 95, dirty_most: 94, ..quiet(16) },
        Options { dirty_background: 101, dirty_most: 101, ..quiet(16) },
    ] {
        assert_eq!(Cache::new(below.clone(), options).err().map(|e| e.kind), Some(Kind::Invalid));
    }
}

// --- many threads --------------------------------------------------------------------------------

fn stamp(sector: u64, version: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let words = [sector, version, sector.wrapping_mul(31) ^ version];
    for (place, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&words[place % 3].to_le_bytes());
    }
    bytes
}

/// The version of a sector that was read; a mixture is an error.
fn version_of(sector: u64, bytes: &[u8]) -> std::result::Result<u64, String> {
    let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    if bytes == [0; SECTOR] || bytes == stamp(sector, version) {
        return Ok(version);
    }
    Err(format!("sector {sector} is torn: {:x?}", &bytes[..32]))
}

/// A trial: a device, threads on it, and what each sector's newest acknowledged version is.
struct Trial {
    below: Arc<Below>,
    cache: Cache,
    acknowledged: Vec<AtomicU64>,
    threads: u64,
}

struct Choice(u64);

impl Choice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % most
    }
}

impl Trial {
    fn new(options: Options, threads: u64, wait: Duration, blocks: usize) -> Trial {
        let size = blocks * 4096 + 1024;
        let below = Below::new(size, wait);
        let acknowledged = (0..size / SECTOR).map(|_| AtomicU64::new(0)).collect();
        let cache = Cache::new(below.clone(), options).unwrap();
        Trial { below, cache, acknowledged, threads }
    }

    /// Reads a range and judges each sector of it.
    fn look(&self, at: u64, count: u64) -> std::result::Result<(), String> {
        let range = at as usize..(at + count) as usize;
        let before = self.acknowledged[range].iter().map(|each| each.load(Ordering::SeqCst));
        let before: Vec<u64> = before.collect();
        let bytes = read(&self.cache, at * SECTOR as u64, count as usize * SECTOR)
            .map_err(|error| error.to_string())?;
        for (place, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            let version = version_of(at + place as u64, sector)?;
            if version < before[place] {
                let (sector, newest) = (at + place as u64, before[place]);
                return Err(format!("sector {sector} is of version {version}, not {newest}"));
            }
        }
        Ok(())
    }

    /// Durable is what was acknowledged before a flush.
    fn look_at_media(&self, known: &[u64], thread: u64) -> std::result::Result<(), String> {
        let durable = self.below.durable.lock().unwrap();
        for (sector, newest) in known.iter().enumerate() {
            if sector as u64 % self.threads == thread {
                let bytes = &durable[sector * SECTOR..][..SECTOR];
                let version = version_of(sector as u64, bytes)?;
                if version < *newest {
                    return Err(format!("sector {sector}: {version} is durable, not {newest}"));
                }
            }
        }
        Ok(())
    }

    fn one_thread(&self, thread: u64, steps: u64, seed: u64) -> std::result::Result<(), String> {
        let mut choose = Choice(seed * 1_000_003 + thread + 1);
        let sectors = self.acknowledged.len() as u64;
        let mut version = 0;
        let said = |error: Error| error.to_string();
        for _ in 0..steps {
            let at = choose.below(sectors);
            let count = (1 + choose.below(40)).min(sectors - at);
            match choose.below(16) {
                0..=6 => self.look(at, count)?,
                7..=13 => {
                    version += 1;
                    let mine = at / self.threads * self.threads + thread;
                    if mine >= sectors {
                        continue;
                    }
                    let fua = if choose.below(8) == 0 { Flags::FUA } else { Flags::empty() };
                    let place = mine * SECTOR as u64;
                    let mut bytes = stamp(mine, version);
                    submit(&self.cache, Op::Write, place, &mut bytes, fua).map_err(said)?;
                    self.acknowledged[mine as usize].store(version, Ordering::SeqCst);
                    if !fua.is_empty() {
                        let durable = self.below.durable.lock().unwrap();
                        let bytes = &durable[place as usize..][..SECTOR];
                        if version_of(mine, bytes)? != version {
                            return Err(format!("sector {mine} with FUA is not durable"));
                        }
                    }
                }
                14 => ranged(&self.cache, Op::Cache, at * SECTOR as u64, 4096.min(count * 256))
                    .map_err(said)?,
                _ => {
                    let known: Vec<u64> =
                        self.acknowledged.iter().map(|each| each.load(Ordering::SeqCst)).collect();
                    flush(&self.cache).map_err(said)?;
                    self.look_at_media(&known, thread)?;
                }
            }
        }
        Ok(())
    }

    /// Lets the threads go at it; gives the first thing that is wrong.
    fn run(&self, steps: u64, seed: u64) -> std::result::Result<(), String> {
        let found = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| scope.spawn(move || self.one_thread(thread, steps, seed)))
                .collect();
            let end = |_| Err("a thread panicked".to_owned());
            let ended = threads.into_iter().map(|thread| thread.join().unwrap_or_else(end));
            ended.collect::<Vec<_>>()
        });
        found.into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
        self.look(0, self.acknowledged.len() as u64)?;
        flush(&self.cache).map_err(|error| error.to_string())?;
        let wrong = self.cache.validate();
        if !wrong.is_empty() || self.cache.stats().dirty != 0 {
            return Err(format!("{wrong:?}, {:?}", self.cache.stats()));
        }
        let known: Vec<u64> =
            self.acknowledged.iter().map(|each| each.load(Ordering::SeqCst)).collect();
        (0..self.threads).try_for_each(|thread| self.look_at_media(&known, thread))
    }
}

fn settings() -> [Options; 5] {
    let age = Some(Duration::from_millis(100));
    [
        quiet(6),
        Options { mode: Mode::WriteThrough, ..quiet(6) },
        Options { read_ahead: 8, dirty_background: 20, dirty_most: 50, ..quiet(24) },
        Options { flush_age: age, read_ahead: 4, ..quiet(1) },
        Options { flush_age: age, ..quiet(4096) },
    ]
}

fn steps() -> u64 {
    if std::env::var_os("PMEMKIT_SOAK").is_some() {
        40_000
    } else {
        2_500
    }
}

#[test]
fn threads_on_the_same_blocks_read_nothing_old_or_torn() {
    for (number, options) in settings().into_iter().enumerate() {
        let trial = Trial::new(options, 3, Duration::ZERO, 48);
        trial.run(steps(), 7 + number as u64).unwrap();
    }
}

#[test]
fn media_that_take_their_time_change_nothing() {
    for (number, options) in settings().into_iter().enumerate() {
        let trial = Trial::new(options, 4, Duration::from_micros(20), 48);
        trial.run(steps() / 12, 70 + number as u64).unwrap();
    }
}

#[test]
fn planted_mistakes_are_seen() {
    for plant in Plant::MISTAKES {
        if plant == Plant::ZeroLeavesBlocks {
            continue;
        }
        let seen = (0..60).any(|seed| {
            let (blocks, device) = match plant {
                Plant::FlushForgetsShard => (4096, 48),
                Plant::NoClaimInFill => (3, 5),
                _ => (6, 48),
            };
            let options = Options { plant, ..quiet(blocks) };
            let trial = Trial::new(options, 4, Duration::from_micros(30), device);
            trial.run(400, seed).is_err()
        });
        assert!(seen, "{plant:?}");
    }
}

#[test]
fn a_block_that_was_zeroed_below_does_not_come_back() {
    for (plant, expected) in [(Plant::None, 0), (Plant::ZeroLeavesBlocks, 3)] {
        for op in [Op::Zero, Op::Discard] {
            let below = Below::new(1 << 20, Duration::ZERO);
            let cache = Cache::new(below, Options { plant, ..quiet(16) }).unwrap();
            write(&cache, 4096, &[3; 8192]).unwrap();
            ranged(&cache, op, 4096 - 256, 8192).unwrap();
            assert_eq!(read(&cache, 4096, 4096).unwrap(), [expected; 4096]);
            // The second block was covered in part: zeroed, it is zero; discarded, it is kept.
            let kept = if op == Op::Zero { 0 } else { 3 };
            assert_eq!(read(&cache, 8192, 4096 - 256).unwrap(), [kept; 4096 - 256]);
            assert_eq!(read(&cache, 12288 - 256, 256).unwrap(), [3; 256]);
        }
    }
}

#[test]
fn holes_are_where_neither_media_nor_the_cache_have_data() {
    let below = Below::new(1 << 20, Duration::ZERO);
    let cache = Cache::new(below, quiet(16)).unwrap();
    write(&cache, 3 * 4096, &[1; 4096]).unwrap();
    write(&cache, 5 * 4096 + 256, &[1; 256]).unwrap();
    let runs = |at, len| -> Vec<(u64, bool)> {
        let found = cache.extents(at, len).unwrap();
        found.into_iter().map(|extent| (extent.len, extent.hole)).collect()
    };
    let whole = [(12288, true), (4096, false), (4096, true), (4096, false), (8192, true)];
    assert_eq!(runs(0, 8 * 4096), whole);
    assert_eq!(runs(3 * 4096 + 256, 512), [(512, false)]);
    assert_eq!(runs(1, 100), [(100, true)]);
}
