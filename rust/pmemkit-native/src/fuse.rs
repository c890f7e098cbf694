//! Glue for `pmemkit_core::fuse`. Documentation: `_native/fuse.pyi`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::fuse as core;
use pyo3::prelude::*;

use crate::block::Channel;
use crate::error::to_py;

/// A mounted file.
#[pyclass(frozen, module = "pmemkit._native.fuse")]
pub struct Session {
    inner: core::Session,
}

#[pymethods]
impl Session {
    #[new]
    #[pyo3(signature = (channel, directory, *, name, source, threads = 4))]
    fn new(
        py: Python<'_>,
        channel: &Bound<'_, Channel>,
        directory: PathBuf,
        name: OsString,
        source: String,
        threads: usize,
    ) -> PyResult<Self> {
        let channel = channel.get().inner.clone();
        let options = core::Options { name, source, threads };
        let mounted = py.detach(|| core::Session::mount(channel, &directory, &options));
        Ok(Session { inner: mounted.map_err(to_py)? })
    }

    fn serve(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.serve()).map_err(to_py)
    }

    fn wait_unused(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let patience = Duration::try_from_secs_f64(seconds).map_err(|cause| {
            to_py(Error::new(Kind::Invalid, "wait", format!("{seconds} seconds: {cause}")))
        })?;
        Ok(py.detach(|| self.inner.wait_unused(patience)))
    }
}

/// Marks this thread, and those it starts, as ones that write-back waits for.
#[pyfunction]
fn allocate_without_write_back() {
    core::allocate_without_write_back();
}

/// The submodule `fuse`.
#[pymodule]
pub mod fuse {
    #[pymodule_export]
    use super::{allocate_without_write_back, Session};
}
