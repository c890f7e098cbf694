//! The system calls of the fault handler, each wrapped once: the memory that faults.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the page of the mapping they
//! belong to. A kernel that lacks something says so by an errno, which is passed on: what that
//! means is for the caller to say.
//!
//! What this does not do: decide anything, or touch a mapped byte.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;

use crate::error::{Error, Kind, Result};

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
