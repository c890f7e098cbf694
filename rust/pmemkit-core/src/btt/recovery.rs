//! Opening an arena, recovery, and the walk over all of it.
//!
//! Invariants:
//! 1. Recovery is the kernel's and a little more: it follows moves of one sector over several lanes
//!    in any order of lanes, which only media of granularity `page` can leave.
//! 2. It stores map entries only, and the same ones when it is interrupted and begins again.
//! 3. Nothing is stored to an arena whose log cannot be trusted.
//!
//! What this does not do: read the map as a whole before writes are possible, or repair it.

use super::engine::{Arena, Lane, LineState, Options, Padded};
use super::geometry::Geometry;
use super::levelling::Leveller;
use super::lock::Lock;
use super::log::{next_seq, read_log, Entry};
use super::sync::LINES;
use super::tracking::Readers;
use super::{MapScan, Plant, Wrong, MAP_MASK, NORMAL};
use crate::error::{Error, Kind, Result};
use crate::media::Medium;

impl Arena {
    /// Reads the log and does what recovery has to do. Writes are possible as soon as this returns:
    /// the map is not read but where the log points.
    pub fn open(medium: &dyn Medium, geometry: Geometry, options: Options) -> Result<Arena> {
        geometry.check(medium.len())?;
        let newest = read_log(medium, &geometry)?;
        let (sectors, blocks) = (geometry.external_nlba, geometry.internal_nlba);
        let writable = !options.read_only && !geometry.in_error;
        let levelling = options.levelling.filter(|_| writable);
        let leveller = levelling.map(|each| Leveller::new(each, sectors, blocks)).transpose()?;
        let lanes = newest.iter().enumerate().map(|(number, newest)| {
            Padded(Lock::new(Lane {
                number: number as u32,
                free: newest.entry.old_map & MAP_MASK,
                bad: newest.entry.left_error(),
                next_place: newest.next_place,
                other_place: newest.place,
                next_seq: next_seq(newest.entry.seq),
                unfenced: None,
                dead: false,
                writes: 0,
                saved: leveller.as_ref().map_or(0, Leveller::start),
            }))
        });
        let lanes = lanes.collect();
        let mut arena = Arena {
            geometry,
            options,
            granularity: medium.granularity(),
            lanes,
            lines: (0..LINES).map(|_| LineState::default()).collect(),
            readers: Readers::new(),
            leveller,
            finished: Vec::new(),
        };
        arena.check_free_blocks()?;
        let entries = newest.into_iter().map(|newest| newest.entry);
        arena.recover(medium, entries)?;
        Ok(arena)
    }

    /// Two lanes with one block would give it to two sectors.
    fn check_free_blocks(&self) -> Result<()> {
        let mut blocks: Vec<_> = self.lanes.iter().map(|lane| lane.0.lock().free).collect();
        blocks.sort_unstable();
        match blocks.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => {
                let text = format!("block {} is the free block of two lanes", pair[0]);
                Err(Error::new(Kind::Corrupt, "open", text).at(self.geometry.start))
            }
        }
    }

    /// Brings the map up to what the log says. A log may be ahead by more than one write of a
    /// sector where a host wrote pages back in any order, so moves are followed until nothing fits.
    fn recover(&mut self, medium: &dyn Medium, entries: impl Iterator<Item = Entry>) -> Result<()> {
        let mut moves: Vec<_> =
            entries.filter(|each| (each.old_map ^ each.new_map) & MAP_MASK != 0).collect();
        if self.planted(Plant::RecoverySkipsLastLane) {
            moves.pop();
        }
        let mut again = !self.planted(Plant::NoRecovery);
        while again {
            let left = moves.len();
            let mut kept = Vec::with_capacity(left);
            for each in moves {
                let entry = self.entry(medium, each.lba)?;
                if self.block_of(entry, each.lba) == each.old_map & MAP_MASK {
                    self.roll_forward(medium, each.lba, each.new_map & MAP_MASK)?;
                } else {
                    kept.push(each);
                }
            }
            // Each move is made once, so that a log that leads in a circle comes to an end.
            again = kept.len() < left;
            moves = kept;
        }
        if !self.is_read_only() && !self.planted(Plant::NoOrderAfterRecovery) {
            self.order(medium)?;
        }
        Ok(())
    }

    fn roll_forward(&mut self, medium: &dyn Medium, lba: u32, block: u32) -> Result<()> {
        if self.is_read_only() {
            match self.finished.binary_search_by_key(&lba, |each| each.0) {
                Ok(place) => self.finished[place].1 = block,
                Err(place) => self.finished.insert(place, (lba, block)),
            }
            return Ok(());
        }
        self.store_entry(medium, lba, NORMAL | block)?;
        Ok(())
    }

    /// Walks the whole arena: each block must belong to exactly one sector or lane. Waits for
    /// writes under way; writes that begin meanwhile wait. Gives what is wrong, in sentences.
    pub fn validate(&self, medium: &dyn Medium) -> Result<Vec<String>> {
        let lanes: Vec<_> = self.lanes.iter().map(|lane| lane.0.lock()).collect();
        let finished = self.finished.iter().map(|(lba, block)| (u64::from(*lba), *block));
        let mut scan = MapScan::new(self.geometry.internal_nlba, finished.collect())?;
        let count = u64::from(self.geometry.external_nlba);
        scan.feed(medium, self.geometry.start + self.geometry.mapoff, 0, count)?;
        let mut wrong: Vec<_> = scan
            .findings()
            .iter()
            .map(|found| match found.wrong {
                Wrong::Duplicate => {
                    format!("sector {}: block {} has another sector", found.lba, found.block)
                }
                Wrong::OutOfRange => {
                    format!("sector {}: there is no block {}", found.lba, found.block)
                }
            })
            .collect();
        for lane in lanes {
            if !scan.claim(lane.free) {
                wrong.push(format!("lane {}: block {} is not free", lane.number, lane.free));
            }
        }
        Ok(wrong)
    }
}
