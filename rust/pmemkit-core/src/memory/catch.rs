//! How writers are kept from a range while its bytes move: by userfaultfd, or by a signal.
//!
//! Invariants:
//! 1. From the return of [`Catch::hold`] until [`Hold::moved`] or the drop of the [`Hold`], no
//!    store of a thread of this process reaches the range through its address. Who tries waits.
//! 2. After either, whoever waited makes its store again, on whatever is mapped there by then.
//!
//! What this does not do: stop stores through other mappings (those of other processes), or of
//! devices that hold the pages (pin the extent for that).

use std::sync::Arc;

use super::{guard, sys};
use crate::error::Result;
use crate::uffd::{feature, mode, Reach, Uffd};

/// A userfaultfd that write-protects ranges of shared memory: Linux 5.19 or later.
pub struct Userfault {
    uffd: Uffd,
    reach: Reach,
}

impl Userfault {
    /// Opens one, with the right to catch the kernel's stores where this process has it.
    pub fn open() -> Result<Userfault> {
        let (uffd, reach) = Uffd::open("migrate")?;
        uffd.begin(feature::WP | feature::WP_SHARED)?;
        Ok(Userfault { uffd, reach })
    }

    fn register(&self, at: u64, len: u64) -> Result<()> {
        self.uffd.register(at, len, mode::WP).map_err(sys::explained)
    }

    /// From its return on, whoever stores to the range waits.
    fn protect(&self, at: u64, len: u64) -> Result<()> {
        self.uffd.protect(at, len, true).map_err(sys::explained)
    }

    /// Undoes both.
    fn unregister(&self, at: u64, len: u64) -> Result<()> {
        self.uffd.unregister(at, len).map_err(sys::explained)
    }
}

/// The way of one region.
#[derive(Clone)]
pub enum Catch {
    /// Write protection ruled by userfaultfd.
    Userfault(Arc<Userfault>),
    /// `mprotect`, and a handler of SIGSEGV that waits.
    Signal,
}

impl Catch {
    /// The word for it, in statistics and documents.
    pub fn name(&self) -> &'static str {
        match self {
            Catch::Userfault(fault) if fault.reach == Reach::Kernel => "userfaultfd",
            Catch::Userfault(_) => "userfaultfd-user",
            Catch::Signal => "signal",
        }
    }

    /// The best way for what is mapped at this address, tried on it.
    ///
    /// # Safety
    /// `at` must be the start of a mapping of the caller of at least `len` bytes, not yet in use.
    pub unsafe fn choose(fault: Option<&Arc<Userfault>>, at: u64, len: u64) -> Catch {
        let Some(fault) = fault else { return Catch::Signal };
        let tried = fault.register(at, len).and_then(|()| {
            let protected = fault.protect(at, len);
            fault.unregister(at, len)?;
            protected
        });
        if tried.is_ok() {
            Catch::Userfault(fault.clone())
        } else {
            Catch::Signal
        }
    }

    /// Has stores to a range wait from now on.
    ///
    /// # Safety
    /// The range must be a mapping of the caller's pool.
    pub unsafe fn hold(&self, at: u64, len: u64) -> Result<Hold> {
        match self {
            Catch::Userfault(fault) => {
                fault.register(at, len)?;
                let hold = Hold { at, len, by: By::Userfault(fault.clone()), moved: false };
                fault.protect(at, len)?;
                Ok(hold)
            }
            Catch::Signal => {
                let held = guard::Held::new(at, len)?;
                let hold = Hold { at, len, by: By::Signal(held), moved: false };
                // SAFETY: the caller vouches for the range.
                unsafe { sys::set_writable(at, len, false)? };
                Ok(hold)
            }
        }
    }
}

enum By {
    Userfault(Arc<Userfault>),
    Signal(#[allow(dead_code)] guard::Held), // Its drop is what matters.
}

/// A range whose stores wait.
pub struct Hold {
    at: u64,
    len: u64,
    by: By,
    moved: bool,
}

impl Hold {
    /// Something else was mapped there: lets stores go on, on that.
    pub fn moved(mut self) {
        self.moved = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // A failure here would leave threads waiting for ever, and there is none that these calls
        // document for ranges that are mapped.
        let done = match (&self.by, self.moved) {
            (By::Userfault(fault), true) => fault.uffd.wake(self.at, self.len),
            (By::Userfault(fault), false) => fault.unregister(self.at, self.len),
            (By::Signal(_), true) => Ok(()),
            // SAFETY: the range is still the mapping that `hold` made read-only.
            (By::Signal(_), false) => unsafe { sys::set_writable(self.at, self.len, true) },
        };
        debug_assert!(done.is_ok(), "{done:?}");
    }
}
