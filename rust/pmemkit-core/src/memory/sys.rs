//! The system calls of pools, each wrapped once: reserved addresses, fixed mappings.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the unit of what is
//! mapped there; whoever calls checked it.
//!
//! What this does not do: decide anything, touch a mapped byte.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;

use crate::error::{Error, Kind, Result};

/// The last failed call on mappings. Where the kernel had no room for one more, says so.
fn failed(op: &'static str, what: String) -> Error {
    explained(Error::last_os(op, what))
}

/// A failed call on mappings, with the limit it met where it met one.
pub fn explained(error: Error) -> Error {
    let op = error.op;
    // madvise says EAGAIN where others say ENOMEM.
    if !matches!(error.source_errno, Some(libc::ENOMEM | libc::EAGAIN)) {
        return error;
    }
    let (used, limit) = mapping_counts();
    // A failing call needs up to two mappings more than there are, and the kernel keeps a few.
    if used + 8 >= limit {
        let text = format!(
            "the mapping-count limit is reached: {used} mappings, vm.max_map_count is {limit} ({})",
            error.detail
        );
        let mut limited = Error::new(Kind::NoSpace, op, text);
        limited.source_errno = Some(libc::ENOMEM);
        return limited;
    }
    let mut short = error;
    if short.source_errno == Some(libc::ENOMEM) {
        short.kind = Kind::NoSpace;
    }
    short
}

/// How many mappings this process has, and how many it may have.
pub fn mapping_counts() -> (u64, u64) {
    // In pieces: where no mapping is left, there is no large buffer to be had either.
    let mut piece = [0u8; 4096];
    let mut used = 0;
    if let Ok(mut maps) = fs::File::open("/proc/self/maps") {
        while let Ok(count @ 1..) = maps.read(&mut piece) {
            used += piece[..count].iter().filter(|&&byte| byte == b'\n').count() as u64;
        }
    }
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    (used, limit.trim().parse().unwrap_or(65530))
}

/// Reserves addresses that nobody may touch; the start is a multiple of `align`, a power of two.
pub fn reserve(len: u64, align: u64) -> Result<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let whole = len.checked_add(align).ok_or_else(|| {
        Error::new(Kind::OutOfRange, "reserve", format!("{len} bytes of addresses are too many"))
    })?;
    // SAFETY: a mapping at an address that the kernel chooses changes no memory in use.
    let base =
        unsafe { libc::mmap(null_mut(), whole as usize, libc::PROT_NONE, flags, -1, 0) } as u64;
    if base == libc::MAP_FAILED as u64 {
        return Err(failed("reserve", format!("mmap of {len} bytes of addresses")));
    }
    let start = base.next_multiple_of(align);
    // SAFETY: both ends were mapped just now and are not handed out.
    unsafe {
        if start > base {
            unmap(base, start - base);
        }
        if start + len < base + whole {
            unmap(start + len, base + whole - start - len);
        }
    }
    Ok(start)
}

/// Maps a range of a file over addresses that are ours, readable and writable.
///
/// # Safety
/// The range must lie in a reservation of the caller, and nobody may rely on what was mapped there.
pub unsafe fn map_over(at: u64, len: u64, fd: BorrowedFd<'_>, offset: u64) -> Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let offset = i64::try_from(offset).map_err(|_| {
        Error::new(Kind::OutOfRange, "map", format!("offset {offset} is more than a file has"))
    })?;
    // SAFETY: the caller vouches for the range.
    let got =
        unsafe { libc::mmap(at as *mut _, len as usize, access, flags, fd.as_raw_fd(), offset) };
    if got == libc::MAP_FAILED {
        return Err(failed("map", format!("mmap of {len} bytes at file offset {offset}")));
    }
    Ok(())
}

/// Makes a range a mere reservation again.
///
/// # Safety
/// As for [`map_over`].
pub unsafe fn map_nothing(at: u64, len: u64) -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the caller vouches for the range.
    let got = unsafe { libc::mmap(at as *mut _, len as usize, libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED {
        return Err(failed("unmap", format!("mmap of {len} bytes of nothing")));
    }
    Ok(())
}

/// True where the kernel has every page of a mapping in memory already, mapped or not.
pub fn is_resident(at: u64, len: u64) -> Result<bool> {
    let page = 4096;
    let mut pages = [0u8; 512];
    let mut done = 0;
    while done < len {
        let part = (len - done).min(pages.len() as u64 * page);
        // SAFETY: there is a byte for every page of this part.
        let status =
            unsafe { libc::mincore((at + done) as *mut _, part as usize, pages.as_mut_ptr()) };
        if status != 0 {
            return Err(failed("migrate", format!("mincore of {part} bytes")));
        }
        if pages[..part.div_ceil(page) as usize].iter().any(|byte| byte & 1 == 0) {
            return Ok(false);
        }
        done += part;
    }
    Ok(true)
}

/// False where the kernel gives shared memory no large pages, whatever is asked for.
pub fn large_pages_possible() -> bool {
    static POSSIBLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *POSSIBLE.get_or_init(|| {
        let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        let text = fs::read_to_string(path).unwrap_or_default();
        !text.contains("[never]") && !text.contains("[deny]")
    })
}

/// Gives addresses back.
///
/// # Safety
/// The range must be the caller's and nobody may use it any more.
pub unsafe fn unmap(at: u64, len: u64) {
    // SAFETY: the caller vouches for the range.
    unsafe { libc::munmap(at as *mut _, len as usize) };
}

fn advise(op: &'static str, at: u64, len: u64, advice: libc::c_int, what: &str) -> Result<()> {
    loop {
        // SAFETY: none of the advices used here changes a byte of a shared mapping.
        if unsafe { libc::madvise(at as *mut _, len as usize, advice) } == 0 {
            return Ok(());
        }
        let error = failed(op, format!("{what} of {len} bytes"));
        if error.source_errno != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

/// Makes the pages of a mapping present and writable, so that nobody faults on them later. A range
/// whose file has no room or no longer reaches there is an error and not a signal.
pub fn populate_write(at: u64, len: u64) -> Result<()> {
    advise("populate", at, len, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE")
}

/// As [`populate_write`], for reading.
pub fn populate_read(at: u64, len: u64) -> Result<()> {
    advise("populate", at, len, libc::MADV_POPULATE_READ, "MADV_POPULATE_READ")
}

/// Takes a range out of this process's page table; its pages stay, and each is mapped again when it
/// is next touched. Only for shared mappings: private ones would lose their bytes.
///
/// # Safety
/// What is mapped in the range must be shared, or nothing.
pub unsafe fn unmap_pages(at: u64, len: u64) -> Result<()> {
    advise("sample", at, len, libc::MADV_DONTNEED, "MADV_DONTNEED")
}

/// Asks for large pages. Whether there are any is for the kernel to say.
pub fn advise_large_pages(at: u64, len: u64) {
    let _ = advise("map", at, len, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE");
}

/// Keeps a mapping out of forked children.
pub fn keep_from_children(at: u64, len: u64) -> Result<()> {
    advise("map", at, len, libc::MADV_DONTFORK, "MADV_DONTFORK")
}

/// Undoes [`keep_from_children`].
pub fn show_to_children(at: u64, len: u64) -> Result<()> {
    advise("map", at, len, libc::MADV_DOFORK, "MADV_DOFORK")
}

/// Forbids or allows stores to a range.
///
/// # Safety
/// The range must be a readable mapping of the caller.
pub unsafe fn set_writable(at: u64, len: u64, writable: bool) -> Result<()> {
    let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: the caller vouches for the range.
    if unsafe { libc::mprotect(at as *mut _, len as usize, access) } != 0 {
        return Err(failed("migrate", format!("mprotect of {len} bytes")));
    }
    Ok(())
}

/// What tells a file from every other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
}

/// Which file this is; two names of one device have one identity.
pub fn identity(fd: BorrowedFd<'_>) -> Result<FileIdentity> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: there is room for one stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), status.as_mut_ptr()) } != 0 {
        return Err(Error::last_os("add", "fstat"));
    }
    // SAFETY: the call succeeded and filled it in.
    let status = unsafe { status.assume_init() };
    let (device, inode) = match status.st_mode & libc::S_IFMT {
        libc::S_IFCHR | libc::S_IFBLK => (u64::MAX, status.st_rdev),
        _ => (status.st_dev, status.st_ino),
    };
    Ok(FileIdentity { device, inode })
}

/// The number of this process.
pub fn process_id() -> u32 {
    // SAFETY: takes nothing, returns a number.
    unsafe { libc::getpid() as u32 }
}

/// Has `before` called in this process before every fork of it.
pub fn before_fork(before: extern "C" fn()) {
    // SAFETY: the function lives as long as the program and is async-signal-safe.
    unsafe { libc::pthread_atfork(Some(before), None, None) };
}
