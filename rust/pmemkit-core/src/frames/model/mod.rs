//! Areas and slots under loom, which tries every interleaving, and every value that the memory
//! model lets a load give.
//!
//! Invariants:
//! 1. `areas` and `slot` are the same files as outside, compiled a second time over the parts in
//!    `sync`.
//!
//! What this does not do: the kernel's fence on all threads; here both sides fence.
#![allow(dead_code, clippy::duplicate_mod)]

#[path = "../areas.rs"]
mod areas;
#[path = "../slot.rs"]
mod slot;
mod sync;
mod tests;

use super::plant;
