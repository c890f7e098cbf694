//! Python buffers as raw ranges, held for the length of one call.
//!
//! A held buffer cannot be resized or freed, but other threads may change its bytes while we copy;
//! so no slice over it is ever built, only raw pointers. There is no guarantee against such races
//! other than that each byte is some byte that was there.

use std::marker::PhantomData;

use pmemkit_core::error::{Error, Kind};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::error::to_py;

/// A contiguous range of bytes that stays in place as long as this value lives.
pub struct Held<'a> {
    address: Address,
    len: u64,
    /// Keeps a Python buffer exported; `None` for a borrowed slice.
    _buffer: Option<PyBuffer<u8>>,
    _borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> Held<'a> {
    /// A slice that Rust lends.
    pub fn borrowed(target: &'a mut [u8]) -> Self {
        let (address, len) = (Address(target.as_mut_ptr()), target.len() as u64);
        Held { address, len, _buffer: None, _borrow: PhantomData }
    }

    /// Holds `object`'s buffer. Fails with `InvalidArgument` where it is not contiguous bytes.
    pub fn new(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)
            .map_err(|cause| refuse(format!("not a buffer of bytes: {cause}")))?;
        if !buffer.is_c_contiguous() {
            return Err(refuse("the buffer is not contiguous".to_owned()));
        }
        if writable && buffer.readonly() {
            return Err(refuse("the buffer is read-only".to_owned()));
        }
        let (address, len) = (Address(buffer.buf_ptr().cast()), buffer.len_bytes() as u64);
        Ok(Held { address, len, _buffer: Some(buffer), _borrow: PhantomData })
    }

    /// Bytes in the buffer.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where it starts.
    pub fn address(&self) -> Address {
        self.address
    }
}

/// The start of a held buffer, for crossing into code that runs without the GIL.
#[derive(Clone, Copy)]
pub struct Address(*mut u8);

// SAFETY: an address is a number; who dereferences it relies on the `Held` that outlives the call.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    /// The raw pointer.
    pub fn get(self) -> *mut u8 {
        self.0
    }
}

fn refuse(text: String) -> PyErr {
    to_py(Error::new(Kind::Invalid, "buffer", text))
}

/// An offset or length from Python: whole bytes from 0 to 2^64 - 1. Any other integer is out of
/// range, and the error says its value.
#[derive(Clone, Copy)]
pub struct Bytes(pub u64);

impl<'py> FromPyObject<'_, 'py> for Bytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<u64>() {
            Ok(value) => Ok(Bytes(value)),
            Err(cause) if cause.is_instance_of::<PyOverflowError>(object.py()) => {
                let text = format!("{} is not between 0 and 2^64 - 1", *object);
                Err(to_py(Error::new(Kind::OutOfRange, "argument", text)))
            }
            Err(cause) => Err(cause),
        }
    }
}
