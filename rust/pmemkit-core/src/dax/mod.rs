//! Direct mappings: bytes of a region in a program's address space, for programs that do their own
//! caching. Loads and stores go straight to the media; what makes them durable is here.
//!
//! Reading order: [`Mapping`] (persist, flush, drain, copy, sync, views), `tracker` (who knows what
//! is dirty), `handler` (write faults), `snapshot` (a copy of one moment), [`Log`] (several ranges
//! all or nothing), `explore` (the power failures).
//!
//! What this does not do: faults of pages that are not there, open files, keep other processes out.

mod crc64;
mod explore;
mod gate;
mod handler;
mod log;
mod mapping;
mod plant;
mod ranges;
mod snapshot;
pub(crate) mod sys;
mod tests;
mod tracker;

pub use log::{Log, LogOptions, LOG_SIZE_LEAST};
pub use mapping::{Mapping, Options, Running, Tracking};
pub use plant::Plant;
