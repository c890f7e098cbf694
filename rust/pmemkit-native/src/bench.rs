//! Glue for `pmemkit_core::bench`. Documentation: `_native/bench.pyi`.

use pyo3::prelude::*;

/// The submodule `bench`.
#[pymodule]
pub mod bench {
    use pmemkit_core::bench::{self as core, Call, Plan};
    use pyo3::prelude::*;

    use crate::error::to_py;

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
