//! The log (flog) of an arena: one group of 64 bytes a lane, four entries, two of them in use.
//!
//! An entry is two aligned words: `lba | old_map << 32` and `new_map | seq << 32`. The second one
//! commits: whoever is power-failed in between has written nothing.
//!
//! Invariants:
//! 1. What is read is believed only where the kernel would believe it, and where every number in it
//!    names a sector or block that exists; otherwise it is `Corrupt`.
//! 2. The two places in use are 0 and 1, or 0 and 2 in layouts older than Linux 4.15.
//!
//! What this does not do: write, or look at the map.

use crate::error::{Error, Kind, Result};
use crate::media::Medium;

use super::geometry::Geometry;
use super::{ERROR, GROUP_SIZE, MAP_MASK, NORMAL};

const ENTRY_SIZE: u64 = 16;

/// One exchange: sector `lba` moved from block `old_map` to block `new_map`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The sector.
    pub lba: u32,
    /// The block it left, with bit 30 set where the sector was in error.
    pub old_map: u32,
    /// The block it has since.
    pub new_map: u32,
    /// 1, 2, 3, 1, …
    pub seq: u32,
}

impl Entry {
    fn of_words(first: u64, second: u64) -> Entry {
        Entry {
            lba: first as u32,
            old_map: (first >> 32) as u32,
            new_map: second as u32,
            seq: (second >> 32) as u32,
        }
    }

    /// The word that is stored first.
    pub fn first_word(&self) -> u64 {
        u64::from(self.lba) | u64::from(self.old_map) << 32
    }

    /// The word that commits.
    pub fn second_word(&self) -> u64 {
        u64::from(self.new_map) | u64::from(self.seq) << 32
    }

    /// True where the block it left has bad media.
    pub fn left_error(&self) -> bool {
        self.old_map & NORMAL == ERROR
    }
}

/// The sequence number that follows.
pub fn next_seq(seq: u32) -> u32 {
    seq % 3 + 1
}

/// The newest entry of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newest {
    /// What it says.
    pub entry: Entry,
    /// Which of the four places of the group it has.
    pub place: u32,
    /// Which of them the next exchange goes to.
    pub next_place: u32,
}

/// Where the entry at `place` of a lane's group lies.
pub fn entry_at(geometry: &Geometry, lane: u32, place: u32) -> u64 {
    geometry.group_at(lane) + u64::from(place) * ENTRY_SIZE
}

/// Reads the log of an arena: the newest entry of each lane. Everything that the kernel would
/// refuse, or follow out of the arena, is `Corrupt`.
pub fn read_log(medium: &dyn Medium, geometry: &Geometry) -> Result<Vec<Newest>> {
    let groups = (0..geometry.nfree)
        .map(|lane| read_group(medium, geometry, lane))
        .collect::<Result<Vec<_>>>()?;
    let faults = |pair| groups.iter().filter(|group| !keeps_to(group, pair)).count();
    let (new, old) = ([0, 1], [0, 2]);
    let pair = if faults(old) < faults(new) { old } else { new };
    let corrupt = |lane: usize, text: String| {
        let text = format!("BTT log of lane {lane}: {text}");
        Error::new(Kind::Corrupt, "open", text).at(geometry.group_at(lane as u32))
    };
    let mut found = Vec::with_capacity(groups.len());
    for (lane, group) in groups.iter().enumerate() {
        if !keeps_to(group, pair) {
            let text = format!("entries are in use that the log does not use; it uses {pair:?}");
            return Err(corrupt(lane, text));
        }
        let newest = newest_of(group, pair).map_err(|text| corrupt(lane, text))?;
        check_entry(&newest.entry, geometry).map_err(|text| corrupt(lane, text))?;
        found.push(newest);
    }
    Ok(found)
}

fn read_group(medium: &dyn Medium, geometry: &Geometry, lane: u32) -> Result<[Entry; 4]> {
    let mut words = [0u64; (GROUP_SIZE / 8) as usize];
    // SAFETY: the target is a local array of this size.
    unsafe { medium.load(geometry.group_at(lane), words.as_mut_ptr().cast(), GROUP_SIZE)? };
    let words = words.map(u64::from_le);
    Ok(std::array::from_fn(|place| Entry::of_words(words[2 * place], words[2 * place + 1])))
}

/// True where a group uses the first place of the pair, and no place outside of it.
fn keeps_to(group: &[Entry; 4], pair: [usize; 2]) -> bool {
    let used = |place: &usize| group[*place] != Entry::default();
    used(&pair[0]) && (0..4).filter(used).all(|place| pair.contains(&place))
}

fn newest_of(group: &[Entry; 4], pair: [usize; 2]) -> std::result::Result<Newest, String> {
    let (first, second) = (group[pair[0]].seq, group[pair[1]].seq);
    let wrong = first == 0 || first > 3 || second > 3 || first == second;
    if wrong || (second == 0 && first != 1) {
        return Err(format!("sequence numbers {first} and {second} do not tell the newest"));
    }
    let newest = usize::from(second == next_seq(first));
    let (place, next_place) = (pair[newest] as u32, pair[1 - newest] as u32);
    Ok(Newest { entry: group[pair[newest]], place, next_place })
}

fn check_entry(entry: &Entry, geometry: &Geometry) -> std::result::Result<(), String> {
    let limits = [
        ("lba", entry.lba, geometry.external_nlba),
        ("old_map", entry.old_map & MAP_MASK, geometry.internal_nlba),
        ("new_map", entry.new_map & MAP_MASK, geometry.internal_nlba),
    ];
    match limits.into_iter().find(|(_, value, limit)| value >= limit) {
        Some((name, value, limit)) => Err(format!("{name} is {value}, there are {limit}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u32) -> Entry {
        Entry { lba: 1, old_map: 2, new_map: 3, seq }
    }

    #[test]
    fn words_give_the_entry_back() {
        let entry = Entry { lba: 7, old_map: 8 | ERROR, new_map: 9, seq: 3 };
        assert_eq!(Entry::of_words(entry.first_word(), entry.second_word()), entry);
        assert!(entry.left_error());
        assert_eq!([1, 2, 3].map(next_seq), [2, 3, 1]);
    }

    #[test]
    fn the_newest_follows_from_the_sequence() {
        let cases = [(1, 0, 0), (1, 2, 1), (2, 1, 0), (2, 3, 1), (3, 2, 0), (3, 1, 1), (1, 3, 0)];
        for (first, second, newest) in cases {
            for pair in [[0, 1], [0, 2]] {
                let mut group = [Entry::default(); 4];
                (group[pair[0]], group[pair[1]]) = (entry(first), entry(second));
                let found = newest_of(&group, pair).unwrap();
                assert_eq!(found.next_place as usize, pair[1 - newest], "{first} {second}");
            }
        }
        for (first, second) in [(0, 0), (0, 1), (1, 1), (2, 0), (3, 0), (4, 1), (1, 4)] {
            let group = [entry(first), entry(second), Entry::default(), Entry::default()];
            assert!(newest_of(&group, [0, 1]).is_err(), "{first} {second}");
        }
    }
}
