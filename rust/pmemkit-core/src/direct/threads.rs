//! Pieces kept in flight by threads, where io_uring is not allowed.
//!
//! Invariants:
//! 1. Threads take pieces in order, under one lock, and none after a failure.
//! 2. Each fences what it flushed before it ends.

use std::sync::{Mutex, PoisonError};
use std::thread;

use super::piece::{Failure, Job, Next, Piece};
use super::sys;
use crate::error::Result;

/// More threads than this only wait for each other.
const THREADS_MAX: u32 = 8;

/// What the threads share.
#[derive(Default)]
struct Progress {
    /// Where the next piece starts.
    next: u64,
    failure: Option<Failure>,
}

/// Carries a transfer out.
pub fn run(job: &Job<'_>) -> std::result::Result<(), Failure> {
    let progress = Mutex::new(Progress::default());
    let pieces = job.len.div_ceil(job.copier.options.piece);
    let count = u64::from(job.copier.options.depth.min(THREADS_MAX)).min(pieces);
    thread::scope(|scope| {
        for _ in 1..count {
            // One that cannot be started is one less: the others take its pieces.
            let _ = thread::Builder::new().spawn_scoped(scope, || work(job, &progress));
        }
        work(job, &progress);
    });
    progress.into_inner().unwrap_or_else(PoisonError::into_inner).failure.map_or(Ok(()), Err)
}

fn work(job: &Job<'_>, progress: &Mutex<Progress>) {
    while let Some(mut piece) = take(job, progress) {
        if let Err(error) = carry(job, &mut piece) {
            let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
            if progress.failure.as_ref().is_none_or(|(moved, _)| piece.start < *moved) {
                progress.failure = Some((piece.start, error));
            }
        }
    }
    job.medium.fence();
}

fn take(job: &Job<'_>, progress: &Mutex<Progress>) -> Option<Piece> {
    let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
    if progress.failure.is_some() || progress.next >= job.len {
        return None;
    }
    let piece = job.piece(progress.next);
    progress.next = piece.end();
    Some(piece)
}

fn carry(job: &Job<'_>, piece: &mut Piece) -> Result<()> {
    loop {
        let call = job.prepare(piece)?;
        let way = job.copier.way;
        // SAFETY: the memory is the piece's buffer or part of the medium's mapping.
        let outcome = unsafe { sys::move_once(call.fd, way, call.memory, call.len, call.file_at) };
        if matches!(job.settle(piece, outcome)?, Next::Done) {
            return Ok(());
        }
    }
}
