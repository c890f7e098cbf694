//! Taking frames and putting them back, by the allocator of frames or by a `malloc` that is loaded
//! for the comparison.
//!
//! Invariants:
//! 1. Both sides run in the same loop and are entered by one call that is not inlined.
//! 2. Nothing touches the memory that is handed out: what is measured is the allocator.
//!
//! What this does not do: fill the memory, measure what a page fault costs.

use std::ffi::c_void;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::Instant;

use super::Library;
use crate::error::{Error, Kind, Result};
use crate::frames::{Allocator, Options, Place};
use crate::media::{Granularity, Mapped};

/// The order in which frames are taken and put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All are taken, then all are put in the same order.
    Bulk,
    /// All are taken, then all are put in a random order.
    Random,
    /// Each is put as soon as it was taken.
    Pair,
}

impl Pattern {
    /// The pattern of this name.
    pub fn from_name(name: &str) -> Result<Pattern> {
        match name {
            "bulk" => Ok(Pattern::Bulk),
            "random" => Ok(Pattern::Random),
            "pair" => Ok(Pattern::Pair),
            _ => {
                let text = format!("{name:?} is none of bulk, random, pair");
                Err(Error::new(Kind::Invalid, "bench", text))
            }
        }
    }
}

/// Where frames come from.
trait Source: Sync {
    /// Takes one; 0 is a frame like any other.
    fn get(&self) -> Result<u64>;
    fn put(&self, frame: u64) -> Result<()>;
}

struct Ours {
    allocator: Allocator,
    order: u32,
}

impl Source for Ours {
    #[inline(never)]
    fn get(&self) -> Result<u64> {
        self.allocator.get(self.order)
    }

    #[inline(never)]
    fn put(&self, frame: u64) -> Result<()> {
        self.allocator.put(frame, self.order)
    }
}

type Malloc = unsafe extern "C" fn(usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);

struct Theirs {
    malloc: Malloc,
    free: Free,
    size: usize,
}

impl Theirs {
    fn new(name: &str, order: u32) -> Result<Theirs> {
        let library = Library::open(name)?;
        let (malloc, free) = (library.symbol(c"malloc")?, library.symbol(c"free")?);
        // SAFETY: these are the types of these functions in every C library.
        let (malloc, free) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Malloc>(malloc),
                std::mem::transmute::<*mut c_void, Free>(free),
            )
        };
        Ok(Theirs { malloc, free, size: 4096 << order })
    }
}

impl Source for Theirs {
    fn get(&self) -> Result<u64> {
        // SAFETY: malloc may be called with any size.
        let address = unsafe { (self.malloc)(self.size) } as u64;
        if address == 0 {
            return Err(Error::new(Kind::NoSpace, "bench", "malloc failed"));
        }
        Ok(address)
    }

    fn put(&self, frame: u64) -> Result<()> {
        // SAFETY: it came from `get`, and the loops below put each once.
        unsafe { (self.free)(frame as *mut c_void) };
        Ok(())
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct FramesPlan {
    /// The order in which frames are taken and put.
    pub pattern: Pattern,
    /// Of each: `2^order` frames.
    pub order: u32,
    /// Threads that do the same at the same time.
    pub threads: usize,
    /// How many each thread takes.
    pub count: u64,
    /// The library to call instead of this core: a path or a soname.
    pub library: Option<String>,
    /// Keep free frames by the thread.
    pub magazines: bool,
    /// A page map that survives a power failure.
    pub persistent: bool,
}

/// Nanoseconds of one get and of one put, the mean over threads; a pair is told as a get. The first
/// of two rounds warms up.
pub fn frames_ns(plan: &FramesPlan) -> Result<(f64, f64)> {
    if plan.threads == 0 || plan.threads > 64 || plan.count == 0 || plan.order > 18 {
        let text = format!("{plan:?} cannot be timed");
        return Err(Error::new(Kind::Invalid, "bench", text));
    }
    if let Some(name) = &plan.library {
        return run(&Theirs::new(name, plan.order)?, plan);
    }
    // Twice the room, so that a search is not one for the last frames.
    let frames = (plan.threads as u64 * plan.count * 2) << plan.order;
    let options = Options { magazines: plan.magazines, online: true };
    let frames = frames.max(1 << 16);
    let allocator = if plan.persistent {
        let length = Allocator::map_size(frames);
        let medium = Mapped::anonymous_as(length, false, Granularity::Cacheline)?;
        let place = Place { medium: Arc::new(medium), offset: 0, length, persistent: true };
        Allocator::over(place, frames, options)?
    } else {
        Allocator::new(frames, options)?
    };
    run(&Ours { allocator, order: plan.order }, plan)
}

fn run(source: &impl Source, plan: &FramesPlan) -> Result<(f64, f64)> {
    let (start, done) = (Barrier::new(plan.threads), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for thread in 0..plan.threads {
            let (start, done) = (&start, &done);
            scope.spawn(move || {
                let mut held = Vec::with_capacity(plan.count as usize);
                let mut last = Ok((0.0, 0.0));
                for _ in 0..2 {
                    start.wait();
                    last = last.and_then(|_| round(source, plan, thread as u64, &mut held));
                }
                done.lock().unwrap_or_else(PoisonError::into_inner).push(last);
            });
        }
    });
    let all = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut sum = (0.0, 0.0);
    for each in all {
        let (get, put) = each?;
        sum = (sum.0 + get, sum.1 + put);
    }
    Ok((sum.0 / plan.threads as f64, sum.1 / plan.threads as f64))
}

fn round(
    source: &impl Source,
    plan: &FramesPlan,
    thread: u64,
    held: &mut Vec<u64>,
) -> Result<(f64, f64)> {
    let each = |start: Instant| start.elapsed().as_nanos() as f64 / plan.count as f64;
    let start = Instant::now();
    if plan.pattern == Pattern::Pair {
        for _ in 0..plan.count {
            let frame = std::hint::black_box(source.get()?);
            source.put(frame)?;
        }
        return Ok((each(start), 0.0));
    }
    held.clear();
    for _ in 0..plan.count {
        held.push(source.get()?);
    }
    let get = each(start);
    if plan.pattern == Pattern::Random {
        shuffle(held, thread + 1);
    }
    let start = Instant::now();
    for &frame in held.iter() {
        source.put(frame)?;
    }
    Ok((get, each(start)))
}

fn shuffle(values: &mut [u64], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for last in (1..values.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        values.swap(last, (state % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(pattern: Pattern, library: Option<&str>) -> FramesPlan {
        let library = library.map(str::to_owned);
        FramesPlan {
            pattern,
            order: 0,
            threads: 2,
            count: 300,
            library,
            magazines: true,
            persistent: false,
        }
    }

    #[test]
    fn every_pattern_takes_some_time_on_both_sides() {
        for name in ["bulk", "random", "pair"] {
            for library in [None, Some("libc.so.6")] {
                let pattern = Pattern::from_name(name).unwrap();
                assert!(frames_ns(&plan(pattern, library)).unwrap().0 > 0.0);
            }
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let kind = |plan: FramesPlan| frames_ns(&plan).unwrap_err().kind;
        assert_eq!(kind(FramesPlan { threads: 0, ..plan(Pattern::Bulk, None) }), Kind::Invalid);
        assert_eq!(kind(plan(Pattern::Bulk, Some("libnothing.so.9"))), Kind::NotSupported);
        assert_eq!(Pattern::from_name("all").unwrap_err().kind, Kind::Invalid);
    }
}
