//! Block devices as a stack of layers that all have one shape and know only `next`.
//!
//! A request is (op, offset, length, flags, sg). The stack's capabilities are asked once, frozen in
//! an [`Info`], advertised, and enforced by the [`Channel`] before any layer is called: a layer
//! never sees a range past the end, a flag or an op that it did not offer.
//!
//! Invariants:
//! 1. `info` of a device never changes while the device exists.
//! 2. A layer overrides what it changes and inherits forwarding for everything else.
//! 3. A write that was acknowledged is durable once a `flush` that started after it succeeded, from
//!    any channel; with FUA once it was acknowledged.
//! 4. `map` hands out segments that stay valid as long as the device; after storing into them the
//!    caller says `commit`, and only then may it acknowledge the write.
//! 5. After a failed write, discard, zero or flush the channel's latch holds the device read-only.
//!
//! What this does not do: negotiate, buffer, know any protocol.

mod channel;
mod layers;
mod raw;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use bitflags::bitflags;

use crate::error::Result;
pub use crate::media::Extent;
use crate::media::Medium;
use crate::sg::Sg;

pub use channel::{Channel, Latch, Stack};
pub use layers::{Bounce, Delay, Fault, FaultRule, Noop, Trace, TraceEntry, TraceLog};
pub use raw::{Raw, PAYLOAD_SIZE_MAX};

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Copy from the device to the sg list.
    Read,
    /// Copy from the sg list to the device.
    Write,
    /// Make acknowledged writes durable.
    Flush,
    /// Give the backing of a range back; its content is undefined afterwards.
    Discard,
    /// Make a range read as zeroes.
    Zero,
    /// A hint that a range will be read soon.
    Cache,
}

impl Op {
    /// Every op, in declaration order.
    pub const ALL: [Op; 6] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::Zero, Op::Cache];

    /// The word used in options, traces and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::Zero => "zero",
            Op::Cache => "cache",
        }
    }

    /// The op as a set of one.
    pub const fn set(self) -> OpSet {
        match self {
            Op::Read => OpSet::READ,
            Op::Write => OpSet::WRITE,
            Op::Flush => OpSet::FLUSH,
            Op::Discard => OpSet::DISCARD,
            Op::Zero => OpSet::ZERO,
            Op::Cache => OpSet::CACHE,
        }
    }
}

bitflags! {
    /// A set of ops.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpSet: u8 {
        /// [`Op::Read`]
        const READ = 1;
        /// [`Op::Write`]
        const WRITE = 2;
        /// [`Op::Flush`]
        const FLUSH = 4;
        /// [`Op::Discard`]
        const DISCARD = 8;
        /// [`Op::Zero`]
        const ZERO = 16;
        /// [`Op::Cache`]
        const CACHE = 32;
    }

    /// What a request asks for beside its op.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Flags: u8 {
        /// Durable before it is acknowledged.
        const FUA = 1;
        /// Zero: keep (or make) the backing allocated.
        const NO_HOLE = 2;
        /// Zero: refuse unless quicker than writing.
        const FAST_ZERO = 4;
    }

    /// What a device offers, asked once when it is opened.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Caps: u16 {
        /// Writes are accepted.
        const WRITE = 1;
        /// `Op::Flush`
        const FLUSH = 2;
        /// `Flags::FUA`
        const FUA = 4;
        /// `Op::Discard`
        const DISCARD = 8;
        /// `Op::Zero`
        const ZERO = 16;
        /// `Flags::FAST_ZERO`
        const FAST_ZERO = 32;
        /// `Op::Cache`
        const CACHE = 64;
        /// `Device::extents` tells holes from data.
        const EXTENTS = 128;
        /// `Device::map` gives stable segments of media.
        const MAP = 256;
        /// A flush on one channel covers the writes of all.
        const MULTI_CONN = 512;
        /// `Device::map` is offered for writes, too.
        const MAP_WRITE = 1024;
    }
}

/// What a device is: frozen when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Size in bytes.
    pub size: u64,
    /// Offsets and lengths must be multiples of this many bytes (a power of two).
    pub block_size_min: u32,
    /// The unit that is quickest, in bytes (a power of two).
    pub block_size_preferred: u32,
    /// The most bytes one read or write may have.
    pub payload_size_max: u32,
    /// What the device offers.
    pub caps: Caps,
    /// The ops that may wait for something slow: a server gives them to another thread.
    pub blocking: OpSet,
    /// FUA writes wait for something slow even where plain writes do not.
    pub blocking_fua: bool,
}

/// One request to a device.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What to do.
    pub op: Op,
    /// The first byte.
    pub at: u64,
    /// How many bytes.
    pub len: u64,
    /// What else is asked.
    pub flags: Flags,
    /// Where the bytes come from or go to; empty for everything but read and write.
    pub sg: &'a Sg,
}

/// A layer of the stack. `next` is the layer below; the default methods forward to it, and the
/// bottom layer overrides all of them.
pub trait Device: Send + Sync {
    /// The layer below, or `None` for the bottom one.
    fn next(&self) -> Option<&Arc<dyn Device>>;

    /// What this device offers; frozen.
    fn info(&self) -> &Info;

    /// Carries one request out. Returns when it is complete.
    fn submit(&self, request: &Request<'_>) -> Result<()> {
        below(self.next()).submit(request)
    }

    /// Data and holes of a range, in order, adding up to exactly `len` bytes.
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        below(self.next()).extents(at, len)
    }

    /// Appends to `out` the segments of media that hold the request's range. Only with
    /// [`Caps::MAP`]. For a read they may be sent from; for a write they may be stored into,
    /// followed by [`Device::commit`].
    fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        below(self.next()).map(request, out)
    }

    /// Says that a mapped write was stored; returns when it may be acknowledged.
    fn commit(&self, request: &Request<'_>) -> Result<()> {
        below(self.next()).commit(request)
    }

    /// The media that segments of [`Device::map`] can name.
    fn media(&self) -> Vec<Arc<dyn Medium>> {
        below(self.next()).media()
    }
}

/// The next layer of a wrapper that forwards; the bottom layer overrides what would come here.
fn below(next: Option<&Arc<dyn Device>>) -> &Arc<dyn Device> {
    next.expect("the bottom layer of a stack implements every method")
}

/// True in a build with planted faults when the environment asks for this one: the durability step
/// of that name is then left out. A normal build has no such switch.
#[cfg(feature = "planted-faults")]
fn planted(step: &str) -> bool {
    static STEP: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    STEP.get_or_init(|| std::env::var("PMEMKIT_PLANT").ok()).as_deref() == Some(step)
}

#[cfg(not(feature = "planted-faults"))]
const fn planted(_step: &str) -> bool {
    false
}
