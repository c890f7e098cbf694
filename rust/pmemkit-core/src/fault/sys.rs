//! The system calls of the fault handler, each wrapped once: userfaultfd and its ioctls, the memory
//! that faults, an event to wake threads by.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the page of the mapping they
//! belong to. A kernel that lacks something says so by an errno, which is passed on: what that
//! means is for the caller to say.
//!
//! What this does not do: decide anything, or touch a mapped byte.

use std::fs::OpenOptions;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use crate::error::{Error, Kind, Result};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const USERFAULTFD_IOC_NEW: libc::Ioctl = request(0, 0x00, 0);
const UFFDIO_API: libc::Ioctl = request(READ_WRITE, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = request(READ_WRITE, 0x00, size_of::<Register>());
const UFFDIO_WAKE: libc::Ioctl = request(READ, 0x02, size_of::<Range>());
const UFFDIO_COPY: libc::Ioctl = request(READ_WRITE, 0x03, size_of::<Copy>());
const UFFDIO_ZEROPAGE: libc::Ioctl = request(READ_WRITE, 0x04, size_of::<Resolve>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = request(READ_WRITE, 0x06, size_of::<Protect>());
const UFFDIO_CONTINUE: libc::Ioctl = request(READ_WRITE, 0x07, size_of::<Resolve>());
const UFFDIO_POISON: libc::Ioctl = request(READ_WRITE, 0x08, size_of::<Resolve>());

const MODE_DONTWAKE: u64 = 1;
const MODE_WP: u64 = 2;
const WRITEPROTECT_ON: u64 = 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;
const FLAG_WP: u64 = 2;
const FLAG_MINOR: u64 = 4;

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
    /// Pages that fail when they are touched.
    pub const POISON: u64 = 1 << 14;
}

/// The number of an ioctl of userfaultfd, as the kernel's macros make it.
const fn request(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | 0xaa << 8 | number) as libc::Ioctl
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

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

fn owned(fd: libc::c_long) -> Option<OwnedFd> {
    // SAFETY: a new descriptor that nobody else knows.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

impl Uffd {
    /// By the system call, which takes a capability for faults of the kernel.
    pub fn by_call(reach: Reach) -> Result<Uffd> {
        let only = if reach == Reach::User { UFFD_USER_MODE_ONLY } else { 0 };
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | only;
        // SAFETY: takes a number, returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        owned(fd).map(Uffd).ok_or_else(|| Error::last_os("fault", "userfaultfd"))
    }

    /// By the device, which its owner gives to whom they like.
    pub fn by_device() -> Result<Uffd> {
        const PATH: &str = "/dev/userfaultfd";
        let device = OpenOptions::new().read(true).write(true).open(PATH).map_err(|cause| {
            Error::from_errno("fault", cause.raw_os_error().unwrap_or(libc::EIO), PATH)
        })?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes numbers, returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        owned(fd.into()).map(Uffd).ok_or_else(|| Error::last_os("fault", PATH))
    }

    /// Shakes hands; gives the features that the kernel has. Once a descriptor.
    pub fn begin(&self, features: u64) -> Result<u64> {
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        self.ioctl(UFFDIO_API, &mut api).map_err(|errno| failed("UFFDIO_API", errno))?;
        Ok(api.features)
    }

    /// Watches a range.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> Result<()> {
        let mut what = Register { range: Range { start, len }, mode, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut what).map_err(|errno| failed("UFFDIO_REGISTER", errno))
    }

    /// Lets whoever waits for a page of the range look again.
    pub fn wake(&self, start: u64, len: u64) {
        // The range is one of the address space, which is all that is asked of it.
        let _woken = self.ioctl(UFFDIO_WAKE, &mut Range { start, len });
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

    /// Protects pages against writes, or lifts that and wakes who waits for it. `EAGAIN` while the
    /// address space is being changed is tried again.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> Result<()> {
        let mode = if on { WRITEPROTECT_ON } else { 0 };
        loop {
            match self
                .ioctl(UFFDIO_WRITEPROTECT, &mut Protect { range: Range { start, len }, mode })
            {
                Err(libc::EAGAIN) => std::thread::yield_now(),
                other => return other.map_err(|errno| failed("UFFDIO_WRITEPROTECT", errno)),
            }
        }
    }

    fn ioctl<T>(&self, number: libc::Ioctl, argument: &mut T) -> std::result::Result<(), i32> {
        // SAFETY: every caller pairs the request with the structure that the kernel expects. What
        // the kernel stores into memory goes into pages that were not there.
        let status = unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument as *mut T) };
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
            libc::read(self.0.as_raw_fd(), into, room)
        };
        match usize::try_from(got) {
            Ok(got) => Ok(got / size_of::<Message>()),
            Err(_) => Err(errno()),
        }
    }

    /// Waits for a message, or for the bell.
    pub fn wait(&self, bell: &OwnedFd) {
        let wanted =
            |fd: &OwnedFd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [wanted(&self.0), wanted(bell)];
        // SAFETY: two pollfds. Whatever it answers, the caller looks for itself.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
    }

    /// From now on [`Uffd::take`] waits: for a loop that knows no end.
    pub fn blocking(&self) -> Result<()> {
        // SAFETY: takes numbers.
        if unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, 0) } < 0 {
            return Err(Error::last_os("fault", "fcntl"));
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
fn failed(what: &str, errno: i32) -> Error {
    let mut error = Error::from_errno("fault", errno, what);
    if matches!(errno, libc::ENOSYS | libc::EINVAL | libc::ENOTTY | libc::EPERM) {
        error.kind = Kind::NotSupported;
    }
    error
}

/// A descriptor that [`Uffd::wait`] looks at.
pub fn bell() -> Result<OwnedFd> {
    // SAFETY: takes numbers, returns a new descriptor or -1.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    owned(fd.into()).ok_or_else(|| Error::last_os("fault", "eventfd"))
}

/// Wakes who waits for the bell, now and for good.
pub fn ring(bell: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of a local.
    unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

fn map_raw(at: *mut u8, len: u64, protection: i32, flags: i32, fd: i32) -> Result<*mut u8> {
    let Ok(bytes) = isize::try_from(len) else {
        let text = format!("{len} bytes are too many to map");
        return Err(Error::new(Kind::Invalid, "map", text));
    };
    // SAFETY: without MAP_FIXED the kernel finds a free place; who says MAP_FIXED owns the range.
    let base = unsafe { libc::mmap(at.cast(), bytes as usize, protection, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        let mut error = Error::last_os("map", format!("mmap of {len} bytes"));
        if error.source_errno == Some(libc::ENOMEM) {
            error.kind = Kind::NoSpace;
        }
        return Err(error);
    }
    Ok(base.cast())
}

/// What a range of addresses is made of.
#[derive(Clone, Copy)]
pub enum Ground<'a> {
    /// Memory of this process.
    Private,
    /// The same from the pool of huge pages.
    Huge,
    /// A file in shared memory.
    Shared(BorrowedFd<'a>),
}

/// Maps memory in which nothing is there yet, aligned to `align`, a power of two. A child of a fork
/// does not get it: there nobody would answer its faults.
pub fn map(ground: Ground<'_>, len: u64, align: u64, read_only: bool) -> Result<*mut u8> {
    let none = libc::PROT_NONE;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let whole = len.checked_add(align).ok_or_else(|| {
        Error::new(Kind::Invalid, "map", format!("{len} bytes are too many to map"))
    })?;
    let place = map_raw(null_mut(), whole, none, reserve, -1)?;
    let before = place.align_offset(align as usize) as u64;
    // SAFETY: what is cut off lies inside the reservation, around the part that is kept.
    let start = unsafe {
        let start = place.add(before as usize);
        if before > 0 {
            libc::munmap(place.cast(), before as usize);
        }
        libc::munmap(start.add(len as usize).cast(), (whole - before - len) as usize);
        start
    };
    let access = libc::PROT_READ | if read_only { 0 } else { libc::PROT_WRITE };
    let (flags, fd) = match ground {
        Ground::Private => (reserve, -1),
        // Reserved: short of them, the kernel says of every page that it is there already.
        Ground::Huge => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, -1),
        Ground::Shared(fd) => (libc::MAP_SHARED, fd.as_raw_fd()),
    };
    let made = map_raw(start, len, access, flags | libc::MAP_FIXED, fd);
    // SAFETY: the range is ours; a refusal leaves a child with pages of zeroes, and nothing else.
    unsafe {
        match &made {
            Ok(_) => libc::madvise(start.cast(), len as usize, libc::MADV_DONTFORK),
            Err(_) => libc::munmap(start.cast(), len as usize),
        };
    }
    made
}

/// Replaces a range with memory of this process in which nothing is there.
///
/// # Safety
/// The range is one of ours.
pub unsafe fn map_fresh(start: u64, len: u64, read_only: bool) -> Result<()> {
    let access = libc::PROT_READ | if read_only { 0 } else { libc::PROT_WRITE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    map_raw(start as *mut u8, len, access, flags, -1).map(|_| ())
}

/// Replaces a range with pages that a file does not have: each touch is a SIGBUS, a store too,
/// which in a mapping that cannot be written to would be a SIGSEGV.
///
/// # Safety
/// The range is one of ours. Whoever still touches it has a handler for that, or dies.
pub unsafe fn map_nothing(nothing: BorrowedFd<'_>, start: u64, len: u64) -> Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    map_raw(start as *mut u8, len, access, flags, nothing.as_raw_fd()).map(|_| ())
}

/// Replaces a range with another mapping of what a shared mapping has at `source`.
///
/// # Safety
/// The range is one of ours, and `source` begins as many mapped bytes.
pub unsafe fn map_again(source: *mut u8, start: u64, len: u64) -> Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: an old length of nothing leaves the old mapping alone; the new range is the caller's.
    let made = unsafe {
        let target = start as *mut libc::c_void;
        libc::mremap(source.cast(), 0, len as usize, flags, target)
    };
    if made == libc::MAP_FAILED {
        return Err(Error::last_os("map", format!("mremap of {len} bytes")));
    }
    // SAFETY: as above; the rest of the mapping stays out of children, and so does this.
    unsafe { libc::madvise(made, len as usize, libc::MADV_DONTFORK) };
    Ok(())
}

/// Takes pages out of a mapping: the next touch is a fault again.
///
/// # Safety
/// The range is one of ours, and its bytes may go.
pub unsafe fn forget(start: u64, len: u64) -> Result<()> {
    // SAFETY: the caller vouches for the range.
    let status = unsafe { libc::madvise(start as *mut _, len as usize, libc::MADV_DONTNEED) };
    if status < 0 {
        return Err(Error::last_os("fault", format!("madvise of {len} bytes")));
    }
    Ok(())
}

/// Undoes a mapping.
///
/// # Safety
/// The range is one of ours, and nobody uses it any more.
pub unsafe fn unmap(start: u64, len: u64) {
    // SAFETY: the caller vouches for it.
    unsafe { libc::munmap(start as *mut _, len as usize) };
}

/// Bytes of a page of a file in shared memory, and whether it is one of huge pages.
pub fn page_of(fd: BorrowedFd<'_>) -> Result<(u64, bool)> {
    const TMPFS_MAGIC: libc::c_long = 0x0102_1994;
    const HUGETLBFS_MAGIC: libc::c_long = 0x9584_58f6;
    let mut status = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: there is room for one statfs.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), status.as_mut_ptr()) } < 0 {
        return Err(Error::last_os("map", "fstatfs"));
    }
    // SAFETY: the call succeeded and filled it in.
    let status = unsafe { status.assume_init() };
    match status.f_type {
        TMPFS_MAGIC => Ok((page_size(), false)),
        HUGETLBFS_MAGIC => Ok((status.f_bsize as u64, true)),
        _ => {
            let text = "faults of files are handled in shared memory only: memfd, tmpfs, hugetlb";
            Err(Error::new(Kind::NotSupported, "map", text))
        }
    }
}

/// Bytes of a page of this machine.
pub fn page_size() -> u64 {
    // SAFETY: takes a number, returns a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}
