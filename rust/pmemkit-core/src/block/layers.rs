//! Layers that ship with the stack: trace, fault, delay, and two that change next to nothing.
//!
//! Invariants:
//! 1. A layer is never called with what the stack does not offer, so none of them checks ranges.
//! 2. Every path through the stack is seen: `submit`, `map`, `commit` and `extents`. A fault that
//!    matches a read or write hits it on the mapped path too, before any byte moves.
//!
//! What this does not do: talk to the outside. A trace is read by whoever holds its [`TraceLog`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Caps, Device, Extent, Info, Op, OpSet, Request};
use crate::error::{Error, Kind, Result};
use crate::sg::Sg;

/// A layer that changes nothing.
pub struct Noop {
    next: Arc<dyn Device>,
}

impl Noop {
    /// Puts the layer on top of `next`.
    pub fn new(next: Arc<dyn Device>) -> Self {
        Noop { next }
    }
}

impl Device for Noop {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        self.next.info()
    }
}

/// A layer that does not offer `map`, so that transfers go through a buffer.
pub struct Bounce {
    next: Arc<dyn Device>,
    info: Info,
}

impl Bounce {
    /// Puts the layer on top of `next`.
    pub fn new(next: Arc<dyn Device>) -> Self {
        let mut info = *next.info();
        info.caps.remove(Caps::MAP | Caps::MAP_WRITE);
        Bounce { next, info }
    }
}

impl Device for Bounce {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        &self.info
    }
}

/// One call that a trace layer saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// The op's name, or `map`, `commit`, `extents`.
    pub op: &'static str,
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// The request's flags as bits.
    pub flags: u8,
    /// `ok`, or the name of the error's kind.
    pub outcome: &'static str,
}

/// What a trace layer saw, oldest first, at most `capacity` entries.
pub struct TraceLog {
    capacity: usize,
    entries: Mutex<VecDeque<TraceEntry>>,
    dropped: AtomicU64,
}

impl TraceLog {
    /// An empty log; the oldest entry makes room for a new one once it is full.
    pub fn new(capacity: usize) -> Self {
        TraceLog { capacity, entries: Mutex::default(), dropped: AtomicU64::new(0) }
    }

    /// A copy of what is in the log.
    pub fn entries(&self) -> Vec<TraceEntry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().cloned().collect()
    }

    /// How many entries were pushed out.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn push(&self, entry: TraceEntry) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= self.capacity {
            entries.pop_front();
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        if self.capacity > 0 {
            entries.push_back(entry);
        }
    }
}

/// A layer that writes every call and its outcome into a [`TraceLog`].
pub struct Trace {
    next: Arc<dyn Device>,
    log: Arc<TraceLog>,
}

impl Trace {
    /// Puts the layer on top of `next`.
    pub fn new(next: Arc<dyn Device>, log: Arc<TraceLog>) -> Self {
        Trace { next, log }
    }

    fn note<T>(&self, op: &'static str, at: u64, len: u64, flags: u8, result: &Result<T>) {
        let outcome = result.as_ref().map_or_else(|error| error.kind.name(), |_| "ok");
        self.log.push(TraceEntry { op, at, len, flags, outcome });
    }

    fn note_request(&self, op: &'static str, request: &Request<'_>, result: &Result<()>) {
        self.note(op, request.at, request.len, request.flags.bits(), result);
    }
}

impl Device for Trace {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        self.next.info()
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        let result = self.next.submit(request);
        self.note_request(request.op.name(), request, &result);
        result
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let result = self.next.extents(at, len);
        self.note("extents", at, len, 0, &result);
        result
    }

    fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        let result = self.next.map(request, out);
        self.note_request("map", request, &result);
        result
    }

    fn commit(&self, request: &Request<'_>) -> Result<()> {
        let result = self.next.commit(request);
        self.note_request("commit", request, &result);
        result
    }
}

/// Which requests a [`Fault`] layer fails, and how.
#[derive(Clone, Copy, Debug)]
pub struct FaultRule {
    /// The ops that count.
    pub ops: OpSet,
    /// The first failing one among the matching requests, counted from 1.
    pub nth: u64,
    /// How many fail from there on; 0 is all.
    pub count: u64,
    /// First byte of the range that counts.
    pub at: u64,
    /// Bytes of that range. A flush touches every range.
    pub len: u64,
    /// The errno they fail with.
    pub errno: i32,
}

/// A layer that fails chosen requests.
pub struct Fault {
    next: Arc<dyn Device>,
    rule: FaultRule,
    seen: AtomicU64,
}

impl Fault {
    /// Puts the layer on top of `next`.
    pub fn new(next: Arc<dyn Device>, rule: FaultRule) -> Result<Self> {
        if rule.nth == 0 || rule.ops.is_empty() || rule.errno <= 0 {
            let text = format!("fault rule {rule:?}: nth from 1, at least one op, errno above 0");
            return Err(Error::new(Kind::Invalid, "fault", text));
        }
        Ok(Fault { next, rule, seen: AtomicU64::new(0) })
    }

    fn strike(&self, request: &Request<'_>) -> Result<()> {
        let rule = &self.rule;
        let touches = request.op == Op::Flush
            || (request.at < rule.at.saturating_add(rule.len)
                && rule.at < request.at.saturating_add(request.len));
        if !rule.ops.contains(request.op.set()) || !touches {
            return Ok(());
        }
        let seen = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        let last = if rule.count == 0 { u64::MAX } else { rule.nth.saturating_add(rule.count - 1) };
        if seen < rule.nth || seen > last {
            return Ok(());
        }
        let text = format!("planted fault at matching request {seen}");
        Err(Error::from_errno(request.op.name(), rule.errno, text).at(request.at))
    }
}

impl Device for Fault {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        self.next.info()
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        self.strike(request)?;
        self.next.submit(request)
    }

    fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        self.strike(request)?;
        self.next.map(request, out)
    }
}

/// A layer that waits before chosen ops, and says that they block.
pub struct Delay {
    next: Arc<dyn Device>,
    info: Info,
    ops: OpSet,
    wait: Duration,
}

impl Delay {
    /// Puts the layer on top of `next`.
    pub fn new(next: Arc<dyn Device>, ops: OpSet, wait: Duration) -> Self {
        let mut info = *next.info();
        info.blocking |= ops;
        Delay { next, info, ops, wait }
    }

    fn wait(&self, request: &Request<'_>) {
        if self.ops.contains(request.op.set()) {
            std::thread::sleep(self.wait);
        }
    }
}

impl Device for Delay {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        self.wait(request);
        self.next.submit(request)
    }

    fn map(&self, request: &Request<'_>, out: &mut Sg) -> Result<()> {
        self.wait(request);
        self.next.map(request, out)
    }
}
