//! The one error type of the core: a stable kind, the context, and a sentence with the numbers.
//!
//! Invariants:
//! 1. A new cause does not add a kind. Kinds are what a caller can act on; causes go into `detail`.
//! 2. Every kind has a class in `pmemkit.errors` (a test compares [`Kind::ALL`] with the classes).
//! 3. Whatever was read from media, wire or caller and is wrong becomes an `Error`, never a panic.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An argument is not acceptable: a flag, a size, a combination.
    Invalid,
    /// The range ends past the end of the device or wraps around 2^64.
    OutOfRange,
    /// The device, layer or backing cannot do this at all.
    NotSupported,
    /// A write to a device that was opened read-only.
    ReadOnly,
    /// The backing has no room for this data.
    NoSpace,
    /// The media failed: poison, an I/O error, a failed write-back.
    Media,
    /// The backing file became shorter than the mapping.
    Truncated,
    /// What is on media breaks its format: a signature, a checksum, a value.
    Corrupt,
    /// An earlier write or flush failed and the device is read-only until it is reopened.
    Latched,
    /// Use after close.
    Closed,
    /// Something else holds what is needed.
    Busy,
    /// The other side of a connection broke the protocol.
    Protocol,
    /// A system call failed for a reason of its own; `errno` tells which.
    System,
}

impl Kind {
    /// Every kind, in declaration order.
    pub const ALL: [Kind; 13] = [
        Kind::Invalid,
        Kind::OutOfRange,
        Kind::NotSupported,
        Kind::ReadOnly,
        Kind::NoSpace,
        Kind::Media,
        Kind::Truncated,
        Kind::Corrupt,
        Kind::Latched,
        Kind::Closed,
        Kind::Busy,
        Kind::Protocol,
        Kind::System,
    ];

    /// The name that the Python side maps to a class.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Invalid => "invalid",
            Kind::OutOfRange => "out_of_range",
            Kind::NotSupported => "not_supported",
            Kind::ReadOnly => "read_only",
            Kind::NoSpace => "no_space",
            Kind::Media => "media",
            Kind::Truncated => "truncated",
            Kind::Corrupt => "corrupt",
            Kind::Latched => "latched",
            Kind::Closed => "closed",
            Kind::Busy => "busy",
            Kind::Protocol => "protocol",
            Kind::System => "system",
        }
    }

    /// The errno of this kind where the error carries none of its own.
    pub const fn errno(self) -> i32 {
        match self {
            Kind::Invalid | Kind::OutOfRange => libc::EINVAL,
            Kind::NotSupported => libc::EOPNOTSUPP,
            Kind::ReadOnly | Kind::Latched => libc::EROFS,
            Kind::NoSpace => libc::ENOSPC,
            Kind::Media | Kind::Truncated | Kind::System => libc::EIO,
            Kind::Corrupt => libc::EUCLEAN,
            Kind::Closed => libc::EBADF,
            Kind::Busy => libc::EBUSY,
            Kind::Protocol => libc::EPROTO,
        }
    }
}

/// An error with its context. It is one pointer, so that a `Result` that is fine goes through
/// registers: a large one that is moved while only its tag was written stalls the CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(Box<Details>);

/// The operation, the byte offset it concerned, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// What a caller can act on.
    pub kind: Kind,
    /// The operation that failed, as the user names it (`read`, `flush`, `map`).
    pub op: &'static str,
    /// The byte offset on the device or medium, where there is one.
    pub offset: Option<u64>,
    /// A sentence with the offending numbers in it.
    pub detail: String,
    /// The errno of a failed system call, where there is one.
    pub source_errno: Option<i32>,
    /// Bytes from the start of a long transfer that were moved before it failed.
    pub moved: Option<u64>,
}

impl Deref for Error {
    type Target = Details;

    fn deref(&self) -> &Details {
        &self.0
    }
}

impl DerefMut for Error {
    fn deref_mut(&mut self) -> &mut Details {
        &mut self.0
    }
}

/// What every fallible function of the core returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with a kind, an operation and a sentence.
    pub fn new(kind: Kind, op: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Error(Box::new(Details { kind, op, offset: None, detail, source_errno: None, moved: None }))
    }

    /// The same error with the byte offset it concerns.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The last failed system call. `ENOSPC`, `EIO` and `EBUSY` get the kind a caller acts on.
    pub fn last_os(op: &'static str, detail: impl Into<String>) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self::from_errno(op, errno, detail)
    }

    /// An error for a known errno of a failed system call.
    pub fn from_errno(op: &'static str, errno: i32, detail: impl Into<String>) -> Self {
        let kind = match errno {
            libc::ENOSPC | libc::EDQUOT => Kind::NoSpace,
            libc::EIO => Kind::Media,
            libc::EBUSY => Kind::Busy,
            libc::EOPNOTSUPP => Kind::NotSupported,
            _ => Kind::System,
        };
        let cause = std::io::Error::from_raw_os_error(errno);
        let mut error = Self::new(kind, op, format!("{}: {cause}", detail.into()));
        error.source_errno = Some(errno);
        error
    }

    /// The errno to show: that of the failed system call, or the kind's own.
    pub fn errno(&self) -> i32 {
        self.source_errno.unwrap_or_else(|| self.kind.errno())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at byte {offset}: {}", self.op, self.detail),
            None => write!(f, "{}: {}", self.op, self.detail),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Kind::ALL.len());
    }

    #[test]
    fn a_failed_call_keeps_its_errno_and_the_offset() {
        let error = Error::from_errno("write", libc::ENOSPC, "punching").at(4096);
        assert_eq!(error.kind, Kind::NoSpace);
        assert_eq!(error.errno(), libc::ENOSPC);
        assert!(error.to_string().starts_with("write at byte 4096: punching"));
    }
}
