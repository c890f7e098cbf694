//! What a thread has for itself: free frames of order 0 that it keeps (a magazine), and where it
//! looked last.
//!
//! Invariants:
//! 1. `count` and `kept` are touched by the owner between [`Slot::enter`] and [`Slot::leave`], or
//!    by whoever closed the slot and saw that the owner is not inside. Closing is under one lock of
//!    the allocator, so that there is one such visitor.
//! 2. The owner says that it is inside before it looks whether the slot is closed; the visitor
//!    closes before it looks whether the owner is inside. A fence on both sides lies between. The
//!    owner's costs nothing where the visitor can make all threads fence.
//! 3. A frame in a magazine is taken in its area and has no descriptor.
//!
//! What this does not do: refill itself, take frames of areas that are offline.

use super::plant::Plant;
use super::sync::{
    fence_all, fence_own, planted, spin_loop, yield_now, AtomicU32, AtomicU64, Ordering, KEPT,
    PATIENCE,
};

/// One thread's slot. Two cache lines before the frames, for CPUs that fetch pairs of lines.
#[repr(C, align(128))]
pub struct Slot {
    /// 1 while the owner is inside.
    inside: AtomicU32,
    /// 1 while a visitor wants in, or is.
    closed: AtomicU32,
    count: AtomicU32,
    /// Where the owner took its last frames, plus one.
    area: AtomicU64,
    /// Where the owner took its last area, plus one.
    whole: AtomicU64,
    kept: [AtomicU64; KEPT],
}

impl Slot {
    /// An empty one. In the allocator a table of zeroes has them.
    #[allow(dead_code)]
    pub fn empty() -> Slot {
        Slot {
            inside: AtomicU32::new(0),
            closed: AtomicU32::new(0),
            count: AtomicU32::new(0),
            area: AtomicU64::new(0),
            whole: AtomicU64::new(0),
            kept: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Begins to use the slot; false while it is closed.
    #[inline]
    pub fn enter(&self, asymmetric: bool) -> bool {
        self.inside.store(1, Ordering::Relaxed);
        fence_own(asymmetric);
        // Acquire: what the last visitor did.
        if self.closed.load(Ordering::Acquire) == 0 || planted(Plant::NoLookAtTheDoor) {
            return true;
        }
        self.leave();
        false
    }

    /// Ends using it.
    #[inline]
    pub fn leave(&self) {
        self.inside.store(0, Ordering::Release);
    }

    /// Keeps the owner out and runs `visit`; false where the owner did not leave in time, as a
    /// thread that `fork` left behind never does.
    pub fn visit(&self, asymmetric: bool, visit: impl FnOnce()) -> bool {
        self.closed.store(1, Ordering::Relaxed);
        let mut alone = fence_all(asymmetric);
        for turn in 0.. {
            if !alone || planted(Plant::NoWaitAtTheDoor) {
                break;
            }
            // Acquire: what the owner did inside.
            if self.inside.load(Ordering::Acquire) == 0 {
                break;
            }
            if turn == PATIENCE {
                alone = false;
            } else if turn < 100 {
                spin_loop();
            } else {
                yield_now();
            }
        }
        if alone {
            visit();
        }
        self.closed.store(0, Ordering::Release);
        alone
    }

    /// How many frames are kept.
    #[inline]
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed) as usize
    }

    /// Takes the frame that was kept last. The caller is inside.
    #[inline]
    pub fn pop(&self) -> Option<u64> {
        let last = self.count().checked_sub(1)?;
        let frame = self.kept[last].load(Ordering::Relaxed);
        self.count.store(last as u32, Ordering::Relaxed);
        Some(frame)
    }

    /// Keeps a frame above the `count` that are kept; false where there is no room. The caller is
    /// inside.
    #[inline]
    pub fn push_at(&self, count: usize, frame: u64) -> bool {
        if count >= KEPT {
            return false;
        }
        self.kept[count].store(frame, Ordering::Relaxed);
        self.count.store(count as u32 + 1, Ordering::Relaxed);
        true
    }

    /// Keeps the frames of a word, such that the lowest is taken first. The caller is inside, and
    /// there is room.
    pub fn fill(&self, word: u64, mask: u64) {
        let mut rest = mask;
        while rest != 0 {
            let bit = 63 - rest.leading_zeros();
            self.push_at(self.count(), word * 64 + u64::from(bit));
            rest &= !(1 << bit);
        }
    }

    /// Takes the `count` frames out that were kept first and tells `give` of them, by word. The
    /// caller is inside, or a visitor.
    pub fn drain(&self, count: usize, mut give: impl FnMut(u64, u64)) {
        let kept = self.count();
        let count = count.min(kept);
        let frame = |index: usize| self.kept[index].load(Ordering::Relaxed);
        let mut index = 0;
        while index < count {
            let word = frame(index) / 64;
            let mut mask = 0;
            while index < count && frame(index) / 64 == word {
                mask |= 1 << (frame(index) % 64);
                index += 1;
            }
            give(word, mask);
        }
        for index in count..kept {
            self.kept[index - count].store(frame(index), Ordering::Relaxed);
        }
        self.count.store((kept - count) as u32, Ordering::Relaxed);
    }

    /// The area of the owner's last frames, or of its last area.
    #[inline]
    pub fn hint(&self, whole: bool) -> Option<u64> {
        let hint = if whole { &self.whole } else { &self.area };
        hint.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Sets it.
    #[inline]
    pub fn set_hint(&self, whole: bool, area: u64) {
        let hint = if whole { &self.whole } else { &self.area };
        hint.store(area + 1, Ordering::Relaxed);
    }
}
