//! Every image that a power failure could leave of a sequence of operations, opened and checked.
//!
//! An [`Explorer`] carries operations out on a recording, each by the worker thread that it names,
//! with a mark before and after each. Then it visits each point between two stores, flushes and
//! fences, and there each choice of what got to media. Reductions, which keep every outcome:
//! 1. Recovery reads the log and the map and nothing else, so these are chosen first, exhaustively
//!    up to [`IMAGES_AT_A_POINT`]. A line of data is chosen only where a sector leads to it after
//!    recovery: nobody reads the others. An engine without faults never leaves such a line open.
//! 2. An image that was seen before, with the same demands on it, is not opened again. The hash is
//!    made of the words that differ from the image before the sequence, so that an image that is
//!    not opened is not put together either.
//! 3. The closer look of [`Explorer::write_on`] is for each state of log and map, not each image.
//!
//! Invariants:
//! 1. The same sequence gives the same images: workers work one after the other, under numbers that
//!    do not depend on the process.
//! 2. What a sector holds says which operation wrote which sector.
//!
//! What this does not do: operations at the same time (`concurrency` and `model` have that).

pub mod checker;
mod sequences;
mod tests;
mod workers;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::engine::Options;
use super::fixture::{fresh, geometry, open, ranged, recording, write};
use super::geometry::Geometry;
use super::{Btt, ERROR, MAP_MASK, NORMAL};
use crate::block::Op;
use crate::media::crash::{CrashImage, Event, Model, Wanted};
use crate::media::recording::Recording;
use crate::media::Granularity;
use checker::Checker;
use workers::Workers;

/// Images at one crash point; where there are more, they are sampled.
const IMAGES_AT_A_POINT: usize = 4096;
/// Choices of data for one state of log and map.
const IMAGES_OF_DATA: usize = 64;
/// Bytes that are compared at once.
const CHUNK: usize = 512;
const SECTORS: u32 = 20;
const LANES: u32 = 3;
/// What a sector shows that cannot be read.
const IN_ERROR: u64 = u64::MAX;
/// How a violation begins that only an interrupted recovery shows.
const INTERRUPTED: &str = "recovery was interrupted: ";
/// What bad media hold, until they are written.
const POISON: u8 = 0xbb;

/// One operation of a sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Step {
    /// The worker.
    thread: usize,
    op: Op,
    /// The first sector.
    first: u32,
    /// How many.
    count: u32,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, last) = (self.op.name(), self.first + self.count - 1);
        write!(f, "{name} {}..={last} by {}", self.first, self.thread)
    }
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
struct Setting {
    /// Bytes of a sector, with metadata.
    sector_size: u32,
    /// Of the media.
    granularity: Granularity,
    /// With `page`: sectors of 512 bytes of a page may be of different age.
    torn_pages: bool,
    /// How the engine is opened.
    options: Options,
    /// Write every sector before the sequence, so that log and map are in use, and lose power at
    /// once: the last entries of the map are in the log only, and recovery has something to do.
    warm: bool,
    /// Put a sector into the error state before the sequence.
    in_error: Option<u32>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    sequences: u64,
    /// Crash points.
    points: u64,
    /// Points with so many choices that they were sampled.
    sampled: u64,
    /// Choices at all points, before those that give equal bytes are merged.
    possible: u64,
    /// Images that were reached: of a sequence, a point and a choice.
    images: u64,
    /// Images of interrupted recoveries.
    recoveries: u64,
    /// Different ones among both; each of them was opened and checked.
    distinct: u64,
    /// Different states of log and map that were written to afterwards.
    states: u64,
}

impl Report {
    fn add(&mut self, other: &Report) {
        self.sequences += other.sequences;
        self.points += other.points;
        self.sampled += other.sampled;
        self.possible = self.possible.saturating_add(other.possible);
        self.images += other.images;
        self.recoveries += other.recoveries;
        self.distinct += other.distinct;
        self.states += other.states;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sequences, {} crash points ({} sampled): {} choices possible, {} images reached; \
             {} images of interrupted recoveries; {} distinct images opened and checked; {} states \
             written on",
            self.sequences,
            self.points,
            self.sampled,
            self.possible,
            self.images,
            self.recoveries,
            self.distinct,
            self.states
        )
    }
}

/// What an image must show: each sector the one or the other.
struct Demand {
    before: Vec<u64>,
    after: Vec<u64>,
    hash: u64,
}

/// An image on its way to the checker.
struct Image {
    bytes: Vec<u8>,
    hash: u64,
}

/// What is certainly on media at a point.
struct Durable {
    bytes: Vec<u8>,
    hash: u64,
}

/// Explores sequences in one setting.
struct Explorer {
    setting: Setting,
    geometry: Geometry,
    workers: Workers,
    /// The image before a sequence, and the operation that its sectors show.
    initial: Vec<u8>,
    base: u64,
    seen: HashSet<u64>,
    states: HashSet<u64>,
    report: Report,
}

/// What a sector holds: the operation (0 for none) and the sector, in each word.
fn word_of(step: u64, sector: u32) -> u64 {
    if step == 0 {
        0
    } else {
        (step << 32) | u64::from(sector + 1)
    }
}

fn content(geometry: &Geometry, step: u64, sector: u32) -> Vec<u8> {
    word_of(step, sector).to_le_bytes().repeat(geometry.sector_size() as usize / 8)
}

fn word_in(bytes: &[u8], at: u64) -> u64 {
    let mut word = [0; 8];
    let end = bytes.len().min(at as usize + 8);
    word[..end - at as usize].copy_from_slice(&bytes[at as usize..end]);
    u64::from_le_bytes(word)
}

fn mix(at: u64, value: u64) -> u64 {
    let mut mixed = (at ^ value.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 32) ^ value).wrapping_mul(0xd6e8_feb8_6659_fd93);
    mixed ^ (mixed >> 32)
}

impl Explorer {
    fn new(setting: Setting) -> Explorer {
        let geometry = geometry(setting.sector_size, SECTORS, LANES);
        let workers = Workers::new(2);
        let initial = prepare(&setting, &geometry, &workers);
        Explorer {
            setting,
            geometry,
            workers,
            initial,
            base: u64::from(setting.warm),
            seen: HashSet::new(),
            states: HashSet::new(),
            report: Report::default(),
        }
    }

    /// Carries a sequence out and checks every image; gives the first that was not accepted.
    fn run(&mut self, steps: &[Step]) -> Result<(), String> {
        self.report.sequences += 1;
        let medium = recording(&self.initial, self.setting.granularity);
        let device = open(&medium, &self.geometry, self.setting.options)
            .map_err(|error| format!("before the sequence: {error}"))?;
        let device = Arc::new(device);
        let mut failed = None;
        for (number, step) in steps.iter().enumerate() {
            medium.mark(2 * number as u64 + 1);
            let (device, geometry, step) = (device.clone(), self.geometry, *step);
            let job = move || carry_out(&device, &geometry, number, step);
            if let Err(text) = self.workers.run(step.thread, Box::new(job)) {
                failed = Some(format!("{step:?} failed: {text}; {steps:?}"));
                break;
            }
            medium.mark(2 * number as u64 + 2);
        }
        self.visit(&medium, steps).map_err(|text| format!("{text}; {steps:?}"))?;
        failed.map_or(Ok(()), Err)
    }

    /// Goes through all crash points.
    fn visit(&mut self, medium: &Arc<Recording>, steps: &[Step]) -> Result<(), String> {
        let log = medium.log();
        let mut durable = Durable { bytes: self.initial.clone(), hash: 0 };
        let mut demand = self.demand(steps, 0);
        let torn_pages = self.setting.torn_pages;
        // There, each event completes the store before it.
        let byte = self.setting.granularity == Granularity::Byte;
        for event in 0..=log.len() {
            let mut settled = byte;
            match event.checked_sub(1).map(|last| &log[last].event) {
                None | Some(Event::Flush { .. } | Event::Store { .. }) => {}
                Some(Event::Mark(number)) => demand = self.demand(steps, *number as usize),
                Some(_) => settled = true,
            }
            let visit = |model: &Model| {
                if settled {
                    durable = self.durable(model);
                }
                self.point(model, &durable, &demand)
            };
            let visited = medium.with_model(event, torn_pages, visit);
            let visited = visited.map_err(|error| error.to_string())?;
            visited.map_err(|text| format!("after {event} of {} events: {text}", log.len()))?;
        }
        Ok(())
    }

    fn demand(&self, steps: &[Step], mark: usize) -> Demand {
        let before = self.expected(&steps[..mark / 2]);
        let after = self.expected(&steps[..mark.div_ceil(2)]);
        let states = before.iter().chain(&after).enumerate();
        let hash = states.fold(0, |hash, (place, state)| hash ^ mix(!(place as u64), *state));
        Demand { before, after, hash }
    }

    /// The number of the operation that each sector shows after some operations.
    fn expected(&self, done: &[Step]) -> Vec<u64> {
        let mut state = vec![self.base; SECTORS as usize];
        if let Some(sector) = self.setting.in_error {
            state[sector as usize] = IN_ERROR;
        }
        for (number, step) in done.iter().enumerate() {
            let shows = match step.op {
                Op::Write => number as u64 + 2,
                Op::Discard if self.geometry.sector_size() < 4096 => continue,
                _ => 0,
            };
            state[step.first as usize..(step.first + step.count) as usize].fill(shows);
        }
        state
    }

    fn durable(&self, model: &Model) -> Durable {
        let bytes = model.durable_image();
        let mut hash = 0;
        // Most of it is as it was: whole chunks are compared first.
        let chunks = bytes.chunks(CHUNK).zip(self.initial.chunks(CHUNK)).enumerate();
        for (number, _) in chunks.filter(|(_, (now, was))| now != was) {
            let (start, end) = (number * CHUNK, bytes.len().min((number + 1) * CHUNK));
            let words = (start as u64..end as u64).step_by(8);
            hash = words.fold(hash, |hash, at| hash ^ self.part(at, word_in(&bytes, at)));
        }
        Durable { bytes, hash }
    }

    /// What a word adds to the hash of an image: nothing where it is as before the sequence.
    fn part(&self, at: u64, value: u64) -> u64 {
        if word_in(&self.initial, at) == value {
            0
        } else {
            mix(at, value)
        }
    }

    fn wanted(&self, limit: usize, only: Vec<(u64, u64)>) -> Wanted {
        let torn_pages = self.setting.torn_pages;
        Wanted { limit, torn_pages, only: Some(only), seed: 5 }
    }

    fn count(&mut self, model: &Model, wanted: &Wanted) -> u64 {
        let possible = model.count_wanted(wanted);
        self.report.possible = self.report.possible.saturating_add(possible);
        self.report.sampled += u64::from(possible > wanted.limit as u64);
        possible
    }

    fn point(&mut self, model: &Model, durable: &Durable, demand: &Demand) -> Result<(), String> {
        self.report.points += 1;
        let mapoff = self.geometry.mapoff;
        let metadata = vec![(mapoff, self.initial.len() as u64 - mapoff)];
        let wanted = self.wanted(IMAGES_AT_A_POINT, metadata);
        self.count(model, &wanted);
        let data_open = model.count_wanted(&self.wanted(1, vec![(0, mapoff)])) > 1;
        model.images(&wanted, |image| {
            self.offer(durable, &[image.overlay()], demand)?;
            if data_open {
                self.choose_data(model, durable, image, demand)?;
            }
            Ok::<_, String>(())
        })?;
        Ok(())
    }

    /// Chooses among lines of data that sectors lead to after recovery.
    fn choose_data(
        &mut self,
        model: &Model,
        durable: &Durable,
        image: &CrashImage<'_>,
        demand: &Demand,
    ) -> Result<(), String> {
        let mapoff = self.geometry.mapoff;
        let mut metadata = durable.bytes[mapoff as usize..].to_vec();
        for (at, word) in image.overlay() {
            let at = (at - mapoff) as usize;
            metadata[at..at + 8].copy_from_slice(word);
        }
        let size = u64::from(self.geometry.sector_size());
        let map = self.checker().linux(&metadata)?;
        let blocks = map.iter().enumerate().map(|(sector, raw)| match raw & NORMAL {
            0 => sector as u32,
            _ => raw & MAP_MASK,
        });
        let ranges = blocks.map(|block| (self.geometry.block_at(block), size)).collect();
        let wanted = self.wanted(IMAGES_OF_DATA, ranges);
        if model.count_wanted(&wanted) > 1 {
            self.count(model, &wanted);
            model.images(&wanted, |data| {
                self.offer(durable, &[image.overlay(), data.overlay()], demand)
            })?;
        }
        Ok(())
    }

    /// Checks an image, unless it was checked before. It is what is durable, and some words.
    fn offer(
        &mut self,
        durable: &Durable,
        overlays: &[&[(u64, [u8; 8])]],
        demand: &Demand,
    ) -> Result<(), String> {
        self.report.images += 1;
        let words = || overlays.iter().flat_map(|overlay| overlay.iter());
        let hash = words().fold(durable.hash, |hash, (at, word)| {
            let was = word_in(&durable.bytes, *at);
            hash ^ self.part(*at, was) ^ self.part(*at, u64::from_le_bytes(*word))
        });
        if !self.seen.insert(hash ^ demand.hash) {
            return Ok(());
        }
        let mut bytes = durable.bytes.clone();
        for (at, word) in words() {
            bytes[*at as usize..*at as usize + 8].copy_from_slice(word);
        }
        self.check(Image { bytes, hash }, demand)
    }

    fn checker(&self) -> Checker<'_> {
        Checker { geometry: &self.geometry, poisoned: self.setting.in_error.is_some() }
    }

    /// Opens an image that is new.
    fn check(&mut self, image: Image, demand: &Demand) -> Result<(), String> {
        self.report.distinct += 1;
        let medium = recording(&image.bytes, self.setting.granularity);
        let device = open(&medium, &self.geometry, self.setting.options)
            .map_err(|error| error.to_string())?;
        let events = medium.event_count();
        let shown = self.checker().judge(&medium, &device, &image.bytes, demand)?;
        self.interrupt(&medium, events, image, demand)?;
        self.write_on(&medium, &device, &shown).map_err(|text| format!("written on: {text}"))
    }

    /// Recovery crashes at each of its points; what that leaves is an image like the others.
    fn interrupt(
        &mut self,
        medium: &Arc<Recording>,
        events: usize,
        image: Image,
        demand: &Demand,
    ) -> Result<(), String> {
        let log = medium.log();
        let stores = log[..events].iter().filter(|each| matches!(each.event, Event::Store { .. }));
        let words: Vec<u64> = stores.map(|each| each.event.range().0 / 8 * 8).collect();
        if words.is_empty() {
            return Ok(());
        }
        let unread = image.bytes.len() as u64;
        let wanted = self.wanted(IMAGES_AT_A_POINT, vec![(0, unread)]);
        for event in 0..=events {
            let mut left = Vec::new();
            let asked = medium.with_model(event, wanted.torn_pages, |model| {
                model.images(&wanted, |crashed| {
                    left.push(words.iter().map(|at| crashed.word(*at).unwrap_or(0)).collect());
                    Ok::<_, String>(())
                })
            });
            asked.map_err(|error| error.to_string())??;
            for values in left {
                self.offer_again(&image, &words, values, demand)?;
            }
        }
        Ok(())
    }

    fn offer_again(
        &mut self,
        image: &Image,
        words: &[u64],
        values: Vec<u64>,
        demand: &Demand,
    ) -> Result<(), String> {
        self.report.recoveries += 1;
        let mut bytes = image.bytes.clone();
        let mut hash = image.hash;
        for (at, value) in words.iter().zip(values) {
            hash ^= self.part(*at, word_in(&bytes, *at)) ^ self.part(*at, value);
            bytes[*at as usize..*at as usize + 8].copy_from_slice(&value.to_le_bytes());
        }
        if !self.seen.insert(hash ^ demand.hash) {
            return Ok(());
        }
        let checked = self.check(Image { bytes, hash }, demand);
        checked.map_err(|text| match text.strip_prefix(INTERRUPTED) {
            Some(_) => text,
            None => format!("{INTERRUPTED}{text}"),
        })
    }

    /// Goes on writing: every lane's free block is used, and nobody's sector changes.
    fn write_on(
        &mut self,
        medium: &Arc<Recording>,
        device: &Btt,
        shown: &[u64],
    ) -> Result<(), String> {
        let words = (self.geometry.mapoff..self.initial.len() as u64).step_by(8);
        let load = |at| crate::media::Medium::load_u64(&**medium, at).unwrap_or(0);
        let state = words.fold(0, |hash, at| hash ^ self.part(at, load(at)));
        if !self.states.insert(state) {
            return Ok(());
        }
        self.report.states += 1;
        self.checker().write_on(device, shown)?;
        let options = Options { read_only: true, ..self.setting.options };
        let again = open(medium, &self.geometry, options).map_err(|error| error.to_string())?;
        self.checker().unchanged(&again, shown)
    }
}

fn carry_out(device: &Btt, geometry: &Geometry, number: usize, step: Step) -> Result<(), String> {
    let size = u64::from(geometry.sector_size());
    let at = u64::from(step.first) * size;
    let result = if step.op == Op::Write {
        let sectors = step.first..step.first + step.count;
        let data = sectors.flat_map(|sector| content(geometry, number as u64 + 2, sector));
        write(device, at, &data.collect::<Vec<u8>>())
    } else {
        ranged(device, step.op, at, u64::from(step.count) * size)
    };
    result.map_err(|error| error.to_string())
}

/// The image before the sequence.
fn prepare(setting: &Setting, geometry: &Geometry, workers: &Workers) -> Vec<u8> {
    let mut image = fresh(geometry);
    if setting.warm {
        let medium = recording(&image, Granularity::Cacheline);
        let device = Arc::new(open(&medium, geometry, Options::default()).expect("a fresh arena"));
        // Twice, so that both places of each lane are in use.
        for _ in 0..2 {
            let (device, geometry) = (device.clone(), *geometry);
            let job = move || {
                let data = (0..SECTORS).flat_map(|sector| content(&geometry, 1, sector));
                write(&device, 0, &data.collect::<Vec<u8>>()).map_err(|error| error.to_string())
            };
            workers.run(0, Box::new(job)).expect("a sound arena");
        }
        let events = medium.event_count();
        let durable = medium.with_model(events, false, Model::durable_image);
        image = durable.expect("as many events as there are");
    }
    if let Some(sector) = setting.in_error {
        let at = geometry.mapoff as usize + 4 * sector as usize;
        let entry = u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"));
        let block = if entry & NORMAL == 0 { sector } else { entry & MAP_MASK };
        image[at..at + 4].copy_from_slice(&(ERROR | block).to_le_bytes());
        let at = geometry.block_at(block) as usize;
        image[at..at + geometry.internal_lbasize as usize].fill(POISON);
    }
    image
}
