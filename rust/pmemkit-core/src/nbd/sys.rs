//! The system calls of the NBD server, and nothing else.
//!
//! Preconditions: descriptors are open stream sockets; pointers are valid for their lengths, or
//! belong to a mapping, where the kernel answers `EFAULT` instead of faulting us.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// What a receive or send came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// That many bytes moved; 0 from a receive is the end of the stream.
    Moved(usize),
    /// Nothing to be had without waiting.
    WouldBlock,
    /// The memory is not there (a truncated mapping).
    Fault,
    /// The connection is gone or the call failed, with this errno.
    Failed(i32),
}

fn outcome(result: isize) -> Option<Io> {
    if let Ok(moved) = usize::try_from(result) {
        return Some(Io::Moved(moved));
    }
    match std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
        libc::EINTR => None,
        libc::EAGAIN => Some(Io::WouldBlock),
        libc::EFAULT => Some(Io::Fault),
        errno => Some(Io::Failed(errno)),
    }
}

/// Receives into a list of ranges.
///
/// # Safety
/// Each range must be valid for writes, or part of a mapping.
pub unsafe fn receive(fd: BorrowedFd<'_>, parts: &mut [libc::iovec], wait: bool) -> Io {
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
    loop {
        // SAFETY: the header points at `parts`; the caller vouches for the ranges.
        let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, flags) };
        if let Some(io) = outcome(result) {
            return io;
        }
    }
}

/// Sends a list of ranges, waiting for room.
///
/// # Safety
/// Each range must be valid for reads, or part of a mapping.
pub unsafe fn send(fd: BorrowedFd<'_>, parts: &mut [libc::iovec]) -> Io {
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    loop {
        // SAFETY: the header points at `parts`; the caller vouches for the ranges.
        let result = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        if let Some(io) = outcome(result) {
            return io;
        }
    }
}

/// Ends the receiving side (what was received can still be read), or both sides at once.
pub fn shutdown(fd: BorrowedFd<'_>, both: bool) {
    let how = if both { libc::SHUT_RDWR } else { libc::SHUT_RD };
    // SAFETY: the descriptor is open. A peer that is gone already makes this fail, harmlessly.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
}

/// Duplicates a descriptor, close-on-exec.
pub fn duplicate(fd: BorrowedFd<'_>) -> std::io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}

/// Makes the socket blocking: the transmission waits in `recvmsg` and `sendmsg`.
pub fn set_blocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    // SAFETY: plain fcntl on an open descriptor.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: as above.
    let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) };
    if set < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock ids used here exist on every Linux, and the target is a local.
    unsafe { libc::clock_gettime(id, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Nanoseconds of a clock that only goes forward.
pub fn now_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// CPU nanoseconds of the calling thread, user and system.
pub fn thread_cpu_ns() -> u64 {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Lets whoever else wants this CPU run: it may be the client we are waiting for.
pub fn pause_between_polls() {
    // SAFETY: no arguments, no memory; it cannot fail on Linux.
    unsafe { libc::sched_yield() };
}

/// Asks for a send buffer of `size` bytes on a Unix socket, past the system's limit where we may.
/// A TCP socket sizes its own buffers better than we could.
pub fn widen_send_buffer(fd: BorrowedFd<'_>, size: libc::c_int) {
    let len = std::mem::size_of::<libc::c_int>() as libc::socklen_t;
    let mut domain: libc::c_int = 0;
    let mut domain_len = len;
    // SAFETY: both targets are locals of the length given.
    let got = unsafe {
        let domain = std::ptr::addr_of_mut!(domain).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN, domain, &mut domain_len)
    };
    if got != 0 || domain != libc::AF_UNIX {
        return;
    }
    for option in [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF] {
        let value = std::ptr::addr_of!(size).cast();
        // SAFETY: the value is a local of the length given. A refusal leaves the socket as it was.
        if unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, len) } == 0 {
            return;
        }
    }
}
