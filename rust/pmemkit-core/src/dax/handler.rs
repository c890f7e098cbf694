//! Write faults of a mapping, handled one by one: a thread learns of the first store to each page,
//! notes it, and saves the page where a snapshot needs it.
//!
//! Invariants:
//! 1. A page that is not write-protected is in `dirty`: it is put there and the protection lifted
//!    under one lock, and it is taken out and protected again under the same one.
//! 2. While `snapshot` is set, no page changes before it was saved.
//! 3. The thread ends, and what waits in a fault goes on, before the range may be unmapped: whoever
//!    holds a handler drops it first.
//!
//! What this does not do: faults of pages that are not there; those are the kernel's.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::ranges::Ranges;
use super::snapshot::Snapshot;
use crate::error::{Error, Result};
use crate::uffd::{self, feature, mode, Message, Uffd};

/// The range of addresses that is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// The address of the mapping.
    pub start: u64,
    /// Whole units.
    pub len: u64,
    /// Bytes of a page of it.
    pub unit: u64,
    /// Memory of this process only: pages that are not there can be protected from Linux 6.4 on.
    pub private: bool,
}

#[derive(Default)]
struct State {
    dirty: Ranges,
    snapshot: Option<Arc<Snapshot>>,
}

struct Shared {
    uffd: Uffd,
    bell: OwnedFd,
    span: Span,
    state: Mutex<State>,
}

/// A thread that handles write faults.
pub(super) struct Handler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Messages that are taken at once.
const BATCH: usize = 16;

/// A userfaultfd with these features, and with that of protecting pages that are not there, where
/// the kernel has it or it is needed.
pub(super) fn open(features: u64, unpopulated: bool) -> Result<Uffd> {
    let with = |features| {
        let (uffd, _) = Uffd::open("track")?;
        uffd.begin(features).map(|_| uffd)
    };
    match with(features | feature::WP_UNPOPULATED) {
        Err(_) if !unpopulated => with(features),
        other => other,
    }
}

/// One that hears of every write fault.
fn open_for(span: Span) -> Result<Uffd> {
    open(feature::WP | feature::WP_SHARED, span.private)
}

impl Handler {
    /// True where write faults can be handled.
    pub fn possible(span: Span) -> bool {
        let tried = open_for(span).and_then(|uffd| {
            uffd.register(span.start, span.len, mode::WP)?;
            uffd.unregister(span.start, span.len)
        });
        tried.is_ok()
    }

    /// Watches a range, all of which is protected at first, for a snapshot if there is one.
    pub fn new(span: Span, snapshot: Option<Arc<Snapshot>>) -> Result<Handler> {
        let (uffd, bell) = (open_for(span)?, uffd::bell("track")?);
        let state = Mutex::new(State { dirty: Ranges::default(), snapshot });
        let shared = Arc::new(Shared { uffd, bell, span, state });
        let watched = shared.clone();
        let thread = std::thread::Builder::new()
            .name("pmemkit-dax".to_owned())
            .spawn(move || watched.serve())
            .map_err(|cause| {
                Error::from_errno("track", cause.raw_os_error().unwrap_or(libc::EAGAIN), "a thread")
            })?;
        let handler = Handler { shared, thread: Some(thread) };
        {
            // Nobody goes on before everything is protected.
            let _state = handler.shared.state();
            handler.shared.uffd.register(span.start, span.len, mode::WP)?;
            handler.shared.uffd.protect(span.start, span.len, true)?;
        }
        Ok(handler)
    }

    /// Fixes the moment of a snapshot: from now on no page changes before it was saved.
    pub fn begin(&self, snapshot: Arc<Snapshot>) -> Result<()> {
        let mut state = self.shared.state();
        self.shared.uffd.protect(self.shared.span.start, self.shared.span.len, true)?;
        state.snapshot = Some(snapshot);
        Ok(())
    }

    /// Ends that.
    pub fn end(&self) {
        self.shared.state().snapshot = None;
    }

    /// What was stored to since the last time. It counts as clean from now on.
    pub fn take(&self) -> Result<Ranges> {
        let mut state = self.shared.state();
        let Span { start, len: whole, .. } = self.shared.span;
        let protect =
            |(at, len): (u64, u64)| self.shared.uffd.protect(start + at, len.min(whole - at), true);
        state.dirty.iter().try_for_each(protect)?;
        Ok(state.dirty.take())
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        uffd::ring(&self.shared.bell);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked is gone all the same.
            let _ended = thread.join();
        }
        let Span { start, len, .. } = self.shared.span;
        // What cannot be undone ends with the descriptor.
        let _undone = self.shared.uffd.unregister(start, len);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread does.
    fn serve(&self) {
        let mut messages = [Message::default(); BATCH];
        let mut goes_on = true;
        while goes_on {
            goes_on = self.uffd.wait(&self.bell);
            // None, where only the bell was rung.
            let count = self.uffd.take(&mut messages).unwrap_or(0);
            for message in messages[..count].iter().filter(|each| each.is_protected()) {
                message.address().into_iter().for_each(|address| self.fault(address));
            }
        }
    }

    /// Lets a store to a protected page through.
    fn fault(&self, address: u64) {
        let Span { start, unit, .. } = self.span;
        let at = address.wrapping_sub(start) / unit * unit;
        let mut state = self.state();
        state.dirty.insert(at, unit);
        if let Some(snapshot) = &state.snapshot {
            snapshot.preserve(at, unit);
        }
        // Fails where the range is gone by now, and then nobody waits.
        let _let_through = self.uffd.protect(start + at, unit, false);
    }
}
