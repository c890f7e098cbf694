//! Glue for `pmemkit_core::memory`. Documentation: `_native/memory.pyi`.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::frames::Place;
use pmemkit_core::memory as core;
use pmemkit_core::memory::RegionOptions;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use crate::error::to_py;
use crate::media::Medium;
use crate::numpy;

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "pool", text))
}

/// Memory of several regions.
#[pyclass(frozen, module = "pmemkit._native.memory")]
pub struct Pool {
    inner: Arc<core::Pool>,
}

/// # Safety
/// The descriptor stays open as long as what is given back is used.
unsafe fn borrowed<'a>(fd: RawFd) -> PyResult<BorrowedFd<'a>> {
    if fd < 0 {
        return Err(refuse(format!("{fd} is not a file descriptor")));
    }
    // SAFETY: not -1, and the caller vouches for the rest.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

fn map_place((medium, end): (Bound<'_, Medium>, u64)) -> core::MapPlace {
    let medium = medium.get().inner.clone();
    let length = medium.len();
    core::MapPlace { place: Place { medium, offset: 0, length, persistent: false }, end }
}

fn placement_of(name: &str, granule: u64) -> PyResult<core::Placement> {
    match name {
        "preferred" => Ok(core::Placement::Preferred),
        "interleave" => Ok(core::Placement::Interleave { granule: granule / core::FRAME_SIZE }),
        _ => Err(refuse(format!("{name:?} is not a placement; there are preferred, interleave"))),
    }
}

fn zeroing_of(name: &str) -> PyResult<core::Zeroing> {
    match name {
        "asked" => Ok(core::Zeroing::Asked),
        "allocate" => Ok(core::Zeroing::Allocate),
        "free" => Ok(core::Zeroing::Free),
        _ => Err(refuse(format!("{name:?} is not one of asked, allocate, free"))),
    }
}

fn deadline_of(timeout: Option<f64>) -> PyResult<Option<Instant>> {
    let Some(seconds) = timeout else { return Ok(None) };
    Ok(Instant::now().checked_add(seconds_of(seconds)?))
}

fn seconds_of(seconds: f64) -> PyResult<Duration> {
    let parsed = Duration::try_from_secs_f64(seconds);
    parsed.map_err(|cause| refuse(format!("{seconds} seconds: {cause}")))
}

impl Pool {
    fn carry_out<'py>(
        &self,
        py: Python<'py>,
        work: &core::Work,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let deadline = deadline_of(timeout)?;
        let mut raised = None;
        let mut report = |at: core::Progress| match tell(progress.as_ref(), at) {
            Ok(flow) => flow,
            Err(error) => {
                raised = Some(error);
                core::Flow::Cancel
            }
        };
        let done = py.detach(|| self.inner.migrate(work, deadline, &mut report));
        match (done, raised) {
            (Ok(outcome), _) => outcome_dict(py, &outcome),
            (Err(_), Some(error)) => Err(error),
            (Err(error), None) => Err(to_py(error)),
        }
    }
}

/// Calls back; `False` cancels, and so does a signal that raises.
fn tell(progress: Option<&Py<PyAny>>, at: core::Progress) -> PyResult<core::Flow> {
    Python::attach(|py| {
        py.check_signals()?;
        let Some(progress) = progress else { return Ok(core::Flow::Continue) };
        let answer = progress.call1(py, (at.moved, at.total))?;
        let stop = answer.bind(py).is(pyo3::types::PyBool::new(py, false));
        Ok(if stop { core::Flow::Cancel } else { core::Flow::Continue })
    })
}

fn outcome_dict<'py>(py: Python<'py>, outcome: &core::Outcome) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("bytes", outcome.bytes)?;
    found.set_item("extents", outcome.extents)?;
    found.set_item("elapsed_ns", outcome.elapsed_ns)?;
    found.set_item("hold_ns_peak", outcome.hold_ns_peak)?;
    Ok(found)
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (*, block_size, placement="preferred", granule=2097152, zeroing="asked",
                        limit=None, share_with_children=true, chunk=2097152, userfault=true,
                        report_every=0.1))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python class.
    fn new(
        block_size: u64,
        placement: &str,
        granule: u64,
        zeroing: &str,
        limit: Option<u64>,
        share_with_children: bool,
        chunk: u64,
        userfault: bool,
        report_every: f64,
    ) -> PyResult<Self> {
        let options = core::Options {
            block_frames: block_size / core::FRAME_SIZE,
            placement: placement_of(placement, granule)?,
            zeroing: zeroing_of(zeroing)?,
            limit_frames: limit.map(|bytes| bytes / core::FRAME_SIZE),
            share_with_children,
            chunk,
            userfault,
            report_every: seconds_of(report_every)?,
        };
        Ok(Pool { inner: Arc::new(core::Pool::new(options).map_err(to_py)?) })
    }

    #[pyo3(signature = (fd, name, *, offset, length, rank=0, weight=1, sealed=false,
                        large_pages=true, claimed=vec![], map=None))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python method.
    fn add(
        &self,
        py: Python<'_>,
        fd: RawFd,
        name: String,
        offset: u64,
        length: u64,
        rank: u32,
        weight: u32,
        sealed: bool,
        large_pages: bool,
        claimed: Vec<(u64, u64)>,
        map: Option<(Bound<'_, Medium>, u64)>,
    ) -> PyResult<u32> {
        // SAFETY: the caller of the Python method keeps the descriptor open during the call.
        let file = unsafe { borrowed(fd)? };
        let (len, map) = (length, map.map(map_place));
        let options =
            RegionOptions { name, offset, len, rank, weight, sealed, large_pages, claimed, map };
        py.detach(|| self.inner.add(file, options)).map_err(to_py)
    }

    #[pyo3(signature = (nbytes, *, region=None, fixed=false, zero=false, whole=false))]
    fn allocate(
        &self,
        py: Python<'_>,
        nbytes: u64,
        region: Option<u32>,
        fixed: bool,
        zero: bool,
        whole: bool,
    ) -> PyResult<Buffer> {
        let request = core::Request { region, fixed, zero, whole };
        let done = if nbytes <= core::SMALL_MAX {
            self.inner.allocate(nbytes, request)
        } else {
            py.detach(|| self.inner.allocate(nbytes, request))
        };
        let address = done.map_err(to_py)?;
        Ok(Buffer::new(self.inner.clone(), address, nbytes))
    }

    fn adopt(&self, address: u64, nbytes: u64) -> PyResult<Buffer> {
        if self.inner.size_of(address).is_none_or(|size| size < nbytes) {
            return Err(refuse(format!("no extent of {nbytes} bytes is at address {address:#x}")));
        }
        Ok(Buffer::new(self.inner.clone(), address, nbytes))
    }

    #[pyo3(signature = (region, *, abandoned=vec![], timeout=None, progress=None))]
    fn remove<'py>(
        &self,
        py: Python<'py>,
        region: u32,
        abandoned: Vec<u64>,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.carry_out(py, &core::Work::Remove { region, abandoned }, timeout, progress)
    }

    #[pyo3(signature = (region, first, count, *, timeout=None, progress=None))]
    fn offline<'py>(
        &self,
        py: Python<'py>,
        region: u32,
        first: u64,
        count: u64,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let work = core::Work::Offline { region, first, count };
        self.carry_out(py, &work, timeout, progress)
    }

    #[pyo3(signature = (addresses, region, *, timeout=None, progress=None))]
    fn migrate<'py>(
        &self,
        py: Python<'py>,
        addresses: Vec<u64>,
        region: u32,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.carry_out(py, &core::Work::Move { addresses, to: region }, timeout, progress)
    }

    #[pyo3(signature = (ranges, region, *, timeout=None, progress=None))]
    fn migrate_ranges<'py>(
        &self,
        py: Python<'py>,
        ranges: Vec<(u64, u64)>,
        region: u32,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.carry_out(py, &core::Work::Ranges { ranges, to: region }, timeout, progress)
    }

    fn sample_begin(
        &self,
        py: Python<'_>,
        after: u64,
        count: usize,
        heat: &str,
    ) -> PyResult<(usize, u64)> {
        let heat = match heat {
            "accesses" => core::Heat::Accesses,
            "writes" => core::Heat::Writes,
            _ => return Err(refuse(format!("{heat:?} is not one of accesses, writes"))),
        };
        py.detach(|| self.inner.sample_begin(after, count, heat)).map_err(to_py)
    }

    fn sample_end(&self, py: Python<'_>) -> PyResult<Vec<SampleRow>> {
        let rows = py.detach(|| self.inner.sample_end()).map_err(to_py)?;
        Ok(rows.into_iter().map(|s| (s.at, s.frames, s.used, s.places, s.held)).collect())
    }

    fn online(&self, region: u32, first: u64, count: u64) -> PyResult<()> {
        self.inner.online(region, first, count).map_err(to_py)
    }

    fn regions<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        py.detach(|| self.inner.members()).iter().map(|info| region_dict(py, info)).collect()
    }

    fn extents(&self, py: Python<'_>) -> Vec<ExtentRow> {
        let rows = py.detach(|| self.inner.extents());
        rows.into_iter().map(|e| (e.address, e.len, e.pieces, e.pins, e.fixed, e.slab)).collect()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, used, used_peak) = self.inner.stats();
        let (objects, object_bytes, slabs) = self.inner.small_stats();
        let (ghosts, ghost_bytes) = self.inner.ghosts();
        let found = PyDict::new(py);
        for (name, value) in [
            ("used", used),
            ("used_peak", used_peak),
            ("allocations", stats.allocations),
            ("frees", stats.frees),
            ("refused", stats.refused),
            ("migrated", stats.migrated),
            ("hold_ns_peak", stats.hold_ns_peak),
            ("small_objects", objects),
            ("small_bytes", object_bytes),
            ("slabs", slabs),
            ("ghost_windows", ghosts),
            ("ghost_bytes", ghost_bytes),
        ] {
            found.set_item(name, value)?;
        }
        Ok(found)
    }

    fn validate(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.inner.validate())
    }

    fn owns(&self, address: u64) -> bool {
        self.inner.owns(address).unwrap_or(true)
    }

    fn pin(&self, py: Python<'_>, address: u64) -> PyResult<()> {
        py.detach(|| self.inner.pin(address)).map_err(to_py)
    }

    fn unpin(&self, address: u64) {
        self.inner.unpin(address);
    }

    fn enter(&self, py: Python<'_>) {
        py.detach(|| self.inner.enter());
    }

    fn leave(&self) {
        self.inner.leave();
    }

    fn forget_children(&self) {
        self.inner.forget_children();
    }

    fn numpy_handler<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        numpy::handler(py, self.inner.clone())
    }
}

type SampleRow = (u64, u64, u64, Vec<(u32, u64)>, bool);
type ExtentRow = (u64, u64, Vec<(u32, u64, u64)>, u32, bool, bool);

fn region_dict<'py>(py: Python<'py>, info: &core::RegionInfo) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("id", info.id)?;
    found.set_item("name", &info.name)?;
    found.set_item("size", info.frames * core::FRAME_SIZE)?;
    found.set_item("free", info.free_frames * core::FRAME_SIZE)?;
    found.set_item("unit", info.unit * core::FRAME_SIZE)?;
    found.set_item("window", info.window)?;
    found.set_item("writers", info.catch)?;
    found.set_item("rank", info.rank)?;
    found.set_item("weight", info.weight)?;
    found.set_item("truncated", info.truncated)?;
    found.set_item("map", if info.map_in_region { "dev" } else { "mem" })?;
    found.set_item("map_bytes", info.map_bytes)?;
    found.set_item("map_stores", info.map_stores)?;
    let blocks = info.blocks.iter();
    let blocks: Vec<_> =
        blocks.map(|(state, used)| (state.name(), used * core::FRAME_SIZE)).collect();
    found.set_item("blocks", blocks)?;
    Ok(found)
}

/// Memory of a pool, given back when the last view of it is gone.
#[pyclass(frozen, module = "pmemkit._native.memory")]
pub struct Buffer {
    pool: Arc<core::Pool>,
    address: u64,
    len: u64,
    /// Views that the buffer protocol gave out and did not get back.
    exports: AtomicU64,
    /// Its extent is no longer its own to give back.
    detached: AtomicBool,
}

impl Buffer {
    fn new(pool: Arc<core::Pool>, address: u64, len: u64) -> Buffer {
        let (exports, detached) = (AtomicU64::new(0), AtomicBool::new(false));
        Buffer { pool, address, len, exports, detached }
    }
}

#[pymethods]
impl Buffer {
    #[getter]
    fn address(&self) -> u64 {
        self.address
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.len
    }

    fn __len__(&self) -> usize {
        self.len as usize
    }

    #[getter]
    fn exports(&self) -> u64 {
        self.exports.load(Ordering::Relaxed)
    }

    fn detach(&self) {
        self.detached.store(true, Ordering::Relaxed);
    }

    #[getter]
    fn place(&self) -> Option<(u32, u64)> {
        self.pool.place_of(self.address)
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: std::ffi::c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: the interpreter gives a view to fill; the memory lives as long as this object,
        // which the view keeps.
        let status = unsafe {
            let (at, len) = (this.address as *mut _, this.len as ffi::Py_ssize_t);
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), at, len, 0, flags)
        };
        if status != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.exports.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.detached.load(Ordering::Relaxed) {
            self.pool.free(self.address);
        }
    }
}

/// The submodule `memory`.
#[pymodule]
pub mod memory {
    use super::*;

    #[pymodule_export]
    use super::{Buffer, Pool};

    #[pymodule_export]
    const SMALL_MAX: u64 = core::SMALL_MAX;

    #[pymodule_export]
    const SAMPLE_CHUNK: u64 = core::SAMPLE_CHUNK;

    #[pyfunction]
    fn mapping_counts() -> (u64, u64) {
        core::mapping_counts()
    }

    #[pyfunction]
    fn set_numpy_handler<'py>(
        py: Python<'py>,
        handler: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        numpy::set_handler(py, handler.as_ref())
    }
}
