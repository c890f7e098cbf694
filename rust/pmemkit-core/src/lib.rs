//! The data plane of pmemkit: what runs once a sector, a page or a request. No Python in it.
//!
//! Reading order: [`error`], [`sg`], [`media`] (bytes with a flush and a fence), [`block`] (layers
//! of one shape), [`btt`] (atomic sectors), [`cache`] (a double buffer), [`nbd`] (requests from a
//! socket, batched), [`fuse`] (one file for the loop device), [`dax`] (direct mappings),
//! [`memory`] (pools of page frames), [`fault`] (mappings that fill themselves); [`formats`] are
//! the structures on media. Each module opens with what it is, its invariants and what it does not
//! do.

pub mod bench;
pub mod block;
pub mod btt;
pub mod cache;
pub mod dax;
pub mod direct;
pub mod error;
pub mod fault;
pub mod formats;
pub mod frames;
pub mod fuse;
pub mod media;
mod membarrier;
pub mod memory;
pub mod nbd;
mod place;
pub mod remote;
pub mod sg;
mod uffd;
