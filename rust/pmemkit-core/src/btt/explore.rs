//! Every image that a power failure could leave of a sequence of operations, opened and checked.
//!
//! A [`Run`] carries operations out on a recording, each by the worker thread that it names, with a
//! mark before and after each. Then each crash point is visited with each choice of what got to
//! media, among the lines of the log and the map and some words of the data. Of each image:
//! 1. our recovery opens it, and so does Linux's one pass over the lanes (written here on its own);
//! 2. each sector is what the acknowledged operations made of it, or what the one under way would;
//! 3. both recoveries read the same, and the metadata are consistent;
//! 4. sectors written afterwards do not change others;
//! 5. recovery itself is interrupted at each of its points, and done again.
//!
//! Invariants:
//! 1. The same sequence gives the same images: workers work one after the other, under numbers that
//!    do not depend on the process.
//! 2. What a sector holds says which operation wrote which sector.
//!
//! What this does not do: operations at the same time (`tests` has that), more data words than the
//! first, one in the middle and the last of a block.

use std::collections::HashSet;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::engine::{impersonate, Options};
use super::fixture::{fresh, geometry, open, ranged, read, recording, write};
use super::geometry::Geometry;
use super::{Btt, ERROR, MAP_MASK, NORMAL, ZERO};
use crate::block::Op;
use crate::media::crash::{CrashImage, Wanted};
use crate::media::recording::Recording;
use crate::media::Granularity;

/// Images at one crash point; where there are more, they are sampled.
const IMAGES_AT_A_POINT: usize = 4096;
/// Of how many images one is written to afterwards, and one has its recovery interrupted.
const CLOSER_LOOK: u64 = 16;

/// One operation of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The worker.
    pub thread: usize,
    /// The first sector.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Zero them instead of writing.
    pub zero: bool,
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Bytes of a sector, with metadata.
    pub sector_size: u32,
    /// Of the media.
    pub granularity: Granularity,
    /// With `page`: sectors of 512 bytes of a page may be of different age.
    pub torn_pages: bool,
    /// How the engine is opened.
    pub options: Options,
    /// Write every sector once before the sequence, so that log and map are in use.
    pub warm: bool,
    /// Put a sector into the error state before the sequence.
    pub in_error: Option<u32>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Images that were opened.
    pub images: u64,
    /// Different ones.
    pub distinct: u64,
    /// Images of interrupted recoveries.
    pub recoveries: u64,
    /// The first that was not accepted.
    pub violation: Option<String>,
}

const SECTORS: u32 = 20;
const LANES: u32 = 3;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that live as long as a run, so that a fence covers what its thread did before.
struct Workers {
    queues: Vec<(Sender<Job>, Receiver<()>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    fn new(count: usize) -> Self {
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (give, take) = channel::<Job>();
            let (say, hear) = channel();
            threads.push(std::thread::spawn(move || {
                impersonate(number);
                for job in take {
                    job();
                    if say.send(()).is_err() {
                        return;
                    }
                }
            }));
            queues.push((give, hear));
        }
        Workers { queues, threads }
    }

    fn run(&self, thread: usize, job: Job) {
        let (give, hear) = &self.queues[thread];
        give.send(job).expect("a worker that waits");
        hear.recv().expect("a job that does not panic");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queues.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What a sector holds: the operation (0 for none) and the sector, in each word.
fn content(geometry: &Geometry, step: u64, sector: u32) -> Vec<u8> {
    let word = if step == 0 { 0 } else { (step << 32) | u64::from(sector + 1) };
    word.to_le_bytes().repeat(geometry.sector_size() as usize / 8)
}

/// The number of the operation that each sector shows after the first `done`.
fn expected(base: u64, steps: &[Step], done: usize) -> Vec<u64> {
    let mut state = vec![base; SECTORS as usize];
    for (number, step) in steps[..done].iter().enumerate() {
        for sector in step.first..step.first + step.count {
            state[sector as usize] = if step.zero { 0 } else { number as u64 + 2 };
        }
    }
    state
}

/// The ranges among which choices are made.
fn choices(geometry: &Geometry, size: u64) -> Vec<(u64, u64)> {
    let middle = u64::from(geometry.sector_size()) / 2;
    let mut ranges = vec![(geometry.mapoff, size - geometry.mapoff)];
    for block in 0..geometry.internal_nlba {
        let at = geometry.block_at(block);
        let last = u64::from(geometry.sector_size()) - 8;
        ranges.extend([(at, 8), (at + middle, 8), (at + last, 8)]);
    }
    ranges
}

/// Carries a sequence out and checks every image.
pub fn explore(setting: &Setting, steps: &[Step], seen: &mut HashSet<u64>) -> Report {
    let geometry = geometry(setting.sector_size, SECTORS, LANES);
    let workers = Workers::new(2);
    let (initial, base) = prepare(setting, &geometry, &workers);
    let medium = recording(&initial, setting.granularity);
    let mut report = Report::default();
    let device = match open(&medium, &geometry, setting.options) {
        Ok(device) => Arc::new(device),
        Err(error) => {
            report.violation = Some(format!("before the sequence: {error}"));
            return report;
        }
    };
    for (number, step) in steps.iter().enumerate() {
        medium.mark(2 * number as u64 + 1);
        let (device, step) = (device.clone(), *step);
        workers.run(step.thread, Box::new(move || carry_out(&device, &geometry, number, step)));
        medium.mark(2 * number as u64 + 2);
    }
    let wanted = Wanted {
        limit: IMAGES_AT_A_POINT,
        torn_pages: setting.torn_pages,
        only: Some(choices(&geometry, initial.len() as u64)),
        ..Wanted::default()
    };
    let checker = Checker { setting, geometry, steps, base };
    let result = medium.explore().wanted(wanted).run(|image| {
        report.images += 1;
        let bytes = image.to_vec();
        if !seen.insert(hash(&bytes, image.mark())) {
            return Ok(());
        }
        report.distinct += 1;
        checker.check(image, bytes, &mut report.recoveries, report.distinct)
    });
    report.violation = result.err().map(|violation| format!("{violation}; {steps:?}"));
    report
}

fn carry_out(device: &Btt, geometry: &Geometry, number: usize, step: Step) {
    let size = u64::from(geometry.sector_size());
    let at = u64::from(step.first) * size;
    let result = if step.zero {
        ranged(device, Op::Zero, at, u64::from(step.count) * size)
    } else {
        let sectors = step.first..step.first + step.count;
        let data: Vec<u8> =
            sectors.flat_map(|sector| content(geometry, number as u64 + 2, sector)).collect();
        write(device, at, &data)
    };
    // Faults that were planted may break the arena for good; the checker sees that.
    let _ = result;
}

/// The image before the sequence, and the operation that its sectors show.
fn prepare(setting: &Setting, geometry: &Geometry, workers: &Workers) -> (Vec<u8>, u64) {
    let mut image = fresh(geometry);
    if setting.warm {
        let medium = recording(&image, Granularity::Byte);
        let device = Arc::new(open(&medium, geometry, Options::default()).expect("a fresh arena"));
        let g = *geometry;
        workers.run(
            0,
            Box::new(move || {
                for sector in 0..SECTORS {
                    let at = u64::from(sector) * u64::from(g.sector_size());
                    write(&device, at, &content(&g, 1, sector)).expect("a sound arena");
                }
            }),
        );
        let events = medium.event_count();
        let visible = medium.with_model(events, false, |model| model.visible_image());
        image = visible.expect("as many events as there are");
    }
    if let Some(sector) = setting.in_error {
        let at = geometry.word_at(sector) as usize + 4 * (sector as usize % 2);
        let entry = u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"));
        let block = if entry & NORMAL == 0 { sector } else { entry & MAP_MASK };
        image[at..at + 4].copy_from_slice(&(ERROR | block).to_le_bytes());
    }
    (image, u64::from(setting.warm))
}

fn hash(bytes: &[u8], mark: Option<u64>) -> u64 {
    // Two multiplications a word: images differ in few words, so a weak mix would do.
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ mark.unwrap_or(u64::MAX);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        state = (state ^ u64::from_le_bytes(word)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        state ^= state >> 32;
    }
    state
}

struct Checker<'a> {
    setting: &'a Setting,
    geometry: Geometry,
    steps: &'a [Step],
    base: u64,
}

impl Checker<'_> {
    fn check(
        &self,
        image: &CrashImage<'_>,
        bytes: Vec<u8>,
        recoveries: &mut u64,
        number: u64,
    ) -> Result<(), String> {
        let mark = image.mark().unwrap_or(0) as usize;
        let before = expected(self.base, self.steps, mark / 2);
        let after = expected(self.base, self.steps, mark.div_ceil(2));
        let medium = recording(&bytes, self.setting.granularity);
        let shown = self.open_and_read(&medium, &before, &after)?;
        let linux = self.linux(bytes)?;
        if linux != shown {
            return Err(format!("Linux would read {linux:?}, we read {shown:?}"));
        }
        if number.is_multiple_of(CLOSER_LOOK) {
            *recoveries += self.interrupt(&medium, &before, &after)?;
            self.write_on(&medium, &shown)?;
        }
        Ok(())
    }

    /// Opens an image, with recovery; each sector must be old or new. Gives what they show.
    fn open_and_read(
        &self,
        medium: &Arc<Recording>,
        before: &[u64],
        after: &[u64],
    ) -> Result<Vec<u64>, String> {
        let options = Options { plant: self.setting.options.plant, ..Options::default() };
        let device = open(medium, &self.geometry, options).map_err(|error| error.to_string())?;
        let wrong = device.validate().map_err(|error| error.to_string())?;
        if let Some(first) = wrong.first() {
            return Err(first.clone());
        }
        let size = u64::from(self.geometry.sector_size());
        let mut shown = Vec::new();
        for sector in 0..SECTORS {
            let found = match read(&device, u64::from(sector) * size, size) {
                Ok(bytes) => self.shown(sector, &bytes)?,
                Err(_) if self.setting.in_error == Some(sector) => self.base,
                Err(error) => return Err(error.to_string()),
            };
            let (old, new) = (before[sector as usize], after[sector as usize]);
            if found != old && found != new {
                return Err(format!("sector {sector} shows {found}, not {old} or {new}"));
            }
            shown.push(found);
        }
        Ok(shown)
    }

    /// The operation that the bytes of a sector show.
    fn shown(&self, sector: u32, bytes: &[u8]) -> Result<u64, String> {
        let first = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let step = first >> 32;
        if bytes != content(&self.geometry, step, sector) {
            return Err(format!("sector {sector} is torn, or another's: it begins {first:#x}"));
        }
        Ok(step)
    }

    /// Linux's recovery, in one pass over the lanes, and its reads.
    fn linux(&self, mut image: Vec<u8>) -> Result<Vec<u64>, String> {
        let g = &self.geometry;
        let word = |image: &[u8], at: usize| {
            u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"))
        };
        for lane in 0..LANES {
            let group = g.group_at(lane) as usize;
            let (a, b) = (word(&image, group + 12), word(&image, group + 28));
            let second = if a.abs_diff(b) == 1 { b > a } else { b < a };
            let entry = if second && b != 0 { group + 16 } else { group };
            let lba = word(&image, entry);
            let old = word(&image, entry + 4) & MAP_MASK;
            let new = word(&image, entry + 8) & MAP_MASK;
            let at = g.mapoff as usize + 4 * lba as usize;
            let raw = word(&image, at);
            let now = if raw & NORMAL == 0 { lba } else { raw & MAP_MASK };
            if old != new && now != new && now == old {
                image[at..at + 4].copy_from_slice(&(NORMAL | new).to_le_bytes());
            }
        }
        let mut shown = Vec::new();
        for sector in 0..SECTORS {
            let raw = word(&image, g.mapoff as usize + 4 * sector as usize);
            let block = if raw & NORMAL == 0 { sector } else { raw & MAP_MASK };
            shown.push(match raw & NORMAL {
                ZERO => 0,
                ERROR => self.base,
                _ => {
                    let at = g.block_at(block) as usize;
                    self.shown(sector, &image[at..at + g.sector_size() as usize])?
                }
            });
        }
        Ok(shown)
    }

    /// Recovery crashes at each of its points, and is done again.
    fn interrupt(
        &self,
        medium: &Arc<Recording>,
        before: &[u64],
        after: &[u64],
    ) -> Result<u64, String> {
        let wanted = Wanted { limit: 64, ..Wanted::default() };
        let interrupted = medium.explore().wanted(wanted).run(|image| {
            let again = recording(&image.to_vec(), self.setting.granularity);
            self.open_and_read(&again, before, after).map(|_| ())
        });
        interrupted.map_err(|violation| format!("recovery was interrupted: {violation}"))
    }

    /// Goes on writing: every lane's free block is used, and nobody's sector changes.
    fn write_on(&self, medium: &Arc<Recording>, shown: &[u64]) -> Result<(), String> {
        let options = Options { plant: self.setting.options.plant, ..Options::default() };
        let device = open(medium, &self.geometry, options).map_err(|error| error.to_string())?;
        let size = u64::from(self.geometry.sector_size());
        let written = 3u32;
        for round in 0..2 {
            // As many sectors as lanes in one request: each lane takes one.
            let data: Vec<u8> = (0..LANES)
                .flat_map(|place| content(&self.geometry, 900 + round, written + place))
                .collect();
            write(&device, u64::from(written) * size, &data).map_err(|error| error.to_string())?;
        }
        for sector in 0..SECTORS {
            if (written..written + LANES).contains(&sector) || self.setting.in_error == Some(sector)
            {
                continue;
            }
            let bytes = read(&device, u64::from(sector) * size, size).map_err(|e| e.to_string())?;
            let found = self.shown(sector, &bytes)?;
            if found != shown[sector as usize] {
                return Err(format!("sector {sector} changed when others were written"));
            }
        }
        match device.validate().map_err(|error| error.to_string())?.first() {
            Some(first) => Err(format!("after more writes: {first}")),
            None => Ok(()),
        }
    }
}
