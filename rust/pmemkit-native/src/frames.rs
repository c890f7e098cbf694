//! Glue for `pmemkit_core::frames`. Documentation: `_native/frames.pyi`.

use pmemkit_core::frames as core;
use pmemkit_core::frames::{Live, Options, Place};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffer::Bytes;
use crate::error::to_py;
use crate::media::Medium;

/// What the page map knows of a frame.
#[pyclass(frozen, get_all, module = "pmemkit._native.frames")]
pub struct Descriptor {
    allocated: bool,
    first: u64,
    frames: u64,
    pinned: bool,
    movable: bool,
    tag: u8,
    online: bool,
}

/// Hands out page frames.
#[pyclass(frozen, module = "pmemkit._native.frames")]
pub struct Allocator {
    inner: core::Allocator,
}

#[pymethods]
impl Allocator {
    #[new]
    #[pyo3(signature = (frames, *, magazines = true, online = true))]
    fn new(py: Python<'_>, frames: Bytes, magazines: bool, online: bool) -> PyResult<Self> {
        let options = Options { magazines, online };
        let made = py.detach(|| core::Allocator::new(frames.0, options));
        Ok(Allocator { inner: made.map_err(to_py)? })
    }

    #[staticmethod]
    #[pyo3(signature = (medium, offset, length, frames, *, persistent, magazines = true,
                        online = true))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python function.
    fn over(
        py: Python<'_>,
        medium: &Bound<'_, Medium>,
        offset: Bytes,
        length: Bytes,
        frames: Bytes,
        persistent: bool,
        magazines: bool,
        online: bool,
    ) -> PyResult<Self> {
        let medium = medium.get().inner.clone();
        let place = Place { medium, offset: offset.0, length: length.0, persistent };
        let options = Options { magazines, online };
        let made = py.detach(|| core::Allocator::over(place, frames.0, options));
        Ok(Allocator { inner: made.map_err(to_py)? })
    }

    #[staticmethod]
    fn map_size(frames: Bytes) -> u64 {
        core::Allocator::map_size(frames.0)
    }

    fn get(&self, order: u32) -> PyResult<u64> {
        self.inner.get(order).map_err(to_py)
    }

    fn put(&self, frame: Bytes, order: u32) -> PyResult<()> {
        self.inner.put(frame.0, order).map_err(to_py)
    }

    fn get_run(&self, py: Python<'_>, frames: Bytes) -> PyResult<u64> {
        py.detach(|| self.inner.get_run(frames.0)).map_err(to_py)
    }

    fn put_run(&self, py: Python<'_>, frame: Bytes, frames: Bytes) -> PyResult<()> {
        py.detach(|| self.inner.put_run(frame.0, frames.0)).map_err(to_py)
    }

    fn claim(&self, py: Python<'_>, frame: Bytes, frames: Bytes) -> PyResult<()> {
        py.detach(|| self.inner.claim(frame.0, frames.0)).map_err(to_py)
    }

    fn retain(&self, py: Python<'_>, live: Vec<(u64, u64)>) -> PyResult<u64> {
        let live: Vec<_> = live.into_iter().map(|(first, frames)| Live { first, frames }).collect();
        py.detach(|| self.inner.retain(&live)).map_err(to_py)
    }

    fn offline(&self, py: Python<'_>, first: Bytes, count: Bytes) -> PyResult<bool> {
        py.detach(|| self.inner.offline(first.0, count.0)).map_err(to_py)
    }

    fn online(&self, py: Python<'_>, first: Bytes, count: Bytes) -> PyResult<()> {
        py.detach(|| self.inner.online(first.0, count.0)).map_err(to_py)
    }

    fn allocated(&self, py: Python<'_>, first: Bytes, count: Bytes) -> PyResult<Vec<(u64, u64)>> {
        let all = py.detach(|| self.inner.allocated(first.0, count.0)).map_err(to_py)?;
        Ok(all.iter().map(|live| (live.first, live.frames)).collect())
    }

    fn descriptor(&self, frame: Bytes) -> PyResult<Descriptor> {
        let core::Descriptor { allocated, first, frames, flags, online } =
            self.inner.descriptor(frame.0).map_err(to_py)?;
        let core::Flags { pinned, movable, tag } = flags;
        Ok(Descriptor { allocated, first, frames, pinned, movable, tag, online })
    }

    #[pyo3(signature = (frame, *, pinned = None, movable = None, tag = None))]
    fn set_flags(
        &self,
        frame: Bytes,
        pinned: Option<bool>,
        movable: Option<bool>,
        tag: Option<u8>,
    ) -> PyResult<()> {
        self.inner.set_flags(frame.0, pinned, movable, tag).map_err(to_py)
    }

    #[getter]
    fn free_frames(&self) -> u64 {
        self.inner.free_frames()
    }

    #[getter]
    fn frames(&self) -> u64 {
        self.inner.frames()
    }

    #[getter]
    fn bytes_a_frame(&self) -> u64 {
        self.inner.frame_bytes()
    }

    #[getter]
    fn metadata_bytes(&self) -> u64 {
        self.inner.metadata_bytes()
    }

    #[getter]
    fn dram_bytes(&self) -> u64 {
        self.inner.dram_bytes()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        let dict = PyDict::new(py);
        dict.set_item("free", stats.free)?;
        dict.set_item("offline", stats.offline)?;
        dict.set_item("fragmentation", stats.fragmentation)?;
        let runs = PyDict::new(py);
        for (order, count) in stats.runs {
            runs.set_item(order, count)?;
        }
        dict.set_item("runs", runs)?;
        Ok(dict)
    }

    fn validate(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.inner.validate())
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.flush()).map_err(to_py)
    }
}

/// The submodule.
#[pymodule]
pub mod frames {
    #[pymodule_export]
    use super::{Allocator, Descriptor};
}
