//! Glue for `pmemkit_core::media`. Documentation: `_native/media.pyi`.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pmemkit_core::error::{Error, Kind, Result};
use pmemkit_core::media::{self as core, Cause, Granularity, Store};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::buffer::{Bytes, Held};
use crate::error::to_py;

/// Bytes that are copied without giving the GIL up: giving it up costs more than the copy.
const HOLD_GIL_MAX: u64 = 4096;

/// Runs `work` without the GIL unless it copies little.
pub fn run<T: Send>(
    py: Python<'_>,
    len: u64,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let result = if len > HOLD_GIL_MAX { py.detach(work) } else { work() };
    result.map_err(to_py)
}

/// The granularity of this name.
pub fn granularity_from(name: &str) -> PyResult<Granularity> {
    match name {
        "byte" => Ok(Granularity::Byte),
        "cacheline" => Ok(Granularity::Cacheline),
        "page" => Ok(Granularity::Page),
        _ => Err(refuse(format!("{name:?} is not one of byte, cacheline, page"))),
    }
}

fn how_from(name: &str) -> PyResult<Store> {
    match name {
        "auto" => Ok(Store::Auto),
        "cached" => Ok(Store::Cached),
        "nontemporal" => Ok(Store::NonTemporal),
        _ => Err(refuse(format!("{name:?} is not one of auto, cached, nontemporal"))),
    }
}

impl Medium {
    /// Runs `work` without the GIL unless it copies little, from where nobody is waited for.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        len: u64,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> PyResult<T> {
        run(py, if self.inner.blocks() { u64::MAX } else { len }, work)
    }
}

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "media", text))
}

fn borrow(fd: &RawFd) -> PyResult<BorrowedFd<'_>> {
    if *fd < 0 {
        return Err(refuse(format!("{fd} is not a file descriptor")));
    }
    // SAFETY: the caller of the Python function keeps the descriptor open during the call; a
    // descriptor that is not open is an error of the first system call.
    Ok(unsafe { BorrowedFd::borrow_raw(*fd) })
}

/// Mapped bytes.
#[pyclass(frozen, module = "pmemkit._native.media")]
pub struct Medium {
    /// The medium of the core.
    pub inner: Arc<dyn core::Medium>,
}

#[pymethods]
impl Medium {
    #[getter]
    fn region(&self) -> u32 {
        self.inner.region().0
    }

    #[getter]
    fn granularity(&self) -> &'static str {
        self.inner.granularity().name()
    }

    #[getter]
    fn map_unit(&self) -> u64 {
        self.inner.map_unit()
    }

    #[getter]
    fn loads_by_mapping(&self) -> bool {
        self.inner.loads_by_mapping()
    }

    #[getter]
    fn stores_by_mapping(&self) -> bool {
        self.inner.stores_by_mapping()
    }

    fn __len__(&self) -> usize {
        self.inner.len() as usize
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: Bytes,
        length: Bytes,
    ) -> PyResult<Bound<'py, PyBytes>> {
        core::check_range("read", offset.0, length.0, self.inner.len()).map_err(to_py)?;
        PyBytes::new_with(py, length.0 as usize, |bytes| {
            let target = bytes.as_mut_ptr() as usize;
            // SAFETY: the new object has `length` bytes, and nobody else has seen it yet.
            self.run(py, length.0, || unsafe {
                self.inner.load(offset.0, target as *mut u8, length.0)
            })
        })
    }

    fn readinto(&self, py: Python<'_>, offset: Bytes, target: &Bound<'_, PyAny>) -> PyResult<u64> {
        let held = Held::new(target, true)?;
        let (address, len) = (held.address(), held.len());
        // SAFETY: `held` keeps the bytes in place.
        self.run(py, len, || unsafe { self.inner.load(offset.0, address.get(), len) })?;
        Ok(len)
    }

    #[pyo3(signature = (offset, data, how="auto"))]
    fn write(
        &self,
        py: Python<'_>,
        offset: Bytes,
        data: &Bound<'_, PyAny>,
        how: &str,
    ) -> PyResult<()> {
        let how = how_from(how)?;
        let held = Held::new(data, false)?;
        let (address, len) = (held.address(), held.len());
        // SAFETY: `held` keeps the bytes in place.
        self.run(py, len, || unsafe { self.inner.store(offset.0, address.get(), len, how) })
    }

    fn zero(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        self.run(py, length.0, || self.inner.zero(offset.0, length.0))
    }

    fn load_u64(&self, py: Python<'_>, offset: Bytes) -> PyResult<u64> {
        self.run(py, 8, || self.inner.load_u64(offset.0))
    }

    fn store_u64(&self, py: Python<'_>, offset: Bytes, value: u64) -> PyResult<()> {
        self.run(py, 8, || self.inner.store_u64(offset.0, value))
    }

    fn flush(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        self.run(py, length.0, || self.inner.flush(offset.0, length.0))
    }

    fn fence(&self) {
        self.inner.fence();
    }

    fn persist(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        if self.inner.sync_blocks() {
            return py.detach(|| self.inner.persist(offset.0, length.0)).map_err(to_py);
        }
        self.run(py, length.0, || self.inner.persist(offset.0, length.0))
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.sync()).map_err(to_py)
    }

    fn punch(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<bool> {
        py.detach(|| self.inner.punch(offset.0, length.0)).map_err(to_py)
    }

    fn extents(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<Vec<(u64, bool)>> {
        let runs = py.detach(|| self.inner.extents(offset.0, length.0)).map_err(to_py)?;
        Ok(runs.iter().map(|run| (run.len, run.hole)).collect())
    }

    fn resize(&self, py: Python<'_>, length: Bytes) -> PyResult<()> {
        py.detach(|| self.inner.resize(length.0)).map_err(to_py)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        dict.set_item("bytes_stored", stats.bytes_stored())?;
        dict.set_item("flushes", stats.flushes)?;
        dict.set_item("fences", stats.fences)?;
        dict.set_item("syncs", stats.syncs)?;
        Ok(dict)
    }

    fn written<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (cause, written) in Cause::ALL.iter().zip(self.inner.stats().written) {
            dict.set_item(cause.name(), (written.bytes, written.lines))?;
        }
        Ok(dict)
    }

    fn set_counting(&self, on: bool) {
        self.inner.set_counting(on);
    }

    #[pyo3(signature = (block_size, *, every = 1))]
    fn count_blocks(&self, block_size: u64, every: u32) -> PyResult<()> {
        self.inner.count_blocks(block_size, every).map_err(to_py)
    }

    fn block_counts<'py>(&self, py: Python<'py>) -> Option<(u64, Bound<'py, PyBytes>)> {
        let (block_size, counts) = py.detach(|| self.inner.block_counts())?;
        let bytes: Vec<u8> = counts.iter().flat_map(|each| each.to_le_bytes()).collect();
        Some((block_size, PyBytes::new(py, &bytes)))
    }
}

/// What was chosen for this CPU.
#[pyclass(frozen, get_all, module = "pmemkit._native.media")]
pub struct Port {
    flush: &'static str,
    copy: &'static str,
    movnt_threshold: u64,
    cacheline_size: u64,
}

/// The submodule `media`.
#[pymodule]
pub mod media {
    use std::os::fd::IntoRawFd;

    use pmemkit_core::media::port as core_port;

    use super::*;

    #[pymodule_export]
    use super::{Medium, Port};
    #[pymodule_export]
    use crate::recording::Recording;

    #[pyfunction]
    fn exchange_cause(cause: &str) -> PyResult<&'static str> {
        let found = Cause::ALL.into_iter().find(|each| each.name() == cause);
        let Some(cause) = found else {
            return Err(PyValueError::new_err(format!("{cause:?} is no cause of writes")));
        };
        Ok(pmemkit_core::media::exchange_cause(cause).name())
    }

    #[pyfunction]
    fn port() -> Port {
        let choice = core_port::Port::get().choice();
        Port {
            flush: choice.flush.name(),
            copy: choice.copy.name(),
            movnt_threshold: choice.movnt_threshold,
            cacheline_size: core_port::CACHELINE_SIZE,
        }
    }

    #[pyfunction]
    #[pyo3(signature = (fd, length, *, offset=0, granularity, map_sync=false, read_only=false,
                        resizable=true))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python function.
    fn map_file(
        py: Python<'_>,
        fd: RawFd,
        length: u64,
        offset: u64,
        granularity: &str,
        map_sync: bool,
        read_only: bool,
        resizable: bool,
    ) -> PyResult<Medium> {
        let granularity = granularity_from(granularity)?;
        let options = core::FileOptions { offset, granularity, map_sync, read_only, resizable };
        let file = borrow(&fd)?;
        let mapped = py.detach(|| core::Mapped::file(file, length, options)).map_err(to_py)?;
        Ok(Medium { inner: Arc::new(mapped) })
    }

    #[pyfunction]
    #[pyo3(signature = (medium, runs, *, record = None, base = 0))]
    fn bad_blocks(
        medium: &Bound<'_, Medium>,
        runs: Vec<(u64, u64)>,
        record: Option<RawFd>,
        base: u64,
    ) -> PyResult<Medium> {
        let runs = runs.into_iter().map(|(offset, length)| core::BadRun { offset, length });
        let open = |fd: RawFd| -> PyResult<core::Record> {
            Ok(core::Record { file: borrow(&fd)?.try_clone_to_owned()?.into(), base })
        };
        let record = record.map(open).transpose()?;
        let next = medium.get().inner.clone();
        Ok(Medium { inner: Arc::new(core::BadBlocks::new(next, runs.collect(), record)) })
    }

    #[pyfunction]
    fn map_sync_granted(fd: RawFd) -> PyResult<bool> {
        core::map_sync_granted(borrow(&fd)?).map_err(to_py)
    }

    #[pyfunction]
    #[pyo3(signature = (length, *, hugetlb=false))]
    fn map_anonymous(length: u64, hugetlb: bool) -> PyResult<Medium> {
        let mapped = core::Mapped::anonymous(length, hugetlb).map_err(to_py)?;
        Ok(Medium { inner: Arc::new(mapped) })
    }

    #[pyfunction]
    #[pyo3(signature = (name, *, hugetlb=false))]
    fn memfd(name: &str, hugetlb: bool) -> PyResult<RawFd> {
        core::memfd(name, hugetlb).map(IntoRawFd::into_raw_fd).map_err(to_py)
    }
}
