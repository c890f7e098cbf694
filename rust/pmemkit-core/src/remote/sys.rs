//! The system calls of remote regions: whole messages over a socket, with a limit to patience.
//!
//! Preconditions: descriptors are stream sockets; pointers are valid for their lengths, or part of
//! a mapping, where the kernel answers `EFAULT`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::nbd::sys::{self, Io};

/// Makes the socket a blocking one whose calls give up after `patience`; zero is endless.
pub fn prepare(fd: BorrowedFd<'_>, patience: Duration) -> Result<()> {
    sys::set_blocking(fd).map_err(|cause| {
        let errno = cause.raw_os_error().unwrap_or(libc::EBADF);
        Error::from_errno("remote", errno, "making the socket a blocking one")
    })?;
    let time = libc::timeval {
        tv_sec: patience.as_secs() as libc::time_t,
        tv_usec: libc::suseconds_t::from(patience.subsec_micros()),
    };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let len = std::mem::size_of::<libc::timeval>() as libc::socklen_t;
        // SAFETY: the value is a local of the length given.
        let set = unsafe {
            let value = std::ptr::addr_of!(time).cast();
            libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, len)
        };
        if set != 0 {
            return Err(Error::last_os("remote", "setting the patience of a socket"));
        }
    }
    Ok(())
}

fn failed(io: Io, what: &str) -> Error {
    match io {
        Io::WouldBlock => {
            Error::from_errno("remote", libc::ETIMEDOUT, format!("{what}: the peer is silent"))
        }
        Io::Fault => Error::new(Kind::Media, "remote", format!("{what}: the memory faulted")),
        Io::Failed(errno) => Error::from_errno("remote", errno, what),
        Io::Moved(_) => {
            Error::from_errno("remote", libc::ECONNRESET, format!("{what}: it is gone"))
        }
    }
}

/// Sends ranges, all of them.
///
/// # Safety
/// Each range must be valid for reads, or part of a mapping.
pub unsafe fn send(fd: BorrowedFd<'_>, parts: &[(*const u8, usize)]) -> Result<()> {
    let mut left: Vec<libc::iovec> =
        parts.iter().map(|&(at, len)| part(at.cast_mut(), len)).collect();
    while skip(&mut left, 0) {
        // SAFETY: the caller vouches for the ranges.
        match unsafe { sys::send(fd, &mut left) } {
            Io::Moved(moved) if moved > 0 => skip(&mut left, moved),
            io => return Err(failed(io, "sending to the peer")),
        };
    }
    Ok(())
}

/// Receives exactly `len` bytes. False where the stream ended before the first.
///
/// # Safety
/// `target` must be valid for writes of `len` bytes, or part of a mapping.
pub unsafe fn receive(fd: BorrowedFd<'_>, target: *mut u8, len: usize) -> Result<bool> {
    let mut left = vec![part(target, len)];
    while skip(&mut left, 0) {
        // SAFETY: the caller vouches for the range.
        match unsafe { sys::receive(fd, &mut left, true) } {
            Io::Moved(0) if left[0].iov_len == len => return Ok(false),
            Io::Moved(moved) if moved > 0 => skip(&mut left, moved),
            io => return Err(failed(io, "receiving from the peer")),
        };
    }
    Ok(true)
}

fn part(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast(), iov_len: len }
}

/// Drops `moved` bytes from the front; true while there are more.
fn skip(parts: &mut Vec<libc::iovec>, mut moved: usize) -> bool {
    while let Some(first) = parts.first_mut() {
        let step = moved.min(first.iov_len);
        first.iov_base = first.iov_base.wrapping_byte_add(step);
        first.iov_len -= step;
        moved -= step;
        if first.iov_len > 0 {
            return true;
        }
        parts.remove(0);
    }
    false
}

/// Ends both directions: whoever waits in a call of this socket returns.
pub fn shutdown(fd: BorrowedFd<'_>) {
    sys::shutdown(fd, true);
}
