//! The bottom layer of mode `raw`: the medium as it is.
//!
//! Invariants:
//! 1. When a write returns, its bytes are visible, and on `cacheline` media they are also fenced:
//!    a fence orders the stores of its own thread only, so a flush on another thread could not
//!    make up for a missing one.
//! 2. Eight aligned bytes are power-fail atomic; nothing larger is promised.
//! 3. There is no page map, no allocation and no lock a request.
//!
//! What this does not do: atomic sectors, caching, remembering bad media.

use std::sync::Arc;

use super::{Caps, Device, Extent, Flags, Info, Op, OpSet, Request};
use crate::error::{Error, Kind, Result};
use crate::media::{Granularity, Medium, Store};
use crate::sg::{Segment, Sg, FRAME_SIZE};

/// The most payload one request may carry: what the NBD text asks every server to take.
pub const PAYLOAD_SIZE_MAX: u32 = 32 << 20;

/// A medium as a block device.
pub struct Raw {
    medium: Arc<dyn Medium>,
    info: Info,
}

impl Raw {
    /// A device over the whole medium, as long as it is now.
    pub fn new(medium: Arc<dyn Medium>, read_only: bool) -> Self {
        let mut caps = Caps::CACHE | Caps::EXTENTS | Caps::MULTI_CONN;
        caps.set(Caps::MAP, medium.loads_by_mapping());
        if !read_only {
            caps |= Caps::WRITE | Caps::FLUSH | Caps::FUA | Caps::DISCARD | Caps::ZERO;
            caps.set(Caps::FAST_ZERO, medium.punch(0, 0) == Ok(true));
            caps.set(Caps::MAP_WRITE, medium.stores_by_mapping());
        }
        let blocks = medium.sync_blocks();
        let flush = if blocks { OpSet::FLUSH } else { OpSet::empty() };
        let copy = if medium.blocks() { OpSet::READ | OpSet::WRITE } else { OpSet::empty() };
        let info = Info {
            size: medium.len(),
            block_size_min: 1,
            block_size_preferred: FRAME_SIZE as u32,
            payload_size_max: PAYLOAD_SIZE_MAX,
            caps,
            blocking: OpSet::DISCARD | OpSet::ZERO | OpSet::CACHE | flush | copy,
            blocking_fua: blocks,
        };
        Raw { medium, info }
    }

    fn copy(&self, request: &Request<'_>) -> Result<()> {
        let mut at = request.at;
        for segment in request.sg.segments() {
            let address = Sg::host_address(segment)?;
            // SAFETY: whoever made the host segment vouches for its range.
            unsafe {
                match request.op {
                    Op::Read => self.medium.load(at, address, segment.len)?,
                    _ => self.medium.store(at, address, segment.len, Store::Auto)?,
                }
            }
            at += segment.len;
        }
        Ok(())
    }

    /// Fences what this thread stored, and makes the range durable where FUA asks for it. A fence
    /// is all that a write needs on media finer than a page; a hole punched there needs more.
    fn settle(&self, request: &Request<'_>) -> Result<()> {
        if !super::planted("fence") {
            self.medium.fence();
        }
        let fenced = request.op == Op::Write && self.medium.granularity() != Granularity::Page;
        if request.flags.contains(Flags::FUA) && !fenced && !super::planted("fua") {
            self.medium.persist(request.at, request.len)?;
        }
        Ok(())
    }

    fn zero(&self, request: &Request<'_>) -> Result<()> {
        let punched = !request.flags.contains(Flags::NO_HOLE)
            && self.medium.punch(request.at, request.len)?;
        if !punched {
            if request.flags.contains(Flags::FAST_ZERO) {
                let text = "zeroing here is no quicker than writing";
                return Err(Error::new(Kind::NotSupported, "zero", text).at(request.at));
            }
            self.medium.zero(request.at, request.len)?;
        }
        self.settle(request)
    }

    /// Touches one byte of every frame, so that the backing brings it in.
    fn prefetch(&self, request: &Request<'_>) -> Result<()> {
        let mut byte = 0u8;
        let end = request.at + request.len;
        let mut at = request.at;
        while at < end {
            // SAFETY: the target is one local byte.
            unsafe { self.medium.load(at, &mut byte, 1)? };
            at = (at / FRAME_SIZE + 1) * FRAME_SIZE;
        }
        Ok(())
    }
}

impl Device for Raw {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        None
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        match request.op {
            Op::Read => self.copy(request),
            Op::Write => {
                self.copy(request)?;
                self.settle(request)
            }
            Op::Flush if super::planted("flush") => Ok(()),
            Op::Flush => self.medium.sync(),
            Op::Discard => {
                self.medium.punch(request.at, request.len)?;
                self.settle(request)
            }
            Op::Zero => self.zero(request),
            Op::Cache => self.prefetch(request),
        }
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        self.medium.extents(at, len)
    }

    fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        crate::media::check_range("map", request.at, request.len, self.medium.len())?;
        out.push(Segment::new(self.medium.region(), request.at, request.len))
    }

    fn commit(&self, request: &Request<'_>) -> Result<()> {
        self.medium.stored_elsewhere(request.at, request.len)?;
        if !super::planted("commit") {
            self.medium.flush(request.at, request.len)?;
        }
        self.settle(request)
    }

    fn media(&self) -> Vec<Arc<dyn Medium>> {
        vec![self.medium.clone()]
    }
}
