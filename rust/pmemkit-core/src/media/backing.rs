//! The file behind a mapping: why a touch of it faulted, where its holes are, how long it may get.
//!
//! Invariants:
//! 1. The position of the caller's open file is never moved: holes are looked for through a
//!    description of our own, where the system lets us have one.
//! 2. Nothing is called a hole unless the file system said so.
//!
//! What this does not do: map, touch a mapped byte.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use super::sys::{self, FileInfo, FileKind, Sharing, Sought};
use super::{Extent, FileOptions, Granularity};
use crate::error::{Error, Kind, Result};

/// A fault in a file with less room than this left on its file system is put down to that.
const ROOM_BYTES: u64 = 64 << 10;

/// The file behind a mapping.
pub struct Backing {
    /// A descriptor of ours.
    pub fd: OwnedFd,
    /// What the file was when it was mapped.
    pub info: FileInfo,
    /// Where in the file the medium starts, in bytes.
    pub offset: u64,
    /// Stores go through the kernel (`pwrite`) instead of the mapping: see [`Backing::store`].
    pub stores_by_call: bool,
    /// How the file is mapped.
    pub sharing: Sharing,
    /// A descriptor whose position is ours to move.
    seeker: OnceLock<OwnedFd>,
    /// Whether holes can be punched, once somebody asked.
    punches: OnceLock<bool>,
}

impl Backing {
    /// The file as a backing for `len` bytes. The descriptor is duplicated.
    pub fn new(fd: BorrowedFd<'_>, len: u64, options: &FileOptions) -> Result<Backing> {
        let info = sys::inspect(fd)?;
        check(&info, len, options)?;
        let sharing = if options.map_sync { Sharing::Synchronous } else { Sharing::Shared };
        let cached = matches!(info.kind, FileKind::Regular | FileKind::Block);
        let stores_by_call =
            cached && options.granularity == Granularity::Page && !sys::is_tmpfs(fd)?;
        Ok(Backing {
            fd: sys::duplicate(fd)?,
            info,
            stores_by_call,
            offset: options.offset,
            sharing,
            seeker: OnceLock::new(),
            punches: OnceLock::new(),
        })
    }

    /// Stores a range with `pwrite`, which the mapping sees at once. On a file behind a page cache
    /// that beats a store through the mapping: the first store to a clean page faults, and it
    /// dirties the whole folio that the page is part of, which the next sync then writes out.
    /// The end of the file is looked at first, because `pwrite` would move it.
    ///
    /// # Safety
    /// `source` must be valid for reads of `len` bytes.
    pub unsafe fn store(&self, at: u64, source: *const u8, len: u64) -> Result<()> {
        let (start, size) = (self.offset + at, sys::size_bytes(self.fd.as_fd(), self.info.kind)?);
        if start + len > size {
            let text =
                format!("the file has only {size} bytes; the range ends at byte {}", start + len);
            return Err(Error::new(Kind::Truncated, "write", text).at(at));
        }
        // SAFETY: the caller vouches for the source.
        unsafe { sys::write(self.fd.as_fd(), start, source, len) }.map_err(|error| error.at(at))
    }

    /// Fills a range with zeroes as [`Backing::store`] would.
    pub fn zero(&self, at: u64, len: u64) -> Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROES.len() as u64);
            // SAFETY: the source is a static of at least `part` bytes.
            unsafe { self.store(at + done, ZEROES.as_ptr(), part)? };
            done += part;
        }
        Ok(())
    }

    /// The kind and the cause of a fault in a range.
    pub fn why(&self, at: u64, len: u64) -> (Kind, String) {
        let fd = self.fd.as_fd();
        let end = self.offset + at + len;
        match sys::size_bytes(fd, self.info.kind) {
            Ok(size) if size < end => {
                let text = format!("the file has only {size} bytes; the range ends at byte {end}");
                return (Kind::Truncated, text);
            }
            _ => {}
        }
        if self.info.kind == FileKind::Hugetlb {
            return (Kind::NoSpace, "the pool of huge pages is empty".to_owned());
        }
        let regular = self.info.kind == FileKind::Regular;
        match sys::room_bytes(fd) {
            Ok(Some(room)) if regular && room < ROOM_BYTES => {
                (Kind::NoSpace, format!("the file system has {room} bytes left to fill a hole"))
            }
            _ => (Kind::Media, format!("{len} bytes cannot be accessed: bad media")),
        }
    }

    /// Asked by punching nothing: behind the end of a file there is nothing to lose.
    pub fn can_punch(&self) -> Result<bool> {
        if let Some(&known) = self.punches.get() {
            return Ok(known);
        }
        let fd = self.fd.as_fd();
        let can = match self.info.kind {
            FileKind::Regular | FileKind::Hugetlb => {
                let size = sys::size_bytes(fd, self.info.kind)?;
                let end = size.checked_next_multiple_of(self.info.hole_unit);
                let room = |&end: &u64| end < i64::MAX as u64 - self.info.hole_unit;
                match end.filter(room) {
                    Some(end) => sys::punch(fd, end, self.info.hole_unit)?,
                    None => false,
                }
            }
            FileKind::Block => sys::block_device_punches(fd)?,
            FileKind::DeviceDax => false,
        };
        Ok(*self.punches.get_or_init(|| can))
    }

    /// Refuses lengths that the file cannot have and files that go on behind the medium: those
    /// bytes are not ours to cut off.
    pub fn check_resize(&self, len: u64) -> Result<()> {
        if self.info.kind == FileKind::Hugetlb && !len.is_multiple_of(self.info.map_unit) {
            let text = format!("{len} bytes are not whole pages of {} bytes", self.info.map_unit);
            return Err(Error::new(Kind::Invalid, "resize", text));
        }
        match self.offset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(()),
            _ => {
                let text = format!("a file cannot have {} + {len} bytes", self.offset);
                Err(Error::new(Kind::Invalid, "resize", text))
            }
        }
    }

    fn seeker(&self) -> Result<BorrowedFd<'_>> {
        if self.seeker.get().is_none() {
            let opened = sys::reopen(self.fd.as_fd())?;
            self.seeker.get_or_init(|| opened);
        }
        Ok(self.seeker.get().unwrap_or(&self.fd).as_fd())
    }

    /// Data and holes of a range of the file. What lies behind the end of the file counts as data:
    /// to call it a hole would make readers take lost bytes for zeroes.
    pub fn extents(&self, start: u64, len: u64) -> Result<Vec<Extent>> {
        let end = start + len;
        let file_end = sys::size_bytes(self.fd.as_fd(), self.info.kind)?.min(end);
        let mut runs = Vec::new();
        let mut at = start;
        while at < file_end {
            let fd = self.seeker()?;
            let data = match sys::seek(fd, at, Sought::Data) {
                Ok(found) => found.unwrap_or(file_end).clamp(at, file_end),
                Err(_) => at,
            };
            append(&mut runs, data - at, true);
            if data == file_end {
                at = file_end;
                break;
            }
            let hole = match sys::seek(fd, data, Sought::Hole) {
                Ok(found) => found.unwrap_or(file_end).clamp(data, file_end),
                Err(_) => file_end,
            };
            append(&mut runs, hole - data, false);
            // The file may change between the two questions; one byte is progress enough.
            if hole == at {
                append(&mut runs, 1, false);
            }
            at = hole.max(at + 1);
        }
        append(&mut runs, end - at, false);
        Ok(runs)
    }

    /// Lengths of the file are multiples of this.
    pub fn granule(&self) -> u64 {
        if self.info.kind == FileKind::Hugetlb {
            self.info.map_unit
        } else {
            1
        }
    }
}

/// Appends a run, joining it with the one before where they are alike.
pub fn append(runs: &mut Vec<Extent>, len: u64, hole: bool) {
    match runs.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.hole == hole => last.len += len,
        _ => runs.push(Extent { len, hole }),
    }
}

fn check(info: &FileInfo, len: u64, options: &FileOptions) -> Result<()> {
    let invalid = |text: String| Err(Error::new(Kind::Invalid, "map", text));
    let offset = options.offset;
    if !offset.is_multiple_of(info.map_unit) {
        return invalid(format!("offset {offset} is not a multiple of {} bytes", info.map_unit));
    }
    if info.kind == FileKind::DeviceDax && options.granularity == Granularity::Page {
        return invalid("a device DAX has no file system to ask: not granularity page".to_owned());
    }
    if offset.checked_add(len).is_none_or(|end| end > info.size) {
        let text = format!("{len} bytes do not fit: the file has {} bytes", info.size);
        return Err(Error::new(Kind::OutOfRange, "map", text).at(offset));
    }
    Ok(())
}
