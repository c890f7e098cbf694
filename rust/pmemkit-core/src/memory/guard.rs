//! The guard: a store to a range that is being migrated waits instead of killing the process, where
//! the memory has no write protection that userfaultfd could rule (files of most file systems).
//!
//! The range is made read-only with `mprotect`, so a store to it is a SIGSEGV. The handler here
//! waits until the range is no longer being migrated and lets the store be made again. What is not
//! ours goes to the handler that was there before.
//!
//! Preconditions:
//! - [`install`] is called before every migration, so that whoever took SIGSEGV since is behind us;
//! - no thread that stores to a pool blocks SIGSEGV (the kernel kills on a blocked fault);
//! - a store that the kernel makes for a program (`read(2)` into the range) is no signal: it fails
//!   with EFAULT. Programs that do that enclose it in the pool's gate.
//!
//! Invariants:
//! 1. The handler allocates nothing, locks nothing, and only reads what was written before; its one
//!    system call besides sleeping is `madvise`, which tells whether a store would succeed now.
//! 2. A fault outside every window of a pool is never swallowed, and one inside only where a store
//!    would succeed by now: an access that is truly wrong still reaches the other handlers.
//! 3. Handlers form a chain that ends, as in `media::guard`.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Kind, Result};

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// How often somebody may replace our handler before migrations are refused.
const LEVELS: usize = 8;
/// How long a waiting store sleeps between looks. A chunk takes some hundred microseconds.
const NAP_NS: i64 = 50_000;
/// `si_code` of a store to a mapping that does not allow it.
const SEGV_ACCERR: c_int = 2;

static HANDLERS: [Handler; LEVELS] = [
    on_fault::<0>,
    on_fault::<1>,
    on_fault::<2>,
    on_fault::<3>,
    on_fault::<4>,
    on_fault::<5>,
    on_fault::<6>,
    on_fault::<7>,
];
static PREVIOUS: [AtomicPtr<libc::sigaction>; LEVELS] =
    [const { AtomicPtr::new(null_mut()) }; LEVELS];

/// A range of addresses that the handler looks at; all zero when unused. The end is written last
/// and cleared first.
struct Slot {
    start: AtomicU64,
    end: AtomicU64,
}

impl Slot {
    const fn free() -> Slot {
        Slot { start: AtomicU64::new(0), end: AtomicU64::new(0) }
    }

    fn covers(&self, address: u64) -> bool {
        let end = self.end.load(Ordering::SeqCst);
        address < end && address >= self.start.load(Ordering::SeqCst)
    }
}

/// Ranges whose stores wait: one a pool that migrates.
static HELD: [Slot; 64] = [const { Slot::free() }; 64];
/// Windows in which something was ever held. A window that is full of them is refused.
static WINDOWS: [Slot; 1024] = [const { Slot::free() }; 1024];

/// Serialises those who write slots.
static WRITING: Mutex<()> = Mutex::new(());

fn take(slots: &'static [Slot], at: u64, len: u64) -> Result<&'static Slot> {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let free = slots.iter().find(|slot| slot.end.load(Ordering::SeqCst) == 0);
    let Some(slot) = free else {
        let text = format!("{} ranges are watched already", slots.len());
        return Err(Error::new(Kind::Busy, "migrate", text));
    };
    slot.start.store(at, Ordering::SeqCst);
    slot.end.store(at + len, Ordering::SeqCst);
    Ok(slot)
}

/// A range whose stores wait as long as this value lives.
pub struct Held(&'static Slot);

impl Held {
    /// Has stores to the range wait, once it is read-only. To be called before it is.
    pub fn new(at: u64, len: u64) -> Result<Held> {
        take(&HELD, at, len).map(Held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::SeqCst);
    }
}

/// A window whose faults are looked at as long as this value lives.
pub struct Watched(&'static Slot);

impl Watched {
    /// Looks at the faults of a window from now on.
    pub fn new(at: u64, len: u64) -> Result<Watched> {
        take(&WINDOWS, at, len).map(Watched)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::SeqCst);
    }
}

/// Makes sure that our handler is the first to see a SIGSEGV.
pub fn install() -> Result<()> {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let current = exchange(null())?;
    if HANDLERS.iter().any(|&handler| handler as usize == current.sa_sigaction) {
        return Ok(());
    }
    let Some(level) = PREVIOUS.iter().position(|slot| slot.load(Ordering::Relaxed).is_null())
    else {
        let text = format!("the SIGSEGV handler was replaced {LEVELS} times");
        return Err(Error::new(Kind::Busy, "migrate", text));
    };
    // Never freed: a handler may run at any time.
    PREVIOUS[level].store(Box::into_raw(Box::new(current)), Ordering::Release);
    let mut ours = current;
    ours.sa_sigaction = HANDLERS[level] as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: the mask is a field of a local.
    unsafe { libc::sigemptyset(&mut ours.sa_mask) };
    exchange(&ours).map(|_| ())
}

fn exchange(new: *const libc::sigaction) -> Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: `new` is null or a complete sigaction; `old` has room for one.
    let status = unsafe { libc::sigaction(libc::SIGSEGV, new, old.as_mut_ptr()) };
    if status != 0 {
        return Err(Error::last_os("migrate", "sigaction of SIGSEGV"));
    }
    // SAFETY: the call succeeded and filled it in.
    Ok(unsafe { old.assume_init() })
}

extern "C" fn on_fault<const LEVEL: usize>(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: the kernel, or a handler that forwards to us, gives a valid siginfo of a SIGSEGV.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    if code == SEGV_ACCERR && WINDOWS.iter().any(|slot| slot.covers(address)) && settled(address) {
        return;
    }
    let previous = PREVIOUS[LEVEL].load(Ordering::Acquire);
    // SAFETY: written before this handler was installed and never freed.
    forward(unsafe { &*previous }, signal, info, context);
}

/// Waits while the address is held; true when a store to it would succeed now.
fn settled(address: u64) -> bool {
    let page = address & !4095;
    // SAFETY: errno is this thread's own; the code that was interrupted may be about to read it.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    let answer = loop {
        if HELD.iter().any(|slot| slot.covers(address)) {
            let nap = libc::timespec { tv_sec: 0, tv_nsec: NAP_NS };
            // SAFETY: async-signal-safe; the argument is a local.
            unsafe { libc::nanosleep(&nap, null_mut()) };
            continue;
        }
        // SAFETY: changes no byte; a range that does not allow stores is an error.
        let status = unsafe { libc::madvise(page as *mut _, 4096, libc::MADV_POPULATE_WRITE) };
        if status == 0 {
            break true;
        }
        // Held again between the two looks: wait once more. Otherwise the access is wrong.
        if !HELD.iter().any(|slot| slot.covers(address)) {
            break false;
        }
    };
    // SAFETY: as above.
    unsafe { *errno = saved };
    answer
}

/// Does what `previous` would have done.
fn forward(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: as in `on_fault`.
    let sent = unsafe { (*info).si_code } <= 0;
    match previous.sa_sigaction {
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            let mut default = *previous;
            default.sa_sigaction = libc::SIG_DFL;
            // SAFETY: both calls are async-signal-safe. A fault repeats when we return, and kills;
            // a signal that was sent is sent again.
            unsafe {
                libc::sigaction(signal, &default, null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the flag says that this is the address of a three-argument handler.
            let handler: Handler = unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without the flag it is the address of a one-argument handler.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
