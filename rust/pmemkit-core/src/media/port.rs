//! The CPU port: how bytes are copied to media, written back and fenced on this machine. What the
//! CPU offers is asked once, the choice is made once, and everything else calls through it.
//!
//! Invariants:
//! 1. Every touch of mapped bytes happens in a leaf routine of the architecture's file: one
//!    contiguous piece of code without stack use, so that [`super::guard`] can leave it from any
//!    instruction. A routine that was left that way says so in its [`Outcome`].
//! 2. [`select`] is a pure function of what the CPU offers and what the user overrides.
//! 3. A range that is aligned to 8 bytes on media is stored in whole 8-byte words, which power
//!    failure cannot tear. (`copy_bulk`, which is for memory that promises nothing, may not.)
//!
//! What this does not do: check ranges, install the fault handler (whoever maps does), cope with
//! ranges that overlap.

use std::env;
use std::sync::OnceLock;

use super::Store;

#[cfg(target_arch = "x86_64")]
#[path = "port_x86_64.rs"]
pub(super) mod arch;

#[cfg(target_arch = "aarch64")]
#[path = "port_aarch64.rs"]
pub(super) mod arch;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("pmemkit knows how to write cache lines back on x86-64 and aarch64 only");

/// Bytes of a cache line, the unit of write-back.
pub const CACHELINE_SIZE: u64 = 64;

/// Length from which stores go around the cache, unless overridden: libpmem's, which is the
/// internal unit of the media it was tuned for. Over DRAM, on the CPU with AVX-512 that this was
/// measured on, the two ways meet between 256 bytes (159 ns through the cache, 194 ns around it)
/// and 512 (215 ns and 200 ns): a machine without such media may gain from a threshold of 512.
pub const MOVNT_THRESHOLD: u64 = 256;

/// Bytes of zeroes at hand: zeroing is a copy from them.
const ZEROES_SIZE: u64 = 4096;

#[repr(align(64))]
struct Zeroes([u8; ZEROES_SIZE as usize]);

static ZEROES: Zeroes = Zeroes([0; ZEROES_SIZE as usize]);

/// What a leaf routine answers, in two registers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Zero, or one when the routine was left because of a fault.
    pub faulted: u64,
    /// The address of the fault, or the value that was loaded; of no meaning after a store.
    pub value: u64,
}

impl Outcome {
    /// Nothing went wrong.
    pub const OK: Outcome = Outcome { faulted: 0, value: 0 };

    /// True when the routine was left because of a fault.
    pub fn is_fault(self) -> bool {
        self.faulted != 0
    }

    fn then(self, next: impl FnOnce() -> Outcome) -> Outcome {
        if self.is_fault() {
            self
        } else {
            next()
        }
    }
}

/// `copy(target, source, len)`
pub(super) type CopyFn = unsafe extern "C" fn(*mut u8, *const u8, u64) -> Outcome;
/// `flush(address, len)`
pub(super) type FlushFn = unsafe extern "C" fn(*const u8, u64) -> Outcome;

/// The instruction that writes a cache line back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flush {
    /// Writes back and may keep the line; needs a fence.
    Clwb,
    /// Writes back and drops the line; needs a fence.
    Clflushopt,
    /// Writes back and drops the line, each in turn.
    Clflush,
    /// To the point of persistence.
    DcCvap,
    /// To the point of coherency, where the CPU knows no other.
    DcCvac,
}

impl Flush {
    /// The name of the instruction.
    pub const fn name(self) -> &'static str {
        match self {
            Flush::Clwb => "clwb",
            Flush::Clflushopt => "clflushopt",
            Flush::Clflush => "clflush",
            Flush::DcCvap => "dc cvap",
            Flush::DcCvac => "dc cvac",
        }
    }
}

/// The instructions that copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyWith {
    /// 64-byte vectors.
    Avx512f,
    /// 32-byte vectors.
    Avx2,
    /// 16-byte vectors.
    Sse2,
    /// General registers; there are no non-temporal stores.
    Generic,
}

impl CopyWith {
    /// The word used in options and reports.
    pub const fn name(self) -> &'static str {
        match self {
            CopyWith::Avx512f => "avx512f",
            CopyWith::Avx2 => "avx2",
            CopyWith::Sse2 => "sse2",
            CopyWith::Generic => "generic",
        }
    }
}

/// What the CPU offers. Lists are in order of preference and end with what every CPU has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Ways to write a line back.
    pub flush: Vec<Flush>,
    /// Ways to copy.
    pub copy: Vec<CopyWith>,
    /// True where one instruction copies any length at full speed.
    pub repeat: bool,
}

/// What the user wants otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Instructions that must not be used to write lines back.
    pub flush_denied: Vec<Flush>,
    /// Instructions that must not be used to copy.
    pub copy_denied: Vec<CopyWith>,
    /// Never store around the cache.
    pub no_movnt: bool,
    /// Length from which stores go around the cache.
    pub movnt_threshold: Option<u64>,
}

impl Overrides {
    /// Reads the environment. A threshold that is not a number is ignored, as in libpmem.
    pub fn from_environment() -> Self {
        Self::from_lookup(|name| env::var(name).ok())
    }

    /// Reads variables through `lookup`, which knows the names without their prefix.
    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let is = |name: &str, value: &str| {
            lookup(&format!("PMEMKIT_{name}")).is_some_and(|found| found.trim() == value)
        };
        let mut overrides = Overrides { no_movnt: is("NO_MOVNT", "1"), ..Self::default() };
        if is("NO_CLWB", "1") {
            overrides.flush_denied.push(Flush::Clwb);
        }
        if is("NO_CLFLUSHOPT", "1") {
            overrides.flush_denied.push(Flush::Clflushopt);
        }
        if is("AVX512F", "0") || is("AVX", "0") {
            overrides.copy_denied.push(CopyWith::Avx512f);
        }
        if is("AVX", "0") {
            overrides.copy_denied.push(CopyWith::Avx2);
        }
        overrides.movnt_threshold =
            lookup("PMEMKIT_MOVNT_THRESHOLD").and_then(|text| text.trim().parse().ok());
        overrides
    }
}

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How lines are written back.
    pub flush: Flush,
    /// How bytes are copied.
    pub copy: CopyWith,
    /// Length from which stores go around the cache; `u64::MAX` for never.
    pub movnt_threshold: u64,
    /// Length from which bulk copies use the one copying instruction; `u64::MAX` for never.
    pub repeat_threshold: u64,
}

/// Length from which the copying instruction beats a loop of vectors.
const REPEAT_THRESHOLD: u64 = 2048;

/// Chooses the first way of each list that is not denied; the last one cannot be denied.
pub fn select(features: &Features, overrides: &Overrides) -> Choice {
    let flush = features.flush.iter().find(|way| !overrides.flush_denied.contains(way));
    let copy = features.copy.iter().find(|way| !overrides.copy_denied.contains(way));
    let copy = copy.copied().unwrap_or(CopyWith::Generic);
    let threshold = if overrides.no_movnt || copy == CopyWith::Generic {
        u64::MAX
    } else {
        overrides.movnt_threshold.unwrap_or(MOVNT_THRESHOLD)
    };
    Choice {
        flush: flush.copied().unwrap_or(arch::FLUSH_ALWAYS_THERE),
        copy,
        movnt_threshold: threshold,
        repeat_threshold: if features.repeat { REPEAT_THRESHOLD } else { u64::MAX },
    }
}

/// The routines of a choice.
#[derive(Debug)]
pub struct Port {
    choice: Choice,
    copy: CopyFn,
    stream: CopyFn,
    flush: FlushFn,
}

impl Port {
    /// The port of this process, chosen at the first call.
    pub fn get() -> &'static Port {
        static PORT: OnceLock<Port> = OnceLock::new();
        PORT.get_or_init(|| {
            // SAFETY: `select` takes only from what this CPU offers.
            unsafe { Port::new(select(&arch::detect(), &Overrides::from_environment())) }
        })
    }

    /// The routines of a choice.
    ///
    /// # Safety
    /// This CPU must have the instructions that the choice names.
    pub unsafe fn new(choice: Choice) -> Port {
        let (copy, stream) = arch::copy_routines(choice.copy);
        Port { choice, copy, stream, flush: arch::flush_routine(choice.flush) }
    }

    /// What was chosen.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Copies with plain cached stores.
    ///
    /// # Safety
    /// Both ranges must be mapped for the access and must not overlap. A fault in them is an
    /// outcome only where the guard is installed.
    pub unsafe fn copy(&self, target: *mut u8, source: *const u8, len: u64) -> Outcome {
        // SAFETY: the caller vouches for the ranges.
        unsafe { (self.copy)(target, source, len) }
    }

    /// Copies as fast as possible, promising nothing about the order or size of stores.
    ///
    /// # Safety
    /// As for [`Port::copy`].
    pub unsafe fn copy_bulk(&self, target: *mut u8, source: *const u8, len: u64) -> Outcome {
        if len < self.choice.repeat_threshold {
            // SAFETY: the caller vouches for the ranges.
            unsafe { (self.copy)(target, source, len) }
        } else {
            // SAFETY: as above.
            unsafe { arch::copy_repeat(target, source, len) }
        }
    }

    /// Copies so that a fence on this thread makes the target durable, unless `how` is `Cached`.
    ///
    /// # Safety
    /// As for [`Port::copy`].
    pub unsafe fn store(
        &self,
        target: *mut u8,
        source: *const u8,
        len: u64,
        how: Store,
    ) -> Outcome {
        let threshold = self.choice.movnt_threshold;
        let around = match how {
            Store::Auto => len >= threshold,
            Store::NonTemporal => threshold != u64::MAX,
            // SAFETY: the caller vouches for the ranges.
            Store::Cached => return unsafe { self.copy(target, source, len) },
        };
        if around {
            // SAFETY: as above.
            unsafe { self.store_around(target, source, len) }
        } else {
            // SAFETY: as above.
            unsafe { self.store_back(target, source, len) }
        }
    }

    /// Copies through the cache and writes the lines back.
    ///
    /// # Safety
    /// As for [`Port::copy`].
    unsafe fn store_back(&self, target: *mut u8, source: *const u8, len: u64) -> Outcome {
        // SAFETY: the caller vouches for the ranges.
        unsafe { (self.copy)(target, source, len).then(|| self.flush(target, len)) }
    }

    /// Copies around the cache; the ragged ends go through it and are written back.
    ///
    /// # Safety
    /// As for [`Port::copy`].
    unsafe fn store_around(&self, target: *mut u8, source: *const u8, len: u64) -> Outcome {
        let head = (target as u64).wrapping_neg() % CACHELINE_SIZE;
        let head = head.min(len);
        let tail = (len - head) % CACHELINE_SIZE;
        let body = len - head - tail;
        let mut outcome = Outcome::OK;
        // SAFETY: the three pieces lie within the ranges the caller vouches for, in this order;
        // the body starts and ends at a line boundary.
        unsafe {
            if head != 0 {
                outcome = self.store_back(target, source, head);
            }
            if body != 0 {
                let (target, source) = (target.add(head as usize), source.add(head as usize));
                outcome = outcome.then(|| (self.stream)(target, source, body));
            }
            if tail != 0 {
                let start = (head + body) as usize;
                let (target, source) = (target.add(start), source.add(start));
                outcome = outcome.then(|| self.store_back(target, source, tail));
            }
        }
        outcome
    }

    /// Stores zeroes like [`Port::store`] with `how`, in pieces that end at multiples of 4 KiB.
    ///
    /// # Safety
    /// As for [`Port::copy`].
    pub unsafe fn zero(&self, target: *mut u8, len: u64, how: Store) -> Outcome {
        let around = how == Store::Auto && len >= self.choice.movnt_threshold;
        let how = if around { Store::NonTemporal } else { how };
        let mut done = 0;
        let mut outcome = Outcome::OK;
        while done < len && !outcome.is_fault() {
            let piece = ZEROES_SIZE - (target as u64 + done) % ZEROES_SIZE;
            let piece = piece.min(len - done);
            // SAFETY: the piece lies within the range the caller vouches for.
            outcome =
                unsafe { self.store(target.add(done as usize), ZEROES.0.as_ptr(), piece, how) };
            done += piece;
        }
        outcome
    }

    /// Starts writing the lines of a range back.
    ///
    /// # Safety
    /// The range must be mapped.
    pub unsafe fn flush(&self, address: *const u8, len: u64) -> Outcome {
        if len == 0 {
            return Outcome::OK;
        }
        // SAFETY: the caller vouches for the range; it has at least one byte.
        unsafe { (self.flush)(address, len) }
    }

    /// Waits for the write-backs and non-temporal stores of this thread.
    pub fn fence(&self) {
        arch::fence();
    }

    /// Loads an aligned u64; its value is in the outcome.
    ///
    /// # Safety
    /// The address must be mapped and a multiple of 8.
    pub unsafe fn load_u64(&self, address: *const u8) -> Outcome {
        // SAFETY: the caller vouches for the address.
        unsafe { arch::load_u64(address) }
    }

    /// Stores an aligned u64 with one store.
    ///
    /// # Safety
    /// The address must be mapped and a multiple of 8.
    pub unsafe fn store_u64(&self, address: *mut u8, value: u64) -> Outcome {
        // SAFETY: the caller vouches for the address.
        unsafe { arch::store_u64(address, value) }
    }
}

/// Says that a line will be loaded soon. Only a hint: any address will do.
#[inline(always)]
pub fn hint_load(address: *const u8) {
    arch::hint_load(address);
}

/// Says that these bytes will be stored to soon. Only a hint: any range will do.
#[inline(always)]
pub fn hint_store(address: *const u8, len: usize) {
    for line in (0..len).step_by(CACHELINE_SIZE as usize) {
        arch::hint_store(address.wrapping_add(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Features {
        Features {
            flush: vec![Flush::Clwb, Flush::Clflushopt, Flush::Clflush],
            copy: vec![CopyWith::Avx512f, CopyWith::Avx2, CopyWith::Sse2],
            repeat: true,
        }
    }

    fn environment(pairs: &'static [(&'static str, &'static str)]) -> Overrides {
        Overrides::from_lookup(|name| {
            pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned())
        })
    }

    #[test]
    fn the_best_of_a_full_cpu_is_chosen() {
        let choice = select(&all(), &environment(&[]));
        assert_eq!((choice.flush, choice.copy), (Flush::Clwb, CopyWith::Avx512f));
        assert_eq!(choice.movnt_threshold, MOVNT_THRESHOLD);
        assert_eq!(choice.repeat_threshold, REPEAT_THRESHOLD);
    }

    #[test]
    fn an_old_cpu_gets_what_it_has() {
        let old =
            Features { flush: vec![Flush::Clflush], copy: vec![CopyWith::Sse2], repeat: false };
        let choice = select(&old, &environment(&[]));
        assert_eq!((choice.flush, choice.copy), (Flush::Clflush, CopyWith::Sse2));
        assert_eq!(choice.repeat_threshold, u64::MAX);
    }

    #[test]
    fn overrides_step_down_one_by_one() {
        let flush = |pairs| select(&all(), &environment(pairs)).flush;
        assert_eq!(flush(&[("PMEMKIT_NO_CLWB", "1")]), Flush::Clflushopt);
        assert_eq!(flush(&[("PMEMKIT_NO_CLFLUSHOPT", "1")]), Flush::Clwb);
        assert_eq!(
            flush(&[("PMEMKIT_NO_CLWB", "1"), ("PMEMKIT_NO_CLFLUSHOPT", "1")]),
            Flush::Clflush
        );
        assert_eq!(flush(&[("PMEMKIT_NO_CLWB", "0")]), Flush::Clwb);
        let copy = |pairs| select(&all(), &environment(pairs)).copy;
        assert_eq!(copy(&[("PMEMKIT_AVX512F", "0")]), CopyWith::Avx2);
        assert_eq!(copy(&[("PMEMKIT_AVX", "0")]), CopyWith::Sse2);
        assert_eq!(copy(&[("PMEMKIT_AVX512F", "1")]), CopyWith::Avx512f);
    }

    #[test]
    fn the_threshold_can_be_moved_and_switched_off() {
        let threshold = |pairs| select(&all(), &environment(pairs)).movnt_threshold;
        assert_eq!(threshold(&[("PMEMKIT_MOVNT_THRESHOLD", " 4096 ")]), 4096);
        assert_eq!(threshold(&[("PMEMKIT_MOVNT_THRESHOLD", "many")]), MOVNT_THRESHOLD);
        assert_eq!(threshold(&[("PMEMKIT_MOVNT_THRESHOLD", "-1")]), MOVNT_THRESHOLD);
        assert_eq!(
            threshold(&[("PMEMKIT_NO_MOVNT", "1"), ("PMEMKIT_MOVNT_THRESHOLD", "64")]),
            u64::MAX
        );
    }

    #[test]
    fn a_cpu_without_vectors_never_stores_around_the_cache() {
        let arm = Features {
            flush: vec![Flush::DcCvap, Flush::DcCvac],
            copy: vec![CopyWith::Generic],
            repeat: false,
        };
        let choice = select(&arm, &environment(&[("PMEMKIT_MOVNT_THRESHOLD", "64")]));
        assert_eq!((choice.flush, choice.copy), (Flush::DcCvap, CopyWith::Generic));
        assert_eq!(choice.movnt_threshold, u64::MAX);
    }
}
