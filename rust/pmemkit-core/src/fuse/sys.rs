//! The system calls of the FUSE server, and nothing else.
//!
//! Preconditions: none; a kernel or a user that may not say no.

/// Marks this thread, and those it starts, as one that others' write-back waits for: memory it asks
/// for is not won by write-back that would wait for it. A kernel before 5.6 has no such mark.
pub fn allocate_without_write_back() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: plain numbers; a refusal leaves the thread as it was.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}
