//! Memory for slots, asked from the kernel a chunk at a time and given back whole.
//!
//! Preconditions: Linux. Lengths are multiples of the page; a failure is an answer, not an error:
//! a cache without memory is a smaller cache.
//!
//! What this does not do: decide how much.

use std::ptr::null_mut;

/// Bytes that the kernel can map at once where a chunk begins at a multiple of them.
pub const HUGE: usize = 2 << 20;

/// Maps `len` bytes, aligned to [`HUGE`] when they are as many; `None` when there are none.
pub fn map(len: usize) -> Option<*mut u8> {
    let slack = if len >= HUGE { HUGE } else { 0 };
    let whole = len.checked_add(slack)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let base = unsafe { libc::mmap(null_mut(), whole, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base = base.cast::<u8>();
    let before = if slack == 0 { 0 } else { base.align_offset(HUGE) };
    // SAFETY: `before + len` stays inside the mapping: what is cut off lies around the part that
    // is kept, and nobody has it yet.
    unsafe {
        if before > 0 {
            libc::munmap(base.cast(), before);
        }
        let start = base.add(before);
        if slack > before {
            libc::munmap(start.add(len).cast(), slack - before);
        }
        if slack > 0 {
            // Fewer, larger entries of the page tables. Without it all works the same.
            libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
        }
        Some(start)
    }
}

/// Gives a mapping back.
///
/// # Safety
/// `start` and `len` are those of one [`map`], and nobody uses the bytes any more.
pub unsafe fn unmap(start: *mut u8, len: usize) {
    // SAFETY: the caller vouches for it.
    unsafe { libc::munmap(start.cast(), len) };
}
