//! Mode `sector` as a block device: arenas one behind the other, requests cut into sectors.
//!
//! Invariants:
//! 1. Each sector of a request is old or new after a power failure; the request as a whole is not.
//! 2. A write is durable when it returns, so that flush and FUA have nothing to do. On media of
//!    granularity `page` that holds with `strict`; without it a flush makes it durable, and what a
//!    power failure in between leaves is up to the host.
//! 3. A request that fails in the middle has written whole sectors from its start on.
//!
//! What this does not do: cache, remember bad media, sub-sector writes.

use std::sync::Arc;

use smallvec::SmallVec;

use super::engine::{Arena, Options, BATCH_MOST};
use super::geometry::Geometry;
use crate::block::{Caps, Device, Extent, Flags, Info, Op, OpSet, Request, PAYLOAD_SIZE_MAX};
use crate::error::{Error, Kind, Result};
use crate::media::{Granularity, Medium};
use crate::sg::Sg;

/// An arena and the number of its first sector.
struct Placed {
    arena: Arena,
    first: u64,
}

/// A namespace of mode `sector`.
pub struct Btt {
    medium: Arc<dyn Medium>,
    arenas: Vec<Placed>,
    sector_size: u32,
    info: Info,
}

impl Btt {
    /// Opens every arena and does what recovery has to do. All of them have sectors of one size.
    pub fn open(medium: Arc<dyn Medium>, geometries: &[Geometry], options: Options) -> Result<Btt> {
        let Some(size) = geometries.first().map(Geometry::sector_size) else {
            return Err(Error::new(Kind::Invalid, "open", "there is no arena"));
        };
        let (mut arenas, mut first) = (Vec::new(), 0);
        for geometry in geometries {
            if geometry.sector_size() != size {
                let text = format!("sectors of {} bytes among {size}", geometry.sector_size());
                return Err(Error::new(Kind::Corrupt, "open", text).at(geometry.start));
            }
            let arena = Arena::open(&*medium, *geometry, options)?;
            arenas.push(Placed { arena, first });
            first += u64::from(geometry.external_nlba);
        }
        let info = info_of(&*medium, &arenas, options, first * u64::from(size));
        Ok(Btt { medium, arenas, sector_size: size, info })
    }

    /// The arenas in their order.
    pub fn arenas(&self) -> impl Iterator<Item = &Arena> {
        self.arenas.iter().map(|placed| &placed.arena)
    }

    /// Walks every arena; gives what is wrong, in sentences.
    pub fn validate(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (number, placed) in self.arenas.iter().enumerate() {
            let found = placed.arena.validate(&*self.medium)?;
            wrong.extend(found.into_iter().map(|text| format!("arena {number}: {text}")));
        }
        Ok(wrong)
    }

    /// The arena of a sector, the sector's number in it, and how many of `count` lie there.
    #[inline]
    fn locate(&self, sector: u64, count: u64) -> (&Arena, u32, u32) {
        let place = match self.arenas.len() {
            1 => 0,
            _ => self.arenas.partition_point(|placed| placed.first <= sector) - 1,
        };
        let placed = &self.arenas[place];
        let lba = (sector - placed.first) as u32;
        let here = u64::from(placed.arena.geometry().external_nlba - lba).min(count);
        (&placed.arena, lba, here as u32)
    }

    fn read(&self, request: &Request<'_>) -> Result<()> {
        let (size, shift) = (u64::from(self.sector_size), self.sector_size.trailing_zeros());
        let mut at = request.at;
        for segment in request.sg.segments() {
            let address = Sg::host_address(segment)?;
            let mut done = 0;
            while done < segment.len {
                let (skip, rest) = (at & (size - 1), segment.len - done);
                let len = (size - skip).min(rest);
                let (arena, lba, _) = self.locate(at >> shift, 1);
                // SAFETY: whoever made the host segment vouches for its range; `done + len` stays
                // inside it.
                let result = unsafe {
                    let target = address.add(done as usize);
                    arena.read(&*self.medium, lba, skip as u32, target, len as u32)
                };
                result.map_err(|error| error.at(at))?;
                done += len;
                at += len;
            }
        }
        Ok(())
    }

    fn write(&self, request: &Request<'_>) -> Result<()> {
        let mut cursor = Cursor::new(request.sg, self.sector_size);
        let mut sector = request.at / u64::from(self.sector_size);
        while let Some(sources) = cursor.peek()? {
            let (arena, lba, here) = self.locate(sector, sources.len() as u64);
            // SAFETY: whoever made the host segments vouches for them; the cursor gives whole
            // sectors inside of them, or inside a buffer of its own.
            let written = unsafe { arena.write(&*self.medium, lba, &sources[..here as usize]) }
                .map_err(|error| error.at(sector * u64::from(self.sector_size)))?;
            cursor.advance(written);
            sector += written as u64;
        }
        self.settle(request)
    }

    /// What flush and FUA come to: nothing, but for a file without `strict`.
    fn settle(&self, request: &Request<'_>) -> Result<()> {
        let page = self.medium.granularity() == Granularity::Page;
        if page && request.flags.contains(Flags::FUA) {
            return self.medium.sync();
        }
        Ok(())
    }

    fn zero(&self, request: &Request<'_>) -> Result<()> {
        let size = u64::from(self.sector_size);
        let (mut sector, end) = (request.at / size, (request.at + request.len) / size);
        while sector < end {
            let (arena, lba, here) = self.locate(sector, end - sector);
            if arena.zeroes_in_map() {
                let mut next = lba;
                while let Some(bad) = arena.zero(&*self.medium, next, lba + here - next)? {
                    self.write_zeroes(arena, bad, 1)?;
                    next = bad + 1;
                    if next == lba + here {
                        break;
                    }
                }
            } else {
                if request.flags.contains(Flags::FAST_ZERO) {
                    let text = "zeroing sectors of 512 bytes is no quicker than writing them";
                    return Err(Error::new(Kind::NotSupported, "zero", text).at(request.at));
                }
                self.write_zeroes(arena, lba, here)?;
            }
            sector += u64::from(here);
        }
        self.settle(request)
    }

    fn write_zeroes(&self, arena: &Arena, first: u32, count: u32) -> Result<()> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let sources = [ZEROES.as_ptr(); BATCH_MOST];
        let mut done = 0;
        while done < count {
            let batch = (count - done).min(BATCH_MOST as u32) as usize;
            // SAFETY: each source is a constant as large as the largest sector.
            let written = unsafe { arena.write(&*self.medium, first + done, &sources[..batch])? };
            done += written as u32;
        }
        Ok(())
    }
}

fn info_of(medium: &dyn Medium, arenas: &[Placed], options: Options, size: u64) -> Info {
    let sector_size = arenas[0].arena.geometry().sector_size();
    let page = medium.granularity() == Granularity::Page;
    let mut caps = Caps::EXTENTS | Caps::MULTI_CONN;
    if !options.read_only {
        caps |= Caps::WRITE | Caps::FLUSH | Caps::FUA | Caps::ZERO | Caps::DISCARD;
        caps.set(Caps::FAST_ZERO, arenas[0].arena.zeroes_in_map());
    }
    let mut blocking = OpSet::ZERO | OpSet::DISCARD;
    blocking.set(OpSet::FLUSH, page);
    blocking.set(OpSet::WRITE, page && options.strict);
    Info {
        size,
        block_size_min: sector_size,
        block_size_preferred: 4096,
        payload_size_max: PAYLOAD_SIZE_MAX,
        caps,
        blocking,
        blocking_fua: page,
    }
}

impl Device for Btt {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        None
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        match request.op {
            Op::Read => self.read(request),
            Op::Write => self.write(request),
            Op::Flush => self.medium.sync(),
            Op::Zero => self.zero(request),
            // Sectors smaller than the kernel's page keep what they hold; a discard may do that.
            Op::Discard if self.sector_size < 4096 => Ok(()),
            Op::Discard => self.zero(request),
            Op::Cache => Ok(()),
        }
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let size = u64::from(self.sector_size);
        let mut found: Vec<Extent> = Vec::new();
        let (mut at, end) = (at, at + len);
        while at < end {
            let (arena, lba, _) = self.locate(at / size, 1);
            let hole = arena.is_zero(&*self.medium, lba)?;
            let next = ((at / size + 1) * size).min(end);
            match found.last_mut() {
                Some(last) if last.hole == hole => last.len += next - at,
                _ => found.push(Extent { len: next - at, hole }),
            }
            at = next;
        }
        Ok(found)
    }

    fn map(&self, request: &Request<'_>, _out: &mut Sg) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "map", "sectors move when they are written")
            .at(request.at))
    }

    fn commit(&self, request: &Request<'_>) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "commit", "there is no mapping").at(request.at))
    }

    fn media(&self) -> Vec<Arc<dyn Medium>> {
        vec![self.medium.clone()]
    }
}

/// Whole sectors of an sg list, in order, some at a time.
struct Cursor<'a> {
    sg: &'a Sg,
    segment: usize,
    offset: u64,
    size: u64,
    sources: SmallVec<[*const u8; BATCH_MOST]>,
    /// A sector that lies in several segments.
    straddling: Vec<u8>,
}

impl<'a> Cursor<'a> {
    fn new(sg: &'a Sg, sector_size: u32) -> Self {
        let (size, sources) = (u64::from(sector_size), SmallVec::new());
        Cursor { sg, segment: 0, offset: 0, size, sources, straddling: Vec::new() }
    }

    /// Where the next sectors are, at most a batch; `None` behind the last.
    fn peek(&mut self) -> Result<Option<&[*const u8]>> {
        self.sources.clear();
        let segments = self.sg.segments();
        while segments.get(self.segment).is_some_and(|segment| self.offset == segment.len) {
            (self.segment, self.offset) = (self.segment + 1, 0);
        }
        let Some(segment) = segments.get(self.segment) else { return Ok(None) };
        let address = Sg::host_address(segment)?;
        let whole = ((segment.len - self.offset) / self.size).min(BATCH_MOST as u64);
        if whole == 0 {
            self.gather()?;
            self.sources.push(self.straddling.as_ptr());
        }
        for place in 0..whole {
            let from = (self.offset + place * self.size) as usize;
            // SAFETY: inside the segment, for which its maker vouches.
            self.sources.push(unsafe { address.add(from) });
        }
        Ok(Some(&self.sources))
    }

    /// Copies a sector together from the segments it lies in.
    fn gather(&mut self) -> Result<()> {
        self.straddling.clear();
        let (mut segment, mut offset) = (self.segment, self.offset);
        while self.straddling.len() < self.size as usize {
            let Some(here) = self.sg.segments().get(segment) else {
                let text = format!("{} bytes are no whole sectors", self.sg.len());
                return Err(Error::new(Kind::Invalid, "write", text));
            };
            let len = (here.len - offset).min(self.size - self.straddling.len() as u64);
            let address = Sg::host_address(here)?;
            let before = self.straddling.len();
            self.straddling.resize(before + len as usize, 0);
            // SAFETY: inside the segment, for which its maker vouches; the target has just been
            // made that long, and is ours.
            unsafe {
                let source = address.add(offset as usize);
                let target = self.straddling.as_mut_ptr().add(before);
                source.copy_to_nonoverlapping(target, len as usize);
            }
            (segment, offset) = (segment + 1, 0);
        }
        Ok(())
    }

    /// Goes over sectors that were written.
    fn advance(&mut self, sectors: usize) {
        let mut rest = sectors as u64 * self.size;
        while rest > 0 {
            let here = (self.sg.segments()[self.segment].len - self.offset).min(rest);
            (self.offset, rest) = (self.offset + here, rest - here);
            if rest > 0 {
                (self.segment, self.offset) = (self.segment + 1, 0);
            }
        }
    }
}
