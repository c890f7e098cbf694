//! The block translation table, mode `sector`: what runs per sector.
//!
//! ```text
//! device    requests and buffers; arenas one behind the other
//!   ▼
//! engine    one arena: read, write, zero, recovery, validate; the crash argument
//!   ▼
//! recovery  opening and checking it           levelling  which sectors are moved, and when
//! log       lanes and their entries       tracking  which blocks are being read
//! geometry  where things are              check     the map as a whole
//! lock, sync  what threads share
//! ```

mod check;
#[cfg(test)]
mod concurrency;
mod device;
mod engine;
#[cfg(test)]
mod explore;
#[cfg(test)]
mod fixture;
mod geometry;
#[cfg(test)]
mod levelled;
mod levelling;
mod lock;
mod log;
#[cfg(all(test, feature = "model-check"))]
mod model;
mod plant;
mod recovery;
mod sync;
#[cfg(test)]
mod tests;
mod tracking;

pub use check::{Finding, MapScan, Wrong};
pub use device::Btt;
pub use engine::{Arena, Options};
pub use geometry::Geometry;
pub use levelling::{Levelling, Victim};
pub use plant::Plant;

/// The block number in a map entry.
pub const MAP_MASK: u32 = 0x3fff_ffff;
/// Set alone: the sector is in error.
pub const ERROR: u32 = 0x4000_0000;
/// Set alone: the sector reads as zeroes.
pub const ZERO: u32 = 0x8000_0000;
/// Both set: a normal entry. None set: the sector lies in the block of its own number.
pub const NORMAL: u32 = 0xc000_0000;

/// Bytes of a lane's group in the log.
const GROUP_SIZE: u64 = 64;
