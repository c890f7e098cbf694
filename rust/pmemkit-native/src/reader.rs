//! A read-only block device whose bytes come from a Python callable. Slow: it takes the GIL a
//! request. Documentation: `_native/block.pyi`, `python_reader`.

use std::sync::Arc;

use pmemkit_core::block::{Caps, Device, Info, Op, OpSet, Request, PAYLOAD_SIZE_MAX};
use pmemkit_core::error::{Error, Kind, Result};
use pmemkit_core::media::{Extent, Medium};
use pmemkit_core::sg::Sg;
use pyo3::prelude::*;

/// The bottom of a stack that asks Python.
pub struct PythonReader {
    read: Py<PyAny>,
    info: Info,
}

impl PythonReader {
    /// A device of `size` bytes in sectors of `sector_size`, a power of two.
    pub fn new(size: u64, sector_size: u32, read: Py<PyAny>) -> Self {
        let info = Info {
            size,
            block_size_min: 1,
            block_size_preferred: sector_size,
            payload_size_max: PAYLOAD_SIZE_MAX,
            caps: Caps::MULTI_CONN,
            blocking: OpSet::READ,
            blocking_fua: false,
        };
        PythonReader { read, info }
    }

    fn bytes(&self, request: &Request<'_>) -> PyResult<Vec<u8>> {
        Python::attach(|py| self.read.call1(py, (request.at, request.len))?.extract(py))
    }
}

/// What a Python exception means here: its errno decides, as it does for every server.
fn error_of(error: &PyErr, request: &Request<'_>) -> Error {
    let (kind, errno) = Python::attach(|py| {
        let value = error.value(py);
        let name = value.getattr("kind").and_then(|kind| kind.extract::<String>());
        let kind = name.ok().and_then(|name| Kind::ALL.into_iter().find(|k| k.name() == name));
        let errno = value.getattr("errno").and_then(|errno| errno.extract::<i32>()).ok();
        (kind.unwrap_or(Kind::System), errno)
    });
    let mut failure = Error::new(kind, "read", error.to_string()).at(request.at);
    failure.source_errno = errno;
    failure
}

impl Device for PythonReader {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        None
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        if request.op != Op::Read {
            let text = format!("{} is not offered", request.op.name());
            return Err(Error::new(Kind::NotSupported, "submit", text).at(request.at));
        }
        let bytes = self.bytes(request).map_err(|error| error_of(&error, request))?;
        if bytes.len() as u64 != request.len {
            let text = format!("{} bytes came, {} were asked for", bytes.len(), request.len);
            return Err(Error::new(Kind::Media, "read", text).at(request.at));
        }
        let mut done = 0;
        for segment in request.sg.segments() {
            let address = Sg::host_address(segment)?;
            let len = segment.len as usize;
            // SAFETY: whoever made the host segment vouches for its range; the segments of a
            // request add up to its length, which is that of `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), address, len) };
            done += len;
        }
        Ok(())
    }

    fn extents(&self, _at: u64, len: u64) -> Result<Vec<Extent>> {
        Ok(vec![Extent { len, hole: false }])
    }

    fn map(&self, request: &Request<'_>, _out: &mut Sg) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "map", "there is no mapping").at(request.at))
    }

    fn commit(&self, request: &Request<'_>) -> Result<()> {
        Err(Error::new(Kind::NotSupported, "commit", "there is no mapping").at(request.at))
    }

    fn media(&self) -> Vec<Arc<dyn Medium>> {
        Vec::new()
    }
}
