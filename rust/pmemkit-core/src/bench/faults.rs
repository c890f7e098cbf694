//! Faults a second: those of a lazily filled mapping, of the shortest loop around userfaultfd that
//! works, and of the kernel by itself. All fill pages of memory of this process, by copies of one
//! page or, the kernel, with zeroes.
//!
//! Invariants:
//! 1. Every page is touched once, by one of as many threads as there are handlers, each in a range
//!    of its own.
//! 2. The shortest loop reads one message, makes one call, and knows no failure.
//! 3. Both wait for the next fault in the way that is asked for, and hear of faults of the kernel
//!    where this process may.
//! 4. The clock runs from the first store of the first thread to the last one of the last thread.
//!
//! What this does not do: fault around, huge pages.

use std::sync::{Arc, Barrier};
use std::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::fault::sys::{self, Ground};
use crate::fault::{Address, Answer, Ask, Content, LazyMapping, Options, PfnProvider};
use crate::uffd::{mode, Message, Uffd};

/// Whose faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handlers {
    /// A [`LazyMapping`].
    Ours,
    /// The shortest loop.
    Bare,
    /// Nobody: the kernel.
    Kernel,
}

impl Handlers {
    /// Those of this name.
    pub fn from_name(name: &str) -> Result<Handlers> {
        match name {
            "ours" => Ok(Handlers::Ours),
            "bare" => Ok(Handlers::Bare),
            "kernel" => Ok(Handlers::Kernel),
            _ => {
                let text = format!("{name:?} is none of ours, bare, kernel");
                Err(Error::new(Kind::Invalid, "bench", text))
            }
        }
    }
}

/// A page that all pages are copies of.
struct Same(Box<[u8]>);

impl PfnProvider for Same {
    fn provide(&self, ask: &Ask, _into: &mut [u8]) -> Result<Answer> {
        // SAFETY: the page lives as long as the provider.
        let address = unsafe { Address::new(self.0.as_ptr().cast_mut()) };
        Ok(Answer { run: ask.run, content: Content::At(address) })
    }
}

/// Memory of a measurement, unmapped at its end.
struct Memory {
    start: u64,
    len: u64,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours; the threads that touched it have ended.
        unsafe { sys::unmap(self.start, self.len) };
    }
}

/// Nanoseconds a fault, the pages touched by `threads` threads and handled by as many, which go on
/// `looking` for the next fault instead of going to sleep at once.
pub fn faults_ns(who: Handlers, threads: usize, pages: u64, looking: bool) -> Result<f64> {
    let page = sys::page_size();
    if threads == 0 || threads > 64 || pages < threads as u64 || pages > 1 << 24 {
        let text = format!("{pages} pages touched by {threads} threads");
        return Err(Error::new(Kind::Invalid, "bench", text));
    }
    // One more for each handler of the shortest loop, to tell it that this is the end.
    let len = (pages + threads as u64) * page;
    let same = Same(vec![0x5a; page as usize].into_boxed_slice());
    match who {
        Handlers::Ours => {
            let poll_ns = if looking { Options::default().poll_ns } else { 0 };
            let options = Options { threads, poll_ns, ..Options::default() };
            let mapping = LazyMapping::new(Arc::new(same), len, options)?;
            let start = mapping.pin(0, len)? as u64;
            let spent = touch(start, threads, pages);
            mapping.unpin();
            mapping.close()?;
            Ok(spent)
        }
        Handlers::Kernel => {
            let start = sys::map(Ground::Private, len, page, false)? as u64;
            let _memory = Memory { start, len };
            Ok(touch(start, threads, pages))
        }
        Handlers::Bare => bare(&same, threads, pages, looking),
    }
}

fn bare(same: &Same, threads: usize, pages: u64, looking: bool) -> Result<f64> {
    let page = sys::page_size();
    let len = (pages + threads as u64) * page;
    let (uffd, _) = Uffd::open("bench")?;
    uffd.begin(0)?;
    if !looking {
        uffd.blocking()?;
    }
    let start = sys::map(Ground::Private, len, page, false)? as u64;
    let _memory = Memory { start, len };
    uffd.register(start, len, mode::MISSING)?;
    let (source, end) = (same.0.as_ptr() as u64, start + pages * page);
    Ok(std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut message = [Message::default()];
                loop {
                    if uffd.take(&mut message).is_err() {
                        std::thread::yield_now();
                        continue;
                    }
                    let address = message[0].address().unwrap_or(start);
                    uffd.copy(address / page * page, source, page, false, true);
                    // Each page behind the others ends the one that handled it.
                    if address >= end {
                        break;
                    }
                }
            });
        }
        let spent = touch(start, threads, pages);
        (pages..pages + threads as u64).for_each(|each| store(start + each * page));
        spent
    }))
}

fn store(address: u64) {
    // SAFETY: a byte of the memory of the measurement.
    unsafe { (address as *mut u8).write_volatile(1) };
}

/// Stores to each page once; nanoseconds a page.
fn touch(start: u64, threads: usize, pages: u64) -> f64 {
    let (page, share) = (sys::page_size(), pages / threads as u64);
    let barrier = Barrier::new(threads);
    let times: Vec<_> = std::thread::scope(|scope| {
        let touching: Vec<_> = (0..threads as u64)
            .map(|thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let begun = Instant::now();
                    let first = thread * share;
                    (first..first + share).for_each(|each| store(start + each * page));
                    (begun, Instant::now())
                })
            })
            .collect();
        // A thread that stores has nothing to panic about.
        touching.into_iter().filter_map(|each| each.join().ok()).collect()
    });
    let begun = times.iter().map(|(begun, _)| begun).min();
    let ended = times.iter().map(|(_, ended)| ended).max();
    let spent = begun.zip(ended).map_or(0, |(begun, ended)| (*ended - *begun).as_nanos());
    spent as f64 / (share * threads as u64) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_come_to_an_end() {
        for name in ["ours", "bare", "kernel"] {
            for threads in [1, 2] {
                for looking in [false, true] {
                    match faults_ns(Handlers::from_name(name).unwrap(), threads, 64, looking) {
                        Ok(spent) => assert!(spent > 0.0),
                        Err(error) => assert_eq!(error.kind, Kind::NotSupported, "{error}"),
                    }
                }
            }
        }
        assert!(faults_ns(Handlers::Kernel, 0, 1, false).is_err());
        assert!(Handlers::from_name("nobody").is_err());
    }
}
