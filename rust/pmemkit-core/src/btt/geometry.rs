//! Where things are in one arena. The numbers come from an info block that Python read and judged;
//! they are checked here once more.
//!
//! Invariants:
//! Of a geometry that was checked:
//! 1. Data, map and log follow each other without overlap and end inside the medium, so that no
//!    later sum overflows or leaves it.
//! 2. Every area begins at a multiple of a cache line: a lane's group is one line, and entries that
//!    share a line of the map share its lock.
//!
//! What this does not do: read anything.

use crate::error::{Error, Kind, Result};

use super::{GROUP_SIZE, MAP_MASK};

/// Offsets count from `start`; sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Where the arena begins on the medium.
    pub start: u64,
    /// Bytes of a sector with its metadata.
    pub external_lbasize: u32,
    /// Sectors.
    pub external_nlba: u32,
    /// Bytes of a block.
    pub internal_lbasize: u32,
    /// Blocks.
    pub internal_nlba: u32,
    /// Spare blocks, one a lane.
    pub nfree: u32,
    /// Where the blocks begin.
    pub dataoff: u64,
    /// Where the map begins.
    pub mapoff: u64,
    /// Where the log begins.
    pub logoff: u64,
    /// The error flag of the info block: nothing is written to this arena.
    pub in_error: bool,
}

impl Geometry {
    /// Bytes of a sector that a user sees.
    pub fn sector_size(&self) -> u32 {
        if self.external_lbasize >= 4096 {
            4096
        } else {
            512
        }
    }

    /// Refuses numbers that do not fit together, or into `medium_len` bytes.
    pub fn check(&self, medium_len: u64) -> Result<()> {
        let wrong = |text: String| Err(Error::new(Kind::Corrupt, "open", text).at(self.start));
        if self.external_lbasize < 512 || self.internal_lbasize < self.external_lbasize {
            let (inner, outer) = (self.internal_lbasize, self.external_lbasize);
            return wrong(format!("blocks of {inner} bytes hold no sectors of {outer}"));
        }
        if !self.internal_lbasize.is_multiple_of(8) {
            return wrong(format!(
                "internal_lbasize {} is no multiple of 8",
                self.internal_lbasize
            ));
        }
        let sum = self.external_nlba.checked_add(self.nfree);
        if self.external_nlba == 0 || self.nfree == 0 || sum != Some(self.internal_nlba) {
            return wrong(format!(
                "{} blocks are not {} sectors and {} spare blocks",
                self.internal_nlba, self.external_nlba, self.nfree
            ));
        }
        if self.internal_nlba > MAP_MASK {
            return wrong(format!("{} blocks are more than a map entry names", self.internal_nlba));
        }
        let areas = [
            (
                "data",
                self.dataoff,
                u64::from(self.internal_nlba) * u64::from(self.internal_lbasize),
            ),
            ("map", self.mapoff, u64::from(self.external_nlba).next_multiple_of(2) * 4),
            ("log", self.logoff, u64::from(self.nfree) * GROUP_SIZE),
        ];
        let mut behind = 0;
        for (name, offset, len) in areas {
            let end = offset.checked_add(len).and_then(|end| end.checked_add(self.start));
            let at = offset.wrapping_add(self.start);
            if offset < behind || !at.is_multiple_of(64) || end.is_none_or(|end| end > medium_len) {
                return wrong(format!(
                    "the {name} area at {offset} of {len} bytes does not fit: {medium_len} bytes \
                     are there, and what comes before it ends at {behind}"
                ));
            }
            behind = offset + len;
        }
        Ok(())
    }

    /// Where a block lies on the medium.
    pub fn block_at(&self, block: u32) -> u64 {
        self.start + self.dataoff + u64::from(block) * u64::from(self.internal_lbasize)
    }

    /// The aligned word that holds the map entry of a sector.
    pub fn word_at(&self, lba: u32) -> u64 {
        self.start + self.mapoff + u64::from(lba / 2) * 8
    }

    /// Where the log group of a lane lies: one cache line.
    pub fn group_at(&self, lane: u32) -> u64 {
        self.start + self.logoff + u64::from(lane) * GROUP_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Geometry {
        Geometry {
            start: 4096,
            external_lbasize: 512,
            external_nlba: 6,
            internal_lbasize: 512,
            internal_nlba: 10,
            nfree: 4,
            dataoff: 64,
            mapoff: 64 + 10 * 512,
            logoff: 64 + 10 * 512 + 64,
            in_error: false,
        }
    }

    #[test]
    fn numbers_that_fit_are_taken_and_others_refused() {
        let good = small();
        let end = good.start + good.logoff + 4 * GROUP_SIZE;
        good.check(end).unwrap();
        assert_eq!(good.check(end - 1).unwrap_err().kind, Kind::Corrupt);
        let wrong = [
            Geometry { external_nlba: 7, ..good },
            Geometry { nfree: 0, external_nlba: 10, ..good },
            Geometry { internal_lbasize: 500, ..good },
            Geometry { mapoff: good.mapoff - 64, ..good },
            Geometry { logoff: good.logoff + 8, ..good },
            Geometry { dataoff: u64::MAX - 63, ..good },
            Geometry { start: u64::MAX - 63, ..good },
            Geometry { internal_nlba: u32::MAX, nfree: u32::MAX - 6, ..good },
        ];
        for each in wrong {
            assert_eq!(each.check(1 << 40).unwrap_err().kind, Kind::Corrupt, "{each:?}");
        }
    }
}
