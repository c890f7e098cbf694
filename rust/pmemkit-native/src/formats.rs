//! Glue for `pmemkit_core::formats`. Documentation: `_native/formats.pyi`.

use pyo3::prelude::*;

/// The submodule `formats`.
#[pymodule]
pub mod formats {
    use std::collections::BTreeMap;

    use pmemkit_core::formats::TABLES;
    use pyo3::prelude::*;

    type Rows = Vec<(&'static str, usize, usize)>;

    #[pyfunction]
    fn tables() -> BTreeMap<&'static str, (usize, Rows)> {
        TABLES.iter().map(|(name, size, fields)| (*name, (*size, fields.to_vec()))).collect()
    }
}
