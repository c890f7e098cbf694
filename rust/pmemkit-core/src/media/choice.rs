//! Choosing among what may be on media: units, the choices of each, and which combinations to try.
//!
//! Invariants:
//! 1. Choice 0 of a unit is "nothing of it", its last choice is "all of it". In between, each
//!    choice is a prefix of whole steps followed by a non-empty subset of the words of the next.
//! 2. A step has at most eight words, so a unit's choices are `1 + sum(2^words - 1)`; a page of a
//!    hole counts as one word.
//! 3. The combinations tried depend on the units, the limit and the seed only.
//!
//! What this does not do: know what a unit is, or what its words hold.

use smallvec::SmallVec;

use super::crash::{Step, StepKind};

/// What may or may not be on media, in the order in which it got or gets there.
#[derive(Clone, Debug, Default)]
pub(super) struct Unit {
    /// Parts of stores in program order.
    pub steps: Vec<Step>,
    /// `(thread, steps)`: how many steps this thread's last flush covers.
    pub flushes: SmallVec<[(u32, usize); 1]>,
}

impl Unit {
    /// The choice that is everything.
    pub fn choice_last(&self) -> u64 {
        self.choice_after(self.steps.len())
    }

    /// The choice that is the first `steps` steps, whole.
    fn choice_after(&self, steps: usize) -> u64 {
        self.steps[..steps].iter().map(subsets).sum()
    }

    /// Calls `visit` with each step of a choice and the words of it as a mask.
    pub fn chosen(&self, choice: u64, mut visit: impl FnMut(&Step, u64)) {
        let mut rest = choice;
        for step in &self.steps {
            if rest == 0 {
                return;
            }
            let mask = rest.min(subsets(step));
            rest -= mask;
            if mask != 0 {
                visit(step, mask);
            }
        }
    }

    /// How many steps the last flush of `thread` covers; the flush is used up.
    pub fn flushed(&mut self, thread: u32) -> usize {
        let found = self.flushes.iter().find(|(by, _)| *by == thread);
        let held = found.map_or(0, |(_, held)| *held);
        self.flushes.retain(|(by, _)| *by != thread);
        held
    }

    /// Takes the first `count` steps out.
    pub fn take(&mut self, count: usize) -> Vec<Step> {
        for (_, held) in &mut self.flushes {
            *held = held.saturating_sub(count);
        }
        self.flushes.retain(|(_, held)| *held > 0);
        self.steps.drain(..count).collect()
    }
}

/// How many non-empty subsets the words of a step have; the largest mask is the whole step.
fn subsets(step: &Step) -> u64 {
    if step.kind == StepKind::Hole {
        return 1;
    }
    debug_assert!(step.pieces.len() <= 8);
    (1 << step.pieces.len()) - 1
}

/// How many combinations there are; saturates.
pub(super) fn count<'a>(units: impl Iterator<Item = &'a Unit>) -> u64 {
    units.fold(1, |count, unit| count.saturating_mul(unit.choice_last() + 1))
}

/// Calls `offer` with combinations, one choice a unit, until it has said `limit` times that the
/// combination was new. All of them where there are at most `limit`; otherwise nothing and
/// everything, the images one and two units away from these for up to three quarters of the limit,
/// and a seeded sample for the rest.
pub(super) fn for_each<E>(
    units: &[&Unit],
    limit: usize,
    seed: u64,
    offer: impl FnMut(&[u64]) -> Result<bool, E>,
) -> Result<(), E> {
    let last: Vec<u64> = units.iter().map(|unit| unit.choice_last()).collect();
    let mut walk = Walk { units, last, found: 0, random: Random(seed), offer };
    if count(units.iter().copied()) <= limit as u64 {
        return walk.all();
    }
    walk.extremes(limit)?;
    walk.neighbours(limit / 2, limit - limit / 4)?;
    walk.sample(limit)
}

struct Walk<'a, F> {
    units: &'a [&'a Unit],
    last: Vec<u64>,
    found: usize,
    random: Random,
    offer: F,
}

impl<E, F: FnMut(&[u64]) -> Result<bool, E>> Walk<'_, F> {
    fn offer(&mut self, choices: &[u64]) -> Result<(), E> {
        self.found += usize::from((self.offer)(choices)?);
        Ok(())
    }

    /// Counts through all combinations like an odometer.
    fn all(&mut self) -> Result<(), E> {
        let mut choices = vec![0; self.last.len()];
        loop {
            self.offer(&choices)?;
            let Some(wheel) = (0..choices.len()).find(|unit| choices[*unit] < self.last[*unit])
            else {
                return Ok(());
            };
            choices[..wheel].fill(0);
            choices[wheel] += 1;
        }
    }

    fn extremes(&mut self, limit: usize) -> Result<(), E> {
        for choices in [vec![0; self.last.len()], self.last.clone()] {
            if self.found < limit {
                self.offer(&choices)?;
            }
        }
        Ok(())
    }

    /// One unit turned over against an extreme, then two; in seeded order, so that another seed
    /// tries others where they do not all fit. The work is bounded also where many stores changed
    /// nothing, so that most combinations are equal.
    fn neighbours(&mut self, limit_one: usize, limit_two: usize) -> Result<(), E> {
        let mut order: Vec<usize> = (0..self.last.len()).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, self.random.below(index as u64 + 1) as usize);
        }
        let tries = limit_two.saturating_mul(4);
        for unit in order.iter().take(tries) {
            self.turned(&[*unit], limit_one)?;
        }
        let pairs = (1..order.len()).flat_map(|one| (0..one).map(move |two| (one, two)));
        for (one, two) in pairs.take(tries) {
            if self.found >= limit_two {
                return Ok(());
            }
            self.turned(&[order[one], order[two]], limit_two)?;
        }
        Ok(())
    }

    fn turned(&mut self, units: &[usize], limit: usize) -> Result<(), E> {
        for everything in [false, true] {
            if self.found >= limit {
                return Ok(());
            }
            let mut choices = if everything { self.last.clone() } else { vec![0; self.last.len()] };
            for unit in units {
                choices[*unit] = self.last[*unit] - choices[*unit];
            }
            self.offer(&choices)?;
        }
        Ok(())
    }

    /// Random combinations: half of them one unit away from an extreme, half anything.
    fn sample(&mut self, limit: usize) -> Result<(), E> {
        let mut tries = limit.saturating_mul(4);
        while self.found < limit && tries > 0 {
            tries -= 1;
            let extreme = self.random.below(4);
            let mut choices: Vec<u64> = match extreme {
                0 => vec![0; self.last.len()],
                1 => self.last.clone(),
                _ => (0..self.last.len()).map(|unit| self.any_choice(unit)).collect(),
            };
            let unit = self.random.below(choices.len() as u64) as usize;
            choices[unit] = self.any_choice(unit);
            self.offer(&choices)?;
        }
        Ok(())
    }

    /// Nothing, everything, whole steps or a torn step, each as likely as the others.
    fn any_choice(&mut self, unit: usize) -> u64 {
        let last = self.last[unit];
        match self.random.below(4) {
            0 => 0,
            1 => last,
            2 => {
                let steps = self.units[unit].steps.len() as u64;
                let steps = self.random.below(steps + 1) as usize;
                self.units[unit].choice_after(steps)
            }
            _ => self.random.below(last + 1),
        }
    }
}

/// SplitMix64: small, seeded, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which must not be 0. The bias does not matter here.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
