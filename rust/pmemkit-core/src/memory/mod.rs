//! Pools: memory of several regions behind addresses that never change.
//!
//! A region that joins a [`Pool`] gets a **window**: reserved addresses with all of the region
//! mapped there, so that frame `n` lies at `window + n * 4096` and handing it out maps nothing. An
//! **extent** is what one allocation has: an address, a length, and the pieces of regions that its
//! bytes lie in. Migration copies the bytes to other frames and maps those at the same address;
//! then the extent's address lies in the window of one region and its bytes in another.
//!
//! Reading order: [`pool`] (what there is), [`evacuate`] (how bytes move under their writers),
//! [`chunk`], [`catch`] and [`guard`] (how writers wait), [`slabs`] (objects smaller than a page),
//! [`runs`] (which frames are free), [`sampling`] (which are used), [`sys`].
//!
//! What this does not do: choose policies (Python does), know what lies in an extent.

mod catch;
mod chunk;
mod evacuate;
mod guard;
mod pool;
mod region;
mod runs;
mod sampling;
mod slabs;
mod state;
mod sys;
#[cfg(test)]
mod tests;

pub use evacuate::{Flow, Outcome, Progress, Work};
pub use pool::{ExtentInfo, Options, Placement, Pool, PoolStats, Request, Zeroing};
pub use region::{BlockState, MapPlace, RegionInfo, RegionOptions};
pub use sampling::{Heat, Sample, SAMPLE_CHUNK};
pub use slabs::SMALL_MAX;
pub use sys::{mapping_counts, process_id};

/// Bytes of a page frame.
pub const FRAME_SIZE: u64 = 4096;

/// Windows start at multiples of this many bytes, so that large pages fit.
pub const WINDOW_ALIGN: u64 = 2 << 20;
