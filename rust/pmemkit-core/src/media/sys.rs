//! The system calls of media, each wrapped once: mappings, files, holes.
//!
//! Preconditions: Linux. File descriptors are borrowed for the length of a call. Calls that a
//! signal interrupts are made again. Lengths and offsets are bytes; those that do not fit the
//! kernel's signed 64 bits are refused, not truncated.
//!
//! What this does not do: decide anything, or touch a mapped byte.

use std::ffi::CString;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use crate::error::{Error, Kind, Result};

const HUGETLBFS_MAGIC: libc::c_long = 0x9584_58f6;
const TMPFS_MAGIC: libc::c_long = 0x0102_1994;

/// `BLKGETSIZE64`, which the libc crate does not name: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// What a file descriptor is, as far as mapping it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file of a file system.
    Regular,
    /// A file of huge pages (a hugetlb memfd, a file on hugetlbfs).
    Hugetlb,
    /// A block device.
    Block,
    /// A device DAX.
    DeviceDax,
}

/// What `fstat` and friends say about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes.
    pub size: u64,
    /// Mappings start at and have a length of a multiple of this many bytes (a power of two).
    pub map_unit: u64,
    /// Holes are asked for in multiples of this many bytes (a power of two). Where the blocks of a
    /// file system are larger, it zeroes the rest by itself.
    pub hole_unit: u64,
}

/// Bytes of a page of this machine.
pub fn page_size() -> u64 {
    // SAFETY: takes a number, returns a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

/// Bytes of the default huge page, read from `/proc/meminfo`; 2 MiB where that does not say.
pub fn huge_page_size() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.filter(|kib| kib.is_power_of_two()).unwrap_or(2048) * 1024
}

/// Makes a call that answers -1 for failure until no signal interrupts it.
fn retry(op: &'static str, what: &str, mut call: impl FnMut() -> libc::c_int) -> Result<()> {
    loop {
        if call() != -1 {
            return Ok(());
        }
        let error = Error::last_os(op, what);
        if error.source_errno != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

fn signed(op: &'static str, value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| {
        Error::new(Kind::Invalid, op, format!("{value} is more than the kernel takes"))
    })
}

/// Another descriptor of the same open file, close-on-exec.
pub fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|cause| {
        let errno = cause.raw_os_error().unwrap_or(libc::EBADF);
        Error::from_errno("map", errno, format!("duplicating descriptor {}", fd.as_raw_fd()))
    })
}

/// The same file opened anew, with a position of its own, or another descriptor of the same open
/// file where that is refused.
pub fn reopen(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    match fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(file) => Ok(file.into()),
        Err(_) => duplicate(fd),
    }
}

/// What a descriptor is. Anything that cannot be media is refused.
pub fn inspect(fd: BorrowedFd<'_>) -> Result<FileInfo> {
    let status = stat(fd)?;
    let page = page_size();
    let block = u64::try_from(status.st_blksize).ok().filter(|size| size.is_power_of_two());
    let block = block.unwrap_or(page);
    match status.st_mode & libc::S_IFMT {
        libc::S_IFREG if is_hugetlb(fd)? => Ok(FileInfo {
            kind: FileKind::Hugetlb,
            size: status.st_size as u64,
            map_unit: block,
            hole_unit: block,
        }),
        libc::S_IFREG => Ok(FileInfo {
            kind: FileKind::Regular,
            size: status.st_size as u64,
            map_unit: page,
            hole_unit: page,
        }),
        libc::S_IFBLK => Ok(FileInfo {
            kind: FileKind::Block,
            size: block_device_size(fd)?,
            map_unit: page,
            hole_unit: page,
        }),
        libc::S_IFCHR => device_dax(status.st_rdev),
        mode => {
            let text = format!("a file of type {mode:#o} cannot be mapped as media");
            Err(Error::new(Kind::NotSupported, "map", text))
        }
    }
}

/// The length that a file has now.
pub fn size_bytes(fd: BorrowedFd<'_>, kind: FileKind) -> Result<u64> {
    match kind {
        FileKind::Regular | FileKind::Hugetlb => Ok(stat(fd)?.st_size as u64),
        FileKind::Block => block_device_size(fd),
        FileKind::DeviceDax => device_dax(stat(fd)?.st_rdev).map(|info| info.size),
    }
}

fn stat(fd: BorrowedFd<'_>) -> Result<libc::stat> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: there is room for one stat.
    let call = || unsafe { libc::fstat(fd.as_raw_fd(), status.as_mut_ptr()) };
    retry("map", "fstat", call)?;
    // SAFETY: the call succeeded and filled it in.
    Ok(unsafe { status.assume_init() })
}

fn is_hugetlb(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(file_system(fd)? == HUGETLBFS_MAGIC)
}

/// True for a file that has no media behind its page cache: a memfd, or one on tmpfs.
pub fn is_tmpfs(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(file_system(fd)? == TMPFS_MAGIC)
}

/// The magic number of the file system that a file is on.
fn file_system(fd: BorrowedFd<'_>) -> Result<libc::c_long> {
    let mut status = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: there is room for one statfs.
    let call = || unsafe { libc::fstatfs(fd.as_raw_fd(), status.as_mut_ptr()) };
    retry("map", "fstatfs", call)?;
    // SAFETY: the call succeeded and filled it in.
    Ok(unsafe { status.assume_init() }.f_type)
}

fn block_device_size(fd: BorrowedFd<'_>) -> Result<u64> {
    let mut size = 0u64;
    // SAFETY: this request stores one u64.
    let call = || unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &mut size) };
    retry("map", "BLKGETSIZE64", call)?;
    Ok(size)
}

/// A character device is media when sysfs gives it the attributes of a device DAX.
fn device_dax(device: libc::dev_t) -> Result<FileInfo> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let read = |name: &str| {
        let path = format!("/sys/dev/char/{major}:{minor}/{name}");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    match (read("size"), read("align")) {
        (Some(size), Some(align)) if align.is_power_of_two() => {
            Ok(FileInfo { kind: FileKind::DeviceDax, size, map_unit: align, hole_unit: align })
        }
        _ => {
            let text = format!("character device {major}:{minor} is not a device DAX");
            Err(Error::new(Kind::NotSupported, "map", text))
        }
    }
}

/// How [`map`] maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Shared with everyone who maps or reads the file.
    Shared,
    /// Shared, with the file system's promise that its metadata is durable (`MAP_SYNC`).
    Synchronous,
}

/// Maps a file. The mapping may reach past its end; touching it there is a SIGBUS.
pub fn map(
    fd: BorrowedFd<'_>,
    offset: u64,
    len: u64,
    read_only: bool,
    sharing: Sharing,
) -> Result<*mut u8> {
    let flags = match sharing {
        Sharing::Shared => libc::MAP_SHARED,
        Sharing::Synchronous => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
    };
    let write = if read_only { 0 } else { libc::PROT_WRITE };
    let offset = signed("map", offset)?;
    map_raw(fd.as_raw_fd(), offset, len, libc::PROT_READ | write, flags)
}

/// Maps private memory that belongs to no file.
pub fn map_anonymous(len: u64, hugetlb: bool) -> Result<*mut u8> {
    // Huge pages are reserved now: an empty pool is an error here and not a fault later.
    let reserve = if hugetlb { libc::MAP_HUGETLB } else { libc::MAP_NORESERVE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | reserve;
    let base = map_raw(-1, 0, len, libc::PROT_READ | libc::PROT_WRITE, flags)?;
    if !hugetlb {
        // Large entries make smaller page tables. Whether there are any is for the kernel to say.
        // SAFETY: the range was mapped just now.
        unsafe { libc::madvise(base.cast(), len as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(base)
}

/// Writes a range of a file, as often as it takes.
///
/// # Safety
/// `source` must be valid for reads of `len` bytes.
pub unsafe fn write(fd: BorrowedFd<'_>, offset: u64, source: *const u8, len: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        let at = signed("write", offset + done)?;
        // SAFETY: the rest of the source lies within what the caller vouches for.
        let moved = unsafe {
            let rest = source.add(done as usize);
            libc::pwrite(fd.as_raw_fd(), rest.cast(), (len - done) as usize, at)
        };
        match moved {
            0 => return Err(Error::from_errno("write", libc::ENOSPC, "pwrite of nothing")),
            1.. => done += moved as u64,
            _ if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => {
                let text = format!("pwrite of {} bytes", len - done);
                return Err(Error::last_os("write", text).at(offset + done));
            }
        }
    }
    Ok(())
}

fn map_raw(fd: i32, offset: i64, len: u64, protection: i32, flags: i32) -> Result<*mut u8> {
    let len = signed("map", len)? as usize;
    // SAFETY: a mapping at an address that the kernel chooses changes no memory in use.
    let base = unsafe { libc::mmap(null_mut(), len, protection, flags, fd, offset) };
    if base != libc::MAP_FAILED {
        return Ok(base.cast());
    }
    let mut error = Error::last_os("map", format!("mmap of {len} bytes"));
    if error.source_errno == Some(libc::ENOMEM) {
        error.kind = Kind::NoSpace;
    }
    Err(error)
}

/// Undoes a mapping.
///
/// # Safety
/// `base` and `len` must be a whole mapping of ours that nobody uses any more.
pub unsafe fn unmap(base: *mut u8, len: u64) {
    // SAFETY: the caller vouches for the range. Failure would mean that it was none of ours.
    let status = unsafe { libc::munmap(base.cast(), len as usize) };
    debug_assert_eq!(status, 0);
}

/// A new memfd, close-on-exec.
pub fn memfd(name: &str, hugetlb: bool) -> Result<OwnedFd> {
    let text = CString::new(name)
        .map_err(|_| Error::new(Kind::Invalid, "memfd", format!("{name:?} has a zero byte")))?;
    let huge = if hugetlb { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(text.as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(Error::last_os("memfd", format!("memfd_create of {name:?}")));
    }
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the length of a file.
pub fn set_length(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
    let end = signed("resize", len)?;
    // SAFETY: takes numbers.
    let call = || unsafe { libc::ftruncate(fd.as_raw_fd(), end) };
    retry("resize", &format!("ftruncate to {len} bytes"), call)
}

/// Waits until the data of a file and the metadata needed to find it are durable.
pub fn data_sync(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: takes a number.
    retry("sync", "fdatasync", || unsafe { libc::fdatasync(fd.as_raw_fd()) })
}

/// Waits until the pages of a mapping are durable.
pub fn map_sync(base: *mut u8, len: u64) -> Result<()> {
    // SAFETY: writes pages back; a range that is not mapped is an error, not a fault.
    let call = || unsafe { libc::msync(base.cast(), len as usize, libc::MS_SYNC) };
    retry("persist", &format!("msync of {len} bytes"), call)
}

/// Makes a hole that reads as zeroes without changing the length. False where the file system or
/// device cannot.
pub fn punch(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<bool> {
    let (start, length) = (signed("punch", at)?, signed("punch", len)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes numbers.
    let call = || unsafe { libc::fallocate(fd.as_raw_fd(), mode, start, length) };
    match retry("punch", &format!("fallocate of {len} bytes"), call) {
        Ok(()) => Ok(true),
        Err(error) => match error.source_errno {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => Ok(false),
            _ => Err(error.at(at)),
        },
    }
}

/// Gives whole pages of private memory back; they read as zeroes. False where that is not possible.
///
/// # Safety
/// The range must be private memory of ours whose bytes may go.
pub unsafe fn forget(base: *mut u8, len: u64) -> Result<bool> {
    // SAFETY: the caller vouches for the range.
    let call = || unsafe { libc::madvise(base.cast(), len as usize, libc::MADV_DONTNEED) };
    match retry("punch", &format!("madvise of {len} bytes"), call) {
        Ok(()) => Ok(true),
        Err(error) if error.source_errno == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What [`seek`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// The next byte that is allocated.
    Data,
    /// The next byte that is not.
    Hole,
}

/// The next data or hole at or after `at`; `None` where there is none before the end of the file.
/// Moves the position of the open file.
pub fn seek(fd: BorrowedFd<'_>, at: u64, sought: Sought) -> Result<Option<u64>> {
    let start = signed("extents", at)?;
    let whence = match sought {
        Sought::Data => libc::SEEK_DATA,
        Sought::Hole => libc::SEEK_HOLE,
    };
    // SAFETY: takes numbers.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), start, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = Error::last_os("extents", "lseek").at(at);
    match error.source_errno {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(error),
    }
}

/// Bytes that the file system of a file has left, or `None` where it has no limit of its own.
pub fn room_bytes(fd: BorrowedFd<'_>) -> Result<Option<u64>> {
    let mut status = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: there is room for one statvfs.
    let call = || unsafe { libc::fstatvfs(fd.as_raw_fd(), status.as_mut_ptr()) };
    retry("map", "fstatvfs", call)?;
    // SAFETY: the call succeeded and filled it in.
    let status = unsafe { status.assume_init() };
    let unlimited = status.f_blocks == 0;
    Ok((!unlimited).then(|| status.f_bavail.saturating_mul(status.f_frsize)))
}

/// True when a block device zeroes ranges by itself, as its queue says in sysfs.
pub fn block_device_punches(fd: BorrowedFd<'_>) -> Result<bool> {
    let device = stat(fd)?.st_rdev;
    let base = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let read = |middle: &str| {
        fs::read_to_string(format!("{base}/{middle}queue/write_zeroes_max_bytes")).ok()
    };
    // A partition has no queue of its own; its disk is one directory up.
    let text = read("").or_else(|| read("../"));
    Ok(text.and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|bytes| bytes > 0))
}
