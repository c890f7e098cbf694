//! Which bytes of a mapping are dirty, and who knows.
//!
//! Invariants:
//! 1. What was stored before [`Tracker::take`] was called is in what it gives, or was in what an
//!    earlier call gave. Where views are not seen by the source, their ranges count as stored to.
//! 2. What was taken and could not be made durable is given back by [`Tracker::note`].
//!
//! What this does not do: write anything back.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::handler::{open, Handler, Span};
use super::ranges::Ranges;
use super::snapshot::Snapshot;
use super::Tracking;
use crate::error::{Error, Kind, Result};
use crate::media::Granularity;
use crate::uffd::{feature, mode, page_table, scan, Run, Uffd};

/// Runs of pages that one scan finds at most.
const RUNS: usize = 1024;

/// Who knows what is dirty.
pub(super) enum Source {
    /// Nobody needs to: a fence is enough.
    Fence,
    /// The kernel, which is asked to sync.
    Kernel,
    /// Nobody but us: what our methods stored, and what views could have.
    Explicit,
    /// The page table: a page that was written lost its protection.
    Scan(Scan),
    /// A thread that hears of every write fault.
    Fault(Handler),
}

/// Pages that the kernel tracks by itself.
pub(super) struct Scan {
    uffd: Uffd,
    table: File,
    span: Span,
}

impl Scan {
    fn new(span: Span) -> Result<Scan> {
        let uffd = open(feature::WP_SHARED | feature::WP_ASYNC, false)?;
        let tracked = Scan { uffd, table: page_table("track")?, span };
        tracked.uffd.register(span.start, span.len, mode::WP)?;
        // A kernel that cannot scan says so now: nothing was written yet, so this is one look.
        scan(&tracked.table, span.start, span.start + span.unit, &mut [Run::default()])?;
        Ok(tracked)
    }

    /// Puts what was written since the last time into a set.
    fn take(&self, dirty: &mut Ranges) -> Result<()> {
        let Span { start, len, .. } = self.span;
        let (mut at, end) = (start, start + len);
        let mut runs = [Run::default(); RUNS];
        while at < end {
            let (found, next) = scan(&self.table, at, end, &mut runs)?;
            for run in &runs[..found] {
                dirty.insert(run.start - start, run.end - run.start);
            }
            at = if next > at { next } else { end };
        }
        Ok(())
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        // What cannot be undone ends with the descriptor.
        let _undone = self.uffd.unregister(self.span.start, self.span.len);
    }
}

/// What is known of a mapping's dirty bytes.
pub(super) struct Tracker {
    pub source: Source,
    noted: Mutex<Ranges>,
}

impl Tracker {
    /// The tracker that was asked for, or the best there is. Without a span the page table cannot
    /// be asked.
    pub fn new(tracking: Tracking, granularity: Granularity, span: Option<Span>) -> Result<Self> {
        let no_address =
            || Error::new(Kind::NotSupported, "track", "there are no addresses to protect");
        let scan = || Scan::new(span.ok_or_else(no_address)?).map(Source::Scan);
        let fault = || Handler::new(span.ok_or_else(no_address)?, None).map(Source::Fault);
        let source = match tracking {
            Tracking::Kernel => Source::Kernel,
            Tracking::Explicit => Source::Explicit,
            Tracking::WriteProtectAsync => scan()?,
            Tracking::WriteProtect => fault()?,
            Tracking::Automatic => match granularity {
                Granularity::Page => Source::Kernel,
                Granularity::Byte => Source::Fence,
                Granularity::Cacheline => scan().or_else(|_| fault()).unwrap_or(Source::Explicit),
            },
        };
        Ok(Tracker { source, noted: Mutex::default() })
    }

    /// The word for it.
    pub fn name(&self) -> &'static str {
        match self.source {
            Source::Fence => "fence",
            Source::Kernel => "kernel",
            Source::Explicit => "explicit",
            Source::Scan(_) => "write-protect-async",
            Source::Fault(_) => "write-protect",
        }
    }

    fn noted(&self) -> MutexGuard<'_, Ranges> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of our methods stored to a range.
    #[inline]
    pub fn stored(&self, at: u64, len: u64) {
        if matches!(self.source, Source::Explicit) {
            self.note(at, len);
        }
    }

    /// A range is about to be written back.
    #[inline]
    pub fn persisting(&self, at: u64, len: u64) {
        if matches!(self.source, Source::Explicit) {
            self.noted().remove(at, len);
        }
    }

    /// Counts a range as dirty.
    pub fn note(&self, at: u64, len: u64) {
        self.noted().insert(at, len);
    }

    /// What is dirty, besides what views could have stored to. It counts as clean from now on.
    pub fn take(&self) -> Result<Ranges> {
        let mut dirty = self.noted().take();
        let found = match &self.source {
            Source::Fence | Source::Kernel | Source::Explicit => Ok(()),
            Source::Scan(scan) => scan.take(&mut dirty),
            Source::Fault(handler) => handler.take().map(|more| {
                more.iter().for_each(|(at, len)| dirty.insert(at, len));
            }),
        };
        if found.is_err() {
            dirty.iter().for_each(|(at, len)| self.note(at, len));
        }
        found.map(|()| dirty)
    }

    /// Hands over from the page table to a thread, for a snapshot. What is stored in between is not
    /// seen by either: the caller makes everything durable that was stored before the moment.
    pub fn begin(&mut self, span: Span, snapshot: Arc<Snapshot>) -> Result<Handover> {
        match &self.source {
            Source::Fault(handler) => {
                handler.begin(snapshot)?;
                Ok(Handover::None)
            }
            Source::Scan(_) => {
                self.source = Source::Explicit;
                let handler = Handler::new(span, Some(snapshot));
                match handler {
                    Ok(handler) => self.source = Source::Fault(handler),
                    Err(error) => {
                        self.note(0, span.len);
                        self.source = Scan::new(span).map_or(Source::Explicit, Source::Scan);
                        return Err(error);
                    }
                }
                Ok(Handover::Unseen)
            }
            _ => Handler::new(span, Some(snapshot)).map(Handover::Temporary),
        }
    }

    /// Ends what [`Tracker::begin`] began.
    pub fn end(&self) {
        if let Source::Fault(handler) = &self.source {
            handler.end();
        }
    }
}

/// What the beginning of a snapshot leaves behind.
pub(super) enum Handover {
    /// Nothing.
    None,
    /// Stores that no tracker saw.
    Unseen,
    /// A handler that is there for the snapshot only.
    Temporary(Handler),
}
