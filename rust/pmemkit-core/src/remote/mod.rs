//! Regions of other processes: a medium whose bytes are copied in and out over a socket, and the
//! other end of it. `docs/remote-regions.md` has the protocol; RDMA fabrics plug in here.
//!
//! The handshake is Python's; what comes after it is here: [`wire`] (headers, and nothing else),
//! [`Remote`] (a region of another process as a medium of this one), [`Server`] (one connection).

mod client;
mod server;
mod sys;
#[cfg(test)]
mod tests;
pub mod wire;

pub use client::{Remote, Terms};
pub use server::{Server, Totals};
