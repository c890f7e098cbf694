//! The system calls of direct I/O, each wrapped once.
//!
//! Preconditions: Linux. Descriptors are borrowed for the length of a call; memory that the kernel
//! reads or fills is valid for its length, or part of a mapping, where it answers `EFAULT`.

use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::Way;

/// `cachestat`, which has this number on every architecture with the generic table and on x86-64.
const SYS_CACHESTAT: libc::c_long = 451;

/// What `cachestat` fills in. Pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    written_back: u64,
    evicted: u64,
    evicted_lately: u64,
}

#[repr(C)]
struct CacheRange {
    at: u64,
    len: u64,
}

/// The same file opened anew, with locks of its own: around the page cache where `direct`.
pub fn reopen(fd: BorrowedFd<'_>, way: Way, direct: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let flags = if direct { libc::O_DIRECT } else { 0 };
    options.read(true).write(way == Way::Out).custom_flags(flags);
    options.open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// What addresses, and offsets and lengths, must be multiples of for direct I/O. `None` where the
/// kernel does not say; zeroes where it says that there is no direct I/O.
pub fn alignment(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: there is room for one statx, and the empty path is a C string.
    let done = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    // SAFETY: it was zeroed, and zeroes are a valid statx.
    let status = unsafe { status.assume_init() };
    let said = done == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0;
    said.then_some((status.stx_dio_mem_align, status.stx_dio_offset_align))
}

/// Bytes of a range that the page cache has, as far as whole pages go. `None` on a kernel that
/// cannot tell.
pub fn cached_bytes(fd: BorrowedFd<'_>, at: u64, len: u64, page: u64) -> Option<u64> {
    let (range, mut found) = (CacheRange { at, len }, CacheStat::default());
    // SAFETY: both structures are as the kernel declares them.
    let done = unsafe {
        let range: *const CacheRange = &range;
        let found: *mut CacheStat = &mut found;
        libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range, found, 0u32)
    };
    (done == 0).then(|| found.cached.saturating_mul(page))
}

/// Reads or writes once at an offset: bytes moved, or minus the errno.
///
/// # Safety
/// `memory` must be valid for `len` bytes, or part of a mapping.
pub unsafe fn move_once(fd: BorrowedFd<'_>, way: Way, memory: *mut u8, len: usize, at: u64) -> i64 {
    let Ok(offset) = i64::try_from(at) else { return -i64::from(libc::EINVAL) };
    // SAFETY: the caller vouches for the memory.
    let moved = unsafe {
        match way {
            Way::In => libc::pread(fd.as_raw_fd(), memory.cast(), len, offset),
            Way::Out => libc::pwrite(fd.as_raw_fd(), memory.cast(), len, offset),
        }
    };
    if moved >= 0 {
        return moved as i64;
    }
    -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}
