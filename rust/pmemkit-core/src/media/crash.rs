//! What a power failure can leave of a medium: the model behind the recording medium.
//!
//! A log of [`Event`]s goes into a [`Model`] one by one. After each of them the model knows what is
//! certainly on media (the durable image) and, for everything stored since, in which units it may
//! or may not have got there. A choice for each unit is one [`CrashImage`].
//!
//! Invariants:
//! 1. An aligned 8-byte word that one store wrote whole is there whole or not at all. A store that
//!    covers a part of a word changes these bytes of it and keeps the others.
//! 2. `cacheline`: a line holds a prefix of the stores to it in program order, whatever other lines
//!    hold: it may have been evicted at any moment. `flush` and then `fence` on the same thread
//!    make durable what the line held at the flush; only the flush, or only the fence, nothing.
//! 3. Non-temporal words are there or not, each on its own, until a fence of the thread that
//!    stored them; then they are durable. A line with both kinds: the cache is coherent, so a
//!    cached store that got to media brought along the non-temporal words of its line that came
//!    before it; a non-temporal word says nothing about cached stores, but once it is durable no
//!    older cached store to that word can come back.
//! 4. `byte`: a cached store is durable when it is complete; the last one may be cut short.
//!    Non-temporal stores are not in the cache and follow rule 3.
//! 5. `page`: a page (with torn pages: each 512-byte sector) holds a prefix of the stores to it,
//!    whatever other pages hold, until `sync`, or `persist` of its range. Flush and fence do
//!    nothing, and a punched hole is a store of zeroes.
//! 6. A store that was cut short has left whole lines in ascending order and any subset of the
//!    words of the next: copy routines store the words of a line in no order to rely on.
//!
//! What this does not do: poison, lines that decay, a thread whose stores others see out of order.

use std::collections::{BTreeMap, HashSet};

use smallvec::SmallVec;

use super::choice::{self, Unit};
use super::Granularity;

/// Bytes of a cache line.
pub const LINE_SIZE: u64 = 64;
/// Bytes that are power-fail atomic.
pub const WORD_SIZE: u64 = 8;
/// Bytes of a page of the page cache.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes that a disk writes whole: the unit of a torn page.
pub const SECTOR_SIZE: u64 = 512;

/// One thing that happened to a medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes became visible.
    Store {
        /// The first byte.
        at: u64,
        /// What was stored.
        data: Box<[u8]>,
        /// True for stores around the cache.
        around: bool,
    },
    /// The lines of a range began to be written back.
    Flush {
        /// The first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// The thread waited for its write-backs and non-temporal stores.
    Fence,
    /// Everything was made durable (`page`), or a fence.
    Sync,
    /// A range was made durable.
    Persist {
        /// The first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// A range was given back and reads as zeroes.
    Punch {
        /// The first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Somebody put a number into the log.
    Mark(u64),
}

impl Event {
    /// The word used in reports.
    pub const fn name(&self) -> &'static str {
        match self {
            Event::Store { around: false, .. } => "store",
            Event::Store { around: true, .. } => "store_nt",
            Event::Flush { .. } => "flush",
            Event::Fence => "fence",
            Event::Sync => "sync",
            Event::Persist { .. } => "persist",
            Event::Punch { .. } => "punch",
            Event::Mark(_) => "mark",
        }
    }

    /// Offset and length in bytes; a mark has its number for an offset.
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Event::Store { at, ref data, .. } => (at, data.len() as u64),
            Event::Flush { at, len } | Event::Persist { at, len } | Event::Punch { at, len } => {
                (at, len)
            }
            Event::Mark(number) => (number, 0),
            Event::Fence | Event::Sync => (0, 0),
        }
    }
}

/// An event and the thread it happened on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A small number, the same for all events of one thread.
    pub thread: u32,
    /// What happened.
    pub event: Event,
}

/// The bytes that one store changes in one aligned word.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Where the word starts.
    word: u64,
    /// Bit n is set when the store covers byte n.
    mask: u8,
    bytes: [u8; 8],
}

impl Piece {
    fn apply(&self, word: &mut [u8; 8]) {
        for (bit, byte) in word.iter_mut().enumerate() {
            if self.mask >> bit & 1 == 1 {
                *byte = self.bytes[bit];
            }
        }
    }
}

/// The part of one store that lies in one line.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// Program order: larger is later. Steps of one store share it.
    sequence: u64,
    thread: u32,
    pub(super) pieces: SmallVec<[Piece; 1]>,
}

impl Step {
    fn line(&self) -> Option<u64> {
        self.pieces.first().map(|piece| piece.word / LINE_SIZE)
    }
}

/// What may or may not be on media on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// The n-th line, page or sector; for `byte` the store that was not complete (0).
    Cached(u64),
    /// The word at this byte, stored around the cache.
    Around(u64),
}

/// Words that differ from the durable image, by ascending offset.
type Overlay = Vec<(u64, [u8; 8])>;

/// Which crash images are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// At most so many images at one point; all of them where there are no more.
    pub limit: usize,
    /// Seed of the sample where there are more.
    pub seed: u64,
    /// With `page`: 512-byte sectors of a page may be of different age.
    pub torn_pages: bool,
    /// Choose only among units that touch these `(offset, length)` ranges; others stay durable.
    pub only: Option<Vec<(u64, u64)>>,
}

impl Default for Wanted {
    fn default() -> Self {
        Wanted { limit: 64, seed: 0, torn_pages: false, only: None }
    }
}

/// One state that a power failure could leave: the durable image and the words that differ from it.
#[derive(Clone, Copy, Debug)]
pub struct CrashImage<'a> {
    model: &'a Model,
    overlay: &'a [(u64, [u8; 8])],
}

impl CrashImage<'_> {
    /// How many events had happened.
    pub fn event(&self) -> usize {
        self.model.event
    }

    /// The last mark that had been put into the log.
    pub fn mark(&self) -> Option<u64> {
        self.model.mark
    }

    /// Bytes of the image.
    pub fn len(&self) -> u64 {
        self.model.len
    }

    /// True when the medium has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The words that differ from what is certainly on media, by ascending offset.
    pub fn overlay(&self) -> &[(u64, [u8; 8])] {
        self.overlay
    }

    /// The aligned word at byte `at`, or `None` past the end.
    pub fn word(&self, at: u64) -> Option<u64> {
        let at = at - at % WORD_SIZE;
        if at + WORD_SIZE > self.len() {
            return None;
        }
        let found = self.overlay.binary_search_by_key(&at, |(word, _)| *word);
        let bytes = match found {
            Ok(index) => self.overlay[index].1,
            Err(_) => self.model.word(at),
        };
        Some(u64::from_le_bytes(bytes))
    }

    /// The whole image.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut image = self.model.durable.clone();
        for (word, bytes) in self.overlay {
            let word = *word as usize;
            image[word..word + 8].copy_from_slice(bytes);
        }
        image.truncate(self.model.len as usize);
        image
    }
}

/// What is on media, certainly or perhaps, after the events so far.
#[derive(Clone, Debug)]
pub struct Model {
    granularity: Granularity,
    torn_pages: bool,
    len: u64,
    /// What is certainly on media, padded to whole words.
    durable: Vec<u8>,
    units: BTreeMap<Key, Unit>,
    sequence: u64,
    event: usize,
    mark: Option<u64>,
}

impl Model {
    /// A medium that holds `initial` for certain.
    pub fn new(initial: &[u8], granularity: Granularity, torn_pages: bool) -> Self {
        let mut durable = initial.to_vec();
        durable.resize(initial.len().next_multiple_of(WORD_SIZE as usize), 0);
        Model {
            granularity,
            torn_pages,
            len: initial.len() as u64,
            durable,
            units: BTreeMap::new(),
            sequence: 0,
            event: 0,
            mark: None,
        }
    }

    /// How many events were taken.
    pub fn event(&self) -> usize {
        self.event
    }

    /// True when sectors of a page are chosen one by one.
    pub fn torn_pages(&self) -> bool {
        self.torn_pages
    }

    /// Takes the next event of the log.
    pub fn apply(&mut self, entry: &Entry) {
        let thread = entry.thread;
        if self.granularity == Granularity::Byte {
            self.complete();
        }
        match &entry.event {
            Event::Store { at, data, around } => self.store(thread, *at, data, *around),
            Event::Punch { at, len } => self.store(thread, *at, &vec![0; *len as usize], false),
            Event::Flush { at, len } => self.flush(thread, *at, *len),
            Event::Fence => self.fence(thread),
            Event::Sync if self.granularity == Granularity::Page => self.settle(0, self.len),
            Event::Sync => self.fence(thread),
            Event::Persist { at, len } if self.granularity == Granularity::Page => {
                self.settle(*at, *len);
            }
            Event::Persist { at, len } => {
                self.flush(thread, *at, *len);
                self.fence(thread);
            }
            Event::Mark(number) => self.mark = Some(*number),
        }
        self.event += 1;
    }

    /// What is certainly on media.
    pub fn durable_image(&self) -> Vec<u8> {
        CrashImage { model: self, overlay: &[] }.to_vec()
    }

    /// What a reader of the running machine saw: everything stored.
    pub fn visible_image(&self) -> Vec<u8> {
        let units: Vec<_> = self.units.iter().collect();
        let all: Vec<_> = units.iter().map(|(_, unit)| unit.choice_last()).collect();
        let overlay = self.overlay(&units, &all);
        CrashImage { model: self, overlay: &overlay }.to_vec()
    }

    /// How many choices there are, before equal images are merged; saturates.
    pub fn count(&self) -> u64 {
        choice::count(self.units.values())
    }

    /// Calls `visit` with each image wanted, without duplicates, until it fails. Returns how many
    /// it was called with.
    pub fn images<E>(
        &self,
        wanted: &Wanted,
        mut visit: impl FnMut(&CrashImage<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let touches = |key: &Key| match &wanted.only {
            None => true,
            Some(ranges) => ranges.iter().any(|range| self.touches(key, *range)),
        };
        let units: Vec<_> = self
            .units
            .iter()
            .filter(|(key, unit)| unit.choice_last() > 0 && touches(key))
            .collect();
        let shapes: Vec<&Unit> = units.iter().map(|(_, unit)| *unit).collect();
        let mut seen: HashSet<Overlay> = HashSet::new();
        choice::for_each(&shapes, wanted.limit, wanted.seed, |choices| {
            let overlay = self.overlay(&units, choices);
            if seen.contains(&overlay) {
                return Ok(false);
            }
            visit(&CrashImage { model: self, overlay: &overlay })?;
            seen.insert(overlay);
            Ok(true)
        })?;
        Ok(seen.len())
    }

    /// Bytes that get to media together, of `page` and `cacheline`.
    fn unit_size(&self) -> u64 {
        match self.granularity {
            Granularity::Page if self.torn_pages => SECTOR_SIZE,
            Granularity::Page => PAGE_SIZE,
            Granularity::Byte | Granularity::Cacheline => LINE_SIZE,
        }
    }

    fn touches(&self, key: &Key, (at, len): (u64, u64)) -> bool {
        let (start, size) = match key {
            Key::Cached(_) if self.granularity == Granularity::Byte => return len > 0,
            Key::Cached(number) => (number * self.unit_size(), self.unit_size()),
            Key::Around(word) => (word - word % LINE_SIZE, LINE_SIZE),
        };
        len > 0 && start < at.saturating_add(len) && at < start + size
    }

    fn word(&self, at: u64) -> [u8; 8] {
        let mut word = [0; 8];
        word.copy_from_slice(&self.durable[at as usize..at as usize + 8]);
        word
    }

    fn store(&mut self, thread: u32, at: u64, data: &[u8], around: bool) {
        self.sequence += 1;
        let around = around && self.granularity != Granularity::Page;
        let unit_size = self.unit_size();
        for pieces in pieces_by_line(at, data) {
            if around {
                for piece in pieces {
                    let key = Key::Around(piece.word);
                    self.push(key, thread, SmallVec::from_elem(piece, 1));
                }
                continue;
            }
            let key = match self.granularity {
                Granularity::Byte => Key::Cached(0),
                _ => Key::Cached(pieces[0].word / unit_size),
            };
            self.push(key, thread, pieces);
        }
    }

    fn push(&mut self, key: Key, thread: u32, pieces: SmallVec<[Piece; 1]>) {
        let step = Step { sequence: self.sequence, thread, pieces };
        self.units.entry(key).or_default().steps.push(step);
    }

    /// `byte`: whatever was being stored is complete now.
    fn complete(&mut self) {
        if let Some(unit) = self.units.remove(&Key::Cached(0)) {
            self.commit(unit.steps);
        }
    }

    fn flush(&mut self, thread: u32, at: u64, len: u64) {
        if self.granularity != Granularity::Cacheline || len == 0 {
            return;
        }
        let (first, last) = (at / LINE_SIZE, (at + len - 1) / LINE_SIZE);
        for (_, unit) in self.units.range_mut(Key::Cached(first)..=Key::Cached(last)) {
            let held = unit.steps.len();
            unit.flushes.retain(|(by, _)| *by != thread);
            unit.flushes.push((thread, held));
        }
    }

    fn fence(&mut self, thread: u32) {
        if self.granularity == Granularity::Page {
            return;
        }
        let mut ready = Vec::new();
        for (key, unit) in &mut self.units {
            let held = match key {
                Key::Cached(_) => unit.flushed(thread),
                Key::Around(_) => {
                    let last = unit.steps.iter().rposition(|step| step.thread == thread);
                    last.map_or(0, |index| index + 1)
                }
            };
            ready.extend(unit.take(held));
        }
        self.commit(ready);
    }

    /// `page`: the units that touch a range are durable now.
    fn settle(&mut self, at: u64, len: u64) {
        if len == 0 {
            return;
        }
        // Pages go to media whole, also where their sectors are chosen one by one.
        let per_page = PAGE_SIZE / self.unit_size();
        let first = at / PAGE_SIZE * per_page;
        let last = ((at + len - 1) / PAGE_SIZE + 1) * per_page - 1;
        let mut ready = Vec::new();
        for (_, unit) in self.units.range_mut(Key::Cached(first)..=Key::Cached(last)) {
            ready.append(&mut unit.steps);
        }
        self.commit(ready);
    }

    /// Puts steps into the durable image, with what they bring along (rule 3), and forgets what
    /// they outlive.
    fn commit(&mut self, mut ready: Vec<Step>) {
        if self.units.keys().any(|key| matches!(key, Key::Around(_))) {
            let lines: Vec<_> =
                ready.iter().filter_map(|step| Some((step.line()?, step.sequence))).collect();
            for (line, sequence) in lines {
                let (first, last) = around_line(line);
                for (_, unit) in self.units.range_mut(first..=last) {
                    let older = unit.steps.iter().take_while(|step| step.sequence < sequence);
                    let older = older.count();
                    ready.extend(unit.take(older));
                }
            }
        }
        ready.sort_by_key(|step| step.sequence);
        for step in &ready {
            for piece in &step.pieces {
                let mut word = self.word(piece.word);
                piece.apply(&mut word);
                let at = piece.word as usize;
                self.durable[at..at + 8].copy_from_slice(&word);
                self.forget_older(piece, step.sequence);
            }
        }
        self.units.retain(|_, unit| !unit.steps.is_empty());
    }

    /// Takes bytes that are durable now out of older cached stores to the same line, which were
    /// not flushed: only a non-temporal store can overtake them.
    fn forget_older(&mut self, durable: &Piece, sequence: u64) {
        if self.granularity != Granularity::Cacheline {
            return;
        }
        let Some(unit) = self.units.get_mut(&Key::Cached(durable.word / LINE_SIZE)) else {
            return;
        };
        for step in unit.steps.iter_mut().filter(|step| step.sequence < sequence) {
            for piece in step.pieces.iter_mut().filter(|piece| piece.word == durable.word) {
                piece.mask &= !durable.mask;
            }
            step.pieces.retain(|piece| piece.mask != 0);
        }
    }

    /// The words that a choice for each unit leaves different from the durable image.
    fn overlay(&self, units: &[(&Key, &Unit)], choices: &[u64]) -> Overlay {
        let mut chosen: Vec<(u64, u64, Piece)> = Vec::new();
        let mut reached: BTreeMap<u64, u64> = BTreeMap::new();
        for ((key, unit), choice) in units.iter().zip(choices) {
            unit.chosen(*choice, |step, mask| {
                for (bit, piece) in step.pieces.iter().enumerate() {
                    if mask >> bit & 1 == 1 {
                        chosen.push((piece.word, step.sequence, *piece));
                    }
                }
                if let (Key::Cached(_), Some(line)) = (key, step.line()) {
                    reached.insert(line, step.sequence);
                }
            });
        }
        self.bring_along(&reached, &mut chosen);
        chosen.sort_by_key(|(word, sequence, _)| (*word, *sequence));
        let mut overlay: Overlay = Vec::new();
        for (at, _, piece) in chosen {
            if overlay.last().map(|(word, _)| *word) != Some(at) {
                overlay.push((at, self.word(at)));
            }
            if let Some((_, word)) = overlay.last_mut() {
                piece.apply(word);
            }
        }
        overlay.retain(|(at, word)| *word != self.word(*at));
        overlay
    }

    /// Adds the non-temporal words that came before a chosen cached store of their line.
    fn bring_along(&self, reached: &BTreeMap<u64, u64>, chosen: &mut Vec<(u64, u64, Piece)>) {
        if self.granularity == Granularity::Page {
            return;
        }
        for (line, sequence) in reached {
            let (first, last) = around_line(*line);
            for (_, unit) in self.units.range(first..=last) {
                for step in unit.steps.iter().take_while(|step| step.sequence < *sequence) {
                    chosen.extend(step.pieces.iter().map(|piece| {
                        (piece.word, step.sequence, *piece)
                    }));
                }
            }
        }
    }
}

/// The keys of the words of a line.
fn around_line(line: u64) -> (Key, Key) {
    (Key::Around(line * LINE_SIZE), Key::Around(line * LINE_SIZE + LINE_SIZE - 1))
}

/// Cuts a store into the words of each line it touches, ascending.
fn pieces_by_line(at: u64, data: &[u8]) -> Vec<SmallVec<[Piece; 1]>> {
    let mut lines: Vec<SmallVec<[Piece; 1]>> = Vec::new();
    let mut done = 0;
    while done < data.len() {
        let here = at + done as u64;
        let inside = (here % WORD_SIZE) as usize;
        let count = (WORD_SIZE as usize - inside).min(data.len() - done);
        let mut piece = Piece { word: here - inside as u64, mask: 0, bytes: [0; 8] };
        piece.bytes[inside..inside + count].copy_from_slice(&data[done..done + count]);
        piece.mask = ((((1u16 << count) - 1) << inside) & 0xff) as u8;
        if done == 0 || piece.word % LINE_SIZE == 0 {
            lines.push(SmallVec::new());
        }
        if let Some(line) = lines.last_mut() {
            line.push(piece);
        }
        done += count;
    }
    lines
}

#[cfg(test)]
#[path = "crash_tests.rs"]
mod tests;
