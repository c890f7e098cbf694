//! The system calls of direct mappings, each wrapped once: `msync`, advice on huge pages.
//!
//! Preconditions: Linux. Addresses and lengths are multiples of the page size of the mapping.
//!
//! What this does not do: decide anything, or touch a mapped byte.

use crate::error::{Error, Kind, Result};

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
        let mut error = Error::last_os("map", "madvise about huge pages");
        if error.source_errno == Some(libc::EINVAL) {
            error.kind = Kind::NotSupported;
        }
        return Err(error);
    }
    Ok(())
}
