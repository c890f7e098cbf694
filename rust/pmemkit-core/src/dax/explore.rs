//! Power failures at every store, flush and fence of mappings, transactions and snapshots, judged
//! by oracles that know only what was promised; and the proof that the oracles can fail.
#![cfg(test)]
#![allow(clippy::print_stdout)]

use std::sync::Arc;

use super::{Log, LogOptions, Mapping, Options, Plant, Tracking};
use crate::media::crash::{CrashImage, Model, Wanted};
use crate::media::recording::Recording;
use crate::media::{Granularity, Medium};

const ALL: [(Granularity, bool); 4] = [
    (Granularity::Cacheline, false),
    (Granularity::Byte, false),
    (Granularity::Page, false),
    (Granularity::Page, true),
];

type Outcome = Result<u64, String>;

fn soak() -> bool {
    std::env::var("PMEMKIT_SOAK").is_ok_and(|value| value == "1")
}

fn map(medium: Arc<Recording>, plant: Plant) -> Arc<Mapping> {
    let len = medium.len();
    let options = Options { len, tracking: Tracking::Explicit, plant, ..Options::default() };
    Arc::new(Mapping::new(medium, options).unwrap())
}

fn read(mapping: &Mapping, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    // SAFETY: the vector has `len` bytes.
    unsafe { mapping.load(at, bytes.as_mut_ptr(), len) }.unwrap();
    bytes
}

fn copy_persist(mapping: &Mapping, at: u64, data: &[u8]) {
    // SAFETY: a slice is valid for its length.
    unsafe { mapping.copy_persist(at, data.as_ptr(), data.len() as u64) }.unwrap();
}

/// Bytes that differ everywhere from those of other turns.
fn filling(turn: u8, len: u64) -> Vec<u8> {
    (0..len).map(|index| (index as u8 & 0x1f) | turn << 5).collect()
}

// --- transactions --------------------------------------------------------------------------------

const HOME: u64 = 4096;
const AREA: u64 = 4096;

/// What happens to the home bytes.
#[derive(Clone)]
enum Step {
    Commit(Vec<(u64, Vec<u8>)>),
    Copy(u64, Vec<u8>),
}

fn apply(home: &mut [u8], at: u64, data: &[u8]) {
    home[at as usize..][..data.len()].copy_from_slice(data);
}

/// The home bytes before the first step and after each.
fn states(steps: &[Step]) -> Vec<Vec<u8>> {
    let mut states = vec![vec![0; HOME as usize]];
    for step in steps {
        let mut home = states[states.len() - 1].clone();
        match step {
            Step::Commit(changes) => {
                changes.iter().for_each(|(at, data)| apply(&mut home, *at, data));
            }
            Step::Copy(at, data) => apply(&mut home, *at, data),
        }
        states.push(home);
    }
    states
}

struct Transactions {
    steps: Vec<Step>,
    states: Vec<Vec<u8>>,
    options: LogOptions,
    granularity: Granularity,
    torn_pages: bool,
    images: u64,
}

impl Transactions {
    fn open(&self, recording: Arc<Recording>) -> Result<(Arc<Mapping>, Log), String> {
        let mapping = map(recording, Plant::None);
        let log = Log::open(mapping.clone(), HOME, AREA, self.options);
        log.map(|log| (mapping, log)).map_err(|error| error.to_string())
    }

    /// Runs the steps, with a mark before and behind each, on these bytes: none where the area is
    /// to be laid out on the way.
    fn run(&self, initial: &[u8]) -> Arc<Recording> {
        let recording = Arc::new(Recording::new(HOME + AREA, self.granularity, initial).unwrap());
        let (mapping, log) = self.open(recording.clone()).unwrap();
        for (number, step) in (0u64..).zip(&self.steps) {
            recording.mark(2 * number);
            match step {
                Step::Commit(changes) => {
                    let changes: Vec<_> =
                        changes.iter().map(|(at, data)| (*at, data.as_slice())).collect();
                    log.commit(&changes).unwrap();
                }
                Step::Copy(at, data) => copy_persist(&mapping, *at, data),
            }
            recording.mark(2 * number + 1);
        }
        recording
    }

    /// What a failure left is the state before or after the step in flight, and after the last one
    /// that was acknowledged.
    fn judge(&self, mark: Option<u64>, home: &[u8]) -> Result<(), String> {
        let Some(mark) = mark else {
            return if home == self.states[0] { Ok(()) } else { Err("changed early".to_owned()) };
        };
        let (step, acknowledged) = ((mark / 2) as usize, mark % 2 == 1);
        let after = &self.states[step + 1];
        if home == after || (!acknowledged && home == self.states[step]) {
            return Ok(());
        }
        if let (Step::Copy(at, data), false) = (&self.steps[step], acknowledged) {
            // A copy alone may be torn; around it nothing changes.
            let mut patched = home.to_vec();
            apply(&mut patched, *at, data);
            return if &patched == after { Ok(()) } else { Err("changed beside".to_owned()) };
        }
        let first = (0..home.len()).find(|&at| home[at] != after[at]).unwrap_or(0);
        Err(format!("step {step}, acknowledged {acknowledged}: byte {first} is wrong"))
    }

    fn check(&mut self, image: &CrashImage<'_>) -> Result<(), String> {
        self.images += 1;
        let recording = Arc::new(Recording::of(image, self.granularity).unwrap());
        let (mapping, log) = self.open(recording.clone())?;
        let home = read(&mapping, 0, HOME);
        self.judge(image.mark(), &home)?;
        // Recovery may be cut short as well; every seventh one is.
        if log.recovered() > 0 && self.images.is_multiple_of(7) {
            let wanted = Wanted { limit: 12, torn_pages: self.torn_pages, ..Wanted::default() };
            let again = recording.explore().wanted(wanted).run(|image| {
                let recording = Arc::new(Recording::of(image, self.granularity).unwrap());
                let (mapping, log) = self.open(recording)?;
                log.commit(&[(8, &[1; 8])]).map_err(|error| error.to_string())?;
                let mut expected = home.clone();
                apply(&mut expected, 8, &[1; 8]);
                let found = read(&mapping, 0, HOME);
                if found == expected {
                    Ok(())
                } else {
                    Err("recovery was torn".to_owned())
                }
            });
            self.images += again.map_err(|violation| violation.to_string())?;
        }
        Ok(())
    }

    fn explore(self, limit: usize) -> Outcome {
        let recording = self.run(&[]);
        self.walk(&recording, limit)
    }

    fn walk(mut self, recording: &Recording, limit: usize) -> Outcome {
        let wanted = Wanted { limit, torn_pages: self.torn_pages, ..Wanted::default() };
        let walked = recording.explore().wanted(wanted).run(|image| self.check(image));
        walked.map_err(|violation| violation.to_string())?;
        Ok(self.images)
    }
}

/// Small and large ranges, aligned and not, over lines and each other, and a plain store to a range
/// of the transaction before.
fn mixed() -> Vec<Step> {
    let part = |turn, at, len| (at, filling(turn, len));
    vec![
        Step::Commit(vec![part(1, 8, 8), part(1, 1000, 8)]),
        Step::Commit(vec![part(2, 61, 7), part(2, 8, 16), part(2, 3000, 300)]),
        Step::Copy(8, filling(3, 8)),
        Step::Commit(vec![part(4, 1000, 8), part(4, 1004, 100)]),
        Step::Commit(vec![part(5, 4088, 8), part(5, 0, 3)]),
    ]
}

fn transactions(
    steps: Vec<Step>,
    plant: Plant,
    granularity: Granularity,
    torn: bool,
) -> Transactions {
    let options = LogOptions { create: false, id: Some(0x1234_5678_9abc_def0), plant };
    let states = states(&steps);
    Transactions { steps, states, options, granularity, torn_pages: torn, images: 0 }
}

#[test]
fn transactions_are_all_or_nothing_at_every_point() {
    let limit = if soak() { 2000 } else { 60 };
    for (granularity, torn) in ALL {
        let images = transactions(mixed(), Plant::None, granularity, torn).explore(limit).unwrap();
        println!("transactions, {}, torn pages {torn}: {images} images", granularity.name());
        assert!(images > 500, "{images}");
    }
}

/// Every choice of every point: two words in two lines.
#[test]
fn a_small_transaction_is_explored_without_sampling() {
    let steps = vec![Step::Commit(vec![(8, vec![0x11; 8]), (72, vec![0x22; 8])])];
    let run = transactions(steps, Plant::None, Granularity::Cacheline, false);
    let blank = Arc::new(Recording::new(HOME + AREA, Granularity::Cacheline, &[]).unwrap());
    run.open(blank.clone()).unwrap();
    let laid_out = blank.with_model(blank.event_count(), false, Model::durable_image).unwrap();
    let (limit, recording) = (1 << 14, run.run(&laid_out));
    for event in 0..=recording.event_count() {
        let choices = recording.with_model(event, false, Model::count).unwrap();
        assert!(choices <= limit, "{choices} at event {event}");
    }
    let images = run.walk(&recording, limit as usize).unwrap();
    println!("one transaction of two words: {images} images");
    assert!(images > 4000, "{images}");
}

#[test]
fn planted_mistakes_of_transactions_are_caught() {
    let mut missed = Vec::new();
    for plant in Plant::TRANSACTIONS {
        let caught = ALL.iter().find_map(|&(granularity, torn)| {
            transactions(mixed(), plant, granularity, torn).explore(150).err()
        });
        match caught {
            Some(text) => println!("{plant:?}: {text}"),
            None => missed.push(plant),
        }
    }
    assert_eq!(missed, []);
}

// --- persist, copy_persist, sync -----------------------------------------------------------------

const SIZE: u64 = 4096;

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u64, u64),
    View(u64, u64),
    Persist(u64, u64),
    FlushDrain(u64, u64),
    Copy(u64, u64),
    Set(u64, u64),
    Sync,
}

/// Of each byte: the values it had, and which of them may be on media.
struct Bytes {
    values: Vec<Vec<u8>>,
    /// The oldest value that a failure may leave.
    oldest: Vec<usize>,
}

impl Bytes {
    fn store(&mut self, at: u64, data: &[u8]) {
        for (place, value) in (at as usize..).zip(data) {
            self.values[place].push(*value);
        }
    }

    fn durable(&mut self, at: u64, len: u64) {
        for place in at as usize..(at + len) as usize {
            self.oldest[place] = self.values[place].len() - 1;
        }
    }
}

/// How many values each byte had, and the oldest of them that counts.
type Allowed = (Vec<usize>, Vec<usize>);

/// Runs operations; what is allowed at each mark.
fn run_ops(ops: &[Op], plant: Plant, recording: &Arc<Recording>) -> (Bytes, Vec<Allowed>) {
    let mapping = map(recording.clone(), plant);
    let mut bytes = Bytes { values: vec![vec![0]; SIZE as usize], oldest: vec![0; SIZE as usize] };
    let mut allowed = Vec::new();
    let mut pinned = Vec::new();
    for (turn, op) in (0u8..).zip(ops) {
        let data = |len| filling(turn % 7 + 1, len);
        match *op {
            Op::Write(at, len) | Op::View(at, len) | Op::Copy(at, len) => {
                bytes.store(at, &data(len))
            }
            Op::Set(at, len) => bytes.store(at, &vec![turn; len as usize]),
            _ => {}
        }
        let count = |bytes: &Bytes| bytes.values.iter().map(Vec::len).collect::<Vec<_>>();
        allowed.push((count(&bytes), bytes.oldest.clone()));
        recording.mark(allowed.len() as u64 - 1);
        match *op {
            // SAFETY: a vector is valid for its length.
            Op::Write(at, len) => unsafe { mapping.write(at, data(len).as_ptr(), len) }.unwrap(),
            Op::View(at, len) => {
                let address = mapping.pin(at, len, true).unwrap();
                let bytes = data(len);
                // SAFETY: the range is pinned.
                unsafe { bytes.as_ptr().copy_to_nonoverlapping(address, bytes.len()) };
                recording.stored_elsewhere(at, len).unwrap();
                pinned.push((at, len));
            }
            Op::Copy(at, len) => copy_persist(&mapping, at, &data(len)),
            Op::Set(at, len) => mapping.set_persist(at, len, turn).unwrap(),
            Op::Persist(at, len) => mapping.persist(at, len).unwrap(),
            Op::FlushDrain(at, len) => {
                mapping.flush(at, len).and_then(|()| mapping.drain()).unwrap();
            }
            Op::Sync => drop(mapping.sync().unwrap()),
        }
        match *op {
            Op::Copy(at, len)
            | Op::Set(at, len)
            | Op::Persist(at, len)
            | Op::FlushDrain(at, len) => {
                bytes.durable(at, len);
            }
            Op::Sync => bytes.durable(0, SIZE),
            Op::Write(..) | Op::View(..) => {}
        }
        allowed.push((count(&bytes), bytes.oldest.clone()));
        recording.mark(allowed.len() as u64 - 1);
    }
    pinned.iter().for_each(|&(at, len)| mapping.unpin(at, len, true));
    (bytes, allowed)
}

fn explore_ops(ops: &[Op], plant: Plant, granularity: Granularity, torn_pages: bool) -> Outcome {
    let recording = Arc::new(Recording::new(SIZE, granularity, &[]).unwrap());
    let (bytes, allowed) = run_ops(ops, plant, &recording);
    let wanted = Wanted { limit: if soak() { 400 } else { 40 }, torn_pages, ..Wanted::default() };
    let walked = recording.explore().wanted(wanted).run(|image| {
        let Some(mark) = image.mark() else { return Ok(()) };
        let (counts, oldest) = &allowed[mark as usize];
        for (place, value) in image.to_vec().iter().enumerate() {
            if !bytes.values[place][oldest[place]..counts[place]].contains(value) {
                return Err(format!("byte {place} is {value:#x}, which it must not be any more"));
            }
        }
        Ok(())
    });
    walked.map_err(|violation| violation.to_string())
}

fn ops() -> Vec<Op> {
    vec![
        Op::Write(0, 16),
        Op::Write(200, 8),
        Op::Persist(4, 12),
        Op::Copy(60, 24),
        Op::Write(1000, 70),
        Op::Sync,
        Op::Copy(512, 700),
        Op::Write(520, 8),
        Op::View(2048, 40),
        Op::Set(3000, 20),
        Op::Sync,
        Op::Write(4000, 96),
        Op::FlushDrain(4000, 96),
        Op::Set(100, 300),
    ]
}

#[test]
fn what_was_persisted_or_synced_outlives_every_failure() {
    for (granularity, torn) in ALL {
        let images = explore_ops(&ops(), Plant::None, granularity, torn).unwrap();
        println!("mapping, {}, torn pages {torn}: {images} images", granularity.name());
        assert!(images > 80, "{images}");
    }
}

#[test]
fn planted_mistakes_of_mappings_are_caught() {
    let mut missed = Vec::new();
    for plant in Plant::DURABILITY {
        match explore_ops(&ops(), plant, Granularity::Cacheline, false) {
            Err(text) => println!("{plant:?}: {text}"),
            Ok(_) => missed.push(plant),
        }
    }
    assert_eq!(missed, []);
}

// --- snapshots -----------------------------------------------------------------------------------

const PAGE: u64 = 4096;
const PAGES: u64 = 40;

/// Writers go on while the copy is made: the copy is of the moment it began, durable once it is
/// called done; and what the writers persist meanwhile stays.
fn explore_snapshot(plant: Plant, granularity: Granularity, torn_pages: bool) -> Outcome {
    let len = PAGES * PAGE;
    let recording = Arc::new(Recording::new(len, granularity, &[]).unwrap());
    let target = Arc::new(Recording::new(len, granularity, &[]).unwrap());
    let mapping = map(recording.clone(), plant);
    for page in 0..PAGES {
        copy_persist(&mapping, page * PAGE + 16, &filling(1, 8));
    }
    let moment = read(&mapping, 0, len);
    let begun = recording.event_count();
    let fail = |error: crate::error::Error| error.to_string();
    let running = mapping.begin_snapshot(target.clone()).map_err(fail)?;
    let mut written = Vec::new();
    let mut turn = 1;
    loop {
        turn += 1;
        // Behind and before the copier, in a page twice, and over the edge of two pages.
        for at in [16, 38 * PAGE + 16, (turn * 5 % (PAGES - 1) + 1) * PAGE - 4, 17 * PAGE + 16] {
            copy_persist(&mapping, at, &filling(turn as u8, 8));
            written.push((recording.mark(turn), at, filling(turn as u8, 8)));
        }
        if !running.copy_some().map_err(fail)? {
            break;
        }
    }
    running.finish().map_err(fail)?;
    target.mark(1);
    let wanted = || Wanted { limit: 6, torn_pages, ..Wanted::default() };
    let copies = target.explore().wanted(wanted()).run(|image| {
        if image.mark().is_some() && image.to_vec() != moment {
            return Err("the copy is not of the moment it began".to_owned());
        }
        Ok(())
    });
    let last = written.len() - 1;
    let events = recording.event_count();
    let kept = [begun, (begun + events) / 2, events].iter().try_fold(0, |sum, &event| {
        let images = recording.with_model(event, torn_pages, |model| {
            model.images(&wanted(), |image| {
                let durable = written.iter().rfind(|(mark, ..)| *mark < event);
                let newest = durable.is_none_or(|(_, at, data)| {
                    image.to_vec()[*at as usize..][..data.len()] == data[..]
                });
                if newest {
                    Ok(())
                } else {
                    Err("a store was lost meanwhile".to_owned())
                }
            })
        });
        images.map_err(fail)?.map(|images| sum + images as u64)
    })?;
    assert!(last > 3);
    copies.map(|copies| copies + kept).map_err(|violation| violation.to_string())
}

#[test]
fn a_snapshot_is_of_one_moment_and_durable_once_it_is_done() {
    for (granularity, torn) in ALL {
        let images = explore_snapshot(Plant::None, granularity, torn).unwrap();
        println!("snapshot, {}, torn pages {torn}: {images} images", granularity.name());
        assert!(images > 10, "{images}");
    }
}

#[test]
fn planted_mistakes_of_snapshots_are_caught() {
    let mut missed = Vec::new();
    for plant in Plant::SNAPSHOTS {
        match explore_snapshot(plant, Granularity::Page, false) {
            Err(text) => println!("{plant:?}: {text}"),
            Ok(_) => missed.push(plant),
        }
    }
    assert_eq!(missed, []);
}
