//! The NBD server's transmission phase: requests from a connected socket to a block device.
//!
//! The handshake is done elsewhere; what it agreed on arrives as [`parse::Session`]. One thread a
//! connection receives as much as there is, answers everything in it, and sends the answers with
//! one call. Payload goes straight from and to mapped media where the whole stack offers `map`.
//!
//! Reading order: [`parse`] (what a request is), [`connection`] (the loop), [`reply`] (batches),
//! [`pool`] (requests that may block), [`wait`] (polling), [`sys`] (system calls).

pub mod connection;
pub mod parse;
pub mod pool;
pub mod reply;
pub mod sys;
#[cfg(test)]
mod tests;
pub mod wait;

pub use connection::{Connection, Options, ServeResult};
