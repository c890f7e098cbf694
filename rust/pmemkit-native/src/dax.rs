//! Glue for `pmemkit_core::dax`. Documentation: `_native/dax.pyi`.

use std::ffi::c_int;
use std::sync::Arc;

use pmemkit_core::dax as core;
use pmemkit_core::error::{Error, Kind, Result};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::{Bytes, Held};
use crate::error::to_py;
use crate::media::{run, Medium};

fn tracking_from(name: &str) -> PyResult<core::Tracking> {
    match name {
        "automatic" => Ok(core::Tracking::Automatic),
        "kernel" => Ok(core::Tracking::Kernel),
        "explicit" => Ok(core::Tracking::Explicit),
        "write-protect" => Ok(core::Tracking::WriteProtect),
        "write-protect-async" => Ok(core::Tracking::WriteProtectAsync),
        _ => Err(to_py(Error::new(Kind::Invalid, "map", format!("{name:?} is no tracker")))),
    }
}

/// Runs `work`: without the GIL where it moves much or asks the file system.
fn paced<T: Send>(
    py: Python<'_>,
    mapping: &core::Mapping,
    len: u64,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let waits = mapping.granularity() == pmemkit_core::media::Granularity::Page;
    run(py, if waits { u64::MAX } else { len }, work)
}

/// Fills a buffer request in with pinned bytes of a mapping.
///
/// # Safety
/// As for `__getbuffer__`; `owner` is what releases the pin.
unsafe fn export(
    owner: *mut ffi::PyObject,
    mapping: &core::Mapping,
    range: (u64, u64),
    read_only: bool,
    request: (*mut ffi::Py_buffer, c_int),
) -> PyResult<()> {
    let ((at, len), (view, flags)) = (range, request);
    if view.is_null() {
        return Err(PyBufferError::new_err("there is no view to fill in"));
    }
    let address = mapping.pin(at, len, !read_only).map_err(to_py)?;
    // SAFETY: the caller vouches for owner and view; the pinned range has `len` bytes.
    let status = unsafe {
        let (size, read_only) = (len as ffi::Py_ssize_t, c_int::from(read_only));
        ffi::PyBuffer_FillInfo(view, owner, address.cast(), size, read_only, flags)
    };
    if status != 0 {
        mapping.unpin(at, len, !read_only);
        return Err(Python::attach(PyErr::fetch));
    }
    Ok(())
}

/// Mapped bytes of a region.
#[pyclass(subclass, frozen, weakref, module = "pmemkit._native.dax")]
pub struct Mapping {
    inner: Arc<core::Mapping>,
}

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (medium, *, offset=0, length, read_only=false, tracker="automatic",
                        private=false))]
    fn new(
        py: Python<'_>,
        medium: &Bound<'_, Medium>,
        offset: u64,
        length: u64,
        read_only: bool,
        tracker: &str,
        private: bool,
    ) -> PyResult<Self> {
        let tracking = tracking_from(tracker)?;
        let (len, medium) = (length, medium.get().inner.clone());
        let more = core::Options::default();
        let options = core::Options { offset, len, read_only, tracking, private, ..more };
        let made = py.detach(|| core::Mapping::new(medium, options));
        Ok(Mapping { inner: Arc::new(made.map_err(to_py)?) })
    }

    fn __len__(&self) -> usize {
        self.inner.len() as usize
    }

    #[getter]
    fn granularity(&self) -> &'static str {
        self.inner.granularity().name()
    }

    #[getter]
    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner.closed()
    }

    #[getter]
    fn unit(&self) -> u64 {
        self.inner.unit()
    }

    #[getter]
    fn tracker(&self) -> PyResult<&'static str> {
        self.inner.tracker().map_err(to_py)
    }

    #[getter]
    fn snapshot_sees_stores(&self) -> bool {
        self.inner.snapshot_sees_stores()
    }

    #[getter]
    fn view_count(&self) -> usize {
        self.inner.view_count()
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: Bytes,
        length: Bytes,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (at, len) = (offset.0, length.0);
        pmemkit_core::media::check_range("read", at, len, self.inner.len()).map_err(to_py)?;
        PyBytes::new_with(py, len as usize, |bytes| {
            let target = bytes.as_mut_ptr() as usize;
            // SAFETY: the new object has `len` bytes, and nobody else has seen it yet.
            run(py, len, || unsafe { self.inner.load(at, target as *mut u8, len) })
        })
    }

    fn write(&self, py: Python<'_>, offset: Bytes, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let held = Held::new(data, false)?;
        let (address, len) = (held.address(), held.len());
        // SAFETY: `held` keeps the bytes in place.
        run(py, len, || unsafe { self.inner.write(offset.0, address.get(), len) })
    }

    fn copy_persist(&self, py: Python<'_>, offset: Bytes, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let held = Held::new(data, false)?;
        let (address, len) = (held.address(), held.len());
        // SAFETY: `held` keeps the bytes in place.
        let work = || unsafe { self.inner.copy_persist(offset.0, address.get(), len) };
        paced(py, &self.inner, len, work)
    }

    fn set_persist(&self, py: Python<'_>, offset: Bytes, length: Bytes, value: u8) -> PyResult<()> {
        let work = || self.inner.set_persist(offset.0, length.0, value);
        paced(py, &self.inner, length.0, work)
    }

    fn flush(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        paced(py, &self.inner, length.0, || self.inner.flush(offset.0, length.0))
    }

    fn drain(&self) -> PyResult<()> {
        self.inner.drain().map_err(to_py)
    }

    fn persist(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        paced(py, &self.inner, length.0, || self.inner.persist(offset.0, length.0))
    }

    fn mark_dirty(&self, offset: Bytes, length: Bytes) -> PyResult<()> {
        self.inner.mark_dirty(offset.0, length.0).map_err(to_py)
    }

    fn sync(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.inner.sync()).map_err(to_py)
    }

    fn kernel_sync(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        py.detach(|| self.inner.kernel_sync(offset.0, length.0)).map_err(to_py)
    }

    fn snapshot_into(&self, py: Python<'_>, target: &Bound<'_, Medium>) -> PyResult<()> {
        let target = target.get().inner.clone();
        py.detach(|| self.inner.snapshot(target)).map_err(to_py)
    }

    fn advise_huge(&self, wanted: bool) -> PyResult<()> {
        self.inner.advise_huge(wanted).map_err(to_py)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.close()).map_err(to_py)
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let inner = &slf.get().inner;
        let range = (0, inner.len());
        // SAFETY: Python vouches for the view.
        unsafe { export(slf.as_ptr(), inner, range, inner.read_only(), (view, flags)) }
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.inner.unpin(0, self.inner.len(), !self.inner.read_only());
    }
}

/// A range of a mapping, as a buffer of its own.
#[pyclass(frozen, module = "pmemkit._native.dax")]
pub struct View {
    mapping: Py<Mapping>,
    range: (u64, u64),
    read_only: bool,
}

#[pymethods]
impl View {
    #[new]
    #[pyo3(signature = (mapping, offset, length, *, read_only=false))]
    fn new(
        mapping: &Bound<'_, Mapping>,
        offset: Bytes,
        length: Bytes,
        read_only: bool,
    ) -> PyResult<Self> {
        let inner = &mapping.get().inner;
        let read_only = read_only || inner.read_only();
        let range = (offset.0, length.0);
        pmemkit_core::media::check_range("view", range.0, range.1, inner.len()).map_err(to_py)?;
        Ok(View { mapping: mapping.clone().unbind(), range, read_only })
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let View { mapping, range, read_only } = slf.get();
        // SAFETY: Python vouches for the view.
        unsafe { export(slf.as_ptr(), &mapping.get().inner, *range, *read_only, (view, flags)) }
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.mapping.get().inner.unpin(self.range.0, self.range.1, !self.read_only);
    }
}

/// A redo log.
#[pyclass(frozen, module = "pmemkit._native.dax")]
pub struct Log {
    inner: core::Log,
}

#[pymethods]
impl Log {
    #[new]
    #[pyo3(signature = (mapping, offset, length, *, create=false))]
    fn new(
        py: Python<'_>,
        mapping: &Bound<'_, Mapping>,
        offset: Bytes,
        length: Bytes,
        create: bool,
    ) -> PyResult<Self> {
        let inner = mapping.get().inner.clone();
        let options = core::LogOptions { create, ..core::LogOptions::default() };
        let opened = py.detach(|| core::Log::open(inner, offset.0, length.0, options));
        Ok(Log { inner: opened.map_err(to_py)? })
    }

    #[getter]
    fn recovered(&self) -> u64 {
        self.inner.recovered()
    }

    #[getter]
    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }

    fn commit(&self, py: Python<'_>, changes: Vec<(u64, Bound<'_, PyBytes>)>) -> PyResult<()> {
        let changes: Vec<(u64, &[u8])> =
            changes.iter().map(|(at, data)| (*at, data.as_bytes())).collect();
        py.detach(|| self.inner.commit(&changes)).map_err(to_py)
    }
}

/// The submodule `dax`.
#[pymodule]
pub mod dax {
    #[pymodule_export]
    use super::{Log, Mapping, View};
}
