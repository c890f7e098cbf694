//! The allocator that is slow and obvious: what the fast one is compared with.
//!
//! Invariants:
//! 1. `live` holds every allocation by its first frame; no two overlap, and all end at `frames`.
//! 2. `closed` holds the areas that are offline.
//!
//! What this does not do: be fast, be shared between threads.

use std::collections::{BTreeMap, BTreeSet};

use super::{check_order, check_span, not_allocated, wrong_length, Descriptor, Flags, Live, AREA};
use crate::error::{Error, Kind, Result};

/// A map of what is allocated.
#[derive(Debug)]
pub struct Reference {
    frames: u64,
    live: BTreeMap<u64, (u64, Flags)>,
    closed: BTreeSet<u64>,
}

impl Reference {
    /// All frames free.
    pub fn new(frames: u64, online: bool) -> Reference {
        let areas = if online { 0 } else { frames.div_ceil(AREA) };
        Reference { frames, live: BTreeMap::new(), closed: (0..areas).collect() }
    }

    /// Frames there are.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    fn is_closed(&self, first: u64, count: u64) -> bool {
        self.closed.range(first / AREA..=(first + count - 1) / AREA).next().is_some()
    }

    /// The first free run of `count` frames at a multiple of `align`.
    fn find(&self, count: u64, align: u64) -> Option<u64> {
        let mut at: u64 = 0;
        loop {
            at = at.checked_next_multiple_of(align)?;
            if at.checked_add(count)? > self.frames {
                return None;
            }
            let in_the_way = self.live.range(..at + count).next_back();
            if let Some((&first, &(length, _))) = in_the_way.filter(|(f, (n, _))| *f + n > at) {
                at = first + length;
            } else if let Some(area) =
                self.closed.range(at / AREA..=(at + count - 1) / AREA).next_back()
            {
                at = (area + 1) * AREA;
            } else {
                return Some(at);
            }
        }
    }

    /// True where these frames are free and online.
    pub fn is_free(&self, first: u64, count: u64) -> bool {
        let before = self.live.range(..first + count).next_back();
        !self.is_closed(first, count) && before.is_none_or(|(f, (n, _))| f + n <= first)
    }

    /// True where `count` frames at a multiple of `align` could be handed out.
    pub fn has_run(&self, count: u64, align: u64) -> bool {
        self.find(count, align).is_some()
    }

    /// Takes these very frames, online or not.
    pub fn claim(&mut self, first: u64, count: u64) -> Result<()> {
        check_span("claim", first, count, self.frames)?;
        if let Some((&other, _)) =
            self.live.range(..first + count).next_back().filter(|(f, (n, _))| *f + n > first)
        {
            let text = format!("{count} frames from {first} reach into those from {other}");
            return Err(Error::new(Kind::Busy, "claim", text));
        }
        self.live.insert(first, (count, Flags::default()));
        Ok(())
    }

    /// Gives a run of any length back.
    pub fn put_run(&mut self, first: u64, count: u64) -> Result<()> {
        check_span("put", first, count, self.frames)?;
        let &(length, flags) = self.live.get(&first).ok_or_else(|| not_allocated("put", first))?;
        if length != count {
            return Err(wrong_length(first, length, count));
        }
        if flags.pinned {
            return Err(Error::new(Kind::Busy, "put", format!("frame {first} is pinned")));
        }
        self.live.remove(&first);
        Ok(())
    }

    /// Gives a run of one order back.
    pub fn put(&mut self, first: u64, order: u32) -> Result<()> {
        check_order(order)?;
        self.put_run(first, 1 << order)
    }

    /// Hands nothing out of these areas any more; true where they are empty.
    pub fn offline(&mut self, first: u64, count: u64) -> Result<bool> {
        self.closed.extend(super::areas("offline", first, count, self.frames)?);
        Ok(self.allocated(first, count)?.is_empty())
    }

    /// Hands these areas out again.
    pub fn online(&mut self, first: u64, count: u64) -> Result<()> {
        for area in super::areas("online", first, count, self.frames)? {
            self.closed.remove(&area);
        }
        Ok(())
    }

    /// The allocations that touch a range.
    pub fn allocated(&self, first: u64, count: u64) -> Result<Vec<Live>> {
        check_span("allocated", first, count, self.frames)?;
        let before = self.live.range(..first).next_back().filter(|(f, (n, _))| *f + n > first);
        let inside = self.live.range(first..first + count);
        let all = before.into_iter().chain(inside);
        Ok(all.map(|(&first, &(frames, _))| Live { first, frames }).collect())
    }

    /// What is known of a frame.
    pub fn descriptor(&self, frame: u64) -> Result<Descriptor> {
        check_span("descriptor", frame, 1, self.frames)?;
        let online = !self.is_closed(frame, 1);
        let owner = self.live.range(..=frame).next_back().filter(|(f, (n, _))| *f + n > frame);
        Ok(match owner {
            Some((&first, &(frames, flags))) => {
                Descriptor { allocated: true, first, frames, flags, online }
            }
            None => Descriptor::free(frame, online),
        })
    }

    /// Changes what an owner says of its allocation.
    pub fn set_flags(&mut self, first: u64, change: impl Fn(&mut Flags)) -> Result<()> {
        check_span("set_flags", first, 1, self.frames)?;
        let live = self.live.get_mut(&first).ok_or_else(|| not_allocated("set_flags", first))?;
        change(&mut live.1);
        Ok(())
    }

    /// Frames that can be handed out.
    pub fn free_frames(&self) -> u64 {
        let closed: u64 = self.closed.iter().map(|area| AREA.min(self.frames - area * AREA)).sum();
        let open = self.live.iter().map(|(&first, &(count, _))| {
            (first..first + count).filter(|frame| !self.closed.contains(&(frame / AREA))).count()
        });
        self.frames - closed - open.map(|count| count as u64).sum::<u64>()
    }
}
