//! The handler threads: what happens between a fault and the moment its thread goes on.
//!
//! Invariants:
//! 1. A message that was taken is answered: its page is resolved or fails, or the range is gone,
//!    and then its waiters are woken. One that is dropped is of a page that somebody asks for at
//!    this moment, who will wake its waiters after the drop.
//! 2. A page that can be stored to is in `dirty`, where writes are tracked: `insert` and the call
//!    that lifts the protection stand under `protecting`, as do `protect` and `remove`.
//! 3. Mappings inside the range are replaced under `placing`, behind `len` only by what fails.
//! 4. A provider that panics is one that failed.
//!
//! Lock order: `protecting` or `placing`, never both; those of `pages` are taken last and alone.
//!
//! What this does not do: know what pages are.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::pages::{Asked, Failures, PageSet};
use super::sys;
use super::{Answer, Ask, Content, PfnProvider, Run};
use crate::error::{Error, Kind, Result};
use crate::uffd::{Message, Progress, Uffd};

/// Messages that a thread takes at once when it has no colleague to leave some for.
const BATCH: usize = 16;
/// Looks in a row that found nothing in time, before a thread sleeps at once.
const MISSES_ALLOWED: u32 = 4;

/// What is done, counted since the mapping was made.
#[derive(Default)]
pub(super) struct Counters {
    pub faults: AtomicU64,
    pub write_faults: AtomicU64,
    pub minor_faults: AtomicU64,
    pub asked: AtomicU64,
    pub bytes_placed: AtomicU64,
    pub failures: AtomicU64,
}

/// What handler threads and the mapping share.
pub(super) struct Shared {
    pub uffd: Uffd,
    pub bell: OwnedFd,
    /// A file without a byte: its pages fail.
    pub nothing: OwnedFd,
    pub provider: Arc<dyn PfnProvider>,
    /// Where the range starts.
    pub base: u64,
    /// Bytes of the range, whole pages.
    pub whole: u64,
    /// Bytes that there are, which is what shrinks.
    pub len: AtomicU64,
    /// Bytes of a page of this mapping.
    pub page: u64,
    /// Bytes of a page of its memory.
    pub small: u64,
    pub around: u64,
    pub threads: usize,
    pub poll_ns: u64,
    pub read_only: bool,
    pub tracked: bool,
    /// The memory can be replaced page by page: it is small pages of this process alone.
    pub replaceable: bool,
    /// The memory is this mapping's alone.
    pub private: bool,
    /// Zeroes need no buffer.
    pub zeroes: bool,
    /// Pages can be made to fail.
    pub poison: bool,
    /// What the range is registered for.
    pub mode: u64,
    pub stopping: AtomicBool,
    /// Why faults are not heard any more, if they are not.
    pub lost: OnceLock<Error>,
    pub asked: Asked,
    pub failures: Failures,
    pub dirty: PageSet,
    pub protecting: Mutex<()>,
    /// The runs of pages that are mapped from elsewhere, by their first page.
    pub placing: Mutex<HashSet<u64>>,
    pub counters: Counters,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer of whole pages that a provider fills. It belongs to one thread.
pub(super) struct Frames(Vec<u8>);

impl Frames {
    pub fn new(shared: &Shared) -> Frames {
        Frames(vec![0; (shared.around * shared.page) as usize])
    }
}

/// What came of an attempt to put pages in place.
enum Placed {
    /// They are there.
    Whole,
    /// The kernel could not read the source.
    Unreadable,
    /// The range is gone.
    Gone,
    /// Another errno.
    Failed(i32),
}

impl Shared {
    /// What one handler thread does.
    pub fn serve(&self) {
        let mut frames = Frames::new(self);
        let mut messages = [Message::default(); BATCH];
        let most = if self.threads == 1 { BATCH } else { 1 };
        let mut misses = 0;
        while let Some(count) = self.next(&mut messages[..most], &mut misses) {
            for message in &messages[..count] {
                self.answer(message, &mut frames);
            }
        }
    }

    /// Waits for messages; `None` when it is time to stop. After a fault the next one is often
    /// soon: to look again for a while costs less than to sleep and be woken. It is left when it
    /// does not pay, until a sleep turns out to have been short.
    fn next(&self, messages: &mut [Message], misses: &mut u32) -> Option<usize> {
        let begun = Instant::now();
        let mut slept = false;
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            match self.uffd.take(messages) {
                Ok(count) if count > 0 => {
                    if !slept || begun.elapsed().as_nanos() as u64 <= self.poll_ns {
                        *misses = 0;
                    }
                    return Some(count);
                }
                Ok(_) | Err(libc::EAGAIN | libc::EINTR) => {}
                Err(errno) => {
                    self.give_up(errno);
                    return None;
                }
            }
            let looks = *misses < MISSES_ALLOWED;
            if looks && !slept && (begun.elapsed().as_nanos() as u64) < self.poll_ns {
                // Whoever has work to do goes first.
                std::thread::yield_now();
                continue;
            }
            *misses = misses.saturating_add(u32::from(!slept));
            slept = true;
            self.uffd.wait(&self.bell);
        }
    }

    /// Nobody will answer any more: every touch fails, and who waits hears of it.
    fn give_up(&self, errno: i32) {
        let error = Error::from_errno("fault", errno, "the faults of the mapping cannot be heard");
        let _first = self.lost.set(error);
        self.sweep(0, self.whole);
    }

    /// From now on every touch of the range fails, and who waits in it goes on. False where the
    /// kernel would not.
    pub fn sweep(&self, at: u64, len: u64) -> bool {
        let _placing = locked(&self.placing);
        // SAFETY: the range is inside the mapping, which lives as long as this.
        let done = unsafe { sys::map_nothing(self.nothing.as_fd(), self.base + at, len) };
        self.wake_range(self.base + at, len);
        done.is_ok()
    }

    fn answer(&self, message: &Message, frames: &mut Frames) {
        let Some(address) = message.address() else { return };
        let page = address.wrapping_sub(self.base) / self.page;
        if message.is_protected() {
            self.counters.write_faults.fetch_add(1, Ordering::Relaxed);
            self.write_fault(page);
        } else if message.is_minor() {
            self.counters.minor_faults.fetch_add(1, Ordering::Relaxed);
            self.minor_fault(address / self.small * self.small, message.is_write());
        } else {
            self.counters.faults.fetch_add(1, Ordering::Relaxed);
            self.missing(page, message.is_write(), frames);
        }
    }

    fn start(&self, run: Run) -> (u64, u64) {
        (self.base + run.first * self.page, run.count * self.page)
    }

    fn wake(&self, run: Run) {
        let (start, len) = self.start(run);
        self.wake_range(start, len);
    }

    /// Lets whoever waits in a range of addresses look again.
    pub fn wake_range(&self, start: u64, len: u64) {
        // The range is one of the address space, which is all that is asked of it.
        let _woken = self.uffd.wake(start, len);
    }

    /// The pages that are asked for with this one.
    fn around(&self, page: u64) -> Run {
        if self.around == 1 {
            return Run::one(page);
        }
        let first = page / self.around * self.around;
        let pages = self.len.load(Ordering::Acquire).div_ceil(self.page);
        Run { first, count: self.around.min(pages.saturating_sub(first)).max(page + 1 - first) }
    }

    /// Finds out what a page is that is not there, and puts it in place.
    pub fn missing(&self, page: u64, write: bool, frames: &mut Frames) {
        let run = self.around(page);
        // One thread alone cannot meet another that asks for the same.
        let alone = self.threads == 1;
        if !alone && !self.asked.begin(page, run) {
            return;
        }
        let ask = Ask { page, run, bytes_only: false };
        let answer = self.ask(&ask, frames);
        if !alone {
            self.asked.end(run);
        }
        self.settle(&ask, answer, write, frames);
        if run.count > 1 {
            // Who touched a page around this one may have been dropped meanwhile.
            self.wake(run);
        }
    }

    fn ask(&self, ask: &Ask, frames: &mut Frames) -> Result<Answer> {
        self.counters.asked.fetch_add(1, Ordering::Relaxed);
        let into = &mut frames.0[..(ask.run.count * self.page) as usize];
        let answer = guarded(|| self.provider.provide(ask, into));
        match answer {
            Err(_) if ask.run.count > 1 => {
                // Which of the pages failed is not said: the one that somebody waits for counts.
                let single = Ask { run: Run::one(ask.page), ..*ask };
                let place = ((ask.page - ask.run.first) * self.page) as usize;
                let into = &mut into[place..place + self.page as usize];
                guarded(|| self.provider.provide(&single, into))
            }
            answer => answer,
        }
    }

    /// Refuses an answer that would reach past what was asked for.
    fn check(&self, ask: &Ask, answer: &Answer) -> Result<()> {
        let run = answer.run;
        let inside = run.first >= ask.run.first
            && run.first.checked_add(run.count).is_some_and(|end| end <= ask.run.end());
        let mapped = matches!(answer.content, Content::Mapped(_));
        let fits =
            run.first.checked_add(run.count).is_some_and(|end| end <= self.whole / self.page);
        if run.count > 0 && run.has(ask.page) && fits && (inside || mapped) {
            return Ok(());
        }
        let (first, count) = (run.first, run.count);
        let text = format!("asked for page {}: an answer for {count} from page {first}", ask.page);
        Err(Error::new(Kind::Invalid, "fault", text))
    }

    /// Does what an answer says, and sees to it that the waiters of its page go on.
    fn settle(&self, ask: &Ask, answer: Result<Answer>, write: bool, frames: &mut Frames) {
        let answer = answer.and_then(|answer| self.check(ask, &answer).map(|()| answer));
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return self.fail(ask.page, error),
        };
        let placed = match answer.content {
            Content::Mapped(address) => self.map_here(answer.run, address.0),
            _ => self.place(ask, &answer, write, frames),
        };
        match placed {
            Placed::Whole | Placed::Gone => {
                self.failures.remove(answer.run);
                if answer.run.count > 1 {
                    self.wake(answer.run);
                }
            }
            Placed::Unreadable if matches!(answer.content, Content::At(_)) && !ask.bytes_only => {
                let again = Ask { run: Run::one(ask.page), bytes_only: true, ..*ask };
                let answer = self.ask(&again, frames);
                self.settle(&again, answer, write, frames);
            }
            Placed::Unreadable => self.fail(ask.page, unreadable()),
            Placed::Failed(errno) => {
                let mut error = Error::from_errno("fault", errno, "putting a page in place");
                if errno == libc::ENOMEM {
                    error.kind = Kind::NoSpace;
                }
                self.fail(ask.page, error);
            }
        }
    }

    /// Puts pages in place; those that are not waited for are protected, where writes are tracked.
    fn place(&self, ask: &Ask, answer: &Answer, write: bool, frames: &mut Frames) -> Placed {
        let (start, len) = self.start(answer.run);
        let single = answer.run.count == 1;
        let may_write = write && self.tracked && self.provider.may_write(ask.page).is_ok();
        if may_write && single {
            let _protecting = locked(&self.protecting);
            self.dirty.insert(ask.page);
            return self.put(ask, answer, (start, len), false, frames);
        }
        self.put(ask, answer, (start, len), self.tracked, frames)
    }

    /// One system call, as a rule: where a page is there already it is passed over.
    fn put(
        &self,
        ask: &Ask,
        answer: &Answer,
        (start, len): (u64, u64),
        protect: bool,
        frames: &mut Frames,
    ) -> Placed {
        let wake = answer.run.count == 1;
        let offset = (answer.run.first - ask.run.first) * self.page;
        let source = match answer.content {
            Content::At(address) => address.0 as u64,
            Content::Zero if self.zeroes && !protect && !ask.bytes_only => {
                return self.each(start, len, |at, len| self.uffd.zero(start + at, len, wake));
            }
            Content::Cached => {
                let call = |at, len| self.uffd.proceed(start + at, len, protect, wake);
                return self.each(start, len, call);
            }
            Content::Zero => {
                let place = offset as usize;
                frames.0[place..place + len as usize].fill(0);
                frames.0.as_ptr() as u64 + offset
            }
            _ => frames.0.as_ptr() as u64 + offset,
        };
        self.each(start, len, |at, len| self.uffd.copy(start + at, source + at, len, protect, wake))
    }

    /// Calls until a range is resolved, which what is there already is.
    #[inline]
    fn each(&self, start: u64, len: u64, call: impl Fn(u64, u64) -> Progress) -> Placed {
        let mut at = 0;
        let mut passed = false;
        while at < len {
            let progress = call(at, len - at);
            at += progress.done;
            self.counters.bytes_placed.fetch_add(progress.done, Ordering::Relaxed);
            match progress.errno {
                0 => {}
                libc::EEXIST => {
                    at += self.small;
                    passed = true;
                }
                libc::EAGAIN if progress.done > 0 => {}
                libc::EAGAIN if !self.stopping.load(Ordering::Acquire) => std::thread::yield_now(),
                libc::EAGAIN | libc::ENOENT | libc::ESRCH => {
                    self.wake_range(start, len);
                    return Placed::Gone;
                }
                libc::EFAULT => return Placed::Unreadable,
                errno => return Placed::Failed(errno),
            }
        }
        if passed {
            self.wake_range(start, len);
        }
        Placed::Whole
    }

    /// Maps pages from elsewhere in place of those of the range, once.
    fn map_here(&self, run: Run, address: *mut u8) -> Placed {
        let (start, len) = self.start(run);
        let mut placed = locked(&self.placing);
        if self.stopping.load(Ordering::Acquire) || run.first * self.page >= self.reachable() {
            drop(placed);
            self.wake(run);
            return Placed::Gone;
        }
        let len = len.min(self.reachable() - run.first * self.page);
        let mut result = Ok(());
        if placed.insert(run.first) {
            // SAFETY: the range is inside the mapping; the provider vouches for the address.
            result = unsafe { sys::map_again(address, start, len) };
            if result.is_err() {
                placed.remove(&run.first);
            } else {
                self.counters.bytes_placed.fetch_add(len, Ordering::Relaxed);
            }
        }
        drop(placed);
        self.wake(run);
        match result {
            Ok(()) => Placed::Whole,
            Err(error) => Placed::Failed(error.errno()),
        }
    }

    /// Bytes of whole pages that there are.
    pub fn reachable(&self) -> u64 {
        self.len.load(Ordering::Acquire).next_multiple_of(self.page)
    }

    /// Maps one small page of the page cache: its neighbours need not be there.
    fn minor_fault(&self, start: u64, write: bool) {
        let page = (start - self.base) / self.page;
        if let Err(error) = guarded(|| self.provider.cached(page)) {
            return self.fail(page, error);
        }
        let may_write = write && self.tracked && self.provider.may_write(page).is_ok();
        let call = |protect| {
            self.each(start, self.small, |_, len| self.uffd.proceed(start, len, protect, true))
        };
        let placed = if may_write {
            let _protecting = locked(&self.protecting);
            self.dirty.insert(page);
            call(false)
        } else {
            call(self.tracked)
        };
        match placed {
            Placed::Whole | Placed::Gone => self.failures.remove(Run::one(page)),
            // Gone from the page cache: who waits looks again, and is told then.
            Placed::Unreadable => self.wake(Run::one(page)),
            Placed::Failed(errno) => {
                self.fail(page, Error::from_errno("fault", errno, "putting a page in place"));
            }
        }
    }

    /// Lets a write to a protected page through, or makes it fail.
    fn write_fault(&self, page: u64) {
        let (start, len) = self.start(Run::one(page));
        let allowed = guarded(|| self.provider.may_write(page));
        {
            let _protecting = locked(&self.protecting);
            // What is dirty was allowed before, and is somebody's only copy.
            if allowed.is_ok() || !self.dirty.runs(Run::one(page)).is_empty() {
                self.dirty.insert(page);
                // Fails where the range is gone, and then its waiters were woken.
                let _let_through = self.uffd.protect(start, len, false);
                return;
            }
            // SAFETY: a page of the mapping that is protected and clean: nobody stored to it, and
            // the provider brings it again.
            let _gone = unsafe { sys::forget(start, len) };
        }
        if let Err(error) = allowed {
            self.fail(page, error);
        }
    }

    /// Makes a page fail when it is touched, with this reason, unless it is there by now.
    fn fail(&self, page: u64, error: Error) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.failures.insert(page, error);
        let run = Run::one(page);
        let (start, len) = self.start(run);
        let (mut at, mut poisoned) = (0, false);
        while at < len && self.poison {
            let progress = self.uffd.poison(start + at, len - at);
            at += progress.done;
            poisoned |= progress.done > 0;
            match progress.errno {
                0 => {}
                libc::EEXIST => at += self.small,
                libc::EAGAIN if !self.stopping.load(Ordering::Acquire) => std::thread::yield_now(),
                libc::ENOENT | libc::ESRCH => (at, poisoned) = (len, true),
                _ => break,
            }
        }
        if at < len {
            self.replace(start + at, len - at);
        } else if !poisoned {
            // It is all there: somebody else had more luck.
            self.failures.remove(run);
        }
        self.wake(run);
    }

    /// A page fails where a mapping of nothing stands in its place. Without that, too, only a
    /// signal would be left; the range as a whole is given up instead.
    fn replace(&self, start: u64, len: u64) {
        let _placing = locked(&self.placing);
        // SAFETY: inside the mapping.
        let done = unsafe { sys::map_nothing(self.nothing.as_fd(), start, len) };
        if done.is_err() {
            // SAFETY: as above.
            let _swept = unsafe { sys::map_nothing(self.nothing.as_fd(), self.base, self.whole) };
            self.wake_range(self.base, self.whole);
        }
    }

    /// Asks for a page that failed once more, in the calling thread. A copy replaces what makes the
    /// page fail, and nothing else.
    pub fn retry(&self, page: u64, frames: &mut Frames) -> Result<()> {
        if !self.failures.take(page) {
            return Ok(());
        }
        if !self.poison && self.replaceable {
            let _placing = locked(&self.placing);
            let (start, len) = self.start(Run::one(page));
            // SAFETY: inside the mapping; what stands there fails, so nobody has bytes in it.
            unsafe { sys::map_fresh(start, len, self.read_only) }?;
            self.uffd.register(start, len, self.mode)?;
        }
        let ask = Ask { page, run: Run::one(page), bytes_only: true };
        let answer = self.ask(&ask, frames);
        self.settle(&ask, answer, false, frames);
        Ok(())
    }
}

/// Calls a provider; a panic is an error.
fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(Error::new(Kind::Media, "fault", "the provider of the page panicked"))
    })
}

#[cold]
fn unreadable() -> Error {
    let text = "the page cannot be read where it is, or the file of the mapping ends before it";
    Error::new(Kind::Truncated, "fault", text)
}
