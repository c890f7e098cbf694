//! A region of another process as a medium: loads copy out, stores copy in, and durable is what was
//! committed there.
//!
//! States: good -> lost. A connection that failed, timed out or broke the protocol stays lost:
//! answers that are still on their way could not be told from those to come.
//!
//! Invariants:
//! 1. One call at a time is on the wire; its requests are, at most [`WINDOW`] of them.
//! 2. A call that returned `Ok` had a good answer to each of its requests. One that failed says
//!    nothing about the bytes of its range.
//! 3. No call waits for longer than the patience without a byte moving.
//! 4. Granularity is `page`, whatever the target has: nothing is durable before a commit came back.
//!
//! What this does not do: connect, negotiate, reconnect, lend addresses, resize.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::sys;
use super::wire::{kind_of, Header, Op, HEADER_SIZE, PAYLOAD_MAX, TEXT_MAX};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, next_region, Extent, Granularity, Medium, Store};
use crate::sg::{RegionId, Segment};

/// Requests that may wait for their answers. Their answers fit into any socket, so that neither
/// side ever waits for the other to read.
const WINDOW: u64 = 16;
/// Bytes that one request zeroes or gives back: the peer answers before patience ends.
const RANGE_MAX: u64 = 16 << 20;

/// What was agreed on when the connection was made.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Bytes of the region.
    pub size: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// The peer's backing can give ranges back.
    pub punches: bool,
    /// How long to wait for a byte.
    pub patience: Duration,
}

/// A region of another process.
pub struct Remote {
    region: RegionId,
    terms: Terms,
    socket: OwnedFd,
    /// The next tag. Held for the length of a call.
    calls: Mutex<u64>,
    lost: OnceLock<Error>,
}

/// The memory of a call: where payload comes from or goes to.
#[derive(Clone, Copy)]
enum Memory {
    None,
    From(*const u8),
    To(*mut u8),
}

impl Remote {
    /// The region at the other end of a socket whose handshake is over.
    pub fn new(socket: OwnedFd, terms: Terms) -> Result<Remote> {
        sys::prepare(socket.as_fd(), terms.patience)?;
        let (region, calls, lost) = (next_region(), Mutex::new(1), OnceLock::new());
        Ok(Remote { region, terms, socket, calls, lost })
    }

    /// Ends the connection; calls in flight fail.
    pub fn close(&self) {
        let _ = self.lost.set(Error::new(Kind::Closed, "remote", "the region was closed"));
        sys::shutdown(self.socket.as_fd());
    }

    fn writable(&self, op: &'static str, at: u64, len: u64) -> Result<()> {
        if self.terms.read_only {
            let text = "the remote region is read-only";
            return Err(Error::new(Kind::ReadOnly, op, text).at(at));
        }
        check_range(op, at, len, self.terms.size)
    }

    /// Carries a range out in requests of at most `step` bytes. Nothing is asked for an empty
    /// range, unless it is a commit, where that is all of the region.
    ///
    /// # Safety
    /// The memory must be valid for `len` bytes, or part of a mapping.
    unsafe fn call(&self, op: Op, at: u64, len: u64, step: u64, memory: Memory) -> Result<()> {
        let mut tag = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let count = len.div_ceil(step).max(u64::from(op == Op::Commit));
        let (first, mut sent, mut answered) = (*tag, 0, 0);
        *tag += count;
        let part = |n: u64| (n * step, (len - n * step).min(step));
        let mut failure = None;
        while answered < sent || (sent < count && failure.is_none()) {
            if sent < count && sent - answered < WINDOW && failure.is_none() {
                let (from, len) = part(sent);
                let header = Header::request(op, first + sent, at + from, len);
                // SAFETY: the part lies in the caller's memory.
                unsafe { self.lasting(send(self, &header, memory, from))? };
                sent += 1;
                continue;
            }
            let (from, len) = part(answered);
            let header = Header::request(op, first + answered, at + from, len);
            // SAFETY: as above.
            let answer = unsafe { self.lasting(self.answer_to(&header, memory, from))? };
            failure = failure.or(answer.err());
            answered += 1;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Receives the answer to a request: an error of the connection, or that of the peer.
    ///
    /// # Safety
    /// As for [`Remote::call`].
    unsafe fn answer_to(&self, asked: &Header, memory: Memory, from: u64) -> Result<Result<()>> {
        let header = self.header_for(asked)?;
        if header.status != 0 {
            return self.error_of(&header).map(Err);
        }
        if let (Memory::To(target), len) = (memory, header.payload as usize) {
            // SAFETY: the answer has the length that was asked for, which the memory has room for.
            let whole = unsafe {
                let target = target.wrapping_add(from as usize);
                sys::receive(self.socket.as_fd(), target, len)?
            };
            if !whole && len > 0 {
                return Err(gone());
            }
        }
        Ok(Ok(()))
    }

    fn header_for(&self, asked: &Header) -> Result<Header> {
        let mut bytes = [0; HEADER_SIZE];
        // SAFETY: the target is a local.
        if !unsafe { sys::receive(self.socket.as_fd(), bytes.as_mut_ptr(), HEADER_SIZE)? } {
            return Err(gone());
        }
        let header = Header::parse(&bytes)?;
        let expected = header.reply
            && (header.version, header.op, header.tag) == (asked.version, asked.op, asked.tag)
            && (header.status != 0 || header.len <= asked.len)
            && (header.op != Op::CopyOut || header.status != 0 || header.len == asked.len);
        if !expected {
            let text = format!(
                "{:?} {} is no answer to {:?} {}",
                header.op, header.tag, asked.op, asked.tag
            );
            return Err(Error::new(Kind::Protocol, "remote", text));
        }
        Ok(header)
    }

    fn payload_of(&self, header: &Header) -> Result<Vec<u8>> {
        let mut bytes = vec![0; header.payload as usize];
        // SAFETY: the vector has that many bytes.
        let whole = unsafe { sys::receive(self.socket.as_fd(), bytes.as_mut_ptr(), bytes.len())? };
        if !whole && !bytes.is_empty() {
            return Err(gone());
        }
        Ok(bytes)
    }

    /// The error that an answer carries.
    fn error_of(&self, header: &Header) -> Result<Error> {
        let text = self.payload_of(header)?;
        let kind = kind_of(header.status).unwrap_or(Kind::Protocol);
        let text = String::from_utf8_lossy(&text[..text.len().min(TEXT_MAX as usize)]);
        Ok(Error::new(kind, "remote", format!("the peer: {text}")).at(header.at()))
    }

    fn check(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(cause) => {
                let text = format!("the connection is lost, after: {cause}");
                Err(Error::new(Kind::Closed, "remote", text))
            }
        }
    }

    /// Remembers an error of the connection, and ends it.
    fn lasting<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            let _ = self.lost.set(error.clone());
            sys::shutdown(self.socket.as_fd());
        }
        result
    }

    fn ranged(&self, op: Op, at: u64, len: u64) -> Result<()> {
        let step = if op == Op::Commit { u64::MAX } else { RANGE_MAX };
        // SAFETY: there is no memory.
        unsafe { self.call(op, at, len, step, Memory::None) }
    }

    /// One answer of data and holes: bytes that it covers, and the runs.
    fn extents_from(&self, at: u64, len: u64) -> Result<(u64, Vec<u8>)> {
        let mut tag = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let asked = Header::request(Op::Extents, *tag, at, len);
        *tag += 1;
        // SAFETY: there is no memory.
        unsafe { self.lasting(send(self, &asked, Memory::None, 0))? };
        let header = self.lasting(self.header_for(&asked))?;
        if header.status != 0 {
            return Err(self.lasting(self.error_of(&header))?);
        }
        let runs = self.lasting(self.payload_of(&header))?;
        Ok((header.len, runs))
    }
}

/// Sends a request, with its part of the memory if it carries any.
///
/// # Safety
/// As for [`Remote::call`].
unsafe fn send(remote: &Remote, header: &Header, memory: Memory, from: u64) -> Result<()> {
    let bytes = header.encode();
    let mut parts = vec![(bytes.as_ptr(), HEADER_SIZE)];
    if let Memory::From(source) = memory {
        parts.push((source.wrapping_add(from as usize), header.payload as usize));
    }
    // SAFETY: the header is a local; the caller vouches for the rest.
    unsafe { sys::send(remote.socket.as_fd(), &parts) }
}

fn gone() -> Error {
    Error::from_errno("remote", libc::ECONNRESET, "the peer ended the connection")
}

fn not_lent(op: &'static str) -> Error {
    Error::new(Kind::NotSupported, op, "a remote region has no address in this process")
}

impl Medium for Remote {
    fn region(&self) -> RegionId {
        self.region
    }

    fn len(&self) -> u64 {
        self.terms.size
    }

    fn granularity(&self) -> Granularity {
        Granularity::Page
    }

    unsafe fn load(&self, at: u64, target: *mut u8, len: u64) -> Result<()> {
        check_range("read", at, len, self.terms.size)?;
        // SAFETY: the caller vouches for the target.
        unsafe { self.call(Op::CopyOut, at, len, u64::from(PAYLOAD_MAX), Memory::To(target)) }
    }

    unsafe fn store(&self, at: u64, source: *const u8, len: u64, _how: Store) -> Result<()> {
        self.writable("write", at, len)?;
        // SAFETY: the caller vouches for the source.
        unsafe { self.call(Op::CopyIn, at, len, u64::from(PAYLOAD_MAX), Memory::From(source)) }
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        self.writable("zero", at, len)?;
        self.ranged(Op::Zero, at, len)
    }

    fn load_u64(&self, at: u64) -> Result<u64> {
        aligned("read", at)?;
        let mut bytes = [0; 8];
        // SAFETY: the target is a local of 8 bytes.
        unsafe { self.load(at, bytes.as_mut_ptr(), 8)? };
        Ok(u64::from_le_bytes(bytes))
    }

    fn store_u64(&self, at: u64, value: u64) -> Result<()> {
        aligned("write", at)?;
        let bytes = value.to_le_bytes();
        // SAFETY: the source is a local of 8 bytes. The peer stores an aligned word as one.
        unsafe { self.store(at, bytes.as_ptr(), 8, Store::Cached) }
    }

    fn stored_elsewhere(&self, at: u64, len: u64) -> Result<()> {
        self.writable("write", at, len)?;
        if len == 0 {
            return Ok(());
        }
        Err(not_lent("write"))
    }

    fn stores_by_mapping(&self) -> bool {
        false
    }

    fn loads_by_mapping(&self) -> bool {
        false
    }

    fn blocks(&self) -> bool {
        true
    }

    fn flush(&self, at: u64, len: u64) -> Result<()> {
        check_range("flush", at, len, self.terms.size)
    }

    fn fence(&self) {}

    fn persist(&self, at: u64, len: u64) -> Result<()> {
        check_range("persist", at, len, self.terms.size)?;
        if len == 0 {
            return Ok(());
        }
        self.ranged(Op::Commit, at, len)
    }

    fn sync(&self) -> Result<()> {
        if self.terms.read_only {
            return Ok(());
        }
        self.ranged(Op::Commit, 0, 0)
    }

    fn punch(&self, at: u64, len: u64) -> Result<bool> {
        self.writable("punch", at, len)?;
        if len == 0 || !self.terms.punches {
            return Ok(self.terms.punches);
        }
        match self.ranged(Op::Punch, at, len) {
            Ok(()) => Ok(true),
            Err(error) if error.kind == Kind::NotSupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        check_range("extents", at, len, self.terms.size)?;
        let mut runs: Vec<Extent> = Vec::new();
        let mut done = 0;
        while done < len {
            let (covered, bytes) = self.extents_from(at + done, len - done)?;
            let found = bytes.chunks_exact(8).map(|run| {
                let word = run.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
                Extent { len: word & !HOLE, hole: word & HOLE != 0 }
            });
            let found: Vec<Extent> = found.collect();
            let sum = found.iter().try_fold(0u64, |sum, run| sum.checked_add(run.len));
            if covered == 0 || sum != Some(covered) || found.iter().any(|run| run.len == 0) {
                let text = format!("{} runs do not add up to {covered} bytes", found.len());
                return self.lasting(Err(Error::new(Kind::Protocol, "remote", text)));
            }
            for run in found {
                match runs.last_mut() {
                    Some(last) if last.hole == run.hole => last.len += run.len,
                    _ => runs.push(run),
                }
            }
            done += covered;
        }
        Ok(runs)
    }

    fn address(&self, _segment: &Segment) -> Result<*mut u8> {
        Err(not_lent("address"))
    }

    fn resize(&self, _len: u64) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "resize", "a remote region keeps its length"))
    }
}

/// The bit of a run that is a hole.
pub const HOLE: u64 = 1 << 63;

fn aligned(op: &'static str, at: u64) -> Result<()> {
    if at.is_multiple_of(8) {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, op, format!("byte {at} is not a multiple of 8")).at(at))
}
