//! Glue for `pmemkit_core::direct`. Documentation: `_native/direct.pyi`.

use std::os::fd::{BorrowedFd, RawFd};

use pmemkit_core::direct::{self as core, Around, Way};
use pmemkit_core::error::{Error, Kind};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffer::Bytes;
use crate::error::to_py;
use crate::media::Medium;

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "copy", text))
}

fn around_from(name: &str) -> PyResult<Around> {
    match name {
        "off" => Ok(Around::Never),
        "auto" => Ok(Around::Uncached),
        "on" => Ok(Around::Always),
        _ => Err(refuse(format!("{name:?} is not one of auto, on, off"))),
    }
}

/// A file, opened for transfers one way.
#[pyclass(frozen, module = "pmemkit._native.direct")]
pub struct Copier {
    inner: core::Copier,
}

#[pymethods]
impl Copier {
    #[new]
    #[pyo3(signature = (fd, way, *, around = "auto", depth = 8, piece = 1 << 20, ring = true))]
    fn new(
        fd: RawFd,
        way: &str,
        around: &str,
        depth: u32,
        piece: u64,
        ring: bool,
    ) -> PyResult<Self> {
        let way = match way {
            "in" => Way::In,
            "out" => Way::Out,
            _ => return Err(refuse(format!("{way:?} is not one of in, out"))),
        };
        if fd < 0 {
            return Err(refuse(format!("{fd} is not a file descriptor")));
        }
        // SAFETY: the caller keeps the descriptor open during the call; it is duplicated.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        let options = core::Options { depth, piece, around: around_from(around)?, ring };
        Ok(Copier { inner: core::Copier::new(file, way, options).map_err(to_py)? })
    }

    fn transfer(
        &self,
        py: Python<'_>,
        medium: &Bound<'_, Medium>,
        file_offset: Bytes,
        offset: Bytes,
        length: Bytes,
    ) -> PyResult<()> {
        let medium = medium.get().inner.clone();
        py.detach(|| self.inner.transfer(&*medium, file_offset.0, offset.0, length.0))
            .map_err(to_py)
    }

    #[getter]
    fn engine(&self) -> &'static str {
        self.inner.engine()
    }

    #[getter]
    fn notice(&self) -> Option<&str> {
        self.inner.notice()
    }

    fn totals<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let totals = self.inner.totals();
        let dict = PyDict::new(py);
        dict.set_item("direct", totals.direct)?;
        dict.set_item("cached", totals.cached)?;
        dict.set_item("buffered", totals.buffered)?;
        Ok(dict)
    }
}

/// The submodule `direct`.
#[pymodule]
pub mod direct {
    #[pymodule_export]
    use super::Copier;
}
