//! Glue for `pmemkit_core::block`. Documentation: `_native/block.pyi`.

use std::sync::Arc;
use std::time::Duration;

use pmemkit_core::block::{self as core, Caps, Flags, Op, OpSet, Request};
use pmemkit_core::error::{Error, Kind};
use pmemkit_core::sg::Sg;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyFrozenSet};

use crate::buffer::{Bytes, Held};
use crate::cache::{options, Cache};
use crate::error::to_py;
use crate::media::Medium;
use crate::reader::PythonReader;

/// Bytes that are copied without giving the GIL up: giving it up costs more than the copy.
const HOLD_GIL_MAX: u64 = 4096;

const CAP_NAMES: [(Caps, &str); 11] = [
    (Caps::WRITE, "write"),
    (Caps::FLUSH, "flush"),
    (Caps::FUA, "fua"),
    (Caps::DISCARD, "discard"),
    (Caps::ZERO, "zero"),
    (Caps::FAST_ZERO, "fast_zero"),
    (Caps::CACHE, "cache"),
    (Caps::EXTENTS, "extents"),
    (Caps::MAP, "map"),
    (Caps::MULTI_CONN, "multi_conn"),
    (Caps::MAP_WRITE, "map_write"),
];

fn cap_set(py: Python<'_>, caps: Caps) -> PyResult<Bound<'_, PyFrozenSet>> {
    let names = CAP_NAMES.iter().filter(|(cap, _)| caps.contains(*cap)).map(|(_, name)| *name);
    PyFrozenSet::new(py, names.collect::<Vec<_>>())
}

fn op_set(names: &str) -> PyResult<OpSet> {
    let mut set = OpSet::empty();
    for name in names.split(',').map(str::trim) {
        let Some(op) = Op::ALL.into_iter().find(|op| op.name() == name) else {
            let names = Op::ALL.map(Op::name).join(", ");
            let text = format!("{name:?} is not an op; ops are {names}");
            return Err(to_py(Error::new(Kind::Invalid, "layer", text)));
        };
        set |= op.set();
    }
    Ok(set)
}

/// Runs `work` without the GIL unless it copies little.
fn run<T: Send>(
    py: Python<'_>,
    len: u64,
    work: impl FnOnce() -> pmemkit_core::error::Result<T> + Send,
) -> PyResult<T> {
    let result = if len > HOLD_GIL_MAX { py.detach(work) } else { work() };
    result.map_err(to_py)
}

/// A stack of layers.
#[pyclass(frozen, module = "pmemkit._native.block")]
pub struct Device {
    /// The core's stack.
    pub stack: core::Stack,
}

impl Device {
    fn layer(&self, wrap: impl FnOnce(Arc<dyn core::Device>) -> Arc<dyn core::Device>) -> Device {
        Device { stack: self.stack.layer(wrap) }
    }

    fn info(&self) -> &core::Info {
        self.stack.top().info()
    }
}

#[pymethods]
impl Device {
    #[getter]
    fn size(&self) -> u64 {
        self.info().size
    }

    #[getter]
    fn block_size_min(&self) -> u32 {
        self.info().block_size_min
    }

    #[getter]
    fn block_size_preferred(&self) -> u32 {
        self.info().block_size_preferred
    }

    #[getter]
    fn payload_size_max(&self) -> u32 {
        self.info().payload_size_max
    }

    #[getter]
    fn caps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyFrozenSet>> {
        cap_set(py, self.info().caps)
    }

    #[pyo3(signature = (*, read_only = false))]
    fn channel(&self, read_only: bool) -> Channel {
        Channel { inner: self.stack.channel(read_only) }
    }

    fn latched(&self) -> Option<String> {
        self.stack.latch().reason().map(ToString::to_string)
    }
}

/// A handle for I/O.
#[pyclass(frozen, module = "pmemkit._native.block")]
pub struct Channel {
    /// The core's channel.
    pub inner: core::Channel,
}

impl Channel {
    fn ranged(&self, py: Python<'_>, op: Op, at: u64, len: u64, flags: Flags) -> PyResult<()> {
        let sg = Sg::new();
        py.detach(|| self.inner.submit(&Request { op, at, len, flags, sg: &sg })).map_err(to_py)
    }

    /// Bytes of a transfer, or as good as endless where it may wait for something slow: the GIL is
    /// given up then, whatever the length.
    fn weight(&self, op: Op, flags: Flags, len: u64) -> u64 {
        if self.inner.blocks(op, flags) {
            u64::MAX
        } else {
            len
        }
    }

    /// Refuses a read that cannot fit before memory for it is asked for.
    fn check(&self, at: u64, len: u64) -> PyResult<()> {
        pmemkit_core::media::check_range("read", at, len, self.inner.info().size).map_err(to_py)
    }

    /// A read or write of any length, in requests of at most the payload limit.
    fn transfer(
        &self,
        op: Op,
        at: u64,
        held: &Held,
        flags: Flags,
    ) -> pmemkit_core::error::Result<()> {
        let info = self.inner.info();
        let step = u64::from(info.payload_size_max);
        pmemkit_core::media::check_range(op.name(), at, held.len(), info.size)?;
        let mut done = 0;
        loop {
            let len = (held.len() - done).min(step);
            let mut sg = Sg::new();
            // SAFETY: `held` keeps the buffer in place; `done + len` stays inside it.
            unsafe { sg.push_host(held.address().get().add(done as usize), len) };
            self.inner.submit(&Request { op, at: at + done, len, flags, sg: &sg })?;
            done += len;
            if done == held.len() {
                return Ok(());
            }
        }
    }
}

fn flags_of(fua: bool, no_hole: bool, fast: bool) -> Flags {
    let mut flags = Flags::empty();
    flags.set(Flags::FUA, fua);
    flags.set(Flags::NO_HOLE, no_hole);
    flags.set(Flags::FAST_ZERO, fast);
    flags
}

#[pymethods]
impl Channel {
    #[getter]
    fn size(&self) -> u64 {
        self.inner.info().size
    }

    #[getter]
    fn block_size_min(&self) -> u32 {
        self.inner.info().block_size_min
    }

    #[getter]
    fn block_size_preferred(&self) -> u32 {
        self.inner.info().block_size_preferred
    }

    #[getter]
    fn payload_size_max(&self) -> u32 {
        self.inner.info().payload_size_max
    }

    #[getter]
    fn caps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyFrozenSet>> {
        cap_set(py, self.inner.info().caps)
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: Bytes,
        length: Bytes,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.check(offset.0, length.0)?;
        let length = usize::try_from(length.0)?;
        PyBytes::new_with(py, length, |target| {
            let held = Held::borrowed(target);
            let weight = self.weight(Op::Read, Flags::empty(), held.len());
            run(py, weight, || self.transfer(Op::Read, offset.0, &held, Flags::empty()))
        })
    }

    fn readinto(&self, py: Python<'_>, offset: Bytes, target: &Bound<'_, PyAny>) -> PyResult<u64> {
        let held = Held::new(target, true)?;
        let weight = self.weight(Op::Read, Flags::empty(), held.len());
        run(py, weight, || self.transfer(Op::Read, offset.0, &held, Flags::empty()))?;
        Ok(held.len())
    }

    #[pyo3(signature = (offset, data, *, fua = false))]
    fn write(
        &self,
        py: Python<'_>,
        offset: Bytes,
        data: &Bound<'_, PyAny>,
        fua: bool,
    ) -> PyResult<u64> {
        let held = Held::new(data, false)?;
        let (flags, len) = (flags_of(fua, false, false), held.len());
        run(py, self.weight(Op::Write, flags, len), || {
            self.transfer(Op::Write, offset.0, &held, flags)
        })?;
        Ok(len)
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.ranged(py, Op::Flush, 0, 0, Flags::empty())
    }

    #[pyo3(signature = (offset, length, *, fua = false))]
    fn discard(&self, py: Python<'_>, offset: Bytes, length: Bytes, fua: bool) -> PyResult<()> {
        self.ranged(py, Op::Discard, offset.0, length.0, flags_of(fua, false, false))
    }

    #[pyo3(signature = (offset, length, *, fua = false, no_hole = false, fast = false))]
    fn zero(
        &self,
        py: Python<'_>,
        offset: Bytes,
        length: Bytes,
        fua: bool,
        no_hole: bool,
        fast: bool,
    ) -> PyResult<()> {
        self.ranged(py, Op::Zero, offset.0, length.0, flags_of(fua, no_hole, fast))
    }

    fn cache(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<()> {
        self.ranged(py, Op::Cache, offset.0, length.0, Flags::empty())
    }

    fn extents(&self, py: Python<'_>, offset: Bytes, length: Bytes) -> PyResult<Vec<(u64, bool)>> {
        let extents = py.detach(|| self.inner.extents(offset.0, length.0)).map_err(to_py)?;
        Ok(extents.into_iter().map(|extent| (extent.len, extent.hole)).collect())
    }
}

/// The log of a trace layer.
#[pyclass(frozen, module = "pmemkit._native.block")]
pub struct Trace {
    log: Arc<core::TraceLog>,
}

#[pymethods]
impl Trace {
    #[new]
    #[pyo3(signature = (capacity = 65536))]
    fn new(capacity: usize) -> Self {
        Trace { log: Arc::new(core::TraceLog::new(capacity)) }
    }

    fn entries(&self) -> Vec<(&'static str, u64, u64, u8, &'static str)> {
        let entries = self.log.entries();
        entries.into_iter().map(|e| (e.op, e.at, e.len, e.flags, e.outcome)).collect()
    }

    fn dropped(&self) -> u64 {
        self.log.dropped()
    }
}

/// The submodule `block`.
#[pymodule]
pub mod block {
    use super::*;

    #[pymodule_export]
    use super::{Cache, Channel, Device, Trace};

    #[pyfunction]
    #[pyo3(signature = (medium, *, read_only = false))]
    fn raw(medium: &Bound<'_, Medium>, read_only: bool) -> Device {
        let medium = medium.get().inner.clone();
        Device { stack: core::Stack::new(Arc::new(core::Raw::new(medium, read_only))) }
    }

    #[pyfunction]
    fn python_reader(size: Bytes, sector_size: u32, read: Py<PyAny>) -> PyResult<Device> {
        if !sector_size.is_power_of_two() {
            let text = format!("a sector size of {sector_size} bytes is no power of two");
            return Err(to_py(Error::new(Kind::Invalid, "open", text)));
        }
        let reader = PythonReader::new(size.0, sector_size, read);
        Ok(Device { stack: core::Stack::new(Arc::new(reader)) })
    }

    #[pyfunction]
    fn noop(below: &Bound<'_, Device>) -> Device {
        below.get().layer(|next| Arc::new(core::Noop::new(next)))
    }

    #[pyfunction]
    #[pyo3(signature = (
        below, *, size, mode = "writeback", read_ahead = 32, dirty_background = 85,
        dirty_most = 95, flush_age = Some(30.0), heed_pressure = true
    ))]
    #[allow(clippy::too_many_arguments)]
    fn cache(
        below: &Bound<'_, Device>,
        size: u64,
        mode: &str,
        read_ahead: u64,
        dirty_background: u32,
        dirty_most: u32,
        flush_age: Option<f64>,
        heed_pressure: bool,
    ) -> PyResult<Cache> {
        let dirty = (dirty_background, dirty_most);
        let options = options(mode, size, read_ahead, dirty, flush_age, heed_pressure)?;
        Cache::over(below.py(), below.get(), options)
    }

    #[pyfunction]
    fn bounce(below: &Bound<'_, Device>) -> Device {
        below.get().layer(|next| Arc::new(core::Bounce::new(next)))
    }

    #[pyfunction]
    fn trace(below: &Bound<'_, Device>, sink: &Bound<'_, Trace>) -> Device {
        let log = sink.get().log.clone();
        below.get().layer(|next| Arc::new(core::Trace::new(next, log)))
    }

    #[pyfunction]
    #[pyo3(signature = (
        below, *, ops = "read,write", nth = 1, count = 1, offset = 0, length = None, errno = 5
    ))]
    fn fault(
        below: &Bound<'_, Device>,
        ops: &str,
        nth: u64,
        count: u64,
        offset: u64,
        length: Option<u64>,
        errno: i32,
    ) -> PyResult<Device> {
        let (ops, len) = (op_set(ops)?, length.unwrap_or(u64::MAX));
        let rule = core::FaultRule { ops, nth, count, at: offset, len, errno };
        let next = below.get().stack.top().clone();
        let layer = Arc::new(core::Fault::new(next, rule).map_err(to_py)?);
        Ok(below.get().layer(|_| layer))
    }

    #[pyfunction]
    #[pyo3(signature = (below, *, ops = "read,write", seconds))]
    fn delay(below: &Bound<'_, Device>, ops: &str, seconds: f64) -> PyResult<Device> {
        let ops = op_set(ops)?;
        let wait = Duration::try_from_secs_f64(seconds).map_err(|cause| {
            to_py(Error::new(Kind::Invalid, "delay", format!("{seconds} seconds: {cause}")))
        })?;
        Ok(below.get().layer(|next| Arc::new(core::Delay::new(next, ops, wait))))
    }
}
