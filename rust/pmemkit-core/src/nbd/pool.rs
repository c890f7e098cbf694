//! The small pool that carries out a connection's requests that may block, so that one slow request
//! does not hold up the ones behind it. Replies leave in the order of completion.
//!
//! Invariants:
//! 1. At most [`QUEUE_LEN_MAX`] requests and [`QUEUE_BYTES_MAX`] of their payload wait; whoever
//!    submits more waits, and with it the client.
//! 2. A submitted job is answered, or the connection is dead: `drain` returns when none is left.
//! 3. Workers start when the first job comes, so a connection without slow requests has none.
//!
//! Lock order: `queue` before the connection's send lock; no worker holds `queue` while it works.
//!
//! What this does not do: decide which requests may block.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::parse::Accepted;

/// Jobs that may wait for a worker.
const QUEUE_LEN_MAX: usize = 128;
/// Payload bytes that may wait for a worker; one larger job still gets through alone.
const QUEUE_BYTES_MAX: usize = 64 << 20;

/// A request handed to the pool, with its write payload.
pub struct Job {
    /// The request.
    pub accepted: Accepted,
    /// Its payload; empty for everything but writes.
    pub payload: Vec<u8>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    bytes: usize,
    running: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker does with a job. Called from several threads at once.
pub type Work = Arc<dyn Fn(Job) + Send + Sync>;

/// The workers of one connection.
pub struct Pool {
    shared: Arc<Shared>,
    work: Work,
    workers_max: usize,
    workers: Vec<JoinHandle<u64>>,
}

impl Pool {
    /// A pool of at most `workers_max` threads, none of them started yet.
    pub fn new(workers_max: usize, work: Work) -> Self {
        Pool { shared: Arc::default(), work, workers_max, workers: Vec::new() }
    }

    /// True when there can be workers at all.
    pub fn is_enabled(&self) -> bool {
        self.workers_max > 0
    }

    /// Hands a job over; waits while the queue is full.
    pub fn submit(&mut self, job: Job) -> std::io::Result<()> {
        let bytes = job.payload.len();
        let mut queue = self.shared.lock();
        while queue.jobs.len() >= QUEUE_LEN_MAX
            || (queue.bytes > 0 && queue.bytes + bytes > QUEUE_BYTES_MAX)
        {
            queue = self.shared.wait(queue);
        }
        queue.bytes += bytes;
        queue.jobs.push_back(job);
        let wanted = queue.running + queue.jobs.len();
        drop(queue);
        self.shared.changed.notify_all();
        if self.workers.len() < self.workers_max.min(wanted) {
            self.start_worker()?;
        }
        Ok(())
    }

    fn start_worker(&mut self) -> std::io::Result<()> {
        let (shared, work) = (self.shared.clone(), self.work.clone());
        let thread = std::thread::Builder::new().name("pmemkit-nbd-pool".into());
        match thread.spawn(move || work_until_closed(&shared, &work)) {
            Ok(handle) => self.workers.push(handle),
            // With a worker running the job will be done, only later.
            Err(_) if !self.workers.is_empty() => {}
            Err(cause) => return Err(cause),
        }
        Ok(())
    }

    /// Waits until every job is done.
    pub fn drain(&self) {
        let mut queue = self.shared.lock();
        while !self.workers.is_empty() && (!queue.jobs.is_empty() || queue.running > 0) {
            queue = self.shared.wait(queue);
        }
    }

    /// Finishes every job, ends the workers and returns their CPU nanoseconds.
    pub fn close(self) -> u64 {
        self.drain();
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        self.workers.into_iter().map(|worker| worker.join().unwrap_or(0)).sum()
    }
}

fn work_until_closed(shared: &Shared, work: &Work) -> u64 {
    let mut queue = shared.lock();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            queue.running += 1;
            drop(queue);
            let bytes = job.payload.len();
            work(job);
            queue = shared.lock();
            queue.bytes -= bytes;
            queue.running -= 1;
            shared.changed.notify_all();
        } else if queue.closed {
            return super::sys::thread_cpu_ns();
        } else {
            queue = shared.wait(queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Flags, Op};
    use crate::nbd::parse::{Command, Header};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn job(bytes: usize) -> Job {
        let header = Header { flags: 0, command: 3, cookie: 0, offset: 0, len: 0 };
        let accepted = Accepted { command: Command::Io(Op::Flush), flags: Flags::empty(), header };
        Job { accepted, payload: vec![0; bytes] }
    }

    #[test]
    fn every_job_is_done_before_close_returns() {
        let done = Arc::new(AtomicUsize::new(0));
        let counter = done.clone();
        let work: Work = Arc::new(move |_| {
            std::thread::yield_now();
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let mut pool = Pool::new(3, work);
        for _ in 0..1000 {
            pool.submit(job(1 << 20)).unwrap();
        }
        pool.drain();
        assert_eq!(done.load(Ordering::SeqCst), 1000);
        pool.submit(job(QUEUE_BYTES_MAX + 1)).unwrap();
        pool.close();
        assert_eq!(done.load(Ordering::SeqCst), 1001);
    }

    #[test]
    fn slow_jobs_run_side_by_side() {
        let gate = Arc::new(std::sync::Barrier::new(2));
        let inner = gate.clone();
        // Both jobs must be inside at once, or neither gets out.
        let work: Work = Arc::new(move |_| {
            inner.wait();
        });
        let mut pool = Pool::new(2, work);
        pool.submit(job(0)).unwrap();
        pool.submit(job(0)).unwrap();
        pool.close();
    }
}
