//! What is known of 64 areas (128 MiB) at once, so that a search does not look at each of them.
//!
//! Invariants:
//! 1. `used` is the sum over the entries of the tree's areas, as soon as who changed them is done.
//!    It tells a search where to look; what may be taken is decided in `areas`.
//! 2. `owner` is a wish: threads take frames from trees of their own while there are enough.
//!
//! What this does not do: lock anything.

use std::sync::atomic::{AtomicU32, Ordering};

use super::areas::{parts, FRAMES};
use super::table::{Table, Zeroed};
use crate::error::Result;

/// Areas of a tree.
pub const AREAS: u64 = 64;
const FULL: u64 = AREAS * FRAMES;

/// One tree. A line of its own, so that threads that work in different trees do not meet.
#[repr(align(64))]
pub struct Tree {
    used: AtomicU32,
    closed: AtomicU32,
    owner: AtomicU32,
}

// SAFETY: atomics, of which zero bytes are a value.
unsafe impl Zeroed for Tree {}

/// Which trees a search looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Partly used ones that no other thread wants.
    Begun,
    /// Those that no other thread wants.
    Unowned,
    /// All.
    Any,
}

/// All trees.
pub struct Trees {
    trees: Table<Tree>,
    areas: u64,
}

impl Trees {
    /// The trees of so many areas, of which nothing is used.
    pub fn new(areas: u64) -> Result<Trees> {
        Ok(Trees { trees: Table::new(areas.div_ceil(AREAS) as usize)?, areas })
    }

    /// Bytes of them.
    pub fn size(&self) -> u64 {
        (self.trees.len() * size_of::<Tree>()) as u64
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.trees.len() as u64
    }

    /// The areas of a tree.
    pub fn areas(&self, tree: u64) -> std::ops::Range<u64> {
        tree * AREAS..self.areas.min((tree + 1) * AREAS)
    }

    #[inline]
    fn of(&self, area: u64) -> &Tree {
        &self.trees[(area / AREAS) as usize]
    }

    /// Frames of a tree that are taken, or past the end.
    pub fn used(&self, tree: u64) -> u64 {
        u64::from(self.trees[tree as usize].used.load(Ordering::Relaxed))
    }

    /// Areas of a tree that are offline.
    pub fn closed(&self, tree: u64) -> u64 {
        u64::from(self.trees[tree as usize].closed.load(Ordering::Relaxed))
    }

    /// Counts frames of an area as taken.
    #[inline]
    pub fn add(&self, area: u64, count: u64) {
        self.of(area).used.fetch_add(count as u32, Ordering::Relaxed);
    }

    /// Counts frames of an area as free.
    #[inline]
    pub fn sub(&self, area: u64, count: u64) {
        self.of(area).used.fetch_sub(count as u32, Ordering::Relaxed);
    }

    /// Counts a span as taken.
    pub fn add_span(&self, first: u64, count: u64) {
        parts(first, count).for_each(|part| self.add(part.area, part.count));
    }

    /// Counts a span as free.
    pub fn sub_span(&self, first: u64, count: u64) {
        parts(first, count).for_each(|part| self.sub(part.area, part.count));
    }

    /// Counts an area as offline or online.
    pub fn close(&self, area: u64, closed: bool) {
        let counter = &self.of(area).closed;
        if closed {
            counter.fetch_add(1, Ordering::Relaxed);
        } else {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Makes a tree that nobody owns this thread's, before anything is taken of it: two that come
    /// at once would stay side by side, in the same cache lines. False where it is another's.
    pub fn claim(&self, tree: u64, place: usize) -> bool {
        let (owner, mine) = (&self.trees[tree as usize].owner, place as u32 + 1);
        let before = owner.load(Ordering::Relaxed);
        let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
        before == mine || before == 0 && owner.compare_exchange(0, mine, success, failure).is_ok()
    }

    /// Makes a tree of this thread nobody's.
    pub fn leave(&self, tree: u64, place: usize) {
        let (owner, mine) = (&self.trees[tree as usize].owner, place as u32 + 1);
        let _ = owner.compare_exchange(mine, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// True where a search for `need` frames should look into a tree.
    pub fn fits(&self, tree: u64, need: u64, pass: Pass, place: usize) -> bool {
        let each = &self.trees[tree as usize];
        let used = u64::from(each.used.load(Ordering::Relaxed));
        let areas = self.areas(tree);
        if used + need > FULL.min((areas.end - areas.start) * FRAMES)
            || u64::from(each.closed.load(Ordering::Relaxed)) == areas.end - areas.start
        {
            return false;
        }
        let owner = each.owner.load(Ordering::Relaxed);
        let free = owner == 0 || owner == place as u32 + 1;
        match pass {
            Pass::Begun => free && used > 0,
            Pass::Unowned => free,
            Pass::Any => true,
        }
    }
}
