//! What a pool has: members, windows, extents; handing memory out and taking it back.
//!
//! Invariants:
//! 1. `extents` are disjoint ranges of addresses, each inside one window; an extent's pieces add up
//!    to its length, and no frame belongs to two pieces.
//! 2. A frame that a piece names is taken in its member's runs, and every taken frame is a piece's,
//!    except while a migration holds frames for both sides.
//! 3. The bytes at an extent's address are those of its pieces at every moment.
//! 4. A window without a member lives until its last extent dies, then its addresses are free.
//! 5. Only the process that made the pool changes it: in a forked child nothing is given back.
//! 6. Lock order: `slabs` or `sampler`, then `state`. Nothing that faults is touched under `state`.
//!
//! What this does not do: move bytes ([`super::evacuate`]).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::catch::{Catch, Userfault};
use super::region::{BlockState, Member, RegionInfo, RegionOptions};
use super::runs::Runs;
use super::sampling::Sampler;
use super::slabs::{Slabs, SLAB_SIZE, SMALL_MAX};
use super::sys;
use super::{guard, FRAME_SIZE, WINDOW_ALIGN};
use crate::error::{Error, Kind, Result};
use crate::frames::AREA;
use crate::media;
use crate::media::port::Port;
use crate::media::Store;

/// How often this process forked since it started, as far as anyone asked to know.
static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// When bytes become zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Only where a caller asks for zeroes.
    Asked,
    /// Before every allocation is handed out.
    Allocate,
    /// When an extent is given back; whoever gets the frames next cannot read what was there.
    Free,
}

/// Where extents go that name no region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// All of it into the first region that has room, by rank.
    Preferred,
    /// In turns over all regions, each getting granules by its weight.
    Interleave {
        /// Frames of one turn for weight one.
        granule: u64,
    },
}

/// How a pool behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Frames of a memory block.
    pub block_frames: u64,
    /// Where extents go.
    pub placement: Placement,
    /// When bytes become zeroes.
    pub zeroing: Zeroing,
    /// Frames that may be in use at most.
    pub limit_frames: Option<u64>,
    /// Forked children have the mappings too. Then nothing is migrated after a fork.
    pub share_with_children: bool,
    /// Bytes that are moved at once; stores to them wait meanwhile.
    pub chunk: u64,
    /// Use userfaultfd where it works.
    pub userfault: bool,
    /// How often the caller of a migration hears of its progress, besides its start and end.
    pub report_every: Duration,
}

/// What one allocation asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// Only in this region.
    pub region: Option<u32>,
    /// Never migrated; a block with it cannot go offline.
    pub fixed: bool,
    /// Zeroes.
    pub zero: bool,
    /// One run of frames, at their own address.
    pub whole: bool,
}

/// Frames of one member, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub region: u32,
    pub first: u64,
    pub frames: u64,
}

/// One allocation.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub frames: u64,
    /// Bytes that were asked for.
    pub asked: u64,
    pub pieces: Vec<Piece>,
    /// The start of the window that the address lies in.
    pub window: u64,
    pub pins: u32,
    pub fixed: bool,
    pub slab: bool,
    /// A migration works on it; who frees it meanwhile sets `dead`.
    pub moving: bool,
    pub dead: bool,
}

impl Extent {
    /// True where it must not move now.
    pub fn is_held(&self) -> bool {
        self.pins > 0 || self.fixed
    }

    fn new(pieces: Vec<Piece>, asked: u64) -> Extent {
        Extent {
            frames: pieces.iter().map(|piece| piece.frames).sum(),
            asked,
            pieces,
            window: 0,
            pins: 0,
            fixed: false,
            slab: false,
            moving: false,
            dead: false,
        }
    }
}

/// Reserved addresses.
pub(super) struct Window {
    pub len: u64,
    /// The member that is mapped here.
    pub owner: Option<u32>,
    /// Extents whose address lies here.
    pub live: u64,
    /// Set once stores in it were made to wait by a signal.
    pub watched: Option<guard::Watched>,
}

/// What the lock protects.
#[derive(Default)]
pub(super) struct State {
    pub members: BTreeMap<u32, Member>,
    pub windows: BTreeMap<u64, Window>,
    pub extents: BTreeMap<u64, Extent>,
    pub used_frames: u64,
    pub used_frames_peak: u64,
    pub next_region: u32,
    pub migrating: bool,
    pub stats: PoolStats,
}

/// What happened so far. Bytes where nothing else is said.
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolStats {
    /// Extents handed out.
    pub allocations: u64,
    /// Extents given back.
    pub frees: u64,
    /// Allocations for which there was no room.
    pub refused: u64,
    /// Moved to other frames.
    pub migrated: u64,
    /// The longest that stores to one chunk had to wait.
    pub hold_ns_peak: u64,
}

/// What is known of an extent.
#[derive(Clone, Debug)]
pub struct ExtentInfo {
    /// Its address.
    pub address: u64,
    /// Its bytes.
    pub len: u64,
    /// `(region, first frame, frames)`, in the order of addresses.
    pub pieces: Vec<(u32, u64, u64)>,
    /// How often it is pinned.
    pub pins: u32,
    /// True for one that never moves.
    pub fixed: bool,
    /// True for one that holds small objects.
    pub slab: bool,
}

/// Who is inside the gate, and who wants it closed.
#[derive(Default)]
pub(super) struct Gate {
    pub inside: u64,
    pub closing: bool,
}

/// Memory of several regions.
pub struct Pool {
    pub(super) options: Options,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) slabs: Mutex<Slabs>,
    pub(super) gate: Mutex<Gate>,
    pub(super) sampler: Mutex<Sampler>,
    pub(super) gate_moved: Condvar,
    fault: Option<Arc<Userfault>>,
    process: u32,
    forks_known: AtomicU64,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(op: &'static str, text: String) -> Error {
    Error::new(Kind::Invalid, op, text)
}

impl Pool {
    /// An empty pool.
    pub fn new(options: Options) -> Result<Pool> {
        static COUNTING: std::sync::Once = std::sync::Once::new();
        COUNTING.call_once(|| sys::before_fork(count_fork));
        if options.block_frames == 0 || !options.block_frames.is_multiple_of(AREA) {
            let text = format!(
                "a block has {} bytes, which is no multiple of {}",
                options.block_frames * FRAME_SIZE,
                AREA * FRAME_SIZE
            );
            return Err(invalid("pool", text));
        }
        if options.chunk == 0 || !options.chunk.is_multiple_of(WINDOW_ALIGN) {
            return Err(invalid("pool", "chunks are multiples of 2 MiB".to_owned()));
        }
        let fault = if options.userfault { Userfault::open().ok().map(Arc::new) } else { None };
        Ok(Pool {
            options,
            state: Mutex::default(),
            changed: Condvar::new(),
            slabs: Mutex::default(),
            gate: Mutex::default(),
            sampler: Mutex::default(),
            gate_moved: Condvar::new(),
            fault,
            process: sys::process_id(),
            forks_known: AtomicU64::new(FORKS.load(Ordering::Relaxed)),
        })
    }

    /// True in a child of the process that made the pool.
    pub fn is_foreign(&self) -> bool {
        sys::process_id() != self.process
    }

    pub(super) fn require_own(&self, op: &'static str) -> Result<()> {
        if !self.is_foreign() {
            return Ok(());
        }
        let text = format!("the pool belongs to process {}; this is a child of it", self.process);
        Err(Error::new(Kind::NotSupported, op, text))
    }

    /// True where children that were forked since may still have the mappings.
    pub(super) fn is_shared_with_children(&self) -> bool {
        let forks = FORKS.load(Ordering::Relaxed);
        self.options.share_with_children && forks != self.forks_known.load(Ordering::Relaxed)
    }

    /// The caller says that no forked child uses the pool's memory any more.
    pub fn forget_children(&self) {
        self.forks_known.store(FORKS.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    // --- members ---------------------------------------------------------------------------------

    /// Adds a region; gives its number. The descriptor is duplicated.
    pub fn add(&self, fd: BorrowedFd<'_>, options: RegionOptions) -> Result<u32> {
        self.require_own("add")?;
        let file = media::sys::duplicate(fd)?;
        let info = media::sys::inspect(file.as_fd())?;
        let frames = self.frames_of(&options, &info)?;
        // Our own copies of the region's bytes fault where the file was cut.
        media::guard::install()?;
        let identity = sys::identity(file.as_fd())?;
        let mut state = locked(&self.state);
        refuse_overlap(&state, identity, &options, frames)?;
        let file = Arc::new(file);
        let runs = match &options.map {
            None => Runs::new(frames)?,
            Some(map) => Runs::over(frames, map, file.clone())?,
        };
        let window = sys::reserve(frames * FRAME_SIZE, WINDOW_ALIGN.max(info.map_unit))?;
        let mut member = Member {
            unit: (info.map_unit / FRAME_SIZE).max(1),
            identity,
            frames,
            window,
            catch: Catch::Signal,
            writable: info.kind == media::sys::FileKind::Regular,
            own: !self.options.share_with_children,
            runs,
            blocks: vec![BlockState::Online; (frames / self.options.block_frames) as usize],
            file,
            options,
        };
        let mapped = self.map_member(&mut member);
        if let Err(error) = mapped {
            // SAFETY: reserved above; nobody knows it.
            unsafe { sys::unmap(window, frames * FRAME_SIZE) };
            return Err(error);
        }
        let id = state.next_region;
        state.next_region += 1;
        let len = frames * FRAME_SIZE;
        state.windows.insert(window, Window { len, owner: Some(id), live: 0, watched: None });
        state.members.insert(id, member);
        self.place_claimed(&mut state, id)?;
        Ok(id)
    }

    /// Frames that a region brings: whole blocks.
    fn frames_of(&self, options: &RegionOptions, info: &media::sys::FileInfo) -> Result<u64> {
        let (name, block) = (&options.name, self.options.block_frames * FRAME_SIZE);
        if block % info.map_unit != 0 {
            let text = format!(
                "region {name} maps in units of {} bytes, of which a block of {block} bytes is no \
                 multiple",
                info.map_unit
            );
            return Err(invalid("add", text));
        }
        if !options.offset.is_multiple_of(info.map_unit) {
            let text = format!(
                "region {name} starts at byte {}, which is no multiple of {}",
                options.offset, info.map_unit
            );
            return Err(invalid("add", text));
        }
        let end = options.offset.checked_add(options.len);
        if end.is_none_or(|end| end > info.size) {
            let text = format!("region {name} ends behind the {} bytes of its file", info.size);
            return Err(Error::new(Kind::OutOfRange, "add", text));
        }
        if options.len < block {
            let text = format!(
                "region {name} has {} bytes, which is less than a block of {block}",
                options.len
            );
            return Err(invalid("add", text));
        }
        Ok(options.len / block * self.options.block_frames)
    }

    fn map_member(&self, member: &mut Member) -> Result<()> {
        // SAFETY: the window was reserved for this.
        unsafe { member.map(member.window, 0, member.frames)? };
        let probe = member.unit * FRAME_SIZE;
        // SAFETY: mapped just now and not in use.
        member.catch = unsafe { Catch::choose(self.fault.as_ref(), member.window, probe) };
        for &(first, frames) in &member.options.claimed {
            if !member.runs.claim(first, frames) {
                let text = format!(
                    "region {}: {frames} frames at {first} are claimed and not free",
                    member.options.name
                );
                return Err(Error::new(Kind::Corrupt, "add", text));
            }
        }
        Ok(())
    }

    /// Makes extents of what is claimed from the start.
    fn place_claimed(&self, state: &mut State, id: u32) -> Result<()> {
        let claimed = state.member(id)?.options.claimed.clone();
        for (first, frames) in claimed {
            let asked = frames * FRAME_SIZE;
            let piece = Piece { region: id, first, frames };
            let extent = Extent { fixed: true, ..Extent::new(vec![piece], asked) };
            self.place(state, extent)?;
        }
        Ok(())
    }

    /// The members, by number.
    pub fn members(&self) -> Vec<RegionInfo> {
        let state = locked(&self.state);
        let block = self.options.block_frames;
        state.members.iter().map(|(&id, member)| member.info(id, block)).collect()
    }

    // --- extents ---------------------------------------------------------------------------------

    /// Memory of `bytes` bytes; its address. Small objects share a slab.
    pub fn allocate(&self, bytes: u64, request: Request) -> Result<u64> {
        self.require_own("allocate")?;
        let address =
            if bytes <= SMALL_MAX && request.region.is_none() && !request.fixed && !request.whole {
                self.allocate_small(bytes)?
            } else {
                self.allocate_extent(bytes, request, false)?
            };
        if request.zero || self.options.zeroing == Zeroing::Allocate {
            if let Err(error) = self.zero(address, bytes) {
                self.free(address);
                return Err(error);
            }
        }
        Ok(address)
    }

    /// Stores zeroes. A region that vanished is an error.
    fn zero(&self, address: u64, bytes: u64) -> Result<()> {
        // SAFETY: the range is an extent of ours that nobody else knows yet, or no longer.
        let outcome = unsafe { Port::get().zero(address as *mut u8, bytes, Store::Cached) };
        if outcome.is_fault() {
            let text = format!("storing zeroes faulted at address {:#x}", outcome.value);
            return Err(Error::new(Kind::Truncated, "allocate", text));
        }
        Ok(())
    }

    pub(super) fn allocate_extent(&self, bytes: u64, request: Request, slab: bool) -> Result<u64> {
        let frames = bytes.div_ceil(FRAME_SIZE).max(1);
        let mut state = locked(&self.state);
        let limit = self.options.limit_frames.unwrap_or(u64::MAX);
        if frames > limit.saturating_sub(state.used_frames) {
            state.stats.refused += 1;
            let text = format!(
                "{bytes} bytes: {} of the limit of {} are in use",
                state.used_frames * FRAME_SIZE,
                limit.saturating_mul(FRAME_SIZE)
            );
            return Err(Error::new(Kind::NoSpace, "allocate", text));
        }
        let taken = state.take(frames, &request, self.options.placement);
        let pieces = match taken {
            Ok(pieces) => pieces,
            Err(error) => {
                state.stats.refused += 1;
                return Err(error);
            }
        };
        let extent = Extent { fixed: request.fixed, slab, ..Extent::new(pieces, bytes) };
        self.place(&mut state, extent)
    }

    /// Gives an extent its address: that of its frames where nobody displaced them, or a new one.
    pub(super) fn place(&self, state: &mut State, mut extent: Extent) -> Result<u64> {
        let home = state.home_of(&extent);
        let home = home.filter(|(_, address)| !extent.slab || address % SLAB_SIZE == 0);
        let address = match home {
            Some((window, address)) => {
                extent.window = window;
                address
            }
            None => {
                let mapped = self.map_elsewhere(state, &extent);
                if mapped.is_err() {
                    state.give(&extent.pieces);
                }
                extent.window = mapped?;
                extent.window
            }
        };
        if let Some(window) = state.windows.get_mut(&extent.window) {
            window.live += 1;
        }
        state.used_frames += extent.frames;
        state.used_frames_peak = state.used_frames_peak.max(state.used_frames);
        state.stats.allocations += 1;
        state.extents.insert(address, extent);
        Ok(address)
    }

    /// Maps an extent's pieces at new addresses.
    fn map_elsewhere(&self, state: &mut State, extent: &Extent) -> Result<u64> {
        let len = extent.frames * FRAME_SIZE;
        let unit = extent.pieces.iter().filter_map(|piece| state.members.get(&piece.region));
        let unit = unit.map(|member| member.unit * FRAME_SIZE).max().unwrap_or(FRAME_SIZE);
        let base = sys::reserve(len, WINDOW_ALIGN.max(unit))?;
        // SAFETY: reserved just now.
        let mapped = unsafe { state.map_pieces(base, &extent.pieces) };
        if let Err(error) = mapped {
            // SAFETY: as above.
            unsafe { sys::unmap(base, len) };
            return Err(error);
        }
        state.windows.insert(base, Window { len, owner: None, live: 0, watched: None });
        Ok(base)
    }

    /// Takes memory back. An address that is none of the pool's is ignored and reported as false.
    pub fn free(&self, address: u64) -> bool {
        if self.is_foreign() {
            return true;
        }
        if self.free_small(address) {
            return true;
        }
        if self.options.zeroing == Zeroing::Free {
            let asked = locked(&self.state).extents.get(&address).map(|extent| extent.asked);
            if let Some(asked) = asked {
                // A region that vanished has nothing left to hide.
                let _ = self.zero(address, asked);
            }
        }
        self.free_extent(address)
    }

    pub(super) fn free_extent(&self, address: u64) -> bool {
        let mut state = locked(&self.state);
        match state.extents.get_mut(&address) {
            None => false,
            Some(extent) if extent.moving => {
                extent.dead = true;
                true
            }
            Some(_) => {
                state.release(address);
                true
            }
        }
    }

    /// Bytes that there are at an address: of a small object's class, or as many as were asked for.
    pub fn size_of(&self, address: u64) -> Option<u64> {
        if let Some(size) = locked(&self.slabs).size_of(address) {
            return Some(size);
        }
        locked(&self.state).extents.get(&address).map(|extent| extent.asked)
    }

    /// As [`Pool::size_of`] for a forked child, where another thread may have held a lock for ever.
    pub fn size_of_in_child(&self, address: u64) -> Option<u64> {
        if let Some(size) = self.slabs.try_lock().ok()?.size_of(address) {
            return Some(size);
        }
        self.state.try_lock().ok()?.extents.get(&address).map(|extent| extent.asked)
    }

    /// True for an address inside a window of the pool; `None` in a child that cannot know.
    pub fn owns(&self, address: u64) -> Option<bool> {
        let state =
            if self.is_foreign() { self.state.try_lock().ok()? } else { locked(&self.state) };
        let below = state.windows.range(..=address).next_back();
        Some(below.is_some_and(|(&base, window)| address < base + window.len))
    }

    /// Where the bytes of an extent that is one run lie: region and byte of its file.
    pub fn place_of(&self, address: u64) -> Option<(u32, u64)> {
        let mut state = locked(&self.state);
        let (start, extent) = state.extent_at(address)?;
        let [piece] = extent.pieces[..] else { return None };
        let member = state.members.get(&piece.region)?;
        Some((piece.region, member.file_offset(piece.first) + address - start))
    }

    /// Keeps the extent at an address where it is until [`Pool::unpin`]. Waits for a migration that
    /// works on it.
    pub fn pin(&self, address: u64) -> Result<()> {
        self.require_own("pin")?;
        let mut state = locked(&self.state);
        loop {
            let Some((_, extent)) = state.extent_at(address) else {
                let text = format!("no extent of this pool is at address {address:#x}");
                return Err(invalid("pin", text));
            };
            if !extent.moving {
                extent.pins += 1;
                return Ok(());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Undoes one [`Pool::pin`].
    pub fn unpin(&self, address: u64) {
        if let Some((_, extent)) = locked(&self.state).extent_at(address) {
            extent.pins = extent.pins.saturating_sub(1);
        }
    }

    // --- the gate --------------------------------------------------------------------------------

    /// Enters the gate: nothing is held from its writers until [`Pool::leave`].
    pub fn enter(&self) {
        let mut gate = locked(&self.gate);
        while gate.closing {
            gate = self.gate_moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.inside += 1;
    }

    /// Leaves the gate.
    pub fn leave(&self) {
        let mut gate = locked(&self.gate);
        gate.inside = gate.inside.saturating_sub(1);
        self.gate_moved.notify_all();
    }

    // --- what is there ---------------------------------------------------------------------------

    /// What happened, and bytes in use now and at most.
    pub fn stats(&self) -> (PoolStats, u64, u64) {
        let state = locked(&self.state);
        (state.stats, state.used_frames * FRAME_SIZE, state.used_frames_peak * FRAME_SIZE)
    }

    /// Objects in slabs, and the slabs: `(objects, bytes of them, slabs)`.
    pub fn small_stats(&self) -> (u64, u64, u64) {
        locked(&self.slabs).stats()
    }

    /// Windows that no member is mapped in: `(windows, bytes)`.
    pub fn ghosts(&self) -> (u64, u64) {
        let state = locked(&self.state);
        let ghosts = state.windows.values().filter(|window| window.owner.is_none());
        ghosts.fold((0, 0), |(count, bytes), window| (count + 1, bytes + window.len))
    }

    /// Every extent, by address.
    pub fn extents(&self) -> Vec<ExtentInfo> {
        let state = locked(&self.state);
        let info = |(&address, extent): (&u64, &Extent)| ExtentInfo {
            address,
            len: extent.frames * FRAME_SIZE,
            pieces: extent.pieces.iter().map(|p| (p.region, p.first, p.frames)).collect(),
            pins: extent.pins,
            fixed: extent.fixed,
            slab: extent.slab,
        };
        state.extents.iter().map(info).collect()
    }

    /// Walks everything and says what is wrong.
    pub fn validate(&self) -> Vec<String> {
        let mut wrong = locked(&self.slabs).validate();
        let state = locked(&self.state);
        if state.migrating {
            return wrong;
        }
        wrong.extend(state.validate());
        wrong
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Whoever has an extent holds the pool, so nobody does. A child has nothing to give back.
        if self.is_foreign() {
            return;
        }
        for (&base, window) in &locked(&self.state).windows {
            // SAFETY: nobody has an address in it any more.
            unsafe { sys::unmap(base, window.len) };
        }
    }
}

fn refuse_overlap(
    state: &State,
    identity: sys::FileIdentity,
    options: &RegionOptions,
    frames: u64,
) -> Result<()> {
    let end = options.offset + frames * FRAME_SIZE;
    for member in state.members.values() {
        let (start, other_end) = (member.options.offset, member.file_offset(member.frames));
        if member.identity != identity || options.offset >= other_end || start >= end {
            continue;
        }
        let text = if (start, other_end) == (options.offset, end) {
            format!("region {} is in the pool already", member.options.name)
        } else {
            format!(
                "region {}, bytes {} to {end} of its file, overlaps region {}, bytes {start} to \
                 {other_end}",
                options.name, options.offset, member.options.name
            )
        };
        return Err(Error::new(Kind::Busy, "add", text));
    }
    Ok(())
}
