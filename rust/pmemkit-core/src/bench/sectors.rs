//! Random sectors, one after the other, by one thread or several: our engine, libpmemblk, and the
//! least that any protocol of this kind has to do.
//!
//! Invariants:
//! 1. Every side runs the same loop, with the same offsets and hot buffers, over populated memory.
//! 2. The floor of a write is one copy around the cache and three times store, write-back, fence.
//!    That of a read is a copy of a random block into a hot buffer.
//!
//! What this does not do: set up the pool of ours (Python does), take turns, judge.

use std::ffi::{c_int, c_longlong, c_void, CString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use super::Library;
use crate::block::{Channel, Flags, Op, Request};
use crate::error::{Error, Kind, Result};
use crate::media::{memfd, set_length, FileOptions, Granularity, Mapped, Medium, Store};
use crate::sg::Sg;

/// Something with sectors that can be read and written from several threads.
pub trait Sectors: Send + Sync {
    /// How many there are.
    fn count(&self) -> u64;
    /// Bytes of one.
    fn size(&self) -> usize;
    /// Reads one into a buffer of that size.
    fn read(&self, sector: u64, target: &mut [u8]) -> Result<()>;
    /// Writes one, durable when this returns.
    fn write(&self, sector: u64, source: &[u8]) -> Result<()>;
}

/// Nanoseconds of one operation of one thread, while `threads` of them each do `iterations`.
pub fn sectors_ns(target: &dyn Sectors, op: Op, threads: usize, iterations: u64) -> Result<f64> {
    if threads == 0 || iterations == 0 || target.count() == 0 || !matches!(op, Op::Read | Op::Write)
    {
        let text = format!("{threads} threads, {iterations} times {}", op.name());
        return Err(Error::new(Kind::Invalid, "bench", text));
    }
    let barrier = Barrier::new(threads);
    let results: Vec<Result<f64>> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|number| {
                let barrier = &barrier;
                scope.spawn(move || one_thread(target, op, number as u64, iterations, barrier))
            })
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().expect("a loop that does not panic"))
            .collect()
    });
    let times = results.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(times.iter().sum::<f64>() / times.len() as f64)
}

fn one_thread(
    target: &dyn Sectors,
    op: Op,
    number: u64,
    iterations: u64,
    barrier: &Barrier,
) -> Result<f64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(number + 1);
    let count = target.count();
    let mut buffer = vec![0x5a ^ number as u8; target.size()];
    let mut run = |rounds: u64| -> Result<()> {
        for _ in 0..rounds {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let sector = ((u128::from(state) * u128::from(count)) >> 64) as u64;
            match op {
                Op::Read => target.read(sector, &mut buffer)?,
                _ => target.write(sector, &buffer)?,
            }
        }
        Ok(())
    };
    let warm = run(iterations / 20 + 1);
    barrier.wait();
    let start = Instant::now();
    let result = warm.and_then(|()| run(iterations));
    let spent = start.elapsed().as_nanos() as f64;
    result.map(|()| spent / iterations as f64)
}

/// A channel of a device of ours, used so many bytes at a time.
pub struct Ours(pub Channel, pub usize);

impl Sectors for Ours {
    fn count(&self) -> u64 {
        self.0.info().size / self.1 as u64
    }

    fn size(&self) -> usize {
        self.1
    }

    fn read(&self, sector: u64, target: &mut [u8]) -> Result<()> {
        let len = target.len() as u64;
        let mut sg = Sg::new();
        // SAFETY: the buffer outlives the request.
        unsafe { sg.push_host(target.as_mut_ptr(), len) };
        let at = sector * len;
        self.0.submit(&Request { op: Op::Read, at, len, flags: Flags::empty(), sg: &sg })
    }

    fn write(&self, sector: u64, source: &[u8]) -> Result<()> {
        let len = source.len() as u64;
        let mut sg = Sg::new();
        // SAFETY: the buffer outlives the request; a write does not store to it.
        unsafe { sg.push_host(source.as_ptr().cast_mut(), len) };
        let at = sector * len;
        self.0.submit(&Request { op: Op::Write, at, len, flags: Flags::empty(), sg: &sg })
    }
}

/// What no protocol with a log and a map can do without.
pub struct Floor {
    medium: Arc<dyn Medium>,
    size: usize,
    count: u64,
    map: u64,
}

impl Floor {
    /// Populated shared memory of `len` bytes, as the engines have it, written back by cache line.
    pub fn new(len: u64, size: usize) -> Result<Floor> {
        let file = memfd("pmemkit-floor", false)?;
        set_length(file.as_fd(), len)?;
        let medium = Mapped::file(file.as_fd(), len, FileOptions::new(Granularity::Cacheline))?;
        medium.zero(0, len)?;
        let count = len / (size as u64 + 8);
        if size < 64 || count == 0 {
            let text = format!("{len} bytes hold no sectors of {size}");
            return Err(Error::new(Kind::Invalid, "bench", text));
        }
        Ok(Floor { medium: Arc::new(medium), size, count, map: count * size as u64 })
    }
}

impl Sectors for Floor {
    fn count(&self) -> u64 {
        self.count
    }

    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, sector: u64, target: &mut [u8]) -> Result<()> {
        let len = target.len() as u64;
        // SAFETY: the target has these bytes.
        unsafe { self.medium.load(sector * len, target.as_mut_ptr(), len) }
    }

    fn write(&self, sector: u64, source: &[u8]) -> Result<()> {
        let len = source.len() as u64;
        // SAFETY: the source has these bytes.
        unsafe { self.medium.store(sector * len, source.as_ptr(), len, Store::NonTemporal)? };
        // Two words that stand for a log entry of this thread, one that stands for a map entry.
        let log = self.map + u64::from(source[0]) * 64;
        for (at, value) in [(log, sector), (log + 8, sector), (self.map + sector / 2 * 8, sector)] {
            self.medium.store_u64(at, value)?;
            self.medium.flush(at, 8)?;
            self.medium.fence();
        }
        Ok(())
    }
}

type Create = unsafe extern "C" fn(*const i8, usize, usize, u32) -> *mut c_void;
type Transfer = unsafe extern "C" fn(*mut c_void, *mut c_void, c_longlong) -> c_int;

/// A pool of PMDK's libpmemblk, the user-space BTT that came before.
pub struct Pmemblk {
    pool: *mut c_void,
    size: usize,
    count: u64,
    read: Transfer,
    write: Transfer,
    close: unsafe extern "C" fn(*mut c_void),
}

// SAFETY: the library locks what threads share; the pool is closed when this is dropped.
unsafe impl Send for Pmemblk {}
// SAFETY: as above.
unsafe impl Sync for Pmemblk {}

impl Pmemblk {
    /// Makes a pool in a new file and writes every block once.
    pub fn new(library: &str, path: &Path, size: usize, len: usize) -> Result<Pmemblk> {
        let library = Library::open(library)?;
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::new(Kind::Invalid, "bench", "a path with a zero byte"))?;
        // SAFETY: these are the types of those functions in libpmemblk 1.
        let (create, nblock, read, write, close) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Create>(library.symbol(c"pmemblk_create")?),
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> usize>(
                    library.symbol(c"pmemblk_nblock")?,
                ),
                std::mem::transmute::<*mut c_void, Transfer>(library.symbol(c"pmemblk_read")?),
                std::mem::transmute::<*mut c_void, Transfer>(library.symbol(c"pmemblk_write")?),
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(
                    library.symbol(c"pmemblk_close")?,
                ),
            )
        };
        // SAFETY: the name is a C string that the call does not keep.
        let pool = unsafe { create(name.as_ptr(), size, len, 0o600) };
        if pool.is_null() {
            let text = format!("libpmemblk makes no pool of {len} bytes at {}", path.display());
            return Err(Error::last_os("bench", text));
        }
        // SAFETY: the pool is open.
        let count = unsafe { nblock(pool) } as u64;
        let made = Pmemblk { pool, size, count, read, write, close };
        let block = vec![0x5a; size];
        (0..count).try_for_each(|number| made.write(number, &block))?;
        Ok(made)
    }

    fn done(status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        Err(Error::last_os("bench", "libpmemblk"))
    }
}

impl Drop for Pmemblk {
    fn drop(&mut self) {
        // SAFETY: the pool is open and nobody else has it.
        unsafe { (self.close)(self.pool) };
    }
}

impl Sectors for Pmemblk {
    fn count(&self) -> u64 {
        self.count
    }

    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, sector: u64, target: &mut [u8]) -> Result<()> {
        // SAFETY: the pool is open; a block has as many bytes as the buffer.
        Self::done(unsafe {
            (self.read)(self.pool, target.as_mut_ptr().cast(), sector as c_longlong)
        })
    }

    fn write(&self, sector: u64, source: &[u8]) -> Result<()> {
        let source = source.as_ptr().cast_mut().cast();
        // SAFETY: as for `read`; the library does not store to the source.
        Self::done(unsafe { (self.write)(self.pool, source, sector as c_longlong) })
    }
}
