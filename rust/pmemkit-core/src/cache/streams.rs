//! Finds readers that go through the device in order, and says how far to read ahead of them.
//!
//! It is asked on misses only: a stream that is read ahead misses once a window, exactly where
//! the last window ended.
//!
//! What this does not do: read.

/// Streams that are followed at a time; the one that was quiet longest makes room.
const STREAMS: usize = 16;
/// Blocks read ahead of a stream that was just found; each window doubles.
const FIRST: u64 = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The block that it misses next, if it goes on.
    next: u64,
    window: u64,
    used: u64,
}

/// The streams of a cache.
#[derive(Debug)]
pub struct Streams {
    streams: [Stream; STREAMS],
    most: u64,
    turn: u64,
}

impl Streams {
    /// Nothing is known. No window is larger than `most` blocks.
    pub fn new(most: u64) -> Self {
        Streams {
            streams: [Stream { next: u64::MAX, ..Stream::default() }; STREAMS],
            most,
            turn: 0,
        }
    }

    /// `count` blocks from `first` are missed: how many to read behind them.
    pub fn missed(&mut self, first: u64, count: u64) -> u64 {
        if self.most == 0 {
            return 0;
        }
        self.turn += 1;
        let known = self.streams.iter_mut().find(|stream| stream.next == first);
        let (stream, window) = match known {
            Some(stream) => {
                let window = (stream.window * 2).clamp(FIRST, self.most.max(FIRST));
                (stream, window.min(self.most))
            }
            None => {
                let quiet = self.streams.iter_mut().min_by_key(|stream| stream.used);
                let Some(stream) = quiet else { return 0 };
                (stream, 0)
            }
        };
        *stream = Stream { next: first + count + window, window, used: self.turn };
        window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_a_stream_double_and_others_have_none() {
        let mut streams = Streams::new(32);
        let mut at = 100;
        let mut windows = Vec::new();
        for turn in 0..6 {
            let window = streams.missed(at, 1);
            windows.push(window);
            at += 1 + window;
            assert_eq!(streams.missed(1_000_000 + 7919 * turn, 1), 0);
        }
        assert_eq!(windows, [0, 4, 8, 16, 32, 32]);
        assert_eq!(Streams::new(0).missed(5, 1), 0);
    }
}
