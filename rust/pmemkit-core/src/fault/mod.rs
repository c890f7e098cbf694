//! The fault handler: ranges of addresses whose pages appear when they are touched.
//!
//! A [`LazyMapping`] is a range in which nothing is there at first. A touch of a page stops its
//! thread, the kernel tells a handler thread over userfaultfd, the handler asks a [`PfnProvider`]
//! what the page is, and the thread goes on. Three kinds of faults are handled: *missing* (nothing
//! is there), *minor* (the page cache has the page and this mapping does not, shared memory only),
//! and *write-protect* (the first write to a page, where writes are tracked).
//!
//! Invariants:
//! 1. Each fault has an outcome: the page, or a SIGBUS where the provider fails, panics or says no,
//!    where memory is short, or where the mapping is closed or cut. Nobody waits for ever, unless a
//!    provider never returns, and then only until somebody closes the mapping.
//! 2. A page is put in place by one system call that fails where one is there already: what was
//!    stored to a page is never replaced by what a late handler brings.
//! 3. Where writes are tracked a page that can be stored to is dirty: it is noted and unprotected,
//!    and cleaned and protected, under one lock each.
//! 4. [`LazyMapping::load`] and [`LazyMapping::store`] answer a failing page with the error of its
//!    provider. Closing lets those in flight return before the range is given back.
//! 5. A handler thread holds no lock while it asks a provider, and of two that are about to ask for
//!    one page only the first does.
//!
//! Who touches the range otherwise than through these methods gets what the hardware has to offer:
//! a page that fails is a SIGBUS, and a system call given an address in it an `EFAULT`. A provider
//! must not touch the mapping it provides for, nor wait for a thread that may be in a fault of it.
//!
//! What this does not do: take pages away by itself when memory is short (the kernel swaps them, as
//! any other), follow a fork (a child does not have the range), persist.

mod clone;
mod handler;
mod mapping;
mod pages;
mod probe;
mod providers;
pub(crate) mod sys;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

use crate::error::Result;

pub use crate::uffd::Reach;
pub use mapping::{LazyMapping, Stats};
pub use probe::{probe, Ability};
pub use providers::{Assembled, FromDevice, FromMedium, Part};

/// A run of pages of a mapping, counted from its start in its own page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first page.
    pub first: u64,
    /// How many there are; never none.
    pub count: u64,
}

impl Run {
    /// One page.
    pub const fn one(page: u64) -> Run {
        Run { first: page, count: 1 }
    }

    /// The page behind the last one.
    pub const fn end(self) -> u64 {
        self.first + self.count
    }

    /// True where the page is in the run.
    pub const fn has(self, page: u64) -> bool {
        page >= self.first && page < self.end()
    }
}

/// What somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The page that was touched.
    pub page: u64,
    /// That page and others around it, which may be answered by the way.
    pub run: Run,
    /// The kernel could not read the address of an earlier answer: bytes or an error, please.
    pub bytes_only: bool,
}

/// What pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Zero,
    /// What the provider put into the buffer, at the place of each page.
    Bytes,
    /// A copy of what stands at an address: the kernel reads it, and where it cannot, asks again.
    At(Address),
    /// What the page cache has. Shared memory only.
    Cached,
    /// Not a copy but the bytes of a shared mapping themselves, mapped here too. Stores go there.
    /// The same pages always have this same answer.
    Mapped(Address),
}

/// An address that a provider vouches for: of pages that stay mapped as long as the provider lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(*mut u8);

impl Address {
    /// The address of the first page of an answer.
    ///
    /// # Safety
    /// As many bytes as the answer has pages are mapped from there, until the provider is dropped.
    /// They may fail when they are touched.
    pub const unsafe fn new(address: *mut u8) -> Address {
        Address(address)
    }
}

/// A provider's answer. Its run has the page that was asked for and lies within what was asked for;
/// only that of [`Content::Mapped`] may be larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pages.
    pub run: Run,
    /// What they are.
    pub content: Content,
}

/// Knows what the pages of a mapping are. Called from handler threads, several at a time.
pub trait PfnProvider: Send + Sync {
    /// Says what missing pages are. `into` has room for the whole run that is asked for and holds
    /// nothing of meaning. An error is that of the page that was touched; it fails until somebody
    /// calls [`LazyMapping::retry`]. The pages around it are not affected.
    fn provide(&self, ask: &Ask, into: &mut [u8]) -> Result<Answer>;

    /// Says whether a page that the page cache has may be mapped as it is.
    fn cached(&self, _page: u64) -> Result<()> {
        Ok(())
    }

    /// True where [`PfnProvider::may_write`] ever says no: then writes are tracked.
    fn has_read_only_pages(&self) -> bool {
        false
    }

    /// Says whether a page may be written to.
    fn may_write(&self, _page: u64) -> Result<()> {
        Ok(())
    }
}

/// What a mapping is made of.
#[derive(Debug, Default)]
pub enum Memory {
    /// Memory of this process.
    #[default]
    Private,
    /// The same from the pool of huge pages.
    Huge,
    /// A file in shared memory, at least as long as the mapping: what is stored, everybody sees who
    /// maps the file. Pages that it has already are minor faults.
    Shared(OwnedFd),
}

/// How a mapping is made.
#[derive(Debug)]
pub struct Options {
    /// The unit in which pages are asked for and tracked: a power of two, at least that of the
    /// memory. 2 MiB of small pages are resolved by one call.
    pub page_size: u64,
    /// What it is made of.
    pub memory: Memory,
    /// Handler threads.
    pub threads: usize,
    /// Pages that are asked for at once, aligned to as many: a power of two.
    pub fault_around: u64,
    /// No store is possible.
    pub read_only: bool,
    /// Which pages were stored to is known.
    pub track_writes: bool,
    /// Leave out what needs a capability.
    pub user_only: bool,
    /// Fail pages by `UFFDIO_POISON`, where the kernel has it; otherwise, and without this, a page
    /// that fails takes a mapping of its own.
    pub poison: bool,
    /// For how long a handler that was busy looks for more before it sleeps, in nanoseconds.
    pub poll_ns: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            page_size: sys::page_size(),
            memory: Memory::Private,
            threads: 1,
            fault_around: 1,
            read_only: false,
            track_writes: false,
            user_only: false,
            poison: true,
            poll_ns: 50_000,
        }
    }
}
