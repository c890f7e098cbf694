//! Glue for `pmemkit_core::bench`. Documentation: `_native/bench.pyi`.

use std::path::PathBuf;

use pmemkit_core::bench as core;
use pmemkit_core::block::Op;
use pmemkit_core::btt::Options;
use pmemkit_core::cache::Use;
use pmemkit_core::error::{Error, Kind};
use pyo3::prelude::*;

use crate::block::Channel;
use crate::btt::{self, Numbers};
use crate::buffer::Held;
use crate::error::to_py;

/// Sectors to be timed.
#[pyclass(frozen, module = "pmemkit._native.bench")]
pub struct Sectors {
    inner: Box<dyn core::Sectors>,
}

#[pymethods]
impl Sectors {
    #[staticmethod]
    #[pyo3(signature = (channel, size = None))]
    fn channel(channel: &Bound<'_, Channel>, size: Option<usize>) -> Sectors {
        let channel = channel.get().inner.clone();
        let size = size.unwrap_or(channel.info().block_size_min as usize);
        Sectors { inner: Box::new(core::Ours(channel, size)) }
    }

    #[staticmethod]
    fn plain_copy(py: Python<'_>, length: u64) -> PyResult<Sectors> {
        let inner = py.detach(|| core::PlainCopy::new(length)).map_err(to_py)?;
        Ok(Sectors { inner: Box::new(inner) })
    }

    #[staticmethod]
    fn floor(py: Python<'_>, length: u64, size: usize) -> PyResult<Sectors> {
        let inner = py.detach(|| core::Floor::new(length, size)).map_err(to_py)?;
        Ok(Sectors { inner: Box::new(inner) })
    }

    #[staticmethod]
    fn pmemblk(
        py: Python<'_>,
        library: &str,
        path: PathBuf,
        size: usize,
        length: usize,
    ) -> PyResult<Sectors> {
        let made = py.detach(|| core::Pmemblk::new(library, &path, size, length));
        Ok(Sectors { inner: Box::new(made.map_err(to_py)?) })
    }

    #[getter]
    fn count(&self) -> u64 {
        self.inner.count()
    }

    fn ns(&self, py: Python<'_>, op: &str, threads: usize, iterations: u64) -> PyResult<f64> {
        let Some(op) = Op::ALL.into_iter().find(|each| each.name() == op) else {
            return Err(to_py(Error::new(Kind::Invalid, "bench", format!("{op:?} is no op"))));
        };
        py.detach(|| core::sectors_ns(&*self.inner, op, threads, iterations)).map_err(to_py)
    }
}

/// Bytes of a use in a trace: block, second, whether it writes, nothing.
const USE_BYTES: usize = 16;

/// Reads one use of a trace.
///
/// # Safety
/// `place` has [`USE_BYTES`] bytes.
unsafe fn use_at(place: *const u8) -> Use {
    // SAFETY: the caller vouches for the bytes.
    let bytes = unsafe { place.cast::<[u8; USE_BYTES]>().read_unaligned() };
    let whole = u128::from_le_bytes(bytes);
    Use { block: whole as u64, second: (whole >> 64) as u32, write: whole >> 96 != 0 }
}

/// Writes, ideal, relocations, whether a block wore out; of each kind of line its size, area and
/// the writes until then; the counts of the blocks.
type Lifetime = (u64, u64, u64, bool, Vec<(u64, &'static str, Option<u64>)>, Vec<u32>);

/// The submodule `bench`.
#[pymodule]
pub mod bench {
    use pmemkit_core::bench::{Call, FramesPlan, Pattern, Plan};
    use pmemkit_core::cache::simulate;

    use super::*;

    #[pymodule_export]
    use super::Sectors;

    #[pyfunction]
    #[pyo3(signature = (trace, slots, *, flush_age = None))]
    fn cache_simulate(
        py: Python<'_>,
        trace: &Bound<'_, PyAny>,
        slots: usize,
        flush_age: Option<u32>,
    ) -> PyResult<(u64, u64, u64)> {
        let held = Held::new(trace, false)?;
        let (address, count) = (held.address(), held.len() as usize / USE_BYTES);
        // SAFETY: the buffer is held; each use is read from inside it.
        let uses = (0..count).map(move |n| unsafe { use_at(address.get().add(n * USE_BYTES)) });
        let found = py.detach(|| simulate(uses, slots, flush_age)).map_err(to_py)?;
        Ok((found.requests, found.hits, found.blocks_written))
    }

    #[pyfunction]
    #[pyo3(signature = (arenas, workload, rating, *, rounds = u64::MAX, levelling = None))]
    fn lifetime(
        py: Python<'_>,
        arenas: Vec<Numbers>,
        workload: &Bound<'_, PyAny>,
        rating: u32,
        rounds: u64,
        levelling: Option<btt::Levelling>,
    ) -> PyResult<Lifetime> {
        let held = Held::new(workload, false)?;
        let (address, count) = (held.address(), held.len() / 4);
        let sector_at = move |number: u64| {
            // SAFETY: the buffer is held; this is inside it.
            let word = unsafe { address.get().cast::<u32>().add(number as usize).read_unaligned() };
            u64::from(u32::from_le(word))
        };
        let writes = (0..count.saturating_mul(rounds)).map(move |each| sector_at(each % count));
        let geometries: Vec<_> = arenas.into_iter().map(btt::geometry).collect();
        let options = Options { levelling: btt::levelling(levelling)?, ..Options::default() };
        let run = || core::lifetime(&geometries, options, rating, writes);
        let found = py.detach(run).map_err(to_py)?;
        let limits = found.limits.iter().map(|each| (each.line_size, each.area, each.writes));
        let (ideal, moved, worn_out) = (found.ideal, found.relocations, found.worn_out);
        Ok((found.writes, ideal, moved, worn_out, limits.collect(), found.counts))
    }

    #[pyfunction]
    #[pyo3(signature = (handlers, threads, pages, *, looking))]
    fn faults_ns(
        py: Python<'_>,
        handlers: &str,
        threads: usize,
        pages: u64,
        looking: bool,
    ) -> PyResult<f64> {
        let handlers = core::Handlers::from_name(handlers).map_err(to_py)?;
        py.detach(|| core::faults_ns(handlers, threads, pages, looking)).map_err(to_py)
    }

    #[pyfunction]
    #[pyo3(signature = (pattern, order, threads, count, *, library=None, magazines=true,
                        persistent=false))]
    #[allow(clippy::too_many_arguments)] // The keyword arguments of the Python function.
    fn frames_ns(
        py: Python<'_>,
        pattern: &str,
        order: u32,
        threads: usize,
        count: u64,
        library: Option<String>,
        magazines: bool,
        persistent: bool,
    ) -> PyResult<(f64, f64)> {
        let pattern = Pattern::from_name(pattern).map_err(to_py)?;
        let plan = FramesPlan { pattern, order, threads, count, library, magazines, persistent };
        py.detach(|| core::frames_ns(&plan)).map_err(to_py)
    }

    #[pyfunction]
    #[pyo3(signature = (call, length, iterations, *, library=None, working_set=1 << 26,
                        mapped=false))]
    fn medium_ns(
        py: Python<'_>,
        call: &str,
        length: u64,
        iterations: u64,
        library: Option<String>,
        working_set: u64,
        mapped: bool,
    ) -> PyResult<f64> {
        let call = Call::from_name(call).map_err(to_py)?;
        let plan = Plan { call, len: length, iterations, library, working_set, mapped };
        py.detach(|| core::medium_ns(&plan)).map_err(to_py)
    }
}
