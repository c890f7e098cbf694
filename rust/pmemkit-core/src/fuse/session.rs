//! A mount and the threads that answer it; who has the file open.
//!
//! States: mounted (requests wait) -> serving -> over, when somebody unmounted it or the kernel
//! aborted the connection.
//!
//! Invariants:
//! 1. The count of handles is that of opens less releases; a loop device holds one.
//! 2. When the session is over, whoever waits for the last handle is woken.
//! 3. Memory that is allocated for a request is not won by writing a file system back that may be
//!    waiting for that very request.
//!
//! What this does not do: unmount. Whoever mounted it knows when, and does it also for a server
//! that was killed.

use std::ffi::OsString;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use fuser::{Config, MountOption, SessionACL};

use super::file::ExportFile;
use super::filesystem::OneFile;
use super::sys;
use crate::block::Channel;
use crate::error::{Error, Kind, Result};

/// Who has the file open.
#[derive(Default)]
pub struct Handles {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    count: u64,
    over: bool,
}

impl Handles {
    /// One more open.
    pub fn opened(&self) {
        self.change(|state| state.count = state.count.saturating_add(1));
    }

    /// One of them was released.
    pub fn closed(&self) {
        self.change(|state| state.count = state.count.saturating_sub(1));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until nobody has the file open, or the session is over; false when it took too long.
    pub fn wait_unused(&self, patience: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let used = |state: &mut State| state.count > 0 && !state.over;
        let waited = self.changed.wait_timeout_while(state, patience, used);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// What is set for one mount.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of the file.
    pub name: OsString,
    /// What the mount table shows as its source.
    pub source: String,
    /// Threads that answer requests.
    pub threads: usize,
}

/// A mounted file.
pub struct Session {
    /// Taken by the one who serves.
    inner: Mutex<Option<fuser::Session<OneFile>>>,
    handles: Arc<Handles>,
}

impl Session {
    /// Mounts a directory with the file of `channel` over `directory`, for root alone to enter if
    /// the directories above say so.
    pub fn mount(channel: Channel, directory: &Path, options: &Options) -> Result<Session> {
        let plain = !options.name.is_empty() && options.name != "." && options.name != "..";
        if !plain || options.name.as_encoded_bytes().contains(&b'/') || options.threads == 0 {
            let text = format!("name {:?}, {} threads", options.name, options.threads);
            return Err(Error::new(Kind::Invalid, "mount", text));
        }
        let handles = Arc::<Handles>::default();
        let file = ExportFile::new(channel);
        let mut config = Config::default();
        // A comma would end the option.
        let source = options.source.replace(',', "_");
        config.mount_options = vec![
            MountOption::FSName(source),
            MountOption::Subtype("pmemkit".into()),
            MountOption::NoExec,
            if file.writable() { MountOption::RW } else { MountOption::RO },
        ];
        // Requests of the loop device carry whatever user caused them.
        config.acl = SessionACL::All;
        config.n_threads = Some(options.threads);
        config.clone_fd = true;
        let files = OneFile::new(file, options.name.clone(), handles.clone());
        let inner = fuser::Session::new(files, directory, &config)
            .map_err(|cause| failure("mount", &cause, directory))?;
        Ok(Session { inner: Mutex::new(Some(inner)), handles })
    }

    /// Answers requests until the file system is unmounted. May be called once.
    pub fn serve(&self) -> Result<()> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(inner) = inner else {
            return Err(Error::new(Kind::Closed, "serve", "this mount is or was served"));
        };
        // Threads inherit it.
        sys::allocate_without_write_back();
        let served = inner.run();
        self.handles.change(|state| state.over = true);
        served.map_err(|cause| failure("serve", &cause, Path::new("the FUSE connection")))
    }

    /// Waits until nobody has the file open, or the session is over; false when it took too long.
    pub fn wait_unused(&self, patience: Duration) -> bool {
        self.handles.wait_unused(patience)
    }
}

fn failure(op: &'static str, cause: &std::io::Error, place: &Path) -> Error {
    let text = place.display().to_string();
    match cause.raw_os_error() {
        Some(errno) => Error::from_errno(op, errno, text),
        None => Error::new(Kind::System, op, format!("{text}: {cause}")),
    }
}
