//! Pieces kept in flight by io_uring, all from one thread.
//!
//! Invariants:
//! 1. `in_flight` entries were handed to the kernel and have not come back; the function does not
//!    return before it is zero, whatever fails.

use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::{opcode, types, IoUring};

use super::piece::{Call, Failure, Job, Next, Piece};
use super::Way;
use crate::error::{Error, Kind};

/// How long to wait before a ring is asked again that refused to take or give entries.
const PAUSE: Duration = Duration::from_millis(1);

struct Run<'r, 'j> {
    ring: &'r mut IoUring,
    job: &'r Job<'j>,
    /// Pieces by the number that their entries carry.
    pieces: Vec<Option<Piece>>,
    in_flight: usize,
    failure: Option<Failure>,
}

/// Carries a transfer out.
pub fn run(ring: &mut IoUring, job: &Job<'_>) -> Result<(), Failure> {
    let depth = job.copier.options.depth as usize;
    let pieces = (0..depth).map(|_| None).collect();
    let mut run = Run { ring, job, pieces, in_flight: 0, failure: None };
    let mut next = 0;
    loop {
        while run.failure.is_none() && next < job.len {
            let Some(slot) = run.pieces.iter().position(Option::is_none) else { break };
            let piece = job.piece(next);
            next = piece.end();
            run.pieces[slot] = Some(piece);
            run.call(slot);
        }
        if run.in_flight == 0 {
            return run.failure.map_or(Ok(()), Err);
        }
        run.wait();
    }
}

impl Run<'_, '_> {
    /// Puts the next call of a piece on the ring.
    fn call(&mut self, slot: usize) {
        let Some(piece) = self.pieces[slot].as_mut() else { return };
        match self.job.prepare(piece) {
            Ok(call) => {
                let entry = entry_of(&call, self.job.copier.way).user_data(slot as u64);
                // SAFETY: the memory belongs to the piece or to the medium, and both stay until
                // the entry came back.
                let pushed = unsafe { self.ring.submission().push(&entry) };
                match pushed {
                    Ok(()) => self.in_flight += 1,
                    Err(_) => self.fail(slot, Error::new(Kind::Busy, "copy", "the ring is full")),
                }
            }
            Err(error) => self.fail(slot, error),
        }
    }

    /// Submits what is on the ring and looks at what came back.
    fn wait(&mut self) {
        if self.ring.submit_and_wait(1).is_err() {
            // Interrupted, or short of memory for the moment: what is in flight comes back anyway.
            std::thread::sleep(PAUSE);
        }
        let back: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, outcome) in back {
            self.in_flight -= 1;
            let slot = slot as usize;
            let Some(piece) = self.pieces.get_mut(slot).and_then(Option::as_mut) else { continue };
            match self.job.settle(piece, i64::from(outcome)) {
                Ok(Next::Again) => self.call(slot),
                Ok(Next::Done) => self.pieces[slot] = None,
                Err(error) => self.fail(slot, error),
            }
        }
    }

    fn fail(&mut self, slot: usize, error: Error) {
        let Some(piece) = self.pieces[slot].take() else { return };
        if self.failure.as_ref().is_none_or(|(moved, _)| piece.start < *moved) {
            self.failure = Some((piece.start, error));
        }
    }
}

fn entry_of(call: &Call<'_>, way: Way) -> io_uring::squeue::Entry {
    let fd = types::Fd(call.fd.as_raw_fd());
    // A piece is far shorter than this.
    let len = u32::try_from(call.len).unwrap_or(u32::MAX);
    match way {
        Way::In => opcode::Read::new(fd, call.memory, len).offset(call.file_at).build(),
        Way::Out => opcode::Write::new(fd, call.memory, len).offset(call.file_at).build(),
    }
}
