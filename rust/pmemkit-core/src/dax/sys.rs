//! The system calls of direct mappings, each wrapped once: userfaultfd, the scan of the page table,
//! `msync`, advice on huge pages.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the page size of the mapping; who
//! calls vouches that the range is mapped for as long as it is registered. What a kernel cannot do
//! is [`Kind::NotSupported`].
//!
//! What this does not do: decide anything, or touch a mapped byte.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Kind, Result};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFDIO_API: libc::Ioctl = request(READ_WRITE, 0xaa, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = request(READ_WRITE, 0xaa, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::Ioctl = request(READ, 0xaa, 0x01, size_of::<Range>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = request(READ_WRITE, 0xaa, 0x06, size_of::<Protect>());
const PAGEMAP_SCAN: libc::Ioctl = request(READ_WRITE, 0x66, 16, size_of::<Scan>());

const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;
const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WP: u64 = 2;

const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;

/// Features of userfaultfd that the kernel must have.
pub const FEATURE_WP: u64 = 1;
/// Write-protection of shared memory and huge pages.
pub const FEATURE_WP_SHARED: u64 = 1 << 12;
/// Write-protection of pages that are not there yet.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel lifts the protection by itself; the page table keeps the trace.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// The number of an ioctl, as the kernel's macros make it.
const fn request(direction: u64, kind: u64, number: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | kind << 8 | number) as libc::Ioctl
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Protect {
    range: Range,
    mode: u64,
}

/// A message of userfaultfd, as far as page faults go.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// A run of pages that [`scan`] found.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The address of the first page.
    pub start: u64,
    /// The address behind the last one.
    pub end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_len: u64,
    pages_most: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A failed call; what the kernel or this kind of memory does not know is [`Kind::NotSupported`].
fn failed(op: &'static str, what: &str) -> Error {
    let mut error = Error::last_os(op, what);
    let unknown = [libc::ENOSYS, libc::EINVAL, libc::ENOTTY, libc::EPERM, libc::ENOENT];
    if error.source_errno.is_some_and(|errno| unknown.contains(&errno)) {
        error.kind = Kind::NotSupported;
    }
    error
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// A userfaultfd with these features; for faults of user mode only where the system allows no
    /// more than that.
    pub fn new(features: u64) -> Result<Uffd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let open = |flags: libc::c_int| {
            // SAFETY: takes a number, returns a new descriptor or -1.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            // SAFETY: a new descriptor that nobody else knows.
            (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
        };
        let fd = open(flags).or_else(|| open(flags | UFFD_USER_MODE_ONLY));
        let uffd = Uffd(fd.ok_or_else(|| failed("track", "userfaultfd"))?);
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        uffd.ioctl(UFFDIO_API, &mut api, "UFFDIO_API")?;
        Ok(uffd)
    }

    /// Watches writes to a range.
    pub fn register(&self, start: u64, len: u64) -> Result<()> {
        let mut what = Register { range: Range { start, len }, mode: MODE_WP, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut what, "UFFDIO_REGISTER")
    }

    /// Ends that; what waits goes on.
    pub fn unregister(&self, start: u64, len: u64) -> Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut Range { start, len }, "UFFDIO_UNREGISTER")
    }

    /// Write-protects a registered range.
    pub fn protect(&self, start: u64, len: u64) -> Result<()> {
        let mode = WRITEPROTECT_MODE_WP;
        self.change(Protect { range: Range { start, len }, mode })
    }

    /// Lifts the protection; whoever waits goes on.
    pub fn unprotect(&self, start: u64, len: u64) -> Result<()> {
        self.change(Protect { range: Range { start, len }, mode: 0 })
    }

    /// The kernel gives up with `EAGAIN` while the address space is being changed.
    fn change(&self, mut what: Protect) -> Result<()> {
        debug_assert!(what.mode & WRITEPROTECT_MODE_DONTWAKE == 0);
        loop {
            match self.ioctl(UFFDIO_WRITEPROTECT, &mut what, "UFFDIO_WRITEPROTECT") {
                Err(error) if error.source_errno == Some(libc::EAGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    fn ioctl<T>(&self, number: libc::Ioctl, argument: &mut T, name: &str) -> Result<()> {
        // SAFETY: every caller pairs the request with the structure that the kernel expects.
        let status = unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument as *mut T) };
        if status < 0 {
            return Err(failed("track", name));
        }
        Ok(())
    }

    /// Waits for a write to a protected page or for the end: calls `fault` with each address.
    /// False once somebody wrote to `stop`.
    pub fn wait(&self, stop: &OwnedFd, mut fault: impl FnMut(u64)) -> bool {
        let wanted =
            |fd: &OwnedFd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [wanted(&self.0), wanted(stop)];
        // SAFETY: two pollfds.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        let mut messages = [Message::default(); 16];
        // SAFETY: the array has this many bytes, and any bytes make messages.
        let got = unsafe {
            let (into, room) = (messages.as_mut_ptr().cast(), size_of_val(&messages));
            libc::read(self.0.as_raw_fd(), into, room)
        };
        let count = usize::try_from(got).unwrap_or(0) / size_of::<Message>();
        for message in &messages[..count] {
            if message.event == EVENT_PAGEFAULT && message.flags & PAGEFAULT_FLAG_WP != 0 {
                fault(message.address);
            }
        }
        fds[1].revents == 0
    }
}

/// A descriptor that [`Uffd::wait`] looks at; [`ring`] ends the waiting.
pub fn bell() -> Result<OwnedFd> {
    // SAFETY: takes numbers, returns a new descriptor or -1.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(Error::last_os("track", "eventfd"));
    }
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends the waiting for good.
pub fn ring(bell: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of a local.
    unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// This process's page table, as a file.
pub fn page_table() -> Result<File> {
    File::open("/proc/self/pagemap").map_err(|cause| {
        let errno = cause.raw_os_error().unwrap_or(libc::EIO);
        let mut error = Error::from_errno("track", errno, "/proc/self/pagemap");
        error.kind = Kind::NotSupported;
        error
    })
}

/// Finds pages that were written since they were last found, and write-protects them, each in one
/// step. Returns how many runs it put into `runs` and the address at which to go on.
pub fn scan(table: &File, start: u64, end: u64, runs: &mut [Run]) -> Result<(usize, u64)> {
    let mut what = Scan {
        size: size_of::<Scan>() as u64,
        flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        start,
        end,
        runs: runs.as_mut_ptr() as u64,
        runs_len: runs.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..Scan::default()
    };
    // SAFETY: the kernel writes at most `runs_len` runs, and reads and writes one Scan.
    let found = unsafe { libc::ioctl(table.as_raw_fd(), PAGEMAP_SCAN, &mut what as *mut Scan) };
    match usize::try_from(found) {
        Ok(found) => Ok((found.min(runs.len()), what.walk_end)),
        Err(_) => Err(failed("track", "PAGEMAP_SCAN")),
    }
}

/// Asks the kernel to make what was stored to a range of a mapping durable.
///
/// # Safety
/// The range must be mapped.
pub unsafe fn kernel_sync(start: *mut u8, len: u64) -> Result<()> {
    // SAFETY: the caller vouches for the range.
    let status = unsafe { libc::msync(start.cast(), len as usize, libc::MS_SYNC) };
    if status < 0 {
        return Err(Error::last_os("sync", format!("msync of {len} bytes")));
    }
    Ok(())
}

/// Says whether huge pages are wanted.
///
/// # Safety
/// The range must be mapped.
pub unsafe fn advise_huge(start: *mut u8, len: u64, wanted: bool) -> Result<()> {
    let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the caller vouches for the range.
    let status = unsafe { libc::madvise(start.cast(), len as usize, advice) };
    if status < 0 {
        return Err(failed("map", "madvise about huge pages"));
    }
    Ok(())
}
