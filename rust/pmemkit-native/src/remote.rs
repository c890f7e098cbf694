//! Glue for `pmemkit_core::remote`. Documentation: `_native/remote.pyi`.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::remote as core;
use pmemkit_core::remote::wire;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::to_py;
use crate::media::Medium;

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "remote", text))
}

fn socket_of(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(refuse(format!("{fd} is not a descriptor")));
    }
    // SAFETY: the descriptor is not negative; a closed one only makes the duplication fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(borrowed.try_clone_to_owned()?)
}

/// A region at the other end of a socket.
#[pyclass(frozen, module = "pmemkit._native.remote")]
pub struct Client {
    inner: Arc<core::Remote>,
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (fd, size, *, read_only, punches, patience))]
    fn new(fd: RawFd, size: u64, read_only: bool, punches: bool, patience: f64) -> PyResult<Self> {
        let patience = Duration::try_from_secs_f64(patience)
            .map_err(|cause| refuse(format!("{patience} seconds: {cause}")))?;
        let terms = core::Terms { size, read_only, punches, patience };
        let inner = core::Remote::new(socket_of(fd)?, terms).map_err(to_py)?;
        Ok(Client { inner: Arc::new(inner) })
    }

    #[getter]
    fn medium(&self) -> Medium {
        Medium { inner: self.inner.clone() }
    }

    fn close(&self) {
        self.inner.close();
    }
}

/// One connection of a client to a region of ours.
#[pyclass(frozen, module = "pmemkit._native.remote")]
pub struct Server {
    inner: core::Server,
}

#[pymethods]
impl Server {
    #[new]
    #[pyo3(signature = (fd, medium, *, read_only = false))]
    fn new(fd: RawFd, medium: &Bound<'_, Medium>, read_only: bool) -> PyResult<Self> {
        let medium = medium.get().inner.clone();
        let inner = core::Server::new(socket_of(fd)?, medium, read_only).map_err(to_py)?;
        Ok(Server { inner })
    }

    fn serve(&self, py: Python<'_>) -> (u64, u64, u64, u64, String) {
        let totals = py.detach(|| self.inner.serve());
        (totals.requests, totals.bytes_out, totals.bytes_in, totals.errors, totals.reason)
    }

    fn stop(&self) {
        self.inner.stop();
    }
}

/// The submodule `remote`.
#[pymodule]
pub mod remote {
    use super::*;

    #[pymodule_export]
    use super::{Client, Server};
    #[pymodule_export]
    const HEADER_SIZE: usize = wire::HEADER_SIZE;
    #[pymodule_export]
    const VERSION: u16 = wire::VERSION;
    #[pymodule_export]
    const TEXT_MAX: u32 = wire::TEXT_MAX;

    #[pyfunction]
    #[pyo3(signature = (payload, *, reply = false, status = 0))]
    fn hello<'py>(
        py: Python<'py>,
        payload: u32,
        reply: bool,
        status: u32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let asked = wire::Header::request(wire::Op::Hello, 0, 0, 0);
        let header = wire::Header { reply, status, payload, ..asked };
        header.check().map_err(to_py)?;
        Ok(PyBytes::new(py, &header.encode()))
    }

    #[pyfunction]
    fn parse(data: &[u8]) -> PyResult<(u16, u16, bool, u32, u64, u32, u64)> {
        let bytes = data.try_into().map_err(|_| refuse(format!("{} bytes", data.len())))?;
        let header = wire::Header::parse(bytes).map_err(to_py)?;
        let wire::Header { version, op, reply, status, payload, len, .. } = header;
        Ok((version, op as u16, reply, status, header.at(), payload, len))
    }

    #[pyfunction]
    fn status_of(kind: &str) -> PyResult<u32> {
        let found = Kind::ALL.into_iter().find(|each| each.name() == kind);
        found.map(wire::status_of).ok_or_else(|| refuse(format!("{kind:?} is no kind of error")))
    }
}
