//! Glue for `pmemkit_core::fault`. Documentation: `_native/fault.pyi`.

use std::ffi::c_int;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pmemkit_core::error::{Error, Kind, Result};
use pmemkit_core::fault as core;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::block::Channel;
use crate::buffer::{Bytes, Held};
use crate::error::to_py;
use crate::media::Medium;

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "map", text))
}

/// An object of Python that says what pages are.
struct Told {
    object: Py<PyAny>,
    asks_for_writes: bool,
}

impl Told {
    /// Calls with the interpreter; an exception is the error of the page.
    fn call<T>(&self, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T> {
        let called = Python::try_attach(|py| {
            call(self.object.bind(py)).map_err(|error| {
                Error::new(Kind::Media, "fault", format!("the provider: {}", error.value(py)))
            })
        });
        let gone = || Error::new(Kind::Closed, "fault", "the interpreter has ended");
        called.unwrap_or_else(|| Err(gone()))
    }
}

impl core::PfnProvider for Told {
    fn provide(&self, ask: &core::Ask, into: &mut [u8]) -> Result<core::Answer> {
        let (run, wanted) = (ask.run, into.len() as u64);
        let content = self.call(|object| {
            let found = object.call_method1("provide", (run.first, run.count))?;
            if found.is_none() {
                return Ok(core::Content::Zero);
            }
            let held = Held::new(&found, false)?;
            if held.len() != wanted {
                let text = format!("{} bytes for {} pages of {wanted}", held.len(), run.count);
                return Err(refuse(text));
            }
            // SAFETY: both are valid for as many bytes, and the buffer is this thread's own.
            unsafe {
                held.address().get().copy_to_nonoverlapping(into.as_mut_ptr(), into.len());
            }
            Ok(core::Content::Bytes)
        })?;
        Ok(core::Answer { run, content })
    }

    fn has_read_only_pages(&self) -> bool {
        self.asks_for_writes
    }

    fn may_write(&self, page: u64) -> Result<()> {
        if !self.asks_for_writes {
            return Ok(());
        }
        let allowed = self.call(|object| object.call_method1("may_write", (page,))?.is_truthy())?;
        if allowed {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "write", format!("page {page} is read-only")))
    }
}

/// Knows what pages are.
#[pyclass(frozen, module = "pmemkit._native.fault")]
pub struct Provider {
    inner: Arc<dyn core::PfnProvider>,
    /// Answers take the interpreter.
    asks_python: bool,
}

#[pymethods]
impl Provider {
    #[staticmethod]
    fn of_object(object: &Bound<'_, PyAny>) -> PyResult<Provider> {
        if !object.getattr("provide").is_ok_and(|method| method.is_callable()) {
            return Err(refuse("a provider has a method provide(first, count)".to_owned()));
        }
        let asks_for_writes = object.hasattr("may_write")?;
        let told = Told { object: object.clone().unbind(), asks_for_writes };
        Ok(Provider { inner: Arc::new(told), asks_python: true })
    }

    #[staticmethod]
    fn of_medium(medium: &Bound<'_, Medium>, offset: u64, length: u64) -> PyResult<Provider> {
        let medium = medium.get().inner.clone();
        let inner = core::FromMedium::new(medium, offset, length).map_err(to_py)?;
        Ok(Provider { inner: Arc::new(inner), asks_python: false })
    }

    #[staticmethod]
    fn of_channel(channel: &Bound<'_, Channel>, offset: u64, length: u64) -> PyResult<Provider> {
        let channel = channel.get().inner.clone();
        let inner = core::FromDevice::new(channel, offset, length).map_err(to_py)?;
        Ok(Provider { inner: Arc::new(inner), asks_python: false })
    }

    #[staticmethod]
    #[allow(clippy::type_complexity)] // What Python hands over.
    fn assembled(
        parts: Vec<(Bound<'_, Medium>, u64, u64, Vec<(u64, u64)>)>,
        page_size: u64,
    ) -> PyResult<(Provider, u64)> {
        let part = |(medium, at, len, bad): (Bound<'_, Medium>, u64, u64, _)| core::Part {
            medium: medium.get().inner.clone(),
            at,
            len,
            bad,
        };
        let parts = parts.into_iter().map(part).collect();
        let inner = core::Assembled::new(parts, page_size).map_err(to_py)?;
        let len = inner.len();
        Ok((Provider { inner: Arc::new(inner), asks_python: false }, len))
    }
}

/// What a mapping is made of.
fn memory_of(fd: Option<RawFd>, huge: bool) -> PyResult<core::Memory> {
    match fd {
        Some(_) if huge => Err(refuse("a file has the pages it has".to_owned())),
        Some(fd) if fd < 0 => Err(refuse(format!("{fd} is no file descriptor"))),
        Some(fd) => {
            // SAFETY: the caller of the Python function keeps it open during the call.
            let file = unsafe { BorrowedFd::borrow_raw(fd) };
            let own = file.try_clone_to_owned();
            Ok(core::Memory::Shared(own.map_err(|cause| refuse(format!("{fd}: {cause}")))?))
        }
        None if huge => Ok(core::Memory::Huge),
        None => Ok(core::Memory::Private),
    }
}

/// A range of addresses whose pages appear when they are touched.
#[pyclass(subclass, frozen, weakref, module = "pmemkit._native.fault")]
pub struct LazyMapping {
    /// Gone when it is closed, and with it what it was filled from.
    inner: Mutex<Option<Arc<core::LazyMapping>>>,
    asks_python: bool,
}

impl LazyMapping {
    fn inner(&self) -> MutexGuard<'_, Option<Arc<core::LazyMapping>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> PyResult<Arc<core::LazyMapping>> {
        let closed = || to_py(Error::new(Kind::Closed, "map", "the mapping is closed"));
        self.inner().clone().ok_or_else(closed)
    }

    /// Runs `work` without the interpreter: whatever touches a page may wait for a provider that
    /// needs it.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&core::LazyMapping) -> Result<T> + Send,
    ) -> PyResult<T> {
        let inner = self.open()?;
        py.detach(|| work(&inner)).map_err(to_py)
    }

    /// Pins all of it for a view.
    fn viewed(&self) -> PyResult<(Arc<core::LazyMapping>, *mut u8)> {
        if self.asks_python {
            let text = "a touch of a view keeps the interpreter, which the provider needs to \
                        answer: use read and write";
            return Err(to_py(Error::new(Kind::NotSupported, "view", text)));
        }
        let inner = self.open()?;
        let address = inner.pin(0, inner.len()).map_err(to_py)?;
        Ok((inner, address))
    }
}

#[pymethods]
impl LazyMapping {
    #[new]
    #[pyo3(signature = (provider, length, *, page_size=None, huge=false, fd=None, threads=1,
                        fault_around=1, read_only=false, track_writes=false, user_only=false))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python function.
    fn new(
        py: Python<'_>,
        provider: &Bound<'_, Provider>,
        length: u64,
        page_size: Option<u64>,
        huge: bool,
        fd: Option<RawFd>,
        threads: usize,
        fault_around: u64,
        read_only: bool,
        track_writes: bool,
        user_only: bool,
    ) -> PyResult<Self> {
        let (more, memory) = (core::Options::default(), memory_of(fd, huge)?);
        let page_size = page_size.unwrap_or(if huge { 2 << 20 } else { more.page_size });
        let more = core::Options { threads, fault_around, track_writes, ..more };
        let options = core::Options { page_size, memory, read_only, user_only, ..more };
        let Provider { inner, asks_python } = provider.get();
        let made = py.detach(|| core::LazyMapping::new(inner.clone(), length, options));
        let inner = Mutex::new(Some(Arc::new(made.map_err(to_py)?)));
        Ok(LazyMapping { inner, asks_python: *asks_python })
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.open()?.len() as usize)
    }

    #[getter]
    fn page_size(&self) -> PyResult<u64> {
        Ok(self.open()?.page_size())
    }

    #[getter]
    fn reach(&self) -> PyResult<&'static str> {
        Ok(match self.open()?.reach() {
            core::Reach::Kernel => "kernel",
            core::Reach::User => "user",
        })
    }

    #[getter]
    fn read_only(&self) -> PyResult<bool> {
        Ok(self.open()?.read_only())
    }

    #[getter]
    fn tracked(&self) -> PyResult<bool> {
        Ok(self.open()?.tracked())
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner().is_none()
    }

    #[getter]
    fn view_count(&self) -> PyResult<usize> {
        Ok(self.open()?.pins())
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: Bytes,
        length: Bytes,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (at, len, inner) = (offset.0, length.0, self.open()?);
        pmemkit_core::media::check_range("read", at, len, inner.len()).map_err(to_py)?;
        PyBytes::new_with(py, len as usize, |bytes| {
            let target = bytes.as_mut_ptr() as usize;
            // SAFETY: the new object has `len` bytes, and nobody else has seen it yet.
            py.detach(|| unsafe { inner.load(at, target as *mut u8, len) }).map_err(to_py)
        })
    }

    fn write(&self, py: Python<'_>, offset: Bytes, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let held = Held::new(data, false)?;
        let (address, len) = (held.address(), held.len());
        // SAFETY: `held` keeps the bytes in place.
        self.run(py, |inner| unsafe { inner.store(offset.0, address.get(), len) })
    }

    fn populate(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        self.run(py, |inner| inner.populate(offset.0, length.0))
    }

    fn retry(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<usize> {
        self.run(py, |inner| inner.retry(offset.0, length.0))
    }

    fn dirty(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        self.run(py, core::LazyMapping::dirty)
    }

    fn take_dirty(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        self.run(py, core::LazyMapping::take_dirty)
    }

    fn discard_dirty(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, core::LazyMapping::drop_dirty)
    }

    fn commit_to(
        &self,
        py: Python<'_>,
        channel: &Bound<'_, Channel>,
        offset: Bytes,
    ) -> PyResult<u64> {
        let channel = &channel.get().inner;
        self.run(py, |inner| inner.commit(channel, offset.0))
    }

    fn shrink(&self, py: Python<'_>, length: Bytes) -> PyResult<()> {
        self.run(py, |inner| inner.shrink(length.0))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, found) = (self.open()?.stats(), PyDict::new(py));
        found.set_item("faults", stats.faults)?;
        found.set_item("write_faults", stats.write_faults)?;
        found.set_item("minor_faults", stats.minor_faults)?;
        found.set_item("asked", stats.asked)?;
        found.set_item("bytes_placed", stats.bytes_placed)?;
        found.set_item("failures", stats.failures)?;
        Ok(found)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Ok(inner) = self.open() else { return Ok(()) };
        py.detach(|| inner.close()).map_err(to_py)?;
        *self.inner() = None;
        Ok(())
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        if view.is_null() {
            return Err(PyBufferError::new_err("there is no view to fill in"));
        }
        let (inner, address) = this.viewed()?;
        // SAFETY: Python vouches for the view; the pinned range has `len` bytes.
        let status = unsafe {
            let size = inner.len() as ffi::Py_ssize_t;
            let read_only = c_int::from(inner.read_only());
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address.cast(), size, read_only, flags)
        };
        if status != 0 {
            inner.unpin();
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        if let Some(inner) = &*self.inner() {
            inner.unpin();
        }
    }
}

impl Drop for LazyMapping {
    fn drop(&mut self) {
        // Closing waits for handlers, and they may wait for the interpreter. A view would have kept
        // the object, so nothing is pinned.
        let inner = self.inner().take();
        let _closed = Python::try_attach(|py| py.detach(|| inner.map(|each| each.close())));
    }
}

#[pyfunction]
fn probe(py: Python<'_>) -> Vec<(&'static str, Option<String>)> {
    let found = py.detach(core::probe);
    found.into_iter().map(|each| (each.name, each.refused)).collect()
}

/// The submodule `fault`.
#[pymodule]
pub mod fault {
    #[pymodule_export]
    use super::{probe, LazyMapping, Provider};
}
