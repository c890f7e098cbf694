//! Compares what the allocator keeps with its page map.
//!
//! Invariants:
//! 1. What is compared is read once; nothing is changed.
//!
//! What this does not do: repair.

use super::areas::{parts, Areas, FRAMES};
use super::map::{mark, Mark, PageMap};
use super::tree::Trees;

/// Sentences at most.
const FINDINGS: usize = 20;

/// What an area should hold, from the page map.
#[derive(Clone, Copy, Default)]
struct Expected {
    words: [u64; (FRAMES / 64) as usize],
    whole: bool,
}

impl Expected {
    fn take(&mut self, first: u64, count: u64) -> bool {
        if count == FRAMES {
            self.whole = true;
            return true;
        }
        (first..first + count).all(|frame| {
            let (word, bit) = ((frame % FRAMES / 64) as usize, 1 << (frame % 64));
            let free = self.words[word] & bit == 0;
            self.words[word] |= bit;
            free
        })
    }
}

/// What is wrong, in sentences. Nobody may use the allocator meanwhile, and magazines are empty.
pub fn walk(frames: u64, map: &PageMap, areas: &Areas, trees: &Trees) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expected = vec![Expected::default(); areas.count() as usize];
    for area in 0..areas.count() {
        let (length, start) = (areas.length(area), area * FRAMES);
        if length < FRAMES {
            expected[area as usize].take(start + length, FRAMES - length);
        }
    }
    let mut at = 0;
    while at < frames && wrong.len() < FINDINGS {
        if at.is_multiple_of(FRAMES) && areas.is_free(at / FRAMES) && map.is_zero(at / FRAMES) {
            at += FRAMES;
            continue;
        }
        at = walk_one(frames, map, at, &mut expected, &mut wrong);
    }
    walk_areas(areas, trees, &expected, &mut wrong);
    wrong.truncate(FINDINGS);
    wrong
}

/// Looks at a frame where no allocation is open, and at the one that begins there; tells where it
/// ends.
fn walk_one(
    frames: u64,
    map: &PageMap,
    at: u64,
    expected: &mut [Expected],
    wrong: &mut Vec<String>,
) -> u64 {
    let byte = map.byte(at);
    let Some(length) = map.length(at, byte) else {
        if mark(byte) != Mark::Nothing {
            wrong.push(format!("the byte {byte:#x} of frame {at} belongs to no allocation"));
        }
        return at + 1;
    };
    let end = at + length;
    if end > frames || !map.is_aligned(at, length) {
        wrong.push(format!("{length} frames from {at} cannot be there"));
        return at + 1;
    }
    for part in parts(at, length) {
        if !expected[part.area as usize].take(part.first, part.count) {
            wrong.push(format!("frames from {at} are allocated twice"));
        }
    }
    for frame in (at + 1..end).filter(|&frame| map.byte(frame) != 0 && map.is_inside(frame)) {
        wrong.push(format!("frame {frame} lies in the allocation at {at} and has a byte"));
    }
    end
}

fn walk_areas(areas: &Areas, trees: &Trees, expected: &[Expected], wrong: &mut Vec<String>) {
    for tree in 0..trees.count() {
        let (mut used, mut closed) = (0, 0);
        for area in trees.areas(tree) {
            let (entry, want) = (areas.entry(area), &expected[area as usize]);
            let bits: Vec<u64> = areas.words(area).collect();
            let count: u64 = bits.iter().map(|word| u64::from(word.count_ones())).sum();
            if bits != want.words {
                wrong.push(format!("the bits of area {area} are not those of its descriptors"));
            }
            if entry.whole != want.whole {
                wrong.push(format!("area {area} is taken as one: {}", entry.whole));
            }
            if entry.count != if entry.whole { FRAMES } else { count } {
                wrong.push(format!("area {area} counts {} frames and has {count}", entry.count));
            }
            used += entry.count;
            closed += u64::from(entry.closed);
        }
        if (trees.used(tree), trees.closed(tree)) != (used, closed) {
            let (says, shut) = (trees.used(tree), trees.closed(tree));
            wrong.push(format!(
                "tree {tree} counts {says} frames and {shut} areas offline, not {used} and {closed}"
            ));
        }
    }
}
