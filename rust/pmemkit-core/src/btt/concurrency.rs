//! Requests at the same time: a read that is interrupted by writes, and eight threads.
//!
//! Invariants:
//! 1. A violation is one of the engine: a sector that is not one write, or a write that another one
//!    had replaced for certain before the read began. Writes that overlap may end in any order.
//! 2. A test ends by itself: no thread waits for another but through the engine.
//!
//! What this does not do: try every interleaving (`model`), lose power (`explore`).
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::engine::{impersonate, Arena, Options};
use super::explore::checker::Checker;
use super::fixture::{fresh, geometry, ranged, read_into, recording, soak, write, Dice};
use super::sync::LINES;
use super::{Btt, Geometry, Levelling, Plant, Victim, NORMAL, ZERO};
use crate::block::Op;
use crate::error::Result;
use crate::media::crash::Wanted;
use crate::media::{Extent, Granularity, Mapped, Medium, Store};
use crate::sg::{RegionId, Segment};

/// An arena in memory that threads share.
fn arena(geometry: &Geometry) -> Arc<Mapped> {
    let image = fresh(geometry);
    let medium = Mapped::anonymous(image.len() as u64, false).unwrap();
    // SAFETY: the image has these bytes.
    unsafe { medium.store(0, image.as_ptr(), image.len() as u64, Store::Auto).unwrap() };
    Arc::new(medium)
}

const SECTOR: u64 = 4096;
/// The sector that is read.
const READ: u64 = 3;

fn round_in(bytes: &[u8]) -> Option<u64> {
    bytes.iter().all(|byte| *byte == bytes[0]).then_some(u64::from(bytes[0]))
}

/// What a medium does in between, once armed.
type Action = Box<dyn Fn() + Send + Sync>;

/// A medium on which something happens in the middle of each copy of a sector, or before a fence.
struct Interrupted {
    inner: Arc<dyn Medium>,
    armed: AtomicBool,
    in_load: OnceLock<Action>,
    before_fence: OnceLock<Action>,
}

impl Interrupted {
    fn new(inner: Arc<dyn Medium>) -> Arc<Interrupted> {
        let (in_load, before_fence) = (OnceLock::new(), OnceLock::new());
        Arc::new(Interrupted { inner, armed: AtomicBool::new(false), in_load, before_fence })
    }

    /// Not while it happens already.
    fn interrupt(&self, action: &OnceLock<Action>) {
        if self.armed.swap(false, Ordering::Relaxed) {
            if let Some(action) = action.get() {
                action();
            }
            self.armed.store(true, Ordering::Relaxed);
        }
    }
}

impl Medium for Interrupted {
    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        let half = len / 2;
        // SAFETY: the caller's promise, for each half.
        unsafe {
            self.inner.load(at, target, half)?;
            self.interrupt(&self.in_load);
            self.inner.load(at + half, target.add(half as usize), len - half)
        }
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, how: Store) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.store(at, source, len, how) }
    }

    fn region(&self) -> RegionId {
        self.inner.region()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn granularity(&self) -> Granularity {
        self.inner.granularity()
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        self.inner.zero(at, len)
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        self.inner.load_u64(at)
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        self.inner.store_u64(at, value)
    }

    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()> {
        self.inner.stored_elsewhere(at, len)
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        self.inner.flush(at, len)
    }

    fn fence(&self) {
        self.interrupt(&self.before_fence);
        self.inner.fence();
    }

    fn persist(&self, at: u64, len: u64) -> Result<()> {
        self.inner.persist(at, len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn punch(&self, at: u64, len: u64) -> Result<bool> {
        self.inner.punch(at, len)
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        self.inner.extents(at, len)
    }

    fn address(&self, segment: &Segment) -> Result<*mut u8> {
        self.inner.address(segment)
    }

    fn resize(&self, len: u64) -> Result<()> {
        self.inner.resize(len)
    }
}

/// Reads a sector that is written three times in the middle of each copy: with two lanes its block
/// would be used again at once. The reader looks without a trace first, and says what it reads
/// after that; it must find one write, whole, and none older than the last before it began.
pub fn interrupted_reads(
    plant: Plant,
    levelling: Option<Levelling>,
) -> std::result::Result<(), String> {
    let geometry = geometry(SECTOR as u32, 8, 2);
    let medium = Interrupted::new(arena(&geometry));
    let options = Options { plant, levelling, ..Options::default() };
    let device = Arc::new(Btt::open(medium.clone(), &[geometry], options).unwrap());
    let round = Arc::new(AtomicU64::new(0));
    let write_next = {
        let (device, round) = (Arc::downgrade(&device), round.clone());
        move || {
            let next = round.fetch_add(1, Ordering::Relaxed) + 1;
            let device = Weak::upgrade(&device).unwrap();
            write(&device, READ * SECTOR, &[next as u8; SECTOR as usize]).unwrap();
        }
    };
    let thrice = write_next.clone();
    let action = move || (0..3).for_each(|_| thrice());
    assert!(medium.in_load.set(Box::new(action)).is_ok());
    let mut buffer = [0; SECTOR as usize];
    for _ in 0..8 {
        write_next();
        let acknowledged = round.load(Ordering::Relaxed);
        medium.armed.store(true, Ordering::Relaxed);
        let result = read_into(&device, READ * SECTOR, &mut buffer);
        medium.armed.store(false, Ordering::Relaxed);
        result.map_err(|error| error.to_string())?;
        match round_in(&buffer) {
            None => return Err(format!("torn sector of write {}", buffer[0])),
            Some(found) if found < acknowledged => {
                return Err(format!("write {found} was read after write {acknowledged}"))
            }
            Some(_) => {}
        }
    }
    let wrong = device.validate().map_err(|error| error.to_string())?;
    wrong.into_iter().next().map_or(Ok(()), Err)
}

// --- eight threads -------------------------------------------------------------------------------

const SECTORS: u64 = 12;
const WRITERS: usize = 4;
const READERS: usize = 4;
/// Fewer than writers, so that lanes are waited for.
const LANES: u32 = 3;

/// What a write under way may have: at least this stamp, in these sectors.
#[derive(Clone, Copy)]
struct Under {
    stamp: u64,
    first: u64,
    count: u64,
}

impl Under {
    const NONE: u64 = u64::MAX;

    fn word(self) -> u64 {
        self.stamp << 16 | self.first << 8 | self.count
    }

    fn of(word: u64) -> Option<Under> {
        let (stamp, first, count) = (word >> 16, word >> 8 & 0xff, word & 0xff);
        (word != Under::NONE).then_some(Under { stamp, first, count })
    }
}

/// What writers and readers know of each other. Each write has a stamp of one clock.
struct Shared {
    clock: AtomicU64,
    under: [AtomicU64; WRITERS],
    /// No read that begins now may find an older stamp in this sector.
    floor: [AtomicU64; SECTORS as usize],
    stop: AtomicBool,
    counts: [AtomicU64; 2],
}

/// Words of a sector that say who wrote it when, in each of them.
fn fill(sector: &mut [u8], head: u64) {
    for (place, word) in sector.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_at(head, place as u64).to_le_bytes());
    }
}

fn word_at(head: u64, place: u64) -> u64 {
    let mixed = (head ^ place << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    if place == 0 {
        head
    } else {
        mixed ^ mixed >> 31
    }
}

impl Shared {
    fn writer(&self, device: &Btt, writer: usize, size: u64) {
        let mut dice = Dice(writer as u64 + 1);
        while !self.stop.load(Ordering::Relaxed) {
            let first = dice.roll(SECTORS);
            let count = 1 + dice.roll((SECTORS - first).min(4));
            // Published before the stamp is drawn: whoever does not see this has an older stamp.
            let stamp = self.clock.load(Ordering::SeqCst);
            self.under[writer].store(Under { stamp, first, count }.word(), Ordering::SeqCst);
            let stamp = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
            let floors: Vec<u64> =
                (first..first + count).map(|sector| self.oldest(sector, stamp)).collect();
            let mut data = vec![0; (count * size) as usize];
            for (sector, bytes) in (first..).zip(data.chunks_mut(size as usize)) {
                fill(bytes, stamp << 16 | (writer as u64) << 8 | sector);
            }
            write(device, first * size, &data).unwrap();
            for (sector, floor) in (first..).zip(floors) {
                self.floor[sector as usize].fetch_max(floor, Ordering::SeqCst);
            }
            self.under[writer].store(Under::NONE, Ordering::SeqCst);
            self.counts[0].fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The oldest stamp that a sector may show once a write that begins now is acknowledged: that
    /// of a write which is under way now may overtake it.
    fn oldest(&self, sector: u64, stamp: u64) -> u64 {
        let under = self.under.iter().filter_map(|each| Under::of(each.load(Ordering::SeqCst)));
        let there = under.filter(|each| (each.first..each.first + each.count).contains(&sector));
        there.map(|each| each.stamp).fold(stamp, u64::min)
    }

    fn reader(&self, device: &Btt, reader: usize, size: u64) {
        let mut dice = Dice(reader as u64 + 77);
        let mut bytes = vec![0; size as usize];
        while !self.stop.load(Ordering::Relaxed) {
            let sector = dice.roll(SECTORS);
            let floor = self.floor[sector as usize].load(Ordering::SeqCst);
            read_into(device, sector * size, &mut bytes).unwrap();
            let words =
                bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
            let words: Vec<u64> = words.collect();
            let head = words[0];
            let whole = if head == 0 {
                words.iter().all(|word| *word == 0)
            } else {
                let right = |(place, word): (usize, &u64)| *word == word_at(head, place as u64);
                head & 0xff == sector && words.iter().enumerate().all(right)
            };
            assert!(whole, "sector {sector} is torn, or another's: {:x?}", &words[..4]);
            let stamp = head >> 16;
            assert!(
                stamp >= floor,
                "sector {sector} shows write {stamp}, {floor} was acknowledged"
            );
            self.counts[1].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Ends a test on all threads when one of them fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writers write the same sectors, some at a time; whoever reads finds one write, whole, and none
/// that is older than one which was acknowledged before.
#[test]
fn eight_threads_find_no_torn_and_no_stale_sector() {
    let seconds = if soak() { 30.0 } else { 1.0 };
    for sector_size in [512, 4096] {
        eight_threads(sector_size, None, seconds);
    }
}

/// The same where many of the writes move other sectors, and those other ones are written and read.
#[test]
fn eight_threads_find_none_where_sectors_are_moved() {
    let seconds = if soak() { 30.0 } else { 0.5 };
    for (sector_size, victim) in [(512, Victim::LeastWorn), (4096, Victim::Random)] {
        let levelling = Levelling { period: 2, victim, seed: 1 };
        eight_threads(sector_size, Some(levelling), seconds);
    }
}

fn eight_threads(sector_size: u32, levelling: Option<Levelling>, seconds: f64) {
    let geometry = geometry(sector_size, SECTORS as u32, LANES);
    let options = Options { levelling, ..Options::default() };
    let device = Btt::open(arena(&geometry), &[geometry], options).unwrap();
    let shared = Shared {
        clock: AtomicU64::new(1),
        under: std::array::from_fn(|_| AtomicU64::new(Under::NONE)),
        floor: std::array::from_fn(|_| AtomicU64::new(0)),
        stop: AtomicBool::new(false),
        counts: [AtomicU64::new(0), AtomicU64::new(0)],
    };
    let size = u64::from(sector_size);
    std::thread::scope(|scope| {
        let (shared, device) = (&shared, &device);
        for number in 0..WRITERS.max(READERS) {
            scope.spawn(move || {
                let _stop = StopAtEnd(&shared.stop);
                shared.writer(device, number, size);
            });
            scope.spawn(move || {
                let _stop = StopAtEnd(&shared.stop);
                shared.reader(device, number, size);
            });
        }
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < until && !shared.stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        shared.stop.store(true, Ordering::Relaxed);
    });
    let [written, read] = shared.counts.map(AtomicU64::into_inner);
    let moved: u64 = device.arenas().map(Arena::relocations).sum();
    println!("sectors of {sector_size}: {written} written, {moved} moved, {read} read");
    assert!(written > 0 && read > 0 && (moved > 0) == levelling.is_some());
    assert_eq!(device.validate().unwrap(), Vec::<String>::new());
}

/// While a relocation copies its victim, another thread writes that one. It is waited for a while:
/// it must wait itself until the victim has its place, and be what is read afterwards.
pub fn interrupted_relocations(plant: Plant) -> std::result::Result<(), String> {
    let geometry = geometry(SECTOR as u32, 2, 2);
    let medium = Interrupted::new(arena(&geometry));
    let levelling = Some(Levelling { period: 1, victim: Victim::Random, seed: 1 });
    let options = Options { plant, levelling, ..Options::default() };
    let device = Arc::new(Btt::open(medium.clone(), &[geometry], options).unwrap());
    write(&device, SECTOR, &[1; SECTOR as usize]).unwrap();
    let (under_way, weak) = (Arc::new(Mutex::new(Vec::new())), Arc::downgrade(&device));
    let threads = under_way.clone();
    let action = move || {
        let device = Weak::upgrade(&weak).unwrap();
        let thread = std::thread::spawn(move || {
            write(&device, SECTOR, &[2; SECTOR as usize]).unwrap();
        });
        let until =
            Instant::now() + Duration::from_millis(if plant == Plant::None { 5 } else { 5_000 });
        while !thread.is_finished() && Instant::now() < until {
            std::thread::yield_now();
        }
        threads.lock().unwrap().push(thread);
    };
    assert!(medium.in_load.set(Box::new(action)).is_ok());
    let mut buffer = [0; SECTOR as usize];
    for _ in 0..8 {
        write(&device, SECTOR, &[1; SECTOR as usize]).unwrap();
        medium.armed.store(true, Ordering::Relaxed);
        write(&device, 0, &[3; SECTOR as usize]).unwrap();
        medium.armed.store(false, Ordering::Relaxed);
        let threads = std::mem::take(&mut *under_way.lock().unwrap());
        let newest = if threads.is_empty() { 1 } else { 2 };
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        read_into(&device, SECTOR, &mut buffer).map_err(|error| error.to_string())?;
        if buffer != [newest; SECTOR as usize] {
            return Err(format!("{} was read, {newest} was acknowledged", buffer[0]));
        }
    }
    Ok(())
}

#[test]
fn a_sector_that_is_written_while_it_is_moved_is_not_lost() {
    interrupted_relocations(Plant::None).unwrap();
}

#[test]
fn a_read_that_writes_interrupt_is_whole() {
    interrupted_reads(Plant::None, None).unwrap();
    let levelling = Levelling { period: 1, victim: Victim::Random, seed: 1 };
    interrupted_reads(Plant::None, Some(levelling)).unwrap();
}

fn as_thread(number: usize, job: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            impersonate(number);
            job();
        });
    });
}

/// Two lines of the map share a lock. One thread moves a sector of the first line; another zeroes
/// one of the second, and before its last fence a third moves the sector of the first line on.
/// Recovery in one pass over the lanes must find the second move.
#[test]
fn a_lock_of_two_lines_does_not_forget_the_first() {
    let geometry = geometry(4096, 16 * LINES as u32 + 1, 3);
    let other = 16 * LINES as u64;
    let recording = recording(&fresh(&geometry), Granularity::Cacheline);
    let medium = Interrupted::new(recording.clone());
    let device = Arc::new(Btt::open(medium.clone(), &[geometry], Options::default()).unwrap());
    as_thread(1, || write(&device, 0, &[1; SECTOR as usize]).unwrap());
    let (weak, log) = (Arc::downgrade(&device), recording.clone());
    let action = move || {
        let zeroed = log.load_u64(geometry.word_at(other as u32)).unwrap() as u32 & NORMAL == ZERO;
        if zeroed {
            let device = Weak::upgrade(&weak).unwrap();
            as_thread(0, || write(&device, 0, &[2; SECTOR as usize]).unwrap());
            log.mark(1);
        }
    };
    assert!(medium.before_fence.set(Box::new(action)).is_ok());
    medium.armed.store(true, Ordering::Relaxed);
    as_thread(2, || ranged(&device, Op::Zero, other * SECTOR, SECTOR).unwrap());
    let moved = recording.load_u64(geometry.word_at(0)).unwrap() as u32;
    let checker = Checker { geometry: &geometry, poisoned: false };
    let metadata = (geometry.mapoff, recording.len() - geometry.mapoff);
    let wanted = Wanted { only: Some(vec![metadata]), ..Wanted::default() };
    let mut images = 0;
    for event in 0..=recording.event_count() {
        let asked = recording.with_model(event, false, |model| {
            model.images(&wanted, |image| {
                if image.mark() != Some(1) {
                    return Ok(());
                }
                images += 1;
                let map = checker.linux(&image.to_vec()[geometry.mapoff as usize..])?;
                let lost = format!("after {event} events: {:#x}, not {moved:#x}", map[0]);
                (map[0] == moved).then_some(()).ok_or(lost)
            })
        });
        asked.unwrap().unwrap();
    }
    assert!(images > 1);
}
