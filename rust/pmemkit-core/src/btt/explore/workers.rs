//! Threads that carry the operations of a sequence out, one after the other.
//!
//! Invariants:
//! 1. A thread lives as long as its [`Workers`], so that a fence covers what it did before.
//! 2. The engine sees the same thread numbers in each run.
//!
//! What this does not do: let two threads work at the same time.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread::JoinHandle;

use crate::btt::engine::impersonate;

/// What a worker does, and why it could not.
pub type Job = Box<dyn FnOnce() -> Outcome + Send>;
type Outcome = Result<(), String>;

/// The threads.
pub struct Workers {
    queues: Vec<(Sender<Job>, Receiver<Outcome>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Threads with the numbers from 0 on.
    pub fn new(count: usize) -> Self {
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (give, take) = channel::<Job>();
            let (say, hear) = channel();
            threads.push(std::thread::spawn(move || {
                impersonate(number);
                for job in take {
                    if say.send(job()).is_err() {
                        return;
                    }
                }
            }));
            queues.push((give, hear));
        }
        Workers { queues, threads }
    }

    /// Has one thread do something, and waits for it.
    pub fn run(&self, thread: usize, job: Job) -> Outcome {
        let (give, hear) = &self.queues[thread];
        let gone = "the worker panicked";
        give.send(job).map_err(|_| gone.to_string())?;
        hear.recv().unwrap_or_else(|_| Err(gone.to_string()))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queues.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
