//! Glue for `pmemkit_core::bench`. Documentation: `_native/bench.pyi`.

use std::path::PathBuf;

use pmemkit_core::bench as core;
use pmemkit_core::block::Op;
use pmemkit_core::error::{Error, Kind};
use pyo3::prelude::*;

use crate::block::Channel;
use crate::error::to_py;

/// Sectors to be timed.
#[pyclass(frozen, module = "pmemkit._native.bench")]
pub struct Sectors {
    inner: Box<dyn core::Sectors>,
}

#[pymethods]
impl Sectors {
    #[staticmethod]
    fn channel(channel: &Bound<'_, Channel>) -> Sectors {
        Sectors { inner: Box::new(core::Ours(channel.get().inner.clone())) }
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

/// The submodule `bench`.
#[pymodule]
pub mod bench {
    use pmemkit_core::bench::{Call, Plan};

    use super::*;

    #[pymodule_export]
    use super::Sectors;

    #[pyfunction]
    #[pyo3(signature = (call, length, iterations, *, library=None, working_set=1 << 26))]
    fn medium_ns(
        py: Python<'_>,
        call: &str,
        length: u64,
        iterations: u64,
        library: Option<String>,
        working_set: u64,
    ) -> PyResult<f64> {
        let call = Call::from_name(call).map_err(to_py)?;
        let plan = Plan { call, len: length, iterations, library, working_set };
        py.detach(|| core::medium_ns(&plan)).map_err(to_py)
    }
}
