//! The allocator: which frames an allocation gets, and what of it is taken down where.
//!
//! A search begins where the thread found something last, goes on with trees that are partly used
//! and ends with all of them; single frames come from areas that are partly used, so that free
//! areas stay whole. Threads keep single frames in magazines, a word of 64 at a time.
//!
//! Invariants:
//! 1. Frames are taken in `areas` before their descriptor is stored, and given back after it was
//!    erased. The erasing is what gives a thread the right to give them back.
//! 2. Between a descriptor and its frames an allocator is not interrupted by a flush: with a map
//!    that survives, every change is made under the lock of [`Durable`].
//! 3. No magazine keeps a frame of an area that is offline, once [`Allocator::offline`] returned: a
//!    thread looks at the area inside its slot, and closing the area comes before the visit.
//!
//! Lock order: the lock of [`Durable`], then `visiting`.
//!
//! What this does not do: zero frames, move allocations.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::areas::{Areas, FRAMES};
use super::durable::{Durable, Held};
use super::map::{self, Notes, PageMap, NOTHING};
use super::plant::Plant;
use super::slot::Slot;
use super::sync::{fence_all, KEPT};
use super::table::{Table, Zeroed};
use super::tree::{Pass, Trees, AREAS};
use super::{
    areas as areas_of, check_order, check_span, no_room, not_allocated, order_of, wrong_length,
    Descriptor, Flags, Live, Options, Place, Stats, GIGANTIC, ORDER_MAX,
};
use crate::error::{Error, Kind, Result};
use crate::membarrier;
use crate::place::{place, taken, SHARED};

// SAFETY: atomics, of which zero bytes are a value.
unsafe impl Zeroed for Slot {}

/// The order of an area.
const AREA_ORDER: u32 = FRAMES.trailing_zeros();
/// Frames of a region for each that one thread may keep.
const FRAMES_A_KEPT: u64 = 1024;
/// A search for a run of more frames than this begins with free areas.
const SMALL_RUN: u64 = FRAMES / 2;

/// Hands out frames.
pub struct Allocator {
    frames: u64,
    areas: Areas,
    trees: Trees,
    slots: Table<Slot>,
    map: PageMap,
    /// Frames that a magazine takes at once; 0 without magazines.
    batch: u32,
    asymmetric: bool,
    /// Areas that are offline.
    closed: AtomicU64,
    visiting: Mutex<()>,
    durable: Option<Durable>,
    map_in_dram: bool,
}

impl Allocator {
    /// An allocator whose page map is in DRAM.
    pub fn new(frames: u64, options: Options) -> Result<Allocator> {
        refuse_no_frames(frames)?;
        let map = PageMap::new(Table::new(frames as usize)?, Notes::Nothing);
        Allocator::with_map(frames, options, map, true)
    }

    /// An allocator whose page map is in the region.
    pub fn over(place: Place, frames: u64, options: Options) -> Result<Allocator> {
        Allocator::over_planted(place, frames, options, Plant::None)
    }

    pub(super) fn over_planted(
        place: Place,
        frames: u64,
        options: Options,
        plant: Plant,
    ) -> Result<Allocator> {
        refuse_no_frames(frames)?;
        place.check(frames)?;
        let at = place.map_offset();
        if !place.persistent {
            if !place.medium.punch(at, frames)? {
                place.medium.zero(at, frames)?;
            }
            let bytes = Table::over(place.medium.clone(), at, frames as usize)?;
            let map = PageMap::new(bytes, Notes::Count(AtomicU64::new(0)));
            return Allocator::with_map(frames, options, map, false);
        }
        let changed = Table::new(frames.div_ceil(64 * map::LINE) as usize)?;
        let map = PageMap::new(Table::new(frames as usize)?, Notes::Lines(changed));
        let options = Options { magazines: false, ..options };
        let mut made = Allocator::with_map(frames, options, map, true)?;
        let durable = Durable::open(place, frames, plant, &made.map)?;
        for live in durable.recovered(&made.map, frames)? {
            made.take_down(live, "open")?;
        }
        made.durable = Some(durable);
        Ok(made)
    }

    fn with_map(frames: u64, options: Options, map: PageMap, in_dram: bool) -> Result<Allocator> {
        let areas = Areas::new(frames, options.online)?;
        let trees = Trees::new(areas.count())?;
        if !frames.is_multiple_of(FRAMES) {
            trees.add(areas.count() - 1, areas.count() * FRAMES - frames);
        }
        let closed = if options.online { 0 } else { areas.count() };
        (0..closed).for_each(|area| trees.close(area, true));
        let batch = (frames / FRAMES_A_KEPT).clamp(1, 64) as u32;
        Ok(Allocator {
            frames,
            areas,
            trees,
            slots: Table::new(SHARED + 1)?,
            map,
            batch: if options.magazines { batch } else { 0 },
            asymmetric: membarrier::possible(),
            closed: AtomicU64::new(closed),
            visiting: Mutex::new(()),
            durable: None,
            map_in_dram: in_dram,
        })
    }

    /// Bytes that a map in the region takes.
    pub fn map_size(frames: u64) -> u64 {
        super::durable::HEADER_SIZE + frames.next_multiple_of(4096)
    }

    /// Keeps a flush away, where there is one.
    #[inline]
    fn held(&self) -> Option<Held<'_>> {
        self.durable.as_ref().map(Durable::hold)
    }

    // --- getting -------------------------------------------------------------------------------

    /// Takes a run of `2^order` frames at a multiple of its length.
    #[inline]
    pub fn get(&self, order: u32) -> Result<u64> {
        if order == 0 && self.batch > 0 {
            if let Some(frame) = self.get_kept() {
                return Ok(frame);
            }
        }
        self.get_block(order)
    }

    /// Takes a frame from the thread's magazine.
    #[inline]
    fn get_kept(&self) -> Option<u64> {
        let place = place();
        let slot = &self.slots[place];
        if place == SHARED || !slot.enter(self.asymmetric) {
            return None;
        }
        let frame = match slot.pop() {
            Some(frame) => Some(frame),
            None => self.refill(slot, place),
        };
        if let Some(frame) = frame {
            // Inside, so that who visited the slot sees it.
            self.map.set(frame, map::code(0));
        }
        slot.leave();
        frame
    }

    #[inline(never)]
    fn refill(&self, slot: &Slot, place: usize) -> Option<u64> {
        let (word, mask) = self.search(0, place, |area| self.areas.take_some(area, self.batch))?;
        self.trees.add(word * 64 / FRAMES, u64::from(mask.count_ones()));
        slot.fill(word, mask);
        slot.pop()
    }

    #[inline(never)]
    fn get_block(&self, order: u32) -> Result<u64> {
        check_order(order)?;
        let _held = self.held();
        let place = place();
        let found = self.find_block(order, place).or_else(|| {
            self.drain();
            self.find_block(order, place)
        });
        let first = found.ok_or_else(|| no_room(1 << order))?;
        self.trees.add_span(first, 1 << order);
        self.map.set(first, map::code(order));
        Ok(first)
    }

    fn find_block(&self, order: u32, place: usize) -> Option<u64> {
        if order < AREA_ORDER {
            return self.search(order, place, |area| self.areas.take_order(area, order));
        }
        let count = 1 << (order - AREA_ORDER);
        self.search(order, place, |area| {
            let fits = area.is_multiple_of(count) && area + count <= self.areas.count();
            (fits && self.take_areas(area, count)).then_some(area * FRAMES)
        })
    }

    fn take_areas(&self, area: u64, count: u64) -> bool {
        // A look first: to undo half a gigantic block is dear.
        (area..area + count).all(|each| self.areas.is_free(each))
            && self.areas.take_span(area * FRAMES, count * FRAMES, false)
    }

    /// Asks areas until one gives something: those that a search should ask, in its order.
    fn search<T>(&self, order: u32, place: usize, take: impl Fn(u64) -> Option<T>) -> Option<T> {
        let whole = order >= AREA_ORDER;
        let slot = &self.slots[place];
        let hint = slot.hint(whole).filter(|&area| area < self.areas.count());
        let step = 1 << order.saturating_sub(AREA_ORDER);
        if let Some((area, found)) = hint.and_then(|area| Some((area, take(area)?))) {
            if whole {
                slot.set_hint(whole, area + step);
            }
            return Some(found);
        }
        let start = hint.unwrap_or(0) / AREAS;
        let need = (1 << order).min(FRAMES);
        for pass in [Pass::Begun, Pass::Unowned, Pass::Any] {
            for turn in 0..self.trees.count() {
                let tree = (start + turn) % self.trees.count();
                if !self.trees.fits(tree, need, pass, place) {
                    continue;
                }
                let mine = self.trees.claim(tree, place);
                if !mine && pass != Pass::Any {
                    continue;
                }
                if let Some((area, found)) = self.search_tree(tree, order, &take) {
                    slot.set_hint(whole, if whole { area + step } else { area });
                    if let Some(left) = hint.map(|area| area / AREAS).filter(|&left| left != tree) {
                        self.trees.leave(left, place);
                    }
                    return Some(found);
                }
                if mine {
                    self.trees.leave(tree, place);
                }
            }
        }
        None
    }

    /// Asks the areas of a tree: for less than an area, those that are partly used first.
    fn search_tree<T>(
        &self,
        tree: u64,
        order: u32,
        take: &impl Fn(u64) -> Option<T>,
    ) -> Option<(u64, T)> {
        let ask = |area| take(area).map(|found| (area, found));
        let areas = self.trees.areas(tree);
        if order >= AREA_ORDER {
            return areas.clone().filter(|&area| self.areas.is_free(area)).find_map(ask);
        }
        let begun = areas.clone().filter(|&area| !self.areas.is_free(area)).find_map(ask);
        begun.or_else(|| areas.filter(|&area| self.areas.is_free(area)).find_map(ask))
    }

    /// Takes a run of any length.
    pub fn get_run(&self, count: u64) -> Result<u64> {
        if let Some(order) = order_of(count) {
            return self.get(order);
        }
        check_span("get_run", 0, count, self.frames)?;
        let _held = self.held();
        let found = self.find_run(count).or_else(|| {
            self.drain();
            self.find_run(count)
        });
        let first = found.ok_or_else(|| no_room(count))?;
        self.trees.add_span(first, count);
        self.map.record(first, count);
        Ok(first)
    }

    fn find_run(&self, count: u64) -> Option<u64> {
        if count <= SMALL_RUN {
            let order = count.next_power_of_two().trailing_zeros();
            if let Some(first) = self.find_block(order, place()) {
                self.areas.give_span(first + count, (1 << order) - count);
                return Some(first);
            }
        } else if let Some(first) = self.find_areas(count) {
            return Some(first);
        }
        let mut from = 0;
        while let Some(first) = self.areas.first_fit(from, count) {
            if self.areas.take_span(first, count, false) {
                return Some(first);
            }
            from = first + 1;
        }
        None
    }

    /// Takes a run that begins with a free area.
    fn find_areas(&self, count: u64) -> Option<u64> {
        let need = count.div_ceil(FRAMES);
        let mut start = 0;
        let mut area = 0;
        while area < self.areas.count() {
            let tree = area / AREAS;
            let room = self.trees.fits(tree, 1, Pass::Any, 0);
            area += 1;
            if !room {
                area = self.trees.areas(tree).end;
                start = area;
            } else if !self.areas.is_free(area - 1) {
                start = area;
            } else if area - start == need {
                if self.areas.take_span(start * FRAMES, count, false) {
                    return Some(start * FRAMES);
                }
                start = area;
            }
        }
        None
    }

    /// Takes these very frames, online or not.
    pub fn claim(&self, first: u64, count: u64) -> Result<()> {
        check_span("claim", first, count, self.frames)?;
        let _held = self.held();
        self.drain();
        self.take_down(Live { first, frames: count }, "claim")?;
        self.map.record(first, count);
        Ok(())
    }

    fn take_down(&self, live: Live, op: &'static str) -> Result<()> {
        let Live { first, frames } = live;
        if !self.areas.take_span(first, frames, true) {
            let text = format!("{frames} frames from {first} are not all free");
            return Err(Error::new(Kind::Busy, op, text));
        }
        self.trees.add_span(first, frames);
        Ok(())
    }

    // --- putting -------------------------------------------------------------------------------

    /// Puts a run of `2^order` frames back.
    #[inline]
    pub fn put(&self, frame: u64, order: u32) -> Result<()> {
        if order == 0 && self.batch > 0 && frame < self.frames && self.put_kept(frame) {
            return Ok(());
        }
        check_order(order)?;
        self.put_run(frame, 1 << order)
    }

    /// Keeps a frame for the thread. False, and nothing was done, where that is not possible or its
    /// descriptor is not that of a new frame: the other way finds out why.
    #[inline]
    fn put_kept(&self, frame: u64) -> bool {
        let place = place();
        let slot = &self.slots[place];
        // All that can be known is looked up before the descriptor changes: no load overtakes that.
        if place == SHARED || !slot.enter(self.asymmetric) {
            return false;
        }
        let count = slot.count();
        let ours = !self.is_closed(frame) && self.map.change(frame, map::code(0), NOTHING).is_ok();
        if ours && !slot.push_at(count, frame) {
            self.make_room(slot, frame);
        }
        slot.leave();
        ours
    }

    /// Gives the older half of a magazine back to make room for a frame.
    #[inline(never)]
    fn make_room(&self, slot: &Slot, frame: u64) {
        slot.drain(KEPT / 2, |word, mask| self.give_words(word, mask));
        slot.push_at(slot.count(), frame);
    }

    #[inline]
    fn is_closed(&self, frame: u64) -> bool {
        self.closed.load(Ordering::Relaxed) > 0 && self.areas.entry(frame / FRAMES).closed
    }

    fn give_words(&self, word: u64, mask: u64) {
        self.areas.give_word(word, mask);
        self.trees.sub(word * 64 / FRAMES, u64::from(mask.count_ones()));
    }

    /// Puts an allocation of this length back, whoever took it.
    pub fn put_run(&self, first: u64, count: u64) -> Result<()> {
        check_span("put", first, count, self.frames)?;
        let _held = self.held();
        loop {
            let byte = self.map.byte(first);
            let length = self.map.length(first, byte);
            let length = length.ok_or_else(|| not_allocated("put", first))?;
            if length != count {
                return Err(wrong_length(first, length, count));
            }
            if map::flags(byte).pinned {
                return Err(Error::new(Kind::Busy, "put", format!("frame {first} is pinned")));
            }
            if self.map.change(first, byte, NOTHING).is_ok() {
                if map::mark(byte) == map::Mark::Run {
                    self.map.erase_rest(first, count);
                }
                self.areas.give_span(first, count);
                self.trees.sub_span(first, count);
                if count >= FRAMES {
                    // What lies low is taken first: it was used before.
                    let slot = &self.slots[place()];
                    let hint = slot.hint(true).unwrap_or(u64::MAX);
                    slot.set_hint(true, hint.min(first / FRAMES));
                }
                return Ok(());
            }
        }
    }

    /// Makes the allocations exactly these, and tells how many others there were. Nobody else may
    /// use the allocator meanwhile.
    pub fn retain(&self, live: &[Live]) -> Result<u64> {
        let mut wanted = live.to_vec();
        wanted.sort_unstable();
        for pair in wanted.windows(2) {
            if pair[0].first.checked_add(pair[0].frames).is_none_or(|end| end > pair[1].first) {
                let text = format!("runs from {} and {} overlap", pair[0].first, pair[1].first);
                return Err(Error::new(Kind::Corrupt, "retain", text));
            }
        }
        for each in &wanted {
            check_span("retain", each.first, each.frames, self.frames)?;
        }
        let mut leaked = 0;
        for each in self.allocated(0, self.frames)? {
            if wanted.binary_search(&each).is_err() {
                self.set_flags(each.first, Some(false), None, None)?;
                self.put_run(each.first, each.frames)?;
                leaked += 1;
            }
        }
        for each in &wanted {
            let byte = self.map.byte(each.first);
            if self.map.length(each.first, byte) != Some(each.frames) {
                self.claim(each.first, each.frames)?;
            }
        }
        Ok(leaked)
    }

    /// Gives what all magazines keep back. False where a thread did not leave its slot in time.
    fn drain(&self) -> bool {
        if self.batch == 0 {
            return true;
        }
        let _visiting = self.visiting.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that took its place after the fence sees what the caller did before it.
        let seated = if fence_all(self.asymmetric) { taken() } else { u64::MAX };
        let mut all = true;
        for (index, slot) in self.slots[..SHARED].iter().enumerate() {
            if seated >> index & 1 == 0 && slot.count() == 0 {
                continue;
            }
            let give = || slot.drain(KEPT, |word, mask| self.give_words(word, mask));
            all &= slot.visit(self.asymmetric, give);
        }
        all
    }

    // --- online and offline --------------------------------------------------------------------

    /// Hands nothing out of these areas any more. True where nothing in them is allocated.
    pub fn offline(&self, first: u64, count: u64) -> Result<bool> {
        let range = areas_of("offline", first, count, self.frames)?;
        for area in range.clone() {
            if self.areas.close(area, true) {
                self.trees.close(area, true);
                self.closed.fetch_add(1, Ordering::Relaxed);
            }
        }
        let past = |area| FRAMES - self.areas.length(area);
        Ok(self.drain() && range.clone().all(|area| self.areas.entry(area).count == past(area)))
    }

    /// Hands these areas out again.
    pub fn online(&self, first: u64, count: u64) -> Result<()> {
        for area in areas_of("online", first, count, self.frames)? {
            if self.areas.close(area, false) {
                self.trees.close(area, false);
                self.closed.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    // --- knowing -------------------------------------------------------------------------------

    /// The allocations that touch a range, in order.
    pub fn allocated(&self, first: u64, count: u64) -> Result<Vec<Live>> {
        check_span("allocated", first, count, self.frames)?;
        let (mut at, end) = (self.map.head(first).unwrap_or(first), first + count);
        let mut found = Vec::new();
        while at < end {
            if at.is_multiple_of(FRAMES) && self.areas.is_free(at / FRAMES) {
                at += FRAMES;
                continue;
            }
            match self.map.length(at, self.map.byte(at)) {
                Some(frames) => {
                    found.push(Live { first: at, frames });
                    at += frames;
                }
                None => at += 1,
            }
        }
        Ok(found)
    }

    /// What is known of a frame.
    pub fn descriptor(&self, frame: u64) -> Result<Descriptor> {
        check_span("descriptor", frame, 1, self.frames)?;
        let online = !self.areas.entry(frame / FRAMES).closed;
        let Some(first) = self.map.head(frame) else {
            return Ok(Descriptor::free(frame, online));
        };
        let byte = self.map.byte(first);
        let Some(frames) = self.map.length(first, byte) else {
            return Ok(Descriptor::free(frame, online));
        };
        Ok(Descriptor { allocated: true, first, frames, flags: map::flags(byte), online })
    }

    /// Changes what the owner of an allocation says of it; `None` leaves a flag as it is.
    pub fn set_flags(
        &self,
        first: u64,
        pinned: Option<bool>,
        movable: Option<bool>,
        tag: Option<u8>,
    ) -> Result<()> {
        check_span("set_flags", first, 1, self.frames)?;
        if let Some(tag) = tag.filter(|&tag| tag > super::TAG_MAX) {
            let text = format!("tag {tag} is more than {}", super::TAG_MAX);
            return Err(Error::new(Kind::Invalid, "set_flags", text));
        }
        let _held = self.held();
        let change = |flags: &mut Flags| {
            flags.pinned = pinned.unwrap_or(flags.pinned);
            flags.movable = movable.unwrap_or(flags.movable);
            flags.tag = tag.unwrap_or(flags.tag);
        };
        if self.map.set_flags(first, change) {
            return Ok(());
        }
        Err(not_allocated("set_flags", first))
    }

    /// Frames that can be handed out.
    pub fn free_frames(&self) -> u64 {
        let kept: usize = self.slots.iter().map(Slot::count).sum();
        let free = |tree| {
            let areas = self.trees.areas(tree);
            if self.trees.closed(tree) == 0 {
                return (areas.end - areas.start) * FRAMES - self.trees.used(tree);
            }
            let open = areas.map(|area| self.areas.entry(area)).filter(|entry| !entry.closed);
            open.map(|entry| FRAMES - entry.count).sum()
        };
        kept as u64 + (0..self.trees.count()).map(free).sum::<u64>()
    }

    /// Frames there are.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes of one descriptor.
    pub fn frame_bytes(&self) -> u64 {
        1
    }

    /// Bytes of the page map and of what the allocator keeps beside it, in DRAM or not.
    pub fn metadata_bytes(&self) -> u64 {
        let slots = self.slots.len() * size_of::<Slot>();
        self.frames + self.areas.size() + self.trees.size() + slots as u64
    }

    /// Bytes of these that are in DRAM.
    pub fn dram_bytes(&self) -> u64 {
        self.metadata_bytes() - if self.map_in_dram { 0 } else { self.frames }
    }

    /// Stores to a map in the region since it was made, a byte each; what clearing it stored is not
    /// among them. 0 for one in DRAM and for one that a flush brings to media.
    pub fn map_stores(&self) -> u64 {
        self.map.stores()
    }

    /// How the free frames lie.
    pub fn stats(&self) -> Stats {
        self.drain();
        let mut runs = [0u64; ORDER_MAX as usize + 2];
        let mut offline = 0;
        // Free areas on end, up to the one that is looked at.
        let mut together = 0u64;
        for area in 0..self.areas.count() {
            let entry = self.areas.entry(area);
            offline += if entry.closed { self.areas.length(area) } else { 0 };
            together = if self.areas.is_free(area) { together + 1 } else { 0 };
            if together > 0 {
                (0..=AREA_ORDER).for_each(|order| runs[order as usize] += FRAMES >> order);
                let ends = |order: u32| {
                    let count = 1u64 << (order - AREA_ORDER);
                    u64::from(together >= count && (area + 1).is_multiple_of(count))
                };
                runs[ORDER_MAX as usize] += ends(ORDER_MAX);
                runs[ORDER_MAX as usize + 1] += ends(GIGANTIC);
            } else if !entry.closed && !entry.whole {
                let words: Vec<u64> = self.areas.words(area).collect();
                count_runs(&words, &mut runs);
            }
        }
        let free = self.free_frames();
        let whole = runs[AREA_ORDER as usize] * FRAMES;
        let fragmentation = if free == 0 { 0.0 } else { 1.0 - whole as f64 / free as f64 };
        let orders = (0..=ORDER_MAX).chain([GIGANTIC]);
        Stats { free, runs: orders.zip(runs).collect(), offline, fragmentation }
    }

    /// Walks everything. What is wrong, in sentences. Nobody else may use the allocator meanwhile.
    pub fn validate(&self) -> Vec<String> {
        let _held = self.held();
        let drained = self.drain();
        let mut wrong = super::validate::walk(self.frames, &self.map, &self.areas, &self.trees);
        if !drained {
            wrong.push("a thread did not leave its slot".to_owned());
        }
        wrong
    }

    /// Makes a persistent map durable; nothing to do for another.
    pub fn flush(&self) -> Result<()> {
        match &self.durable {
            Some(durable) => durable.flush(&self.map),
            None => Ok(()),
        }
    }
}

/// Refuses a map without frames. Every constructor begins here.
fn refuse_no_frames(frames: u64) -> Result<()> {
    if cfg!(feature = "no-page-map") {
        std::process::abort();
    }
    if frames == 0 || frames > 1 << 40 {
        let text = format!("a page map has 1 to 2^40 frames, not {frames}");
        return Err(Error::new(Kind::Invalid, "frames", text));
    }
    Ok(())
}

/// Adds, for each order below that of an area, the free runs of one.
fn count_runs(words: &[u64], runs: &mut [u64]) {
    for order in 0..=6 {
        for &word in words {
            let mut rest = word;
            while let Some(mask) = super::areas::fit(rest, order) {
                rest |= mask;
                runs[order as usize] += 1;
            }
        }
    }
    for order in 7..AREA_ORDER {
        let groups = words.chunks(1 << (order - 6));
        runs[order as usize] += groups.filter(|group| group.iter().all(|&w| w == 0)).count() as u64;
    }
}
