//! Glue for `pmemkit_core::nbd`. Documentation: `_native/nbd.pyi`.

use std::os::fd::BorrowedFd;

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::nbd as core;
use pmemkit_core::nbd::parse::Session;
use pyo3::prelude::*;

use crate::block::Channel;
use crate::error::to_py;

/// Totals of one connection.
#[pyclass(frozen, get_all, module = "pmemkit._native.nbd")]
pub struct ServeResult {
    requests: u64,
    bytes_read: u64,
    bytes_written: u64,
    errors: u64,
    direct_bytes: u64,
    cpu_seconds: f64,
    reason: String,
}

impl From<core::ServeResult> for ServeResult {
    fn from(result: core::ServeResult) -> Self {
        ServeResult {
            requests: result.requests,
            bytes_read: result.bytes_read,
            bytes_written: result.bytes_written,
            errors: result.errors,
            direct_bytes: result.direct_bytes,
            cpu_seconds: result.cpu_ns as f64 / 1e9,
            reason: result.reason,
        }
    }
}

/// One connection in the transmission phase.
#[pyclass(frozen, module = "pmemkit._native.nbd")]
pub struct Connection {
    inner: core::Connection,
}

#[pymethods]
impl Connection {
    #[new]
    #[pyo3(signature = (
        fd, channel, *, leftover = Vec::new(), structured = false, allocation_context = None,
        transmission_flags, map = true, workers = 4, poll_us = 50
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        fd: i32,
        channel: &Bound<'_, Channel>,
        leftover: Vec<u8>,
        structured: bool,
        allocation_context: Option<u32>,
        transmission_flags: u16,
        map: bool,
        workers: usize,
        poll_us: u64,
    ) -> PyResult<Self> {
        let channel = channel.get().inner.clone();
        let socket = duplicate(fd)?;
        let session =
            Session::new(channel.info(), transmission_flags, structured, allocation_context);
        let options = core::Options { map, workers, poll_us };
        let inner = core::Connection::new(socket, channel, session, leftover, options);
        Ok(Connection { inner: inner.map_err(to_py)? })
    }

    fn serve(&self, py: Python<'_>) -> PyResult<ServeResult> {
        py.detach(|| self.inner.serve()).map(Into::into).map_err(to_py)
    }

    fn stop(&self) {
        self.inner.stop();
    }

    fn abort(&self) {
        self.inner.abort();
    }
}

fn duplicate(fd: i32) -> PyResult<std::os::fd::OwnedFd> {
    if fd < 0 {
        let text = format!("{fd} is not a descriptor");
        return Err(to_py(Error::new(Kind::Invalid, "serve", text)));
    }
    // SAFETY: the descriptor is not negative; a closed one only makes the duplication fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    core::sys::duplicate(borrowed).map_err(|cause| {
        let errno = cause.raw_os_error().unwrap_or(libc::EIO);
        to_py(Error::from_errno("serve", errno, format!("descriptor {fd}")))
    })
}

/// The submodule `nbd`.
#[pymodule]
pub mod nbd {
    #[pymodule_export]
    use super::{Connection, ServeResult};
}
