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
//! 4. `cacheline` and `byte`: a punched hole is news to the file system. Each page of it is there
//!    or not until `sync` or `persist` (of any range: it is one call for the whole file). A later
//!    store to the page faulted it in again, which commits the hole before the store.
//! 5. `byte`: a cached store is durable when it is complete; the last one may be cut short.
//!    Non-temporal stores are not in the cache and follow rule 3.
//! 6. `page`: a page (with torn pages: each 512-byte sector) holds a prefix of the stores to it,
//!    whatever other pages hold, until `sync`, or `persist` of its range. Flush and fence do
//!    nothing, and a punched hole is a store of zeroes.
//! 7. A store that was cut short has left whole lines in ascending order and any subset of the
//!    words of the next: copy routines store the words of a line in no order to rely on.
//!
//! What this does not do: poison, lines that decay, a thread whose stores others see out of order.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

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

/// How a step is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepKind {
    /// The part of a cached store that lies in one line.
    Cached,
    /// One word of a non-temporal store.
    Around,
    /// One page of a hole, which nothing tears.
    Hole,
}

/// What gets to media in one go, but for a tear.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// Program order: larger is later. Steps of one store share it.
    sequence: u64,
    thread: u32,
    pub(super) kind: StepKind,
    pub(super) pieces: SmallVec<[Piece; 1]>,
}

/// The line that a step stored to, when, and whether through the cache.
type Reach = (u64, u64, bool);

impl Step {
    /// What decides whom the step brings along; `None` for one that brings nobody.
    fn reach(&self) -> Option<Reach> {
        let piece = self.pieces.first().filter(|_| self.kind != StepKind::Hole)?;
        Some((piece.word / LINE_SIZE, self.sequence, self.kind == StepKind::Cached))
    }
}

/// What may or may not be on media on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// The n-th line, page or sector; for `byte` the store that was not complete (0).
    Cached(u64),
    /// The word at this byte, stored around the cache.
    Around(u64),
    /// The n-th page, given back.
    Hole(u64),
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
    /// Choose only among what touches these `(offset, length)` ranges, lines or stores, and keep
    /// the rest as it is durable.
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
            Event::Punch { at, len } => self.punch(thread, *at, *len),
            Event::Flush { at, len } => self.flush(thread, *at, *len),
            Event::Fence => self.fence(thread),
            Event::Sync if self.granularity == Granularity::Page => self.settle(0, self.len),
            Event::Sync => {
                self.fence(thread);
                self.settle_holes();
            }
            Event::Persist { at, len } if self.granularity == Granularity::Page => {
                self.settle(*at, *len);
            }
            Event::Persist { at, len } => {
                self.flush(thread, *at, *len);
                self.fence(thread);
                self.settle_holes();
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

    /// How many of them are choices among the units wanted.
    pub fn count_wanted(&self, wanted: &Wanted) -> u64 {
        choice::count(self.wanted_units(wanted).into_iter().map(|(_, unit)| unit))
    }

    /// Calls `visit` with each image wanted, without duplicates, until it fails. Returns how many
    /// it was called with.
    pub fn images<E>(
        &self,
        wanted: &Wanted,
        mut visit: impl FnMut(&CrashImage<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let units = self.wanted_units(wanted);
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

    fn wanted_units(&self, wanted: &Wanted) -> Vec<(&Key, &Unit)> {
        let touches = |key: &Key, unit: &Unit| match &wanted.only {
            None => true,
            Some(ranges) => ranges.iter().any(|range| self.touches(key, unit, *range)),
        };
        let open = |(key, unit): &(&Key, &Unit)| unit.choice_last() > 0 && touches(key, unit);
        self.units.iter().filter(open).collect()
    }

    /// Bytes that get to media together, of `page` and `cacheline`.
    fn unit_size(&self) -> u64 {
        match self.granularity {
            Granularity::Page if self.torn_pages => SECTOR_SIZE,
            Granularity::Page => PAGE_SIZE,
            Granularity::Byte | Granularity::Cacheline => LINE_SIZE,
        }
    }

    fn touches(&self, key: &Key, unit: &Unit, (at, len): (u64, u64)) -> bool {
        let (start, size) = match key {
            Key::Cached(_) if self.granularity != Granularity::Cacheline => {
                let mut pieces = unit.steps.iter().flat_map(|step| &step.pieces);
                let inside = at.saturating_sub(WORD_SIZE - 1)..at.saturating_add(len);
                return len > 0 && pieces.any(|piece| inside.contains(&piece.word));
            }
            Key::Cached(line) => (line * LINE_SIZE, LINE_SIZE),
            Key::Around(word) => (word - word % LINE_SIZE, LINE_SIZE),
            Key::Hole(page) => (page * PAGE_SIZE, PAGE_SIZE),
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

    fn punch(&mut self, thread: u32, at: u64, len: u64) {
        let zeroes = vec![0; len as usize];
        if self.granularity == Granularity::Page {
            return self.store(thread, at, &zeroes, false);
        }
        self.sequence += 1;
        let mut done = 0;
        while done < len {
            let here = at + done;
            let count = (PAGE_SIZE - here % PAGE_SIZE).min(len - done);
            let lines = pieces_by_line(here, &zeroes[..count as usize]);
            let pieces = lines.into_iter().flatten().collect();
            self.push(Key::Hole(here / PAGE_SIZE), thread, pieces);
            done += count;
        }
    }

    fn push(&mut self, key: Key, thread: u32, pieces: SmallVec<[Piece; 1]>) {
        let kind = match key {
            Key::Cached(_) => StepKind::Cached,
            Key::Around(_) => StepKind::Around,
            Key::Hole(_) => StepKind::Hole,
        };
        let step = Step { sequence: self.sequence, thread, kind, pieces };
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
                Key::Hole(_) => 0,
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

    /// Holes are durable now.
    fn settle_holes(&mut self) {
        let mut ready = Vec::new();
        for (_, unit) in self.units.range_mut(Key::Hole(0)..) {
            ready.append(&mut unit.steps);
        }
        self.commit(ready);
    }

    /// Puts steps into the durable image, with what they bring along (rules 3 and 4), and forgets
    /// what they outlive.
    fn commit(&mut self, mut ready: Vec<Step>) {
        let reached: Vec<Reach> = ready.iter().filter_map(Step::reach).collect();
        for reach in reached {
            for range in self.brought_along(&reach) {
                for (_, unit) in self.units.range_mut(range) {
                    let older = unit.steps.iter().take_while(|step| step.sequence < reach.1);
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

    /// Takes bytes that are durable now out of older stores that are not: non-temporal stores
    /// overtake cached ones that were not flushed, and holes overtake both.
    fn forget_older(&mut self, durable: &Piece, sequence: u64) {
        if self.granularity == Granularity::Page {
            return;
        }
        let word = durable.word;
        for key in [Key::Cached(word / LINE_SIZE), Key::Around(word)] {
            let Some(unit) = self.units.get_mut(&key) else { continue };
            for step in unit.steps.iter_mut().filter(|step| step.sequence < sequence) {
                for piece in step.pieces.iter_mut().filter(|piece| piece.word == word) {
                    piece.mask &= !durable.mask;
                }
                step.pieces.retain(|piece| piece.mask != 0);
            }
        }
    }

    /// The words that a choice for each unit leaves different from the durable image.
    fn overlay(&self, units: &[(&Key, &Unit)], choices: &[u64]) -> Overlay {
        let mut chosen: Vec<(u64, u64, Piece)> = Vec::new();
        let mut reached: Vec<Reach> = Vec::new();
        for ((_, unit), choice) in units.iter().zip(choices) {
            unit.chosen(*choice, |step, mask| {
                for (bit, piece) in step.pieces.iter().enumerate() {
                    if step.kind == StepKind::Hole || mask >> bit & 1 == 1 {
                        chosen.push((piece.word, step.sequence, *piece));
                    }
                }
                reached.extend(step.reach());
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

    /// Adds what chosen steps bring along.
    fn bring_along(&self, reached: &[Reach], chosen: &mut Vec<(u64, u64, Piece)>) {
        for reach in reached {
            for range in self.brought_along(reach) {
                let units = self.units.range(range).map(|(_, unit)| unit);
                for step in units.flat_map(|unit| &unit.steps) {
                    if step.sequence < reach.1 {
                        let pieces = step.pieces.iter();
                        chosen.extend(pieces.map(|piece| (piece.word, step.sequence, *piece)));
                    }
                }
            }
        }
    }

    /// The units whose older steps are on media when a step of this reach is.
    fn brought_along(&self, (line, _, cached): &Reach) -> SmallVec<[RangeInclusive<Key>; 2]> {
        let mut ranges = SmallVec::new();
        if self.granularity == Granularity::Page {
            return ranges;
        }
        let start = line * LINE_SIZE;
        if *cached {
            ranges.push(Key::Around(start)..=Key::Around(start + LINE_SIZE - 1));
        }
        // Holes come last and are rare; most steps are spared the search.
        if matches!(self.units.keys().next_back(), Some(Key::Hole(_))) {
            let page = start / PAGE_SIZE;
            ranges.push(Key::Hole(page)..=Key::Hole(page));
        }
        ranges
    }
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
        if done == 0 || piece.word.is_multiple_of(LINE_SIZE) {
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
mod tests {
    use super::*;

    const A: u8 = 0xaa;
    const B: u8 = 0xbb;
    const C: u8 = 0xcc;

    fn on(thread: u32, event: Event) -> Entry {
        Entry { thread, event }
    }

    fn store(at: u64, data: &[u8]) -> Entry {
        on(0, Event::Store { at, data: data.into(), around: false })
    }

    fn around(at: u64, data: &[u8]) -> Entry {
        on(0, Event::Store { at, data: data.into(), around: true })
    }

    fn flush(at: u64, len: u64) -> Entry {
        on(0, Event::Flush { at, len })
    }

    fn fence() -> Entry {
        on(0, Event::Fence)
    }

    fn model(granularity: Granularity, len: usize, log: &[Entry]) -> Model {
        let mut model = Model::new(&vec![0; len], granularity, false);
        log.iter().for_each(|entry| model.apply(entry));
        model
    }

    /// All images, as the first byte of each of the words at `words`, sorted.
    fn states(model: &Model, words: &[u64]) -> Vec<Vec<u8>> {
        let wanted = Wanted { limit: usize::MAX, ..Wanted::default() };
        let mut states = Vec::new();
        let found = model.images(&wanted, |image| {
            let bytes = image.to_vec();
            states.push(words.iter().map(|word| bytes[*word as usize]).collect());
            Ok::<(), ()>(())
        });
        assert_eq!(found, Ok(states.len()));
        states.sort();
        states.dedup();
        states
    }

    fn cacheline(log: &[Entry], words: &[u64]) -> Vec<Vec<u8>> {
        states(&model(Granularity::Cacheline, 256, log), words)
    }

    #[test]
    fn a_line_that_was_not_flushed_is_there_or_not() {
        let log = [store(0, &[A; 8]), store(64, &[B; 8])];
        assert_eq!(cacheline(&log, &[0, 64]), [[0, 0], [0, B], [A, 0], [A, B]]);
        assert_eq!(model(Granularity::Cacheline, 256, &log).count(), 4);
    }

    #[test]
    fn flush_and_fence_make_a_line_durable() {
        let log = [store(0, &[A; 8]), flush(0, 8), fence(), store(64, &[B; 8])];
        assert_eq!(cacheline(&log, &[0, 64]), [[A, 0], [A, B]]);
        let durable = model(Granularity::Cacheline, 256, &log).durable_image();
        assert_eq!((durable[0], durable[64]), (A, 0));
    }

    #[test]
    fn neither_the_flush_nor_the_fence_is_enough() {
        let no_fence = [store(0, &[A; 8]), flush(0, 8)];
        assert_eq!(cacheline(&no_fence, &[0]), [[0], [A]]);
        let no_flush = [store(0, &[A; 8]), fence(), fence()];
        assert_eq!(cacheline(&no_flush, &[0]), [[0], [A]]);
        let wrong_order = [flush(0, 8), store(0, &[A; 8]), fence()];
        assert_eq!(cacheline(&wrong_order, &[0]), [[0], [A]]);
    }

    #[test]
    fn a_fence_counts_for_its_own_thread_only() {
        let other = on(1, Event::Fence);
        let log = [store(0, &[A; 8]), flush(0, 8), other.clone()];
        assert_eq!(cacheline(&log, &[0]), [[0], [A]]);
        let log = [around(0, &[A; 8]), other.clone()];
        assert_eq!(cacheline(&log, &[0]), [[0], [A]]);
        let log = [store(0, &[A; 8]), on(1, Event::Flush { at: 0, len: 8 }), other];
        assert_eq!(cacheline(&log, &[0]), [[A]]);
    }

    #[test]
    fn a_flush_covers_what_the_line_held_then() {
        let log = [store(0, &[A; 8]), flush(0, 1), store(8, &[B; 8]), fence()];
        assert_eq!(cacheline(&log, &[0, 8]), [[A, 0], [A, B]]);
    }

    #[test]
    fn stores_to_one_line_stay_in_order() {
        let log = [store(8, &[A; 8]), store(0, &[B; 8]), store(8, &[C; 8])];
        assert_eq!(cacheline(&log, &[8, 0]), [[0, 0], [A, 0], [A, B], [C, B]]);
    }

    #[test]
    fn the_words_of_one_store_are_torn_in_any_way_but_each_is_whole() {
        let log = [store(0, &[A; 24])];
        let expected =
            [[0, 0, 0], [0, 0, A], [0, A, 0], [0, A, A], [A, 0, 0], [A, 0, A], [A, A, 0]];
        let mut expected = expected.to_vec();
        expected.push([A, A, A]);
        assert_eq!(cacheline(&log, &[0, 8, 16]), expected);
        let model = model(Granularity::Cacheline, 256, &log);
        let wanted = Wanted::default();
        let whole = |image: &CrashImage<'_>| {
            let words = image.to_vec();
            let torn = words.chunks(8).any(|word| word.iter().any(|byte| *byte != word[0]));
            (!torn).then_some(()).ok_or(())
        };
        assert_eq!(model.images(&wanted, whole), Ok(8));
    }

    #[test]
    fn a_store_to_a_part_of_a_word_keeps_the_rest() {
        let log = [store(0, &[A; 8]), flush(0, 8), fence(), store(6, &[B; 4])];
        assert_eq!(
            cacheline(&log, &[5, 6, 8, 10]),
            [[A, A, 0, 0], [A, A, B, 0], [A, B, 0, 0], [A, B, B, 0]]
        );
    }

    #[test]
    fn words_around_the_cache_are_there_or_not_until_the_fence() {
        let mut log = vec![around(0, &[A; 16])];
        let any = [[0, 0], [0, A], [A, 0], [A, A]];
        assert_eq!(cacheline(&log, &[0, 8]), any);
        log.push(flush(0, 16));
        assert_eq!(cacheline(&log, &[0, 8]), any);
        log.push(fence());
        assert_eq!(cacheline(&log, &[0, 8]), [[A, A]]);
    }

    #[test]
    fn an_older_cached_store_does_not_come_back_over_a_durable_word() {
        let log = [store(0, &[A; 8]), store(8, &[A; 8]), around(0, &[B; 8]), fence()];
        assert_eq!(cacheline(&log, &[0, 8]), [[B, 0], [B, A]]);
    }

    #[test]
    fn a_cached_store_brings_older_words_of_its_line_along() {
        let log = [around(0, &[A; 8]), store(8, &[B; 8]), around(16, &[C; 8])];
        let states = cacheline(&log, &[0, 8, 16]);
        assert_eq!(states, [[0, 0, 0], [0, 0, C], [A, 0, 0], [A, 0, C], [A, B, 0], [A, B, C]]);
        // Another thread's fence makes the cached store durable, and the word with it.
        let log = [
            around(0, &[A; 8]),
            store(8, &[B; 8]),
            on(1, Event::Flush { at: 8, len: 8 }),
            on(1, Event::Fence),
        ];
        assert_eq!(cacheline(&log, &[0, 8]), [[A, B]]);
    }

    #[test]
    fn a_commit_record_without_its_payload_is_found() {
        // The payload was not flushed before the commit record.
        let wrong = [store(0, &[A; 8]), store(64, &[1; 8]), flush(64, 8), fence()];
        assert!(cacheline(&wrong, &[64, 0]).contains(&vec![1, 0]));
        let right =
            [store(0, &[A; 8]), flush(0, 8), fence(), store(64, &[1; 8]), flush(64, 8), fence()];
        for events in 0..=right.len() {
            assert!(!cacheline(&right[..events], &[64, 0]).contains(&vec![1, 0]), "{events}");
        }
    }

    #[test]
    fn byte_granularity_loses_at_most_a_part_of_the_last_store() {
        let mut log = vec![store(0, &[A; 16]), store(64, &[B; 16])];
        let last = states(&model(Granularity::Byte, 256, &log), &[0, 8, 64, 72]);
        assert_eq!(last, [[A, A, 0, 0], [A, A, 0, B], [A, A, B, 0], [A, A, B, B]]);
        log.push(on(0, Event::Mark(0)));
        let done = model(Granularity::Byte, 256, &log);
        assert_eq!(states(&done, &[0, 8, 64, 72]), [[A, A, B, B]]);
        assert_eq!(done.durable_image(), done.visible_image());
        let log = [store(60, &[A; 12])];
        let lines = states(&model(Granularity::Byte, 256, &log), &[60, 64, 71]);
        assert_eq!(lines, [[0, 0, 0], [A, 0, 0], [A, A, A]]);
    }

    #[test]
    fn byte_granularity_waits_for_words_around_the_cache() {
        let log = [around(0, &[A; 8]), on(0, Event::Mark(0)), fence()];
        assert_eq!(states(&model(Granularity::Byte, 64, &log[..2]), &[0]), [[0], [A]]);
        assert_eq!(states(&model(Granularity::Byte, 64, &log), &[0]), [[A]]);
    }

    #[test]
    fn any_page_may_be_written_back_at_any_moment() {
        let log =
            [store(0, &[A; 8]), store(4096, &[B; 8]), flush(0, 8192), fence(), store(512, &[C; 8])];
        let pages = model(Granularity::Page, 8192, &log);
        let expected = [[0, 0, 0], [0, 0, B], [A, 0, 0], [A, 0, B], [A, C, 0], [A, C, B]];
        assert_eq!(states(&pages, &[0, 512, 4096]), expected);
        let mut sectors = Model::new(&[0; 8192], Granularity::Page, true);
        log.iter().for_each(|entry| sectors.apply(entry));
        assert!(states(&sectors, &[0, 512, 4096]).contains(&vec![0, C, 0]));
        assert_eq!(sectors.count(), 8);
    }

    #[test]
    fn sync_makes_every_page_durable_and_persist_its_own() {
        let stores = [store(0, &[A; 8]), store(4096, &[B; 8])];
        let with = |event: Event| {
            let mut log = stores.to_vec();
            log.push(on(0, event));
            states(&model(Granularity::Page, 8192, &log), &[0, 4096])
        };
        assert_eq!(with(Event::Sync), [[A, B]]);
        assert_eq!(with(Event::Persist { at: 4100, len: 1 }), [[0, B], [A, B]]);
        assert_eq!(with(Event::Persist { at: 4095, len: 2 }), [[A, B]]);
    }

    #[test]
    fn a_hole_waits_for_the_file_system() {
        let mut log = vec![
            store(0, &[A; 8]),
            store(4096, &[A; 8]),
            flush(0, 8192),
            fence(),
            on(0, Event::Punch { at: 0, len: 8192 }),
            fence(),
        ];
        let holes = |log: &[Entry]| states(&model(Granularity::Cacheline, 8192, log), &[0, 4096]);
        assert_eq!(holes(&log), [[0, 0], [0, A], [A, 0], [A, A]]);
        // A later store to the page faults it in, and the hole is committed before.
        log.extend([store(64, &[B; 8]), flush(64, 8), fence()]);
        assert_eq!(holes(&log), [[0, 0], [0, A]]);
        log.push(on(0, Event::Persist { at: 0, len: 1 }));
        assert_eq!(holes(&log), [[0, 0]]);
        assert_eq!(model(Granularity::Cacheline, 8192, &log).durable_image()[64], B);
    }

    #[test]
    fn a_durable_hole_outlives_older_stores() {
        for dirty in [store(0, &[A; 8]), around(0, &[A; 8])] {
            let log = [dirty, on(0, Event::Punch { at: 0, len: 4096 })];
            let dirty = model(Granularity::Cacheline, 4096, &log);
            assert_eq!(states(&dirty, &[0]), [[0], [A]]);
            let log = [&log[..], &[on(1, Event::Sync)]].concat();
            assert_eq!(states(&model(Granularity::Cacheline, 4096, &log), &[0]), [[0]]);
        }
    }

    #[test]
    fn marks_change_nothing_and_are_remembered() {
        let mut model = model(Granularity::Cacheline, 64, &[store(0, &[A; 8])]);
        model.apply(&on(0, Event::Mark(17)));
        assert_eq!(states(&model, &[0]), [[0], [A]]);
        let mark = |image: &CrashImage<'_>| Err::<(), _>((image.event(), image.mark()));
        assert_eq!(model.images(&Wanted::default(), mark), Err((2, Some(17))));
    }

    #[test]
    fn equal_images_are_merged_and_the_count_is_of_choices() {
        let same = model(Granularity::Cacheline, 256, &[store(0, &[0; 8]), store(64, &[0; 8])]);
        assert_eq!((same.count(), states(&same, &[0]).len()), (4, 1));
        let log: Vec<Entry> = (0..100).map(|line| store(line * 64, &[A; 64])).collect();
        assert_eq!(model(Granularity::Cacheline, 6400, &log).count(), u64::MAX);
    }

    #[test]
    fn more_images_than_wanted_are_sampled_with_their_extremes() {
        let log: Vec<Entry> = (0..20).map(|line| store(line * 64, &[A; 8])).collect();
        let dirty = model(Granularity::Cacheline, 20 * 64, &log);
        let sample = |limit, seed| {
            let wanted = Wanted { limit, seed, ..Wanted::default() };
            let mut counts = Vec::new();
            let found = dirty.images(&wanted, |image| {
                counts.push(image.overlay().len());
                Ok::<(), ()>(())
            });
            assert_eq!(found, Ok(counts.len()));
            counts
        };
        let counts = sample(1000, 1);
        assert_eq!(counts.len(), 1000);
        let with = |lines: usize| counts.iter().filter(|count| **count == lines).count();
        assert_eq!([0, 20, 1, 19].map(with), [1, 1, 20, 20]);
        assert_eq!([with(2), with(18)], [190, 190]);
        assert_eq!(sample(2, 1), [0, 20]);
        assert_eq!(sample(40, 7), sample(40, 7));
        assert_eq!(sample(0, 0), []);
    }

    #[test]
    fn many_stores_that_changed_nothing_do_not_hold_the_sample_up() {
        let mut log = vec![around(0, &[0; 32768])];
        log.push(store(32768, &[A; 64]));
        let same = model(Granularity::Cacheline, 32768 + 64, &log);
        let mut tried = 0;
        let wanted = Wanted { limit: 16, ..Wanted::default() };
        let found = same.images(&wanted, |_| {
            tried += 1;
            Ok::<(), ()>(())
        });
        assert_eq!(found, Ok(tried));
        assert!((2..=16).contains(&tried), "{tried}");
    }

    #[test]
    fn only_lines_that_were_named_are_chosen() {
        let log = [store(0, &[A; 8]), store(64, &[B; 8])];
        let dirty = model(Granularity::Cacheline, 256, &log);
        let images = |ranges: &[(u64, u64)]| {
            let only = Some(ranges.to_vec());
            let mut seen = Vec::new();
            let wanted = Wanted { only, ..Wanted::default() };
            let found = dirty.images(&wanted, |image| {
                let bytes = image.to_vec();
                seen.push((bytes[0], bytes[64]));
                Ok::<(), ()>(())
            });
            assert_eq!(found, Ok(seen.len()));
            seen
        };
        assert_eq!(images(&[(100, 1)]), [(0, 0), (0, B)]);
        assert_eq!(images(&[(128, 64), (0, 0)]), [(0, 0)]);
        assert_eq!(images(&[(63, 2)]).len(), 4);
    }

    #[test]
    fn an_image_ends_where_the_medium_ends() {
        let log = [store(0, &[A; 13])];
        let odd = model(Granularity::Cacheline, 13, &log);
        assert_eq!(odd.visible_image(), [A; 13]);
        assert_eq!(odd.durable_image(), [0; 13]);
        let words = |image: &CrashImage<'_>| Err::<(), _>((image.word(3), image.word(8)));
        assert_eq!(odd.images(&Wanted::default(), words), Err((Some(0), None)));
    }
}
