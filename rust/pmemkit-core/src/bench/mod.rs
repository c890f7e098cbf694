//! Timing loops that must not run in Python: one store made durable, over and over, by this core
//! or by a libpmem that is loaded for the comparison.
//!
//! Invariants:
//! 1. Both sides run in the same loop, called the same way, over the same kind of memory.
//! 2. Consecutive calls touch lines that the call before did not touch.
//!
//! What this does not do: take turns between the two sides, judge the result, run inside CI.

mod blocks;
mod faults;
mod frames;
mod lifetime;
mod sectors;

use std::ffi::{c_void, CStr, CString};
use std::sync::Arc;
use std::time::Instant;

use crate::dax::{Mapping, Options, Tracking};
use crate::error::{Error, Kind, Result};
use crate::media::{Granularity, Mapped, Medium, Store};
use crate::sg::Segment;

pub use blocks::PlainCopy;
pub use faults::{faults_ns, Handlers};
pub use frames::{frames_ns, FramesPlan, Pattern};
pub use lifetime::{lifetime, Lifetime, Limit};
pub use sectors::{sectors_ns, Floor, Ours, Pmemblk, Sectors};

/// Batches of a measurement; the median of their times is the result.
const BATCHES: u64 = 31;

const LINE: u64 = 64;

/// What one call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Copies a buffer and makes it durable.
    CopyPersist,
    /// Makes durable what one store a line made dirty.
    Persist,
    /// Makes durable what is durable already.
    PersistClean,
}

impl Call {
    /// The call of this name.
    pub fn from_name(name: &str) -> Result<Call> {
        match name {
            "copy_persist" => Ok(Call::CopyPersist),
            "persist" => Ok(Call::Persist),
            "persist_clean" => Ok(Call::PersistClean),
            _ => {
                let text =
                    format!("{name:?} is no call; calls are copy_persist, persist, persist_clean");
                Err(Error::new(Kind::Invalid, "bench", text))
            }
        }
    }
}

/// A measurement.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What a call does.
    pub call: Call,
    /// Bytes of a call.
    pub len: u64,
    /// How many calls are timed.
    pub iterations: u64,
    /// The libpmem to call instead of this core: a path or a soname.
    pub library: Option<String>,
    /// Bytes that the calls walk over.
    pub working_set: u64,
    /// Call a mapping ([`crate::dax`]) and not the medium itself.
    pub mapped: bool,
}

/// The memory that the calls walk over, all of it touched.
struct Ground {
    medium: Arc<dyn Medium>,
    base: *mut u8,
    source: Vec<u8>,
    len: u64,
    stride: u64,
    slots: u64,
}

/// Nanoseconds of one call: the median over batches.
pub fn medium_ns(plan: &Plan) -> Result<f64> {
    let ground = Ground::new(plan)?;
    match (&plan.library, plan.call) {
        (None, call) if plan.mapped => mapped(&ground, call, plan.iterations),
        (None, call) => ours(&ground, call, plan.iterations),
        (Some(name), call) => theirs(&ground, call, plan.iterations, &Library::open(name)?),
    }
}

fn ours(ground: &Ground, call: Call, iterations: u64) -> Result<f64> {
    let (medium, len) = (&*ground.medium, ground.len);
    match call {
        Call::CopyPersist => ground.time(iterations, |at, _| {
            // SAFETY: the source has `len` bytes.
            unsafe { medium.store(at, ground.source.as_ptr(), len, Store::Auto) }?;
            medium.fence();
            Ok(())
        }),
        Call::Persist | Call::PersistClean => ground.time(iterations, |at, target| {
            ground.dirty(call, target);
            medium.persist(at, len)
        }),
    }
}

/// The same through a mapping: its checks, its gate and its tracker come on top.
fn mapped(ground: &Ground, call: Call, iterations: u64) -> Result<f64> {
    let size = ground.medium.len();
    let options = Options { len: size, tracking: Tracking::Kernel, ..Options::default() };
    let (mapping, len) = (Mapping::new(ground.medium.clone(), options)?, ground.len);
    match call {
        // SAFETY: the source has `len` bytes.
        Call::CopyPersist => ground.time(iterations, |at, _| unsafe {
            mapping.copy_persist(at, ground.source.as_ptr(), len)
        }),
        Call::Persist | Call::PersistClean => ground.time(iterations, |at, target| {
            ground.dirty(call, target);
            mapping.persist(at, len)
        }),
    }
}

fn theirs(ground: &Ground, call: Call, iterations: u64, library: &Library) -> Result<f64> {
    let len = ground.len as usize;
    match call {
        Call::CopyPersist => {
            let copy = library.symbol(c"pmem_memcpy_persist")?;
            // SAFETY: this is the type of that function in every libpmem.
            let copy: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void =
                unsafe { std::mem::transmute(copy) };
            ground.time(iterations, |_, target| {
                // SAFETY: both ranges have `len` bytes of memory of ours.
                unsafe { copy(target.cast(), ground.source.as_ptr().cast(), len) };
                Ok(())
            })
        }
        Call::Persist | Call::PersistClean => {
            let persist = library.symbol(c"pmem_persist")?;
            // SAFETY: as above.
            let persist: unsafe extern "C" fn(*const c_void, usize) =
                unsafe { std::mem::transmute(persist) };
            ground.time(iterations, |_, target| {
                ground.dirty(call, target);
                // SAFETY: the range has `len` bytes of memory of ours.
                unsafe { persist(target.cast(), len) };
                Ok(())
            })
        }
    }
}

impl Ground {
    fn new(plan: &Plan) -> Result<Ground> {
        let stride = plan.len.checked_next_multiple_of(LINE).filter(|&stride| stride > 0);
        let (Some(stride), true) = (stride, plan.iterations > 0) else {
            let text = format!("{} calls of {} bytes cannot be timed", plan.iterations, plan.len);
            return Err(Error::new(Kind::Invalid, "bench", text));
        };
        let size = plan.working_set.max(stride);
        let medium = Mapped::anonymous_as(size, false, Granularity::Cacheline)?;
        medium.zero(0, size)?;
        let base = medium.address(&Segment::new(medium.region(), 0, size))?;
        Ok(Ground {
            medium: Arc::new(medium),
            base,
            source: vec![0x5a; plan.len as usize],
            len: plan.len,
            stride,
            slots: size / stride,
        })
    }

    /// Stores one byte into every line of a slot, where the call is to find it dirty.
    #[inline(always)]
    fn dirty(&self, call: Call, target: *mut u8) {
        if call == Call::PersistClean {
            return;
        }
        for line in (0..self.len).step_by(LINE as usize) {
            // SAFETY: private memory of ours, within the slot; no file can vanish behind it.
            unsafe { target.add(line as usize).write_volatile(1) };
        }
    }

    /// Times `call(offset, address)` over the slots, in turn.
    fn time(
        &self,
        iterations: u64,
        mut call: impl FnMut(u64, *mut u8) -> Result<()>,
    ) -> Result<f64> {
        let calls = (iterations / BATCHES).max(1);
        let mut slot = 0;
        let mut times = Vec::new();
        // One batch more than counts: the first warms up.
        for _ in 0..=BATCHES {
            let start = Instant::now();
            for _ in 0..calls {
                let at = slot * self.stride;
                // SAFETY: the slot lies within the working set.
                call(at, unsafe { self.base.add(at as usize) })?;
                slot = if slot + 1 == self.slots { 0 } else { slot + 1 };
            }
            times.push(start.elapsed().as_nanos() as f64 / calls as f64);
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// A shared library that was loaded at run time. It stays loaded.
struct Library {
    handle: *mut c_void,
    name: String,
}

impl Library {
    fn open(name: &str) -> Result<Library> {
        let refused = |text: String| Err(Error::new(Kind::NotSupported, "bench", text));
        let Ok(path) = CString::new(name) else {
            return refused(format!("{name:?} has a zero byte"));
        };
        // SAFETY: the path is a C string; the user asked for the library's code to run.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return refused(format!("{name} cannot be loaded"));
        }
        Ok(Library { handle, name: name.to_owned() })
    }

    fn symbol(&self, symbol: &CStr) -> Result<*mut c_void> {
        // SAFETY: the handle is open and the name is a C string.
        let address = unsafe { libc::dlsym(self.handle, symbol.as_ptr()) };
        if address.is_null() {
            let text = format!("{} has no {symbol:?}", self.name);
            return Err(Error::new(Kind::NotSupported, "bench", text));
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(call: Call, len: u64, library: Option<&str>) -> Plan {
        let library = library.map(str::to_owned);
        Plan { call, len, iterations: 100, library, working_set: 1 << 16, mapped: false }
    }

    #[test]
    fn every_call_takes_some_time() {
        for call in [Call::CopyPersist, Call::Persist, Call::PersistClean] {
            for len in [1, 64, 100, 4096, 1 << 17] {
                let plan = plan(call, len, None);
                assert!(medium_ns(&plan).unwrap() > 0.0);
                assert!(medium_ns(&Plan { mapped: true, ..plan }).unwrap() > 0.0);
            }
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let kind = |plan: Plan| medium_ns(&plan).unwrap_err().kind;
        assert_eq!(kind(plan(Call::Persist, 0, None)), Kind::Invalid);
        assert_eq!(kind(plan(Call::Persist, u64::MAX, None)), Kind::Invalid);
        let idle = Plan { iterations: 0, ..plan(Call::Persist, 64, None) };
        assert_eq!(kind(idle), Kind::Invalid);
        assert_eq!(kind(plan(Call::Persist, 64, Some("libnothing.so.9"))), Kind::NotSupported);
        assert_eq!(kind(plan(Call::Persist, 64, Some("libc.so.6"))), Kind::NotSupported);
        assert_eq!(Call::from_name("copy").unwrap_err().kind, Kind::Invalid);
    }
}
