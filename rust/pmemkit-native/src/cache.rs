//! Glue for `pmemkit_core::cache`. Documentation: `_native/block.pyi`, `_native/bench.pyi`.

use std::sync::Arc;
use std::time::Duration;

use pmemkit_core::cache as core;
use pmemkit_core::error::{Error, Kind};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::block::Device;
use crate::error::to_py;

/// A cache and the stack with it on top.
#[pyclass(frozen, module = "pmemkit._native.block")]
pub struct Cache {
    inner: Arc<core::Cache>,
    device: Py<Device>,
}

fn mode_of(name: &str) -> PyResult<core::Mode> {
    match name {
        "writeback" => Ok(core::Mode::WriteBack),
        "writethrough" => Ok(core::Mode::WriteThrough),
        _ => {
            let text = format!("{name:?} is not a mode; modes are writeback, writethrough");
            Err(to_py(Error::new(Kind::Invalid, "cache", text)))
        }
    }
}

fn seconds_of(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|cause| {
        to_py(Error::new(Kind::Invalid, "cache", format!("{seconds} seconds: {cause}")))
    })
}

impl Cache {
    /// Puts a cache on top of a stack.
    pub fn over(py: Python<'_>, below: &Device, options: core::Options) -> PyResult<Cache> {
        let cache = core::Cache::new(below.stack.top().clone(), options).map_err(to_py)?;
        let inner = Arc::new(cache);
        let device = Device { stack: below.stack.layer(|_| inner.clone()) };
        Ok(Cache { inner, device: Py::new(py, device)? })
    }
}

#[pymethods]
impl Cache {
    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.drain()).map_err(to_py)
    }

    fn validate(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.inner.validate())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        let found = PyDict::new(py);
        for (name, value) in stats.named() {
            found.set_item(name, value)?;
        }
        Ok(found)
    }
}

/// What a call from Python says, as the core's options.
pub fn options(
    mode: &str,
    size: u64,
    read_ahead: u64,
    (dirty_background, dirty_most): (u32, u32),
    flush_age: Option<f64>,
    heed_pressure: bool,
) -> PyResult<core::Options> {
    Ok(core::Options {
        mode: mode_of(mode)?,
        read_ahead,
        dirty_background,
        dirty_most,
        flush_age: flush_age.map(seconds_of).transpose()?,
        heed_pressure,
        plant: core::Plant::asked_for(),
        ..core::Options::new(size)
    })
}
