//! Glue for `pmemkit_core::media::recording`. Documentation: `_native/media.pyi`.

use std::convert::Infallible;
use std::sync::Arc;

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::media::crash::{Model, Wanted};
use pmemkit_core::media::{recording as core, Granularity};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::Held;
use crate::error::to_py;
use crate::media::Medium;

fn granularity_of(name: &str) -> PyResult<Granularity> {
    let all = [Granularity::Byte, Granularity::Cacheline, Granularity::Page];
    all.into_iter().find(|granularity| granularity.name() == name).ok_or_else(|| {
        let text = format!("granularity {name:?} is not byte, cacheline or page");
        to_py(Error::new(Kind::Invalid, "record", text))
    })
}

/// A copy of a Python buffer.
fn copy_of(buffer: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let held = Held::new(buffer, false)?;
    let mut bytes = vec![0; held.len() as usize];
    // SAFETY: `held` keeps its range in place; a fresh vector does not overlap it.
    unsafe { held.address().get().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    Ok(bytes)
}

/// A medium that records.
#[pyclass(frozen, module = "pmemkit._native.media")]
pub struct Recording {
    inner: Arc<core::Recording>,
}

impl Recording {
    /// Asks the model, without the GIL: the replay may be long.
    fn ask<T: Send>(
        &self,
        py: Python<'_>,
        event: usize,
        torn_pages: bool,
        question: impl FnOnce(&Model) -> T + Send,
    ) -> PyResult<T> {
        py.detach(|| self.inner.with_model(event, torn_pages, question)).map_err(to_py)
    }
}

#[pymethods]
impl Recording {
    #[new]
    #[pyo3(signature = (length, *, granularity = "cacheline", initial = None))]
    fn new(length: u64, granularity: &str, initial: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let initial = initial.map(copy_of).transpose()?.unwrap_or_default();
        let granularity = granularity_of(granularity)?;
        let inner = core::Recording::new(length, granularity, &initial).map_err(to_py)?;
        Ok(Recording { inner: Arc::new(inner) })
    }

    fn medium(&self) -> Medium {
        Medium { inner: self.inner.clone() }
    }

    fn event_count(&self) -> usize {
        self.inner.event_count()
    }

    fn events(&self) -> Vec<(&'static str, u64, u64)> {
        let log = self.inner.log();
        let shape = log.iter().map(|entry| (entry.event.name(), entry.event.range()));
        shape.map(|(name, (at, len))| (name, at, len)).collect()
    }

    fn mark(&self, number: u64) -> usize {
        self.inner.mark(number)
    }

    #[pyo3(signature = (event, *, limit = 64, seed = 0, torn_pages = false, only = None))]
    fn crash_images<'py>(
        &self,
        py: Python<'py>,
        event: usize,
        limit: usize,
        seed: u64,
        torn_pages: bool,
        only: Option<Vec<(u64, u64)>>,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let wanted = Wanted { limit, seed, torn_pages, only };
        let mut images = Vec::new();
        self.ask(py, event, torn_pages, |model| {
            let _: Result<usize, Infallible> = model.images(&wanted, |image| {
                images.push(image.to_vec());
                Ok(())
            });
        })?;
        Ok(images.iter().map(|image| PyBytes::new(py, image)).collect())
    }

    fn crash_count(&self, py: Python<'_>, event: usize) -> PyResult<u64> {
        self.ask(py, event, false, Model::count)
    }

    fn durable_image<'py>(&self, py: Python<'py>, event: usize) -> PyResult<Bound<'py, PyBytes>> {
        let image = self.ask(py, event, false, Model::durable_image)?;
        Ok(PyBytes::new(py, &image))
    }

    fn visible_image<'py>(&self, py: Python<'py>, event: usize) -> PyResult<Bound<'py, PyBytes>> {
        let image = self.ask(py, event, false, Model::visible_image)?;
        Ok(PyBytes::new(py, &image))
    }
}
