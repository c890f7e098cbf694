//! The guard: a SIGBUS while our own routines touch a mapping becomes an error of that call.
//!
//! A file that shrinks under a mapping, a hole the file system has no room for, poisoned memory:
//! the kernel answers a touch of such bytes with SIGBUS. The handler here looks at the program
//! counter: inside the leaf routines of the CPU port it makes the thread leave the routine with
//! "faulted" and the address; anywhere else the signal is none of ours and goes to the handler that
//! was there before.
//!
//! Preconditions:
//! - every touch of mapped bytes by us is in a leaf routine (`port_*.rs` says what that takes);
//! - [`install`] was called after whoever else takes SIGBUS, hence before every new mapping: what
//!   replaced our handler since is put behind it;
//! - no thread that touches a mapping blocks SIGBUS (the kernel kills on a blocked fault);
//! - SIGSEGV is left alone: ranges are checked before they are touched, so a SIGSEGV is a bug.
//!
//! Invariants:
//! 1. Handlers form a chain that ends: each of our installations has a function and a predecessor
//!    of its own, written once before it is installed and never changed.
//! 2. The handler allocates nothing, locks nothing and reads only what was written before.
//! 3. A fault that no handler of the chain takes kills the process as if we were not there.
//!
//! What this does not do: tell why the fault happened (the medium does), remove the handler.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::port::arch;
use crate::error::{Error, Kind, Result};

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// How often somebody may replace our handler before new mappings are refused.
const LEVELS: usize = 16;

/// One function an installation, so that each finds its own predecessor.
static HANDLERS: [Handler; LEVELS] = [
    on_fault::<0>,
    on_fault::<1>,
    on_fault::<2>,
    on_fault::<3>,
    on_fault::<4>,
    on_fault::<5>,
    on_fault::<6>,
    on_fault::<7>,
    on_fault::<8>,
    on_fault::<9>,
    on_fault::<10>,
    on_fault::<11>,
    on_fault::<12>,
    on_fault::<13>,
    on_fault::<14>,
    on_fault::<15>,
];

/// The handler that each installation found; null where there was no such installation yet.
static PREVIOUS: [AtomicPtr<libc::sigaction>; LEVELS] =
    [const { AtomicPtr::new(null_mut()) }; LEVELS];

/// Where a faulted routine goes on; set before the first installation.
static LANDING: AtomicUsize = AtomicUsize::new(0);

/// Makes sure that our handler is the first to see a SIGBUS.
pub fn install() -> Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _installing = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let current = exchange(null())?;
    if HANDLERS.iter().any(|&handler| handler as usize == current.sa_sigaction) {
        return Ok(());
    }
    let Some(level) = PREVIOUS.iter().position(|slot| slot.load(Ordering::Relaxed).is_null())
    else {
        let text = format!("the SIGBUS handler was replaced {LEVELS} times");
        return Err(Error::new(Kind::Busy, "map", text));
    };
    LANDING.store(arch::landing(), Ordering::Release);
    // Never freed: a handler may run at any time.
    PREVIOUS[level].store(Box::into_raw(Box::new(current)), Ordering::Release);
    let mut ours = current;
    ours.sa_sigaction = HANDLERS[level] as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the mask is a field of a local.
    unsafe { libc::sigemptyset(&mut ours.sa_mask) };
    exchange(&ours).map(|_| ())
}

/// Sets the disposition of SIGBUS, unless `new` is null, and returns what it was.
fn exchange(new: *const libc::sigaction) -> Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: `new` is null or a complete sigaction; `old` has room for one.
    let status = unsafe { libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()) };
    if status != 0 {
        return Err(Error::last_os("map", "sigaction of SIGBUS"));
    }
    // SAFETY: the call succeeded and filled it in.
    Ok(unsafe { old.assume_init() })
}

/// True for a fault of the instruction at the program counter, as opposed to a signal that somebody
/// sent or the early notice of a memory error elsewhere.
fn is_fault_here(code: c_int) -> bool {
    matches!(code, libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR)
}

extern "C" fn on_fault<const LEVEL: usize>(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: the kernel, or a handler that forwards to us, gives a valid siginfo of a SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    let landing = LANDING.load(Ordering::Acquire);
    // SAFETY: as above for the context.
    if is_fault_here(code) && unsafe { arch::leave(context, address, landing) } {
        return;
    }
    let previous = PREVIOUS[LEVEL].load(Ordering::Acquire);
    // SAFETY: written before this handler was installed and never freed.
    forward(unsafe { &*previous }, signal, info, context);
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use super::*;
    use crate::media::port::Port;
    use crate::media::sys;

    /// The status with which the handler of a stranger ends the process.
    const STRANGER: i32 = 42;

    /// A mapped page that no file is behind.
    fn page_of_nothing() -> *mut u8 {
        let file = sys::memfd("nothing", false).unwrap();
        sys::map(file.as_fd(), 0, 4096, false, sys::Sharing::Shared).unwrap()
    }

    fn ours_recovers() -> bool {
        // SAFETY: the page is mapped.
        unsafe { Port::get().load_u64(page_of_nothing()).is_fault() }
    }

    fn fault_elsewhere() {
        // SAFETY: the page is mapped; the fault is the point.
        unsafe { page_of_nothing().read_volatile() };
    }

    extern "C" fn stranger(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: ends the process without running anything else.
        unsafe { libc::_exit(STRANGER) };
    }

    /// As faulthandler does it: puts back what was there before and sends the signal again.
    extern "C" fn sends_again(signal: c_int) {
        let previous = BEFORE.load(Ordering::Acquire);
        // SAFETY: `previous` was written before this handler was installed.
        unsafe {
            libc::sigaction(signal, previous, null_mut());
            libc::raise(signal);
        }
    }

    static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(null_mut());

    fn install_stranger(handler: usize, flags: c_int) {
        let mut action = exchange(null()).unwrap();
        BEFORE.store(Box::into_raw(Box::new(action)), Ordering::Release);
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        exchange(&action).unwrap();
    }

    /// What a child process does, by name.
    fn act(scene: &str) {
        install().unwrap();
        match scene {
            "alone" => {}
            "replaced" => install_stranger(stranger as *const () as usize, libc::SA_SIGINFO),
            "sends-again" => install_stranger(sends_again as *const () as usize, libc::SA_NODEFER),
            "ignored" => install_stranger(libc::SIG_IGN, 0),
            other => panic!("no scene {other}"),
        }
        install().unwrap();
        assert!(ours_recovers());
        if scene == "ignored" {
            // SAFETY: sends a signal that is ignored.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        fault_elsewhere();
    }

    /// Runs one test of this program again, in a process of its own that plays a scene.
    fn play(scene: &str) -> ExitStatus {
        let test = "media::guard::tests::a_fault_that_is_not_ours_goes_to_whoever_was_there_before";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", test]).env("PMEMKIT_TEST_SCENE", scene);
        child.output().unwrap().status
    }

    #[test]
    fn a_fault_that_is_not_ours_goes_to_whoever_was_there_before() {
        if let Ok(scene) = std::env::var("PMEMKIT_TEST_SCENE") {
            return act(&scene);
        }
        assert_eq!(play("alone").signal(), Some(libc::SIGBUS));
        assert_eq!(play("replaced").code(), Some(STRANGER));
        assert_eq!(play("sends-again").signal(), Some(libc::SIGBUS));
        assert_eq!(play("ignored").signal(), Some(libc::SIGBUS));
    }

    #[test]
    fn a_fault_of_ours_is_an_outcome() {
        install().unwrap();
        install().unwrap();
        assert!(ours_recovers());
        std::thread::spawn(|| assert!(ours_recovers())).join().unwrap();
    }
}
