//! Providers that need no Python: a medium, a block device, extents of several media side by side.
//!
//! Invariants:
//! 1. What lies behind the end of a source, in its last page, is zeroes.
//! 2. A source that fails fails the pages that it was read for, with its error.
//! 3. Media are read where they are, by the kernel, unless they have to be asked.
//!
//! What this does not do: write; what is stored to a copy stays there until somebody commits it.

use std::sync::Arc;

use super::{sys, Address, Answer, Ask, Content, PfnProvider, Run};
use crate::block::{Caps, Channel, Flags, Op, Request};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Medium};
use crate::sg::{Segment, Sg};

/// The bytes of a run that a source of `len` bytes has; `None` where it has none of the page.
fn within(ask: &Ask, page_size: u64, len: u64) -> Option<(u64, u64)> {
    let at = ask.run.first * page_size;
    let end = (ask.run.end() * page_size).min(len);
    (ask.page * page_size < len).then(|| (at, end - at))
}

fn page_size_of(ask: &Ask, into: &[u8]) -> u64 {
    into.len() as u64 / ask.run.count
}

fn behind(ask: &Ask, len: u64) -> Error {
    let text = format!("page {} lies behind the {len} bytes of the source", ask.page);
    Error::new(Kind::Truncated, "fault", text)
}

/// Copies of what a medium has, from a byte on.
pub struct FromMedium {
    medium: Arc<dyn Medium>,
    at: u64,
    len: u64,
}

impl FromMedium {
    /// `len` bytes of a medium at `at`.
    pub fn new(medium: Arc<dyn Medium>, at: u64, len: u64) -> Result<FromMedium> {
        check_range("map", at, len, medium.len())?;
        Ok(FromMedium { medium, at, len })
    }
}

impl PfnProvider for FromMedium {
    fn provide(&self, ask: &Ask, into: &mut [u8]) -> Result<Answer> {
        let page_size = page_size_of(ask, into);
        let (at, len) = within(ask, page_size, self.len).ok_or_else(|| behind(ask, self.len))?;
        let whole = len == into.len() as u64;
        if whole && !ask.bytes_only && self.medium.loads_by_mapping() {
            let segment = Segment::new(self.medium.region(), self.at + at, len);
            let address = self.medium.address(&segment)?;
            // SAFETY: the medium's mapping lives as long as the medium, which is ours.
            let content = Content::At(unsafe { Address::new(address) });
            return Ok(Answer { run: ask.run, content });
        }
        into[len as usize..].fill(0);
        // SAFETY: the buffer is at least that long.
        unsafe { self.medium.load(self.at + at, into.as_mut_ptr(), len) }?;
        Ok(Answer { run: ask.run, content: Content::Bytes })
    }
}

/// Copies of what a block device has: demand loading.
pub struct FromDevice {
    channel: Channel,
    at: u64,
    len: u64,
}

impl FromDevice {
    /// `len` bytes of a device at `at`, whole sectors but for the end.
    pub fn new(channel: Channel, at: u64, len: u64) -> Result<FromDevice> {
        let info = channel.info();
        check_range("map", at, len, info.size)?;
        let sector = u64::from(info.block_size_min);
        if !at.is_multiple_of(sector) || !sys::page_size().is_multiple_of(sector) {
            let text = format!("byte {at} in sectors of {sector} bytes: pages are not whole ones");
            return Err(Error::new(Kind::NotSupported, "map", text).at(at));
        }
        Ok(FromDevice { channel, at, len })
    }

    fn is_hole(&self, at: u64, len: u64) -> Result<bool> {
        if !self.channel.info().caps.contains(Caps::EXTENTS) {
            return Ok(false);
        }
        Ok(self.channel.extents(at, len)?.iter().all(|extent| extent.hole))
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let most = self.channel.info().payload_size_max as usize;
        let mut at = at;
        for piece in into.chunks_mut(most) {
            let len = piece.len() as u64;
            // SAFETY: the list is used while the slice is borrowed.
            let sg = unsafe { Sg::host(piece.as_mut_ptr(), len) };
            let request = Request { op: Op::Read, at, len, flags: Flags::empty(), sg: &sg };
            self.channel.submit(&request)?;
            at += len;
        }
        Ok(())
    }
}

impl PfnProvider for FromDevice {
    fn provide(&self, ask: &Ask, into: &mut [u8]) -> Result<Answer> {
        let page_size = page_size_of(ask, into);
        let (at, len) = within(ask, page_size, self.len).ok_or_else(|| behind(ask, self.len))?;
        if self.is_hole(self.at + at, len)? {
            return Ok(Answer { run: ask.run, content: Content::Zero });
        }
        // The device may end inside a sector of this range, and then it has it all the same.
        let sector = u64::from(self.channel.info().block_size_min);
        let sectors = len.next_multiple_of(sector).min(self.channel.info().size - self.at - at);
        into[len as usize..].fill(0);
        self.read(self.at + at, &mut into[..sectors as usize])?;
        into[len as usize..sectors as usize].fill(0);
        Ok(Answer { run: ask.run, content: Content::Bytes })
    }
}

/// One extent of an assembled mapping.
#[derive(Clone)]
pub struct Part {
    /// Whose bytes they are.
    pub medium: Arc<dyn Medium>,
    /// From which byte on, a multiple of the page.
    pub at: u64,
    /// How many; a multiple of the page.
    pub len: u64,
    /// Ranges of the medium that must not be touched, `(offset, length)` in bytes.
    pub bad: Vec<(u64, u64)>,
}

/// A run of pages that are mapped together, or that fail.
struct Piece {
    run: Run,
    /// The part and the byte in its medium; `None` for bad media.
    place: Option<(usize, u64)>,
}

/// Extents of several media side by side. Nothing is copied: each is mapped where it belongs when
/// one of its pages is touched, and what is stored there is on its medium. A page that has bad
/// blocks is left out, and fails.
pub struct Assembled {
    parts: Vec<Part>,
    pieces: Vec<Piece>,
    page_size: u64,
}

impl Assembled {
    /// Puts parts side by side in pages of `page_size`. Media without a shared mapping are refused.
    pub fn new(parts: Vec<Part>, page_size: u64) -> Result<Assembled> {
        let mut pieces = Vec::new();
        let mut first = 0;
        for (index, part) in parts.iter().enumerate() {
            check_range("assemble", part.at, part.len, part.medium.len())?;
            if part.len == 0 || !(part.at | part.len).is_multiple_of(page_size) {
                let text = format!("{} bytes: not whole pages of {page_size} bytes", part.len);
                return Err(Error::new(Kind::Invalid, "assemble", text).at(part.at));
            }
            try_to_map(part, page_size)?;
            cut(part, index, page_size, &mut first, &mut pieces);
        }
        Ok(Assembled { parts, pieces, page_size })
    }

    /// Bytes of all parts.
    pub fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.run.end() * self.page_size)
    }

    /// True without a part.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

fn address_of(part: &Part, at: u64, len: u64) -> Result<*mut u8> {
    part.medium.address(&Segment::new(part.medium.region(), at, len))
}

/// Maps the first page of a part elsewhere and gives it back.
fn try_to_map(part: &Part, page_size: u64) -> Result<()> {
    let address = address_of(part, part.at, page_size)?;
    let start = sys::map(sys::Ground::Private, page_size, page_size, true)? as u64;
    // SAFETY: the range was mapped just now and nobody else knows it; the medium has the bytes.
    let mapped = unsafe { sys::map_again(address, start, page_size) };
    // SAFETY: as above; the call replaces the range or leaves it.
    unsafe { sys::unmap(start, page_size) };
    mapped.map_err(|mut error| {
        if error.source_errno == Some(libc::EINVAL) {
            error.kind = Kind::NotSupported;
            error.detail = "memory without a file has no second mapping: use memfd".to_owned();
        }
        error.at(part.at)
    })
}

/// Cuts a part into pieces at its bad pages.
fn cut(part: &Part, index: usize, page_size: u64, first: &mut u64, pieces: &mut Vec<Piece>) {
    let is_bad = |at: u64| {
        let (end, touches) = (at + page_size, |from: u64, len: u64| from.saturating_add(len) > at);
        part.bad.iter().any(|&(from, len)| len > 0 && from < end && touches(from, len))
    };
    let mut bad: Vec<u64> = Vec::new();
    for &(from, len) in &part.bad {
        let start = from.max(part.at) / page_size;
        let end = from.saturating_add(len).min(part.at + part.len).div_ceil(page_size);
        bad.extend(start..end);
    }
    bad.sort_unstable();
    bad.dedup();
    let mut add = |from: u64, to: u64, good: bool| {
        if from < to {
            let run = Run { first: *first, count: to - from };
            *first = run.end();
            pieces.push(Piece { run, place: good.then_some((index, from * page_size)) });
        }
    };
    let mut next = part.at / page_size;
    for page in bad {
        if !is_bad(page * page_size) {
            continue;
        }
        add(next, page, true);
        add(page, page + 1, false);
        next = page + 1;
    }
    add(next, (part.at + part.len) / page_size, true);
}

impl PfnProvider for Assembled {
    fn provide(&self, ask: &Ask, _into: &mut [u8]) -> Result<Answer> {
        let position = self.pieces.partition_point(|piece| piece.run.end() <= ask.page);
        let piece = self.pieces.get(position).ok_or_else(|| behind(ask, self.len()))?;
        let Some((index, at)) = piece.place else {
            let text = format!("page {} has bad blocks", ask.page);
            return Err(Error::new(Kind::Media, "fault", text));
        };
        let address = address_of(&self.parts[index], at, piece.run.count * self.page_size)?;
        // SAFETY: the medium's mapping lives as long as the medium, which is ours.
        let content = Content::Mapped(unsafe { Address::new(address) });
        Ok(Answer { run: piece.run, content })
    }
}
