//! What this kernel lets this process do with faults, found out by doing it.
//!
//! Invariants:
//! 1. What is called possible was done once, on memory of the same kind, or is done for the mapping
//!    itself, whose maker then says what was refused.
//! 2. A refusal keeps the words of the call that refused.
//!
//! What this does not do: remember: a question costs some ten system calls.

use std::os::fd::AsFd;

use super::sys::{self, Ground};
use super::Memory;
use crate::error::{Error, Kind, Result};
use crate::media::{huge_page_size, memfd, set_length};
use crate::uffd::{feature, mode, Progress, Reach, Uffd};

/// What a mapping needs.
pub(super) struct Wanted<'a> {
    pub memory: &'a Memory,
    pub tracked: bool,
    pub user_only: bool,
}

/// A userfaultfd that has it.
pub(super) struct Opened {
    pub uffd: Uffd,
    pub reach: Reach,
    pub mode: u64,
    pub poison: bool,
}

/// One for faults of the program.
fn user() -> Result<Uffd> {
    Uffd::by_call("fault", Reach::User)
}

/// The features that the kernel has.
fn features() -> Result<u64> {
    user()?.begin(0)
}

/// Opens a userfaultfd for a mapping, or says what is missing.
pub(super) fn open(wanted: &Wanted<'_>) -> Result<Opened> {
    let has = features()?;
    let (mut needs, mut mode) = (0, mode::MISSING);
    let shared = match wanted.memory {
        Memory::Private => false,
        Memory::Huge => {
            needs |= feature::MISSING_HUGETLB;
            true
        }
        Memory::Shared(fd) => {
            let huge = sys::page_of(fd.as_fd())?.1;
            needs |= if huge {
                feature::MISSING_HUGETLB | feature::MINOR_HUGETLB
            } else {
                feature::MISSING_SHMEM | feature::MINOR_SHMEM
            };
            mode |= mode::MINOR;
            true
        }
    };
    if wanted.tracked {
        needs |= feature::WP | if shared { feature::WP_SHARED } else { 0 };
        mode |= mode::WP;
    }
    if needs & !has != 0 {
        let text = format!("this kernel lacks features {:#x} of userfaultfd", needs & !has);
        return Err(Error::new(Kind::NotSupported, "map", text));
    }
    let poison = has & feature::POISON;
    let (uffd, reach) =
        if wanted.user_only { (user()?, Reach::User) } else { Uffd::open("fault")? };
    uffd.begin(needs | poison)?;
    Ok(Opened { uffd, reach, mode, poison: poison != 0 })
}

/// Something that a fault handler can or cannot do here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ability {
    /// What it is.
    pub name: &'static str,
    /// Why not; `None` where it was done.
    pub refused: Option<String>,
}

fn ability(name: &'static str, done: Result<()>) -> Ability {
    Ability { name, refused: done.err().map(|error| error.to_string()) }
}

/// A page to try things on.
struct Trial {
    uffd: Uffd,
    start: u64,
    len: u64,
}

impl Trial {
    fn new(ground: Ground<'_>, len: u64, needs: u64, mode: u64) -> Result<Trial> {
        let uffd = user()?;
        uffd.begin(needs)?;
        let start = sys::map(ground, len, len, false)? as u64;
        let trial = Trial { uffd, start, len };
        trial.uffd.register(start, len, mode)?;
        Ok(trial)
    }

    fn check(&self, what: &str, progress: Progress) -> Result<()> {
        match progress.errno {
            0 => Ok(()),
            errno => Err(Error::from_errno("fault", errno, what)),
        }
    }

    fn copy(&self, protect: bool) -> Result<()> {
        let bytes = vec![1u8; self.len as usize];
        let source = bytes.as_ptr() as u64;
        let done = self.uffd.copy(self.start, source, self.len, protect, true);
        self.check("UFFDIO_COPY", done)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours, made by `new`, which nobody else knows.
        unsafe { sys::unmap(self.start, self.len) };
    }
}

fn missing(ground: Ground<'_>, len: u64, needs: u64) -> Result<()> {
    Trial::new(ground, len, needs, mode::MISSING)?.copy(false)
}

fn protected(ground: Ground<'_>, len: u64, needs: u64) -> Result<()> {
    let trial = Trial::new(ground, len, needs | feature::WP, mode::MISSING | mode::WP)?;
    trial.copy(true)?;
    trial.uffd.protect(trial.start, trial.len, false)
}

/// A minor fault of a page that was put into the page cache by another mapping.
fn minor(huge: bool, len: u64) -> Result<()> {
    let file = memfd("pmemkit-probe", huge)?;
    set_length(file.as_fd(), len)?;
    let ground = || Ground::Shared(file.as_fd());
    let (first, second) = if huge {
        (feature::MISSING_HUGETLB, feature::MINOR_HUGETLB)
    } else {
        (feature::MISSING_SHMEM, feature::MINOR_SHMEM)
    };
    Trial::new(ground(), len, first, mode::MISSING)?.copy(false)?;
    let trial = Trial::new(ground(), len, second, mode::MINOR)?;
    let done = trial.uffd.proceed(trial.start, trial.len, false, true);
    trial.check("UFFDIO_CONTINUE", done)
}

fn poison() -> Result<()> {
    let page = sys::page_size();
    let trial = Trial::new(Ground::Private, page, feature::POISON, mode::MISSING)?;
    trial.check("UFFDIO_POISON", trial.uffd.poison(trial.start, page))
}

fn in_shared(huge: bool, len: u64, act: impl Fn(Ground<'_>) -> Result<()>) -> Result<()> {
    let file = memfd("pmemkit-probe", huge)?;
    set_length(file.as_fd(), len)?;
    act(Ground::Shared(file.as_fd()))
}

/// Tries everything.
pub fn probe() -> Vec<Ability> {
    let (page, huge) = (sys::page_size(), huge_page_size());
    let shmem = feature::MISSING_SHMEM;
    let hugetlb = feature::MISSING_HUGETLB;
    let wp = feature::WP_SHARED;
    vec![
        ability("kernel faults by capability", Uffd::by_call("fault", Reach::Kernel).map(|_| ())),
        ability("kernel faults by device", Uffd::by_device("fault").map(|_| ())),
        ability("user faults", user().map(|_| ())),
        ability("missing, private", missing(Ground::Private, page, 0)),
        ability("missing, shmem", in_shared(false, page, |at| missing(at, page, shmem))),
        ability("missing, hugetlb", missing(Ground::Huge, huge, hugetlb)),
        ability("minor, shmem", minor(false, page)),
        ability("minor, hugetlb", minor(true, huge)),
        ability("write-protect, private", protected(Ground::Private, page, 0)),
        ability(
            "write-protect, shmem",
            in_shared(false, page, |at| protected(at, page, shmem | wp)),
        ),
        ability("write-protect, hugetlb", protected(Ground::Huge, huge, hugetlb | wp)),
        ability("poison", poison()),
    ]
}
