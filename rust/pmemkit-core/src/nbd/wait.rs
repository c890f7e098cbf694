//! How long to poll a socket before blocking on it.
//!
//! Waking up after a blocking receive is most of the cost of a request at queue depth 1, so it pays
//! to poll for a short time when the next request usually comes soon. It must cost nothing when it
//! does not: polling is given up as soon as it stops paying, and taken up again when a blocking
//! wait turns out to have been short.
//!
//! The other half is patience: looking at the socket while the client is still filling it makes
//! both sides fight over its queue, and splits what could be one batch. After a batch of several
//! requests the next look is put off by a little time for each of them.
//!
//! Invariants:
//! 1. One wait polls at most `poll_ns_max`, and is put off at most for the [`Patience`] of each
//!    request just answered: an idle connection waits for nothing.
//! 2. After [`MISSES_ALLOWED`] waits in a row in which polling did not pay, no wait polls until a
//!    blocking one ends within `RESUME_FACTOR * poll_ns_max`.
//! 3. [`BUSY`] counts the connections of this process that are not idle in this sense.
//!
//! What this does not do: sleep, choose among sockets.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

/// Fruitless polls in a row before polling stops.
const MISSES_ALLOWED: u32 = 4;
/// A blocking wait that ended within this many times the polling time starts polling again: waking
/// up from it took longer than the wait itself.
const RESUME_FACTOR: u64 = 3;

/// A batch below this many requests comes from a client that waits for each answer: no patience.
const GATHER_REQUESTS_MIN: u64 = 4;

/// How long the next look at a socket is put off.
struct Patience {
    /// For each request of the last batch but writes.
    ns_each: u64,
    /// For each write of the last batch: its client sends two pieces and gets a short answer, and
    /// is sooner out of things to do.
    ns_write: u64,
    /// At most.
    ns_max: u64,
}

/// With CPUs to spare. Measured with one connection on two CPUs against the short one: 5 to 10 %
/// more operations at queue depth 16 and 64.
const LONG: Patience = Patience { ns_each: 1500, ns_write: 1000, ns_max: 40_000 };
/// With more busy connections than CPUs for them and their clients: waiting takes a CPU away from a
/// client. Measured with two connections on two CPUs: 12 % more operations than with the long one.
const SHORT: Patience = Patience { ns_each: 500, ns_write: 500, ns_max: 12_000 };

/// Connections of this process that are not idle.
static BUSY: AtomicUsize = AtomicUsize::new(0);

/// True when every busy connection and its client can have a CPU.
fn cpus_to_spare() -> bool {
    static CPUS: OnceLock<usize> = OnceLock::new();
    let cpus = *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    BUSY.load(Ordering::Relaxed) * 2 <= cpus
}

/// The state of one connection's polling.
#[derive(Debug)]
pub struct Polling {
    poll_ns_max: u64,
    misses: u32,
    /// Counted in [`BUSY`].
    busy: bool,
}

impl Polling {
    /// Polls at most this long; 0 never polls.
    pub fn new(poll_ns_max: u64) -> Self {
        Polling { poll_ns_max, misses: 0, busy: false }
    }

    /// How long the next wait may poll.
    pub fn budget_ns(&self) -> u64 {
        if self.misses < MISSES_ALLOWED {
            self.poll_ns_max
        } else {
            0
        }
    }

    /// How long to leave the socket alone after answering `writes` writes and `others` other
    /// requests in one go.
    pub fn gather_ns(&self, writes: u32, others: u32) -> u64 {
        let (writes, others) = (u64::from(writes), u64::from(others));
        if self.poll_ns_max == 0 || writes + others < GATHER_REQUESTS_MIN {
            return 0;
        }
        let patience = if cpus_to_spare() { LONG } else { SHORT };
        (writes * patience.ns_write + others * patience.ns_each).min(patience.ns_max)
    }

    /// Says that data came while polling.
    pub fn hit(&mut self) {
        self.misses = 0;
        self.count(true);
    }

    /// Says that the wait had to block, and how long it took in all.
    pub fn blocked(&mut self, waited_ns: u64) {
        if waited_ns <= RESUME_FACTOR * self.poll_ns_max {
            return self.hit();
        }
        self.misses = self.misses.saturating_add(1);
        if self.misses >= MISSES_ALLOWED {
            self.count(false);
        }
    }

    fn count(&mut self, busy: bool) {
        if busy && !self.busy {
            BUSY.fetch_add(1, Ordering::Relaxed);
        } else if !busy && self.busy {
            BUSY.fetch_sub(1, Ordering::Relaxed);
        }
        self.busy = busy;
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        self.count(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_stops_polling() {
        let mut polling = Polling::new(20_000);
        for _ in 0..MISSES_ALLOWED {
            assert_eq!(polling.budget_ns(), 20_000);
            polling.blocked(1_000_000_000);
        }
        assert_eq!(polling.budget_ns(), 0);
    }

    #[test]
    fn a_short_wait_takes_polling_up_again() {
        let mut polling = Polling::new(20_000);
        for _ in 0..10 {
            polling.blocked(1_000_000);
        }
        polling.blocked(25_000);
        assert_eq!(polling.budget_ns(), 20_000);
        polling.hit();
        assert_eq!(polling.budget_ns(), 20_000);
    }

    #[test]
    fn patience_is_earned_by_requests_and_bounded() {
        let polling = Polling::new(20_000);
        assert_eq!(polling.gather_ns(1, 1), 0);
        let eight = polling.gather_ns(0, 8);
        assert!([8 * LONG.ns_each, 8 * SHORT.ns_each].contains(&eight), "{eight}");
        let many = polling.gather_ns(u32::MAX, u32::MAX);
        assert!([LONG.ns_max, SHORT.ns_max].contains(&many), "{many}");
        assert_eq!(Polling::new(0).gather_ns(32, 32), 0);
    }

    #[test]
    fn a_connection_counts_as_busy_until_it_idles_or_ends() {
        let mut polling = Polling::new(20_000);
        assert!(!polling.busy);
        polling.hit();
        polling.hit();
        assert!(polling.busy);
        for _ in 0..MISSES_ALLOWED {
            polling.blocked(1_000_000_000);
        }
        assert!(!polling.busy);
    }

    #[test]
    fn no_budget_means_no_polling() {
        let mut polling = Polling::new(0);
        polling.blocked(0);
        assert_eq!(polling.budget_ns(), 0);
    }
}
