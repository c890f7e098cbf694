//! Lists through the slots of a directory: a slot leaves from the middle at no cost.
//!
//! Invariants:
//! 1. An entry is in a list at most once; `len` counts the entries that are.
//! 2. Links of an entry that is in no list of a kind mean nothing.
//!
//! What this does not do: know which entries are in it; their owner does.

/// No entry.
pub const NONE: u32 = u32::MAX;

/// The neighbours of an entry in one list.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    older: u32,
    newer: u32,
}

impl Link {
    /// The links of an entry in no list.
    pub const fn new() -> Self {
        Link { older: NONE, newer: NONE }
    }
}

/// Which of an entry's links a list goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// The queue that replacement has the entry in.
    Queue = 0,
    /// The order in which entries became dirty.
    Dirty = 1,
}

/// A list from its oldest to its newest entry.
#[derive(Debug)]
pub struct List {
    through: Through,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl List {
    /// An empty list.
    pub const fn new(through: Through) -> Self {
        List { through, oldest: NONE, newest: NONE, len: 0 }
    }

    /// How many entries are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The entry that is in it longest.
    pub fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    /// The entry that came after this one.
    pub fn newer(&self, links: &[[Link; 2]], slot: u32) -> Option<u32> {
        let newer = links[slot as usize][self.through as usize].newer;
        (newer != NONE).then_some(newer)
    }

    /// Puts an entry that is in no list of this kind at the newest end.
    pub fn push(&mut self, links: &mut [[Link; 2]], slot: u32) {
        let which = self.through as usize;
        links[slot as usize][which] = Link { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = slot,
            newest => links[newest as usize][which].newer = slot,
        }
        self.newest = slot;
        self.len += 1;
    }

    /// Takes an entry out that is in it.
    pub fn remove(&mut self, links: &mut [[Link; 2]], slot: u32) {
        let which = self.through as usize;
        let Link { older, newer } = links[slot as usize][which];
        match older {
            NONE => self.oldest = newer,
            older => links[older as usize][which].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => links[newer as usize][which].older = older,
        }
        self.len -= 1;
    }

    /// Moves an entry that is in it to the newest end.
    pub fn renew(&mut self, links: &mut [[Link; 2]], slot: u32) {
        self.remove(links, slot);
        self.push(links, slot);
    }

    /// Its entries, oldest first.
    pub fn iter<'a>(&'a self, links: &'a [[Link; 2]]) -> impl Iterator<Item = u32> + 'a {
        std::iter::successors(self.oldest(), move |slot| self.newer(links, *slot))
    }
}
