//! The door of a stack: the control handle ([`Stack`]) and the I/O handle ([`Channel`]).
//!
//! A channel checks every request against the frozen capabilities before any layer is called, and
//! turns a failed write into a latch.
//!
//! Invariants:
//! 1. No layer is called with an op or flag that was not offered, a range that does not fit, a
//!    misaligned range or more payload than allowed.
//! 2. Once a write, discard, zero or flush failed for a reason of the media, every later one is
//!    refused with `Latched` on every channel of the stack, and the reason stays readable.
//! 3. A failed read fails that request only.
//!
//! What this does not do: retry, queue, split requests.

use std::sync::{Arc, OnceLock};

use super::{Caps, Device, Extent, Flags, Info, Op, Request};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Medium};
use crate::sg::Sg;

/// Holds the first failure of a mutating request; set once, never cleared.
#[derive(Debug, Default)]
pub struct Latch {
    reason: OnceLock<Error>,
}

impl Latch {
    /// The failure that latched, if any did.
    pub fn reason(&self) -> Option<&Error> {
        self.reason.get()
    }

    fn note(&self, error: &Error) {
        let harmless = matches!(
            error.kind,
            Kind::NotSupported | Kind::Invalid | Kind::OutOfRange | Kind::ReadOnly | Kind::Latched
        );
        if !harmless {
            // A second failure at the same moment keeps the first as the reason.
            let _ = self.reason.set(error.clone());
        }
    }

    fn check(&self, op: &'static str) -> Result<()> {
        match self.reason.get() {
            None => Ok(()),
            Some(cause) => {
                let text = format!("read-only until reopened, after: {cause}");
                Err(Error::new(Kind::Latched, op, text))
            }
        }
    }
}

/// A stack of layers and its latch: the control handle.
#[derive(Clone)]
pub struct Stack {
    top: Arc<dyn Device>,
    latch: Arc<Latch>,
}

impl Stack {
    /// A stack of one bottom layer.
    pub fn new(bottom: Arc<dyn Device>) -> Self {
        Stack { top: bottom, latch: Arc::default() }
    }

    /// The same stack with another layer on top. The latch is the media's, so it is shared.
    pub fn layer(&self, wrap: impl FnOnce(Arc<dyn Device>) -> Arc<dyn Device>) -> Self {
        Stack { top: wrap(self.top.clone()), latch: self.latch.clone() }
    }

    /// The layer on top.
    pub fn top(&self) -> &Arc<dyn Device> {
        &self.top
    }

    /// The stack's latch.
    pub fn latch(&self) -> &Latch {
        &self.latch
    }

    /// A handle for I/O. A read-only one offers nothing that changes the device.
    pub fn channel(&self, read_only: bool) -> Channel {
        let mut info = *self.top.info();
        if read_only {
            info.caps &= Caps::CACHE | Caps::EXTENTS | Caps::MAP | Caps::MULTI_CONN;
        }
        Channel { device: self.top.clone(), latch: self.latch.clone(), info }
    }
}

/// A handle for I/O only.
#[derive(Clone)]
pub struct Channel {
    device: Arc<dyn Device>,
    latch: Arc<Latch>,
    info: Info,
}

impl Channel {
    /// What this channel offers; frozen.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The media that mapped segments can name.
    pub fn media(&self) -> Vec<Arc<dyn Medium>> {
        self.device.media()
    }

    /// True when this request may wait for something slow.
    pub fn blocks(&self, op: Op, flags: Flags) -> bool {
        self.info.blocking.contains(op.set())
            || (flags.contains(Flags::FUA) && op == Op::Write && self.info.blocking_fua)
    }

    /// Checks a request at the door and carries it out.
    pub fn submit(&self, request: &Request<'_>) -> Result<()> {
        self.check(request)?;
        let carried = matches!(request.op, Op::Read | Op::Write);
        assert!(!carried || request.sg.len() == request.len, "sg and length disagree");
        let result = self.device.submit(request);
        self.settle(request.op, result)
    }

    /// Data and holes of a range, in order, adding up to exactly `len` bytes.
    pub fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        check_range("extents", at, len, self.info.size)?;
        if !self.info.caps.contains(Caps::EXTENTS) {
            return Ok(vec![Extent { len, hole: false }]);
        }
        let extents = self.device.extents(at, len)?;
        let sum: u64 = extents.iter().map(|extent| extent.len).sum();
        assert_eq!(sum, len, "a layer's extents do not add up");
        Ok(extents)
    }

    /// Checks a read or write at the door and appends its segments of media to `out`.
    pub fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        self.check(request)?;
        let wanted = if request.op == Op::Read { Caps::MAP } else { Caps::MAP_WRITE };
        if !self.info.caps.contains(wanted) {
            return Err(Error::new(Kind::NotSupported, "map", "a layer needs a buffer"));
        }
        let result = self.device.map(request, out);
        self.settle(request.op, result)
    }

    /// Says that a write handed out by [`Channel::map`] was stored.
    pub fn commit(&self, request: &Request<'_>) -> Result<()> {
        let result = self.device.commit(request);
        self.settle(request.op, result)
    }

    fn settle(&self, op: Op, result: Result<()>) -> Result<()> {
        if let Err(error) = &result {
            if mutates(op) {
                self.latch.note(error);
            }
        }
        result
    }

    fn check(&self, request: &Request<'_>) -> Result<()> {
        let name = request.op.name();
        let (caps, flags) = (self.info.caps, request.flags);
        if mutates(request.op) && request.op != Op::Flush && !caps.contains(Caps::WRITE) {
            let text = "the device is read-only";
            return Err(Error::new(Kind::ReadOnly, name, text).at(request.at));
        }
        if !caps.contains(needed(request.op)) {
            return Err(Error::new(Kind::NotSupported, name, "the device does not offer this"));
        }
        let zeroes = request.op == Op::Zero;
        let refused = (flags.contains(Flags::FUA) && !caps.contains(Caps::FUA))
            || (flags.intersects(Flags::NO_HOLE | Flags::FAST_ZERO) && !zeroes)
            || (flags.contains(Flags::FAST_ZERO) && !caps.contains(Caps::FAST_ZERO));
        if refused {
            let text = format!("flags {flags:?} were not offered");
            return Err(Error::new(Kind::NotSupported, name, text).at(request.at));
        }
        check_range(name, request.at, request.len, self.info.size)?;
        self.check_shape(name, request)?;
        if mutates(request.op) {
            self.latch.check(name)?;
        }
        Ok(())
    }

    fn check_shape(&self, name: &'static str, request: &Request<'_>) -> Result<()> {
        let block = u64::from(self.info.block_size_min);
        // A power of two: a division would cost more than the rest of these checks.
        if (request.at | request.len) & (block - 1) != 0 {
            let text = format!("{} bytes: not in whole blocks of {block} bytes", request.len);
            return Err(Error::new(Kind::Invalid, name, text).at(request.at));
        }
        let carried = matches!(request.op, Op::Read | Op::Write);
        if carried && request.len > u64::from(self.info.payload_size_max) {
            let most = self.info.payload_size_max;
            let text = format!("{} bytes are more than one request's {most}", request.len);
            return Err(Error::new(Kind::Invalid, name, text).at(request.at));
        }
        Ok(())
    }
}

fn mutates(op: Op) -> bool {
    matches!(op, Op::Write | Op::Discard | Op::Zero | Op::Flush)
}

fn needed(op: Op) -> Caps {
    match op {
        Op::Read => Caps::empty(),
        Op::Write => Caps::WRITE,
        Op::Flush => Caps::FLUSH,
        Op::Discard => Caps::DISCARD,
        Op::Zero => Caps::ZERO,
        Op::Cache => Caps::CACHE,
    }
}
