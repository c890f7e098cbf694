//! What is demanded of an image that was opened.
//!
//! Invariants:
//! Of every image that is accepted:
//! 1. The metadata are consistent: each block belongs to one sector or one lane.
//! 2. Linux's one pass over the lanes, written here on its own, leaves the same map.
//! 3. Each sector is what the acknowledged operations made of it, or what the one under way would.
//! 4. A block of bad media is known as such: its sector is in error, or the log of its lane says
//!    so.
//! 5. Whoever writes on changes no other sector.
//!
//! What this does not do: choose images.

use std::sync::Arc;

use super::{content, word_in, word_of, Demand, IN_ERROR, LANES, POISON, SECTORS};
use crate::btt::fixture::{read_into, write};
use crate::btt::geometry::Geometry;
use crate::btt::{Btt, ERROR, MAP_MASK, NORMAL};
use crate::error::Kind;
use crate::media::recording::Recording;
use crate::media::Medium;

/// Where the sectors begin that are written afterwards.
const WRITTEN: u32 = 3;

/// Judges images of one setting.
pub struct Checker<'a> {
    /// What the arena looks like.
    pub geometry: &'a Geometry,
    /// A sector was in error before the sequence; its block holds [`POISON`].
    pub poisoned: bool,
}

impl Checker<'_> {
    /// Looks at an arena that was just opened, with recovery, on an image. Gives what each sector
    /// shows.
    pub(super) fn judge(
        &self,
        medium: &Arc<Recording>,
        device: &Btt,
        image: &[u8],
        demand: &Demand,
    ) -> Result<Vec<u64>, String> {
        self.consistent(device)?;
        let map = self.map_on(medium);
        let linux = self.linux(&image[self.geometry.mapoff as usize..])?;
        if let Some(sector) = (0..map.len()).find(|sector| map[*sector] != linux[*sector]) {
            let (ours, theirs) = (map[sector], linux[sector]);
            return Err(format!(
                "sector {sector}: Linux's recovery leaves {theirs:#x} in the map, ours {ours:#x}"
            ));
        }
        if self.poisoned {
            self.bad_media_are_known(device, &map, image)?;
        }
        let shown = self.read_all(device)?;
        let states = shown.iter().zip(demand.before.iter().zip(&demand.after));
        for (sector, (found, (old, new))) in states.enumerate() {
            if found != old && found != new {
                let name = |state: &u64| match *state {
                    IN_ERROR => "an error".to_string(),
                    0 => "zeroes".to_string(),
                    1 => "what was there before".to_string(),
                    _ => format!("operation {}", state - 1),
                };
                let (found, or) = (name(found), format!(" or {}", name(new)));
                let or = if old == new { "" } else { &or };
                return Err(format!("sector {sector} shows {found}, not {}{or}", name(old)));
            }
        }
        Ok(shown)
    }

    fn consistent(&self, device: &Btt) -> Result<(), String> {
        let wrong = device.validate().map_err(|error| error.to_string())?;
        wrong.into_iter().next().map_or(Ok(()), Err)
    }

    fn map_on(&self, medium: &Arc<Recording>) -> Vec<u32> {
        let words = (0..SECTORS).map(|sector| {
            let word = medium.load_u64(self.geometry.word_at(sector)).unwrap_or(0);
            (word >> (32 * (sector % 2))) as u32
        });
        words.collect()
    }

    /// Linux's recovery, in one pass over the lanes; `metadata` is the image from the map on. Gives
    /// the map that it leaves.
    pub fn linux(&self, metadata: &[u8]) -> Result<Vec<u32>, String> {
        let word = |at: usize| (word_in(metadata, at as u64 / 8 * 8) >> (at % 8 * 8)) as u32;
        let mut map: Vec<u32> = (0..SECTORS as usize).map(|sector| word(4 * sector)).collect();
        for lane in 0..LANES {
            let group = (self.geometry.group_at(lane) - self.geometry.mapoff) as usize;
            let (a, b) = (word(group + 12), word(group + 28));
            if a == b || a + b > 5 {
                return Err(format!("Linux refuses sequence numbers {a} and {b} of lane {lane}"));
            }
            let second = if a.abs_diff(b) == 1 { b > a } else { b < a };
            let entry = if second { group + 16 } else { group };
            let (old, new) = (word(entry + 4) & MAP_MASK, word(entry + 8) & MAP_MASK);
            let lba = word(entry);
            let Some(raw) = map.get_mut(lba as usize) else {
                return Err(format!("Linux follows lane {lane} to sector {lba}"));
            };
            let now = if *raw & NORMAL == 0 { lba } else { *raw & MAP_MASK };
            if old != new && now != new && now == old {
                *raw = NORMAL | new;
            }
        }
        Ok(map)
    }

    fn bad_media_are_known(&self, device: &Btt, map: &[u32], image: &[u8]) -> Result<(), String> {
        let poison = u64::from_le_bytes([POISON; 8]);
        let size = u64::from(self.geometry.internal_lbasize);
        for block in 0..self.geometry.internal_nlba {
            let at = self.geometry.block_at(block);
            if word_in(image, at) != poison && word_in(image, at + size - 8) != poison {
                continue;
            }
            let lanes = device.arenas().flat_map(|arena| arena.lanes.iter());
            let known = map.contains(&(ERROR | block))
                || lanes.map(|lane| lane.0.lock()).any(|lane| lane.free == block && lane.bad);
            if !known {
                return Err(format!("block {block} has bad media, and nobody knows any more"));
            }
        }
        Ok(())
    }

    fn read_all(&self, device: &Btt) -> Result<Vec<u64>, String> {
        let mut buffer = vec![0xee; self.geometry.sector_size() as usize];
        (0..SECTORS).map(|sector| self.shown(device, sector, &mut buffer)).collect()
    }

    /// The operation that a sector shows.
    fn shown(&self, device: &Btt, sector: u32, buffer: &mut [u8]) -> Result<u64, String> {
        let size = buffer.len() as u64;
        match read_into(device, u64::from(sector) * size, buffer) {
            Err(error) if error.kind == Kind::Media => return Ok(IN_ERROR),
            result => result.map_err(|error| error.to_string())?,
        }
        let first = word_in(buffer, 0);
        let step = first >> 32;
        let whole = buffer.chunks_exact(8).all(|word| word == &buffer[..8]);
        if !whole || first != word_of(step, sector) {
            return Err(format!("sector {sector} is torn, or another's: it begins {first:#x}"));
        }
        Ok(step)
    }

    /// Writes some sectors, as many as there are lanes in one request, so that each lane takes one.
    pub fn write_on(&self, device: &Btt, shown: &[u64]) -> Result<(), String> {
        let size = u64::from(self.geometry.sector_size());
        for round in 0..2 {
            let sectors = WRITTEN..WRITTEN + LANES;
            let data: Vec<u8> =
                sectors.flat_map(|sector| content(self.geometry, 900 + round, sector)).collect();
            write(device, u64::from(WRITTEN) * size, &data).map_err(|error| error.to_string())?;
        }
        self.unchanged(device, shown)?;
        self.consistent(device)
    }

    /// Sectors show what was written to them, and others what they showed.
    pub fn unchanged(&self, device: &Btt, shown: &[u64]) -> Result<(), String> {
        for (sector, found) in self.read_all(device)?.into_iter().enumerate() {
            let written = (WRITTEN..WRITTEN + LANES).contains(&(sector as u32));
            let wanted = if written { 901 } else { shown[sector] };
            if found != wanted {
                return Err(format!("sector {sector} shows {found:#x}, not {wanted:#x}"));
            }
        }
        Ok(())
    }
}
