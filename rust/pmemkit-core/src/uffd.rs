//! userfaultfd and what goes with it, each call wrapped once: messages of faults and the answers to
//! them, the scan of the page table for what was written, an event to wake threads by.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the page of what is mapped there;
//! who calls vouches that the range is mapped for as long as it is registered. What the kernel or
//! this kind of memory does not know is [`Kind::NotSupported`].
//!
//! What this does not do: decide anything, or touch a mapped byte.

use std::fs::{File, OpenOptions};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Kind, Result};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const USERFAULTFD_IOC_NEW: libc::Ioctl = request(0, UFFD_API, 0x00, 0);
const UFFDIO_API: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::Ioctl = request(READ, UFFD_API, 0x01, size_of::<Range>());
const UFFDIO_WAKE: libc::Ioctl = request(READ, UFFD_API, 0x02, size_of::<Range>());
const UFFDIO_COPY: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x03, size_of::<Copy>());
const UFFDIO_ZEROPAGE: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x04, size_of::<Resolve>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x06, size_of::<Protect>());
const UFFDIO_CONTINUE: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x07, size_of::<Resolve>());
const UFFDIO_POISON: libc::Ioctl = request(READ_WRITE, UFFD_API, 0x08, size_of::<Resolve>());

const PAGEMAP_SCAN: libc::Ioctl = request(READ_WRITE, 0x66, 16, size_of::<Scan>());

const MODE_DONTWAKE: u64 = 1;
const MODE_WP: u64 = 2;
const WRITEPROTECT_ON: u64 = 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;
const FLAG_WP: u64 = 2;
const FLAG_MINOR: u64 = 4;

const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;

/// What a range is registered for.
pub mod mode {
    /// Pages that are not there.
    pub const MISSING: u64 = 1;
    /// Writes to protected pages.
    pub const WP: u64 = 2;
    /// Pages that the page cache has and this mapping does not.
    pub const MINOR: u64 = 4;
}

/// What a kernel's userfaultfd can do.
pub mod feature {
    /// Write faults are told from others.
    pub const WP: u64 = 1;
    /// Missing faults of huge pages.
    pub const MISSING_HUGETLB: u64 = 1 << 4;
    /// Missing faults of shared memory.
    pub const MISSING_SHMEM: u64 = 1 << 5;
    /// Minor faults of huge pages.
    pub const MINOR_HUGETLB: u64 = 1 << 9;
    /// Minor faults of shared memory.
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// Write-protection of shared memory and huge pages.
    pub const WP_SHARED: u64 = 1 << 12;
    /// Write-protection of pages that are not there yet.
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// Pages that fail when they are touched.
    pub const POISON: u64 = 1 << 14;
    /// The kernel lifts the protection by itself; the page table keeps the trace.
    pub const WP_ASYNC: u64 = 1 << 15;
}

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

#[repr(C)]
struct Copy {
    target: u64,
    source: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// The argument of the ioctls that need no source.
#[repr(C)]
struct Resolve {
    range: Range,
    mode: u64,
    done: i64,
}

/// A message of userfaultfd, as far as page faults go.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

impl Message {
    /// The address that was touched; `None` for a message of another kind.
    pub fn address(&self) -> Option<u64> {
        (self.event == EVENT_PAGEFAULT).then_some(self.address)
    }

    /// True where it was a write.
    pub fn is_write(&self) -> bool {
        self.flags & FLAG_WRITE != 0
    }

    /// True for a write to a protected page.
    pub fn is_protected(&self) -> bool {
        self.flags & FLAG_WP != 0
    }

    /// True for a page that the page cache has.
    pub fn is_minor(&self) -> bool {
        self.flags & FLAG_MINOR != 0
    }
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

/// Whose faults a userfaultfd hears of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Those of the program and those of system calls that it hands addresses to.
    Kernel,
    /// Those of the program alone; a system call that meets a missing page fails with `EFAULT`.
    User,
}

/// How far a range was resolved by one call, and why it ended there.
pub struct Progress {
    /// Bytes from the start that are resolved.
    pub done: u64,
    /// The errno, or 0 where all of it is.
    pub errno: i32,
}

/// A userfaultfd, and for what it is there: the operation in the errors of its calls.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    op: &'static str,
}

fn owned(fd: libc::c_long) -> Option<OwnedFd> {
    // SAFETY: a new descriptor that nobody else knows.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

impl Uffd {
    /// One with as much reach as there is: by the call, by the device, by the call for faults of
    /// the program alone.
    pub fn open(op: &'static str) -> Result<(Uffd, Reach)> {
        match Uffd::by_call(op, Reach::Kernel).or_else(|_| Uffd::by_device(op)) {
            Ok(uffd) => Ok((uffd, Reach::Kernel)),
            Err(_) => Uffd::by_call(op, Reach::User).map(|uffd| (uffd, Reach::User)),
        }
    }

    /// By the system call, which takes a capability for faults of the kernel.
    pub fn by_call(op: &'static str, reach: Reach) -> Result<Uffd> {
        let only = if reach == Reach::User { UFFD_USER_MODE_ONLY } else { 0 };
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | only;
        // SAFETY: takes a number, returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = owned(fd).ok_or_else(|| failed(op, "userfaultfd", errno()))?;
        Ok(Uffd { fd, op })
    }

    /// By the device, which its owner gives to whom they like.
    pub fn by_device(op: &'static str) -> Result<Uffd> {
        const PATH: &str = "/dev/userfaultfd";
        let device = OpenOptions::new().read(true).write(true).open(PATH).map_err(|cause| {
            Error::from_errno(op, cause.raw_os_error().unwrap_or(libc::EIO), PATH)
        })?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes numbers, returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        let fd = owned(fd.into()).ok_or_else(|| failed(op, PATH, errno()))?;
        Ok(Uffd { fd, op })
    }

    /// Shakes hands; gives the features that the kernel has. Once a descriptor.
    pub fn begin(&self, features: u64) -> Result<u64> {
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        self.change(UFFDIO_API, &mut api, "UFFDIO_API")?;
        Ok(api.features)
    }

    /// Watches a range, for what [`mode`] says.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> Result<()> {
        let mut what = Register { range: Range { start, len }, mode, ioctls: 0 };
        self.change(UFFDIO_REGISTER, &mut what, "UFFDIO_REGISTER")
    }

    /// Ends that and lifts all protection; who waits goes on.
    pub fn unregister(&self, start: u64, len: u64) -> Result<()> {
        self.change(UFFDIO_UNREGISTER, &mut Range { start, len }, "UFFDIO_UNREGISTER")
    }

    /// Lets whoever waits for a page of the range look again.
    pub fn wake(&self, start: u64, len: u64) -> Result<()> {
        self.change(UFFDIO_WAKE, &mut Range { start, len }, "UFFDIO_WAKE")
    }

    /// Protects pages of a registered range against writes, or lifts that and wakes who waits.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> Result<()> {
        let mode = if on { WRITEPROTECT_ON } else { 0 };
        let mut what = Protect { range: Range { start, len }, mode };
        self.change(UFFDIO_WRITEPROTECT, &mut what, "UFFDIO_WRITEPROTECT")
    }

    /// A call that the kernel gives up with `EAGAIN` while the address space is being changed, as
    /// during a fork, and that is made again then.
    fn change<T>(&self, number: libc::Ioctl, argument: &mut T, name: &str) -> Result<()> {
        loop {
            match self.ioctl(number, argument) {
                Err(libc::EAGAIN | libc::EINTR) => std::thread::yield_now(),
                other => return other.map_err(|errno| failed(self.op, name, errno)),
            }
        }
    }

    /// Puts a copy of `len` bytes at `source` into pages that are not there, protected on wish.
    ///
    /// The kernel reads the source as it would for `write`: an address that cannot be read is
    /// `EFAULT`.
    pub fn copy(&self, target: u64, source: u64, len: u64, protect: bool, wake: bool) -> Progress {
        let mode = mode_of(protect, wake);
        let mut what = Copy { target, source, len, mode, done: 0 };
        let result = self.ioctl(UFFDIO_COPY, &mut what);
        progress(result, what.done, len)
    }

    /// Puts the page of zeroes into pages that are not there.
    pub fn zero(&self, start: u64, len: u64, wake: bool) -> Progress {
        self.resolve(UFFDIO_ZEROPAGE, start, len, mode_of(false, wake))
    }

    /// Maps what the page cache has.
    pub fn proceed(&self, start: u64, len: u64, protect: bool, wake: bool) -> Progress {
        self.resolve(UFFDIO_CONTINUE, start, len, mode_of(protect, wake))
    }

    /// Makes pages that are not there fail when they are touched.
    pub fn poison(&self, start: u64, len: u64) -> Progress {
        self.resolve(UFFDIO_POISON, start, len, 0)
    }

    fn resolve(&self, number: libc::Ioctl, start: u64, len: u64, mode: u64) -> Progress {
        let mut what = Resolve { range: Range { start, len }, mode, done: 0 };
        let result = self.ioctl(number, &mut what);
        progress(result, what.done, len)
    }

    fn ioctl<T>(&self, number: libc::Ioctl, argument: &mut T) -> std::result::Result<(), i32> {
        // SAFETY: every caller pairs the request with the structure that the kernel expects. What
        // the kernel stores into memory goes into pages that were not there.
        let status = unsafe { libc::ioctl(self.fd.as_raw_fd(), number, argument as *mut T) };
        if status < 0 {
            return Err(errno());
        }
        Ok(())
    }

    /// Takes what messages there are, without waiting: how many, or the errno.
    pub fn take(&self, messages: &mut [Message]) -> std::result::Result<usize, i32> {
        // SAFETY: the array has this many bytes, and any bytes make messages.
        let got = unsafe {
            let (into, room) = (messages.as_mut_ptr().cast(), size_of_val(messages));
            libc::read(self.fd.as_raw_fd(), into, room)
        };
        match usize::try_from(got) {
            Ok(got) => Ok(got / size_of::<Message>()),
            Err(_) => Err(errno()),
        }
    }

    /// Waits for a message, or for the bell; false once that was rung.
    pub fn wait(&self, bell: &OwnedFd) -> bool {
        let wanted =
            |fd: &OwnedFd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [wanted(&self.fd), wanted(bell)];
        // SAFETY: two pollfds. Whatever it answers, the caller looks for itself.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        fds[1].revents == 0
    }

    /// From now on [`Uffd::take`] waits: for a loop that knows no end.
    pub fn blocking(&self) -> Result<()> {
        // SAFETY: takes numbers.
        if unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETFL, 0) } < 0 {
            return Err(Error::last_os(self.op, "fcntl"));
        }
        Ok(())
    }
}

const fn mode_of(protect: bool, wake: bool) -> u64 {
    (if protect { MODE_WP } else { 0 }) | (if wake { 0 } else { MODE_DONTWAKE })
}

fn progress(result: std::result::Result<(), i32>, done: i64, len: u64) -> Progress {
    match result {
        Ok(()) => Progress { done: len, errno: 0 },
        Err(errno) => Progress { done: u64::try_from(done).unwrap_or(0), errno },
    }
}

/// A call that failed; what the kernel or this kind of memory does not know is
/// [`Kind::NotSupported`].
fn failed(op: &'static str, what: &str, errno: i32) -> Error {
    let mut error = Error::from_errno(op, errno, what);
    let unknown = [libc::ENOSYS, libc::EINVAL, libc::ENOTTY, libc::EPERM, libc::ENOENT];
    if unknown.contains(&errno) {
        error.kind = Kind::NotSupported;
    }
    error
}

/// A descriptor that [`Uffd::wait`] looks at.
pub fn bell(op: &'static str) -> Result<OwnedFd> {
    // SAFETY: takes numbers, returns a new descriptor or -1.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    owned(fd.into()).ok_or_else(|| Error::last_os(op, "eventfd"))
}

/// Wakes who waits for the bell, now and for good.
pub fn ring(bell: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of a local.
    unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// This process's page table, as a file.
pub fn page_table(op: &'static str) -> Result<File> {
    File::open("/proc/self/pagemap").map_err(|cause| {
        let errno = cause.raw_os_error().unwrap_or(libc::EIO);
        let mut error = Error::from_errno(op, errno, "/proc/self/pagemap");
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
        Err(_) => Err(failed("track", "PAGEMAP_SCAN", errno())),
    }
}
