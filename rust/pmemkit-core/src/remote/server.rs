//! One connection of a client to a region of ours, after the handshake.
//!
//! Invariants:
//! 1. Requests are answered one after the other, in order; an answer says what was done, and a
//!    commit is answered when the range is durable here.
//! 2. Payload is received whole before a byte of it is stored: a client that dies in the middle of
//!    a message changed nothing with it.
//! 3. A header that does not parse ends the connection. One that parses and asks for what may not
//!    be is answered with an error, after its payload was taken.
//! 4. Memory of a connection is one buffer of the largest payload.
//!
//! What this does not do: negotiate, authenticate, serve two requests of a client at once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::client::HOLE;
use super::sys;
use super::wire::{
    status_of, Header, Op, EXTENTS_MAX, HEADER_SIZE, PAYLOAD_MAX, TEXT_MAX, VERSION,
};
use crate::error::{Error, Kind, Result};
use crate::media::{check_range, Extent, Medium, Store};

/// What one connection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests, refused ones included.
    pub requests: u64,
    /// Bytes copied out.
    pub bytes_out: u64,
    /// Bytes copied in.
    pub bytes_in: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Why it ended.
    pub reason: String,
}

/// One connection.
pub struct Server {
    socket: OwnedFd,
    medium: Arc<dyn Medium>,
    read_only: bool,
    stopped: AtomicBool,
}

impl Server {
    /// A connection whose handshake is over.
    pub fn new(socket: OwnedFd, medium: Arc<dyn Medium>, read_only: bool) -> Result<Server> {
        sys::prepare(socket.as_fd(), Duration::ZERO)?;
        Ok(Server { socket, medium, read_only, stopped: AtomicBool::new(false) })
    }

    /// Answers until the client goes, breaks the protocol or [`Server::stop`] is called.
    pub fn serve(&self) -> Totals {
        let mut totals = Totals::default();
        let mut buffer = vec![0; PAYLOAD_MAX as usize];
        totals.reason = loop {
            match self.one(&mut buffer, &mut totals) {
                Ok(true) => {}
                Ok(false) => break "eof".to_owned(),
                Err(_) if self.stopped.load(Ordering::Acquire) => break "stopped".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        if self.stopped.load(Ordering::Acquire) {
            totals.reason = "stopped".to_owned();
        }
        // Whoever is still sending learns that nobody listens.
        sys::shutdown(self.socket.as_fd());
        totals
    }

    /// Makes [`Server::serve`] return.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        sys::shutdown(self.socket.as_fd());
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives a request and answers it. False at the end of the stream.
    fn one(&self, buffer: &mut [u8], totals: &mut Totals) -> Result<bool> {
        let mut bytes = [0; HEADER_SIZE];
        // SAFETY: the target is a local.
        if !unsafe { sys::receive(self.fd(), bytes.as_mut_ptr(), HEADER_SIZE)? } {
            return Ok(false);
        }
        let request = Header::parse(&bytes)?;
        if request.reply || request.version != VERSION || request.op == Op::Hello {
            let Header { op, version, reply, .. } = request;
            let text = format!("{op:?} of version {version}, reply {reply}: not a request here");
            return Err(Error::new(Kind::Protocol, "remote", text));
        }
        let payload = request.payload as usize;
        // SAFETY: the header was checked: the payload is no longer than the buffer.
        if payload > 0 && !unsafe { sys::receive(self.fd(), buffer.as_mut_ptr(), payload)? } {
            return Ok(false);
        }
        totals.requests += 1;
        match self.carry_out(&request, buffer) {
            Ok(answer) => {
                totals.bytes_in += u64::from(request.payload);
                totals.bytes_out += if request.op == Op::CopyOut { request.len } else { 0 };
                self.send(&answer, &buffer[..answer.payload as usize])?;
            }
            Err(error) => {
                totals.errors += 1;
                self.refuse(&request, &error)?;
            }
        }
        Ok(true)
    }

    fn send(&self, header: &Header, payload: &[u8]) -> Result<()> {
        let bytes = header.encode();
        // SAFETY: both are slices.
        unsafe {
            let parts = [(bytes.as_ptr(), bytes.len()), (payload.as_ptr(), payload.len())];
            sys::send(self.fd(), &parts)
        }
    }

    fn refuse(&self, request: &Header, error: &Error) -> Result<()> {
        let text = error.to_string();
        let len = (0..=text.len().min(TEXT_MAX as usize)).rev().find(|&n| text.is_char_boundary(n));
        let text = &text.as_bytes()[..len.unwrap_or(0)];
        let answer = Header { status: status_of(error.kind), ..request.answer(text.len() as u32) };
        self.send(&answer, text)
    }

    /// Carries a request out; the answer's payload is in the buffer then.
    fn carry_out(&self, request: &Header, buffer: &mut [u8]) -> Result<Header> {
        let (at, len) = (request.at(), request.len);
        let writes = matches!(request.op, Op::CopyIn | Op::Zero | Op::Punch);
        if writes && self.read_only {
            return Err(Error::new(Kind::ReadOnly, "write", "the export is read-only").at(at));
        }
        check_range("remote", at, len, self.medium.len())?;
        match request.op {
            Op::CopyOut => {
                // SAFETY: the header was checked: the buffer has room for `len` bytes.
                unsafe { self.medium.load(at, buffer.as_mut_ptr(), len)? };
                return Ok(request.answer(len as u32));
            }
            Op::CopyIn => self.copy_in(at, &buffer[..len as usize])?,
            Op::Commit if len == 0 => self.medium.sync()?,
            Op::Commit => self.medium.persist(at, len)?,
            Op::Zero => self.medium.zero(at, len)?,
            Op::Punch => {
                if !self.medium.punch(at, len)? {
                    let text = "the backing cannot give anything back";
                    return Err(Error::new(Kind::NotSupported, "punch", text).at(at));
                }
            }
            Op::Extents => return self.extents(request, buffer),
            Op::Hello => {}
        }
        // A commit of another connection must find what this thread stored.
        self.medium.fence();
        Ok(request.answer(0))
    }

    /// An aligned word is stored as one, which power failure cannot tear.
    fn copy_in(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if let (Ok(word), true) = (<[u8; 8]>::try_from(bytes), at.is_multiple_of(8)) {
            self.medium.store_u64(at, u64::from_le_bytes(word))?;
            return self.medium.flush(at, 8);
        }
        // SAFETY: a slice is valid for its length.
        unsafe { self.medium.store(at, bytes.as_ptr(), bytes.len() as u64, Store::Auto) }
    }

    fn extents(&self, request: &Header, buffer: &mut [u8]) -> Result<Header> {
        let mut runs: Vec<Extent> = self.medium.extents(request.at(), request.len)?;
        runs.truncate(EXTENTS_MAX);
        for (run, place) in runs.iter().zip(buffer.chunks_exact_mut(8)) {
            let word = run.len | if run.hole { HOLE } else { 0 };
            place.copy_from_slice(&word.to_le_bytes());
        }
        let covered = runs.iter().map(|run| run.len).sum();
        let answer = request.answer((runs.len() * 8) as u32);
        Ok(Header { len: covered, ..answer })
    }
}
