//! Wear levelling: the free block of a lane changes places with one that is hardly ever written.
//!
//! A sector that is written again and again uses the blocks of its lanes again and again, and the
//! block of a sector that nobody writes is never used. Now and then a write is followed by a
//! *relocation*: a cold sector, the victim, is rewritten as it is into the lane's worn free block.
//! That goes the way of every write, so that nothing has to be added to the crash argument, and it
//! leaves the victim's fresh block to the lane. The media look as if somebody had written the
//! victim.
//!
//! ```text
//! random       every `period`-th write of a lane; any sector; no memory
//! least-worn   at most as often, where the free block is worn; four bytes a block
//! ```
//!
//! Who looks for a block with few writes goes round the sectors like the hand of a clock and takes
//! the first whose block is no more worn than the least that was met on the round before (the
//! floor), or the least of [`SCAN`] sectors. How worn a free block has to be for that depends on
//! what its lane has saved: four periods above the floor with one relocation saved, half a period
//! with eight. So nothing is spent on blocks that are hardly worn while much is written, and
//! something is left for those that stand out.
//!
//! Invariants:
//! 1. Relocations are at most one for `period` writes of a lane, and one more a lane, which begins
//!    somewhere in a period. What a lane saves is limited, and an attempt that finds nobody is paid
//!    for as well, so that looking costs little, too.
//! 2. A relocation holds one lane, and the lock of the victim's line of the map: the content that
//!    is copied is that of the entry which is replaced. It waits for no lane.
//! 3. It stores into the lane's free block only after it has taken the lane and found no reader in
//!    that block, as a write does; the block that the victim leaves is the lane's afterwards.
//! 4. A victim that reads as zeroes does so afterwards, on each side of a crash: its new block is
//!    zeroed, and its entry says zero again. One in error is left where it is.
//! 5. A relocation that fails has changed nothing, or costs a lane. No client sees it.
//! 6. A block's count is changed only by whoever has its lane.
//!
//! What this does not do: level map and log, which have their place; arenas among each other;
//! remember counts when the arena is closed.

use std::alloc::{alloc_zeroed, Layout};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::engine::{Arena, Entries, Lane, Lanes, Lines};
use super::{Plant, ERROR, NORMAL, ZERO};
use crate::error::{Error, Kind, Result};
use crate::media::{caused_by, Cause, Medium};

/// Sectors that are looked at for one relocation: four lines of the map.
const SCAN: u32 = 64;
/// Sectors in a line of the map.
const LINE: u32 = 16;
/// Relocations that a lane may save up while its free blocks are not worn.
const SAVED: u32 = 8;
/// Attempts that find nobody and cost as much as one relocation.
const LOOKS_FOR_ONE: u32 = 8;
/// The longest period.
const PERIOD_MOST: u32 = 1 << 20;
/// Bytes of the largest sector with its metadata.
const SECTOR_MOST: usize = 4224;

/// Whose block goes to the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Victim {
    /// Any sector's.
    Random,
    /// That of few writes.
    LeastWorn,
}

/// How an arena is levelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levelling {
    /// Writes of a lane for one relocation: the ψ of Start-Gap.
    pub period: u32,
    /// Whose block goes to the lane.
    pub victim: Victim,
    /// Where it begins: another number, another order.
    pub seed: u64,
}

/// The state of levelling of one arena.
pub(super) struct Leveller {
    options: Levelling,
    sectors: u32,
    /// Lines of the map, and how far apart are those that follow each other in a round.
    lines: u32,
    stride: u32,
    /// Writes of each block since the arena was opened; none where victims are random.
    counts: Box<[AtomicU32]>,
    /// How many lanes further on threads begin than they did at first.
    turn: AtomicUsize,
    dice: AtomicU64,
    /// The sector that is looked at next.
    hand: AtomicU32,
    /// The least count of the last round: no block of a sector has less.
    floor: AtomicU32,
    /// The least count of this round so far.
    least: AtomicU32,
    relocations: AtomicU64,
}

impl Leveller {
    pub(super) fn new(options: Levelling, sectors: u32, blocks: u32) -> Result<Leveller> {
        if !(1..=PERIOD_MOST).contains(&options.period) {
            let text =
                format!("a levelling period of {} is not 1 to {PERIOD_MOST}", options.period);
            return Err(Error::new(Kind::Invalid, "open", text));
        }
        let counted = options.victim == Victim::LeastWorn;
        let lines = sectors.div_ceil(LINE);
        let leveller = Leveller {
            options,
            sectors,
            lines,
            stride: stride_of(lines),
            counts: if counted { zeroes(blocks as usize)? } else { Box::default() },
            turn: AtomicUsize::new(0),
            dice: AtomicU64::new(options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            hand: AtomicU32::new(0),
            floor: AtomicU32::new(0),
            least: AtomicU32::new(u32::MAX),
            relocations: AtomicU64::new(0),
        };
        leveller.hand.store(leveller.roll(lines) * LINE, Ordering::Relaxed);
        leveller.turn.store(leveller.roll(u32::MAX) as usize, Ordering::Relaxed);
        Ok(leveller)
    }

    /// Where a lane begins to count to the period.
    pub(super) fn start(&self) -> u32 {
        self.roll(self.options.period)
    }

    /// How many lanes further on threads begin.
    pub(super) fn turn(&self) -> usize {
        self.turn.load(Ordering::Relaxed)
    }

    /// A number below `bound`. Threads may draw the same one; nobody minds.
    fn roll(&self, bound: u32) -> u32 {
        let mut dice = self.dice.load(Ordering::Relaxed);
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        self.dice.store(dice, Ordering::Relaxed);
        (((dice >> 32) * u64::from(bound)) >> 32) as u32
    }

    fn count_of(&self, block: u32) -> u32 {
        self.counts.get(block as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Counts a write to the free block of a lane, which the caller has.
    pub(super) fn wrote(&self, block: u32) {
        if let Some(count) = self.counts.get(block as usize) {
            // No exchange: those wait for every write-back under way, like a fence.
            count.store(count.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed);
        }
    }

    /// True when a lane that has just moved on is to have another free block; it has `used` its
    /// last one. Of these two the more worn is to go: where one sector is written over and over
    /// they take turns, and the other one might never be seen.
    pub(super) fn is_due(&self, lane: &mut Lane, used: u32) -> bool {
        let period = self.options.period;
        lane.writes = lane.writes.wrapping_add(1);
        if lane.writes.is_multiple_of(period) {
            let turn = self.turn.load(Ordering::Relaxed).wrapping_add(1);
            self.turn.store(turn, Ordering::Relaxed);
        }
        lane.saved = lane.saved.saturating_add(1).min(period * SAVED);
        if lane.saved < period {
            return false;
        }
        match self.options.victim {
            // Where one sector is written over and over, two blocks take turns. An even period
            // would always find the same one.
            Victim::Random => self.roll(2) == 0 || lane.saved > period,
            Victim::LeastWorn => {
                let (floor, count) = (self.floor.load(Ordering::Relaxed), self.count_of(lane.free));
                let half = u64::from(period) * u64::from(period * SAVED / 2);
                let margin = (half / u64::from(lane.saved)) as u32;
                count >= floor.saturating_add(margin) && count >= self.count_of(used)
            }
        }
    }

    /// A sector whose block a lane may have for its own; `block_of` gives a sector's, if it has a
    /// plain one.
    fn choose(&self, free: u32, block_of: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        match self.options.victim {
            Victim::Random => Some(self.roll(self.sectors)),
            Victim::LeastWorn => {
                let (lba, count) = self.least_worn(block_of)?;
                (count.saturating_add(self.options.period / 2) <= self.count_of(free))
                    .then_some(lba)
            }
        }
    }

    /// The sector at a place of the round: line by line, and the lines in an order that no stream
    /// of writes has. The worn block of a victim just ahead of a stream would be back at once.
    fn sector_at(&self, place: u32) -> u32 {
        let line = u64::from(place / LINE) * u64::from(self.stride) % u64::from(self.lines);
        line as u32 * LINE + place % LINE
    }

    fn least_worn(&self, block_of: impl Fn(u32) -> Option<u32>) -> Option<(u32, u32)> {
        let floor = self.floor.load(Ordering::Relaxed);
        let mut hand = self.hand.load(Ordering::Relaxed);
        let (mut found, mut least) = (None, self.least.load(Ordering::Relaxed));
        let end = self.lines * LINE;
        for _ in 0..SCAN.min(end) {
            let lba = self.sector_at(hand);
            hand = (hand + 1) % end;
            if let Some(block) = (lba < self.sectors).then(|| block_of(lba)).flatten() {
                let count = self.count_of(block);
                if found.is_none_or(|(_, best)| count < best) {
                    found = Some((lba, count));
                }
                least = least.min(count);
            }
            if hand == 0 && least != u32::MAX {
                self.floor.store(least, Ordering::Relaxed);
                least = u32::MAX;
            }
            if found.is_some_and(|(_, best)| best <= floor) {
                break;
            }
        }
        self.hand.store(hand, Ordering::Relaxed);
        self.least.store(least, Ordering::Relaxed);
        found
    }
}

/// A step of about the golden section that meets every line before it comes back.
fn stride_of(lines: u32) -> u32 {
    let divisor = |mut a: u32, mut b: u32| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let near = (u64::from(lines) * 618 / 1000).max(1) as u32;
    (near..=lines).find(|stride| divisor(*stride, lines) == 1).unwrap_or(1)
}

/// Counters that take no memory until they are used.
fn zeroes(count: usize) -> Result<Box<[AtomicU32]>> {
    let refused = || {
        let text = format!("counters of {count} blocks");
        Error::new(Kind::NoSpace, "open", text)
    };
    let layout = Layout::array::<AtomicU32>(count).map_err(|_| refused())?;
    if layout.size() == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout has bytes.
    let memory = unsafe { alloc_zeroed(layout) }.cast::<AtomicU32>();
    if memory.is_null() {
        return Err(refused());
    }
    // SAFETY: the allocator gave this memory for this layout, and zero bytes are zero counters.
    Ok(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(memory, count)) })
}

impl Arena {
    /// Sectors that were rewritten for levelling since the arena was opened.
    pub fn relocations(&self) -> u64 {
        self.leveller.as_ref().map_or(0, |each| each.relocations.load(Ordering::Relaxed))
    }

    /// Gives a lane another free block, unless somebody else has the lane or reads that block. What
    /// goes wrong is nobody's failure: the client's sectors are written, the victim is as it was.
    #[cold]
    pub(super) fn relocate(&self, medium: &dyn Medium, leveller: &Leveller, number: usize) {
        let Some(mut lane) = self.lanes[number].0.try_lock() else { return };
        let readers = !self.planted(Plant::RelocationIgnoresReaders);
        if lane.dead || (readers && !self.readers.idle(lane.free)) {
            return;
        }
        let period = leveller.options.period;
        let looking = period.div_ceil(LOOKS_FOR_ONE);
        lane.saved = lane.saved.saturating_sub(looking);
        let block_of = |lba| {
            let entry = self.entry(medium, lba).ok().filter(|entry| entry & NORMAL != ERROR)?;
            Some(self.block_of(entry, lba))
        };
        if let Some(victim) = leveller.choose(lane.free, block_of) {
            lane.saved = lane.saved.saturating_sub(period - looking);
            let mut lanes = Lanes::new();
            lanes.push(lane);
            if self.rewrite(medium, &mut lanes, victim).is_ok_and(|done| done) {
                // Not exact where threads relocate at the same moment.
                let done = leveller.relocations.load(Ordering::Relaxed) + 1;
                leveller.relocations.store(done, Ordering::Relaxed);
            }
        }
    }

    /// Writes a sector's own content into the free block of the lane. False for one in error.
    fn rewrite(&self, medium: &dyn Medium, lanes: &mut Lanes<'_>, lba: u32) -> Result<bool> {
        let mut content = [0; SECTOR_MOST];
        let early = self.planted(Plant::RelocationReadsUnlocked);
        let before = if early { self.content_of(medium, lba, &mut content)? } else { None };
        let mut lines = Lines::new();
        self.lock_lines(lba, 1, &mut lines);
        let found = if early { before } else { self.content_of(medium, lba, &mut content)? };
        let Some(state) = found else { return Ok(false) };
        let mut entries = Entries::new();
        self.plan(medium, lba, lanes, &mut entries)?;
        if self.planted(Plant::RelocationMapFirst) {
            self.store_map(medium, &entries, state)?;
            self.order(medium)?;
        }
        let mut len = self.geometry.external_lbasize;
        if self.planted(Plant::RelocationCutsShort) {
            len /= 2;
        }
        let keep = state == ZERO && self.planted(Plant::RelocationSkipsZeroes);
        for lane in lanes.iter_mut().filter(|_| !keep) {
            let _moved = caused_by(Cause::Levelling);
            // SAFETY: the content has room for the largest sector.
            let filled = unsafe { self.fill_block(medium, lane, content.as_ptr(), len) };
            lane.dead = filled.as_ref().is_err_and(|error| error.kind == Kind::Media);
            filled?;
        }
        let result = self.exchange(medium, lanes, &mut lines, &entries, state);
        lanes.iter_mut().for_each(|lane| lane.dead = result.is_err());
        result.map(|()| true)
    }

    /// Reads all of a sector, metadata too; the flags that its entry is to have afterwards.
    fn content_of(
        &self,
        medium: &dyn Medium,
        lba: u32,
        content: &mut [u8; SECTOR_MOST],
    ) -> Result<Option<u32>> {
        let entry = self.entry(medium, lba)?;
        let len = self.geometry.external_lbasize as usize;
        match entry & NORMAL {
            _ if len > content.len() => return Ok(None),
            ERROR => return Ok(None),
            ZERO => return Ok(Some(ZERO)),
            _ => {}
        }
        let block = self.checked_block("write", entry, lba)?;
        // SAFETY: the content is longer than a sector.
        unsafe {
            medium.load(self.geometry.block_at(block), content.as_mut_ptr(), len as u64)?;
        }
        Ok(Some(NORMAL))
    }
}
