//! Glue for `pmemkit_core::btt`. Documentation: `_native/btt.pyi`.

use std::sync::{Arc, Mutex};

use pmemkit_core::block::Stack;
use pmemkit_core::btt as core;
use pmemkit_core::error::{Error, Kind};
use pyo3::prelude::*;

use crate::block::Device;
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

/// `start`, `external_lbasize`, `external_nlba`, `internal_lbasize`, `internal_nlba`, `nfree`,
/// `dataoff`, `mapoff`, `logoff`, and whether the arena is in error.
pub(crate) type Numbers = (u64, u32, u32, u32, u32, u32, u64, u64, u64, bool);

pub(crate) fn geometry(numbers: Numbers) -> core::Geometry {
    let (start, external_lbasize, external_nlba, internal_lbasize, internal_nlba, ..) = numbers;
    let (.., nfree, dataoff, mapoff, logoff, in_error) = numbers;
    core::Geometry {
        start,
        external_lbasize,
        external_nlba,
        internal_lbasize,
        internal_nlba,
        nfree,
        dataoff,
        mapoff,
        logoff,
        in_error,
    }
}

/// Victim, period, seed.
pub(crate) type Levelling = (String, u32, u64);

pub(crate) fn levelling(wanted: Option<Levelling>) -> PyResult<Option<core::Levelling>> {
    let Some((victim, period, seed)) = wanted else { return Ok(None) };
    let victim = match victim.as_str() {
        "random" => core::Victim::Random,
        "least-worn" => core::Victim::LeastWorn,
        _ => {
            let text = format!("levelling {victim:?} is none of random, least-worn");
            return Err(to_py(Error::new(Kind::Invalid, "open", text)));
        }
    };
    Ok(Some(core::Levelling { period, victim, seed }))
}

/// The arenas of a namespace.
#[pyclass(frozen, module = "pmemkit._native.btt")]
pub struct Engine {
    inner: Arc<core::Btt>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (medium, arenas, *, read_only = false, strict = false, levelling = None))]
    fn new(
        py: Python<'_>,
        medium: &Bound<'_, Medium>,
        arenas: Vec<Numbers>,
        read_only: bool,
        strict: bool,
        levelling: Option<Levelling>,
    ) -> PyResult<Self> {
        let medium = medium.get().inner.clone();
        let geometries: Vec<_> = arenas.into_iter().map(geometry).collect();
        let options = core::Options {
            read_only,
            strict,
            levelling: self::levelling(levelling)?,
            ..core::Options::default()
        };
        let opened = py.detach(|| core::Btt::open(medium, &geometries, options));
        Ok(Engine { inner: Arc::new(opened.map_err(to_py)?) })
    }

    fn device(&self) -> Device {
        Device { stack: Stack::new(self.inner.clone()) }
    }

    fn relocations(&self) -> u64 {
        self.inner.arenas().map(core::Arena::relocations).sum()
    }

    fn validate(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        py.detach(|| self.inner.validate()).map_err(to_py)
    }
}

/// The submodule.
#[pymodule]
pub mod btt {
    #[pymodule_export]
    use super::{Engine, MapScan};
}
