//! The block translation table, mode `sector`: what runs per sector.
//!
//! What this does not do yet: read and write sectors.

mod check;

pub use check::{Finding, MapScan, Wrong};

/// The block number in a map entry.
pub const MAP_MASK: u32 = 0x3fff_ffff;
/// Set alone: the sector is in error.
pub const ERROR: u32 = 0x4000_0000;
/// Set alone: the sector reads as zeroes.
pub const ZERO: u32 = 0x8000_0000;
/// Both set: a normal entry. None set: the sector lies in the block of its own number.
pub const NORMAL: u32 = 0xc000_0000;
