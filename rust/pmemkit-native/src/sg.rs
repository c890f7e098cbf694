//! Glue for `pmemkit_core::sg`. Documentation: `_native/sg.pyi`.

use pmemkit_core::sg::{Access, RegionId, Registry, Segment, Sg};
use pyo3::prelude::*;

use crate::buffer::{Bytes, Held};
use crate::error::to_py;
use crate::media::Medium;

/// A region's number or a buffer, and the bytes of it.
type Part<'py> = (Bound<'py, PyAny>, Bytes, Bytes);

/// A list of segments, and what keeps the buffers in it in place.
struct Parts<'a> {
    sg: Sg,
    _held: Vec<Held<'a>>,
}

impl Parts<'_> {
    fn new(parts: &[Part<'_>], writable: bool) -> PyResult<Self> {
        let (mut sg, mut kept) = (Sg::new(), Vec::new());
        for (place, offset, length) in parts {
            if let Ok(region) = place.extract::<u32>() {
                sg.push(Segment::new(RegionId(region), offset.0, length.0)).map_err(to_py)?;
                continue;
            }
            let held = Held::new(place, writable)?;
            let op = if writable { "write" } else { "read" };
            pmemkit_core::media::check_range(op, offset.0, length.0, held.len()).map_err(to_py)?;
            // SAFETY: the buffer is kept beside the list; the range was checked against it.
            unsafe { sg.push_host(held.address().get().wrapping_add(offset.0 as usize), length.0) };
            kept.push(held);
        }
        Ok(Parts { sg, _held: kept })
    }
}

/// The submodule `sg`.
#[pymodule]
pub mod sg {
    use super::*;

    #[pyfunction]
    #[pyo3(signature = (medium, *, read = true, write = true))]
    fn add(medium: &Bound<'_, Medium>, read: bool, write: bool) -> u32 {
        let mut access = Access::empty();
        access.set(Access::READ, read);
        access.set(Access::WRITE, write);
        Registry::get().add(medium.get().inner.clone(), access).0
    }

    #[pyfunction]
    fn remove(py: Python<'_>, region: u32) -> bool {
        py.detach(|| Registry::get().remove(RegionId(region)))
    }

    #[pyfunction]
    #[pyo3(signature = (sources, targets, *, durable = false))]
    fn copy(
        py: Python<'_>,
        sources: Vec<Part<'_>>,
        targets: Vec<Part<'_>>,
        durable: bool,
    ) -> PyResult<u64> {
        let (from, to) = (Parts::new(&sources, false)?, Parts::new(&targets, true)?);
        let (source, target) = (&from.sg, &to.sg);
        py.detach(|| Registry::get().copy(source, target, durable)).map_err(to_py)
    }
}
