//! The data plane of pmemkit: what runs once a sector, a page or a request. No Python in it.
//!
//! Reading order: [`error`], [`sg`], [`media`] (bytes with a flush and a fence), [`block`] (layers
//! of one shape), [`nbd`] (requests from a socket, batched). Each module opens with what it is, its
//! invariants and what it does not do.

pub mod bench;
pub mod block;
pub mod error;
pub mod media;
pub mod nbd;
pub mod sg;
