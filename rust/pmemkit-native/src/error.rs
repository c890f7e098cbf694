//! Core errors become the exceptions of `pmemkit.errors`: one match on the kind, nothing else.

use pmemkit_core::error::{Error, Kind};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The name of the exception class of a kind.
const fn class_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => "InvalidArgument",
        Kind::OutOfRange => "OutOfRange",
        Kind::NotSupported => "NotSupported",
        Kind::ReadOnly => "ReadOnly",
        Kind::NoSpace => "NoSpace",
        Kind::Media => "MediaError",
        Kind::Truncated => "Truncated",
        Kind::Corrupt => "Corrupt",
        Kind::Latched => "Latched",
        Kind::Closed => "Closed",
        Kind::Busy => "Busy",
        Kind::Protocol => "ProtocolError",
        Kind::System => "SystemFailure",
    }
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = py.import("pmemkit.errors")?.getattr(class_name(error.kind))?;
    let kwargs = PyDict::new(py);
    kwargs.set_item("errno", error.errno())?;
    kwargs.set_item("op", error.op)?;
    kwargs.set_item("offset", error.offset)?;
    kwargs.set_item("moved", error.moved)?;
    Ok(PyErr::from_value(class.call((error.to_string(),), Some(&kwargs))?))
}

/// The Python exception of a core error.
pub fn to_py(error: Error) -> PyErr {
    Python::attach(|py| {
        build(py, &error).unwrap_or_else(|_| PyRuntimeError::new_err(error.to_string()))
    })
}

/// Every kind with its default errno, for the agreement test.
pub fn kinds() -> Vec<(&'static str, i32)> {
    Kind::ALL.iter().map(|kind| (kind.name(), kind.errno())).collect()
}
