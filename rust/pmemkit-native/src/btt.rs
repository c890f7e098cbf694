//! Glue for `pmemkit_core::btt`. Documentation: `_native/btt.pyi`.

use std::sync::Mutex;

use pmemkit_core::btt as core;
use pyo3::prelude::*;

use crate::buffer::Bytes;
use crate::error::to_py;
use crate::media::Medium;

/// A scan of a map.
#[pyclass(frozen, module = "pmemkit._native.btt")]
pub struct MapScan {
    inner: Mutex<core::MapScan>,
}

impl MapScan {
    fn locked(&self) -> std::sync::MutexGuard<'_, core::MapScan> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[pymethods]
impl MapScan {
    #[new]
    #[pyo3(signature = (blocks, finished = vec![]))]
    fn new(blocks: u32, finished: Vec<(u64, u32)>) -> PyResult<Self> {
        let inner = core::MapScan::new(blocks, finished).map_err(to_py)?;
        Ok(MapScan { inner: Mutex::new(inner) })
    }

    fn feed(
        &self,
        py: Python<'_>,
        medium: &Bound<'_, Medium>,
        offset: Bytes,
        first: u64,
        count: u64,
    ) -> PyResult<()> {
        let medium = medium.get().inner.clone();
        py.detach(|| self.locked().feed(&*medium, offset.0, first, count)).map_err(to_py)
    }

    fn claim(&self, block: u32) -> bool {
        self.locked().claim(block)
    }

    fn findings(&self) -> Vec<(&'static str, u64, u32)> {
        let name = |wrong| match wrong {
            core::Wrong::Duplicate => "duplicate",
            core::Wrong::OutOfRange => "out_of_range",
        };
        self.locked()
            .findings()
            .iter()
            .map(|each| (name(each.wrong), each.lba, each.block))
            .collect()
    }

    fn counts(&self) -> std::collections::BTreeMap<&'static str, u64> {
        let scan = self.locked();
        let [initial, error, zero, normal] = scan.states;
        let [duplicate, out_of_range] = scan.wrong;
        std::collections::BTreeMap::from([
            ("initial", initial),
            ("error", error),
            ("zero", zero),
            ("normal", normal),
            ("duplicate", duplicate),
            ("out_of_range", out_of_range),
        ])
    }

    fn unclaimed(&self, limit: usize) -> (u64, Vec<u32>) {
        self.locked().unclaimed(limit)
    }
}

/// The submodule.
#[pymodule]
pub mod btt {
    #[pymodule_export]
    use super::MapScan;
}
