//! NumPy's own allocations in a pool: NEP 49's handler, without linking to NumPy.
//!
//! The functions of the handler may be called from any thread, with or without the GIL, and after a
//! fork; they call nothing of Python. The capsule holds the pool: arrays keep the capsule, so their
//! memory outlives the `Pool` object.

use std::ffi::{c_char, c_void, CStr};
use std::sync::Arc;

use pmemkit_core::error::{Error, Kind};
use pmemkit_core::memory::{Pool, Request};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::error::to_py;

const CAPSULE: &CStr = c"mem_handler";
/// Place of `PyDataMem_SetHandler` in NumPy's table of functions, part of its ABI since 1.22.
const SET_HANDLER: usize = 304;

/// NumPy's `PyDataMem_Handler`, version 1.
#[repr(C)]
struct Handler {
    name: [c_char; 127],
    version: u8,
    ctx: *mut c_void,
    malloc: extern "C" fn(*mut c_void, usize) -> *mut c_void,
    calloc: extern "C" fn(*mut c_void, usize, usize) -> *mut c_void,
    realloc: extern "C" fn(*mut c_void, *mut c_void, usize) -> *mut c_void,
    free: extern "C" fn(*mut c_void, *mut c_void, usize),
    /// What `ctx` points to.
    pool: Arc<Pool>,
}

/// The pool behind `ctx`.
fn pool_of<'a>(ctx: *mut c_void) -> &'a Pool {
    // SAFETY: `handler` made it of the pool that the capsule holds, and whoever calls has the
    // capsule.
    unsafe { &*ctx.cast::<Pool>() }
}

/// In a forked child new memory comes from the C library: the pool is its parent's.
extern "C" fn malloc(ctx: *mut c_void, size: usize) -> *mut c_void {
    let pool = pool_of(ctx);
    if pool.is_foreign() {
        // SAFETY: takes a number.
        return unsafe { libc::malloc(size.max(1)) };
    }
    pool.allocate(size.max(1) as u64, Request::default()).unwrap_or(0) as *mut c_void
}

extern "C" fn calloc(ctx: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let pool = pool_of(ctx);
    let Some(bytes) = count.checked_mul(size) else { return std::ptr::null_mut() };
    if pool.is_foreign() {
        // SAFETY: takes numbers.
        return unsafe { libc::calloc(bytes.max(1), 1) };
    }
    let request = Request { zero: true, ..Request::default() };
    pool.allocate(bytes.max(1) as u64, request).unwrap_or(0) as *mut c_void
}

extern "C" fn realloc(ctx: *mut c_void, old: *mut c_void, size: usize) -> *mut c_void {
    let pool = pool_of(ctx);
    if old.is_null() {
        return malloc(ctx, size);
    }
    if pool.owns(old as u64) == Some(false) {
        // SAFETY: what is not the pool's came from the C library, see `malloc`.
        return unsafe { libc::realloc(old, size.max(1)) };
    }
    let foreign = pool.is_foreign();
    let had = if foreign { pool.size_of_in_child(old as u64) } else { pool.size_of(old as u64) };
    let Some(had) = had else { return std::ptr::null_mut() };
    let new = malloc(ctx, size);
    if !new.is_null() {
        let len = size.min(had as usize);
        // SAFETY: both are of at least this length, and the new one is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(old.cast::<u8>(), new.cast(), len) };
        free(ctx, old, had as usize);
    }
    new
}

extern "C" fn free(ctx: *mut c_void, old: *mut c_void, _size: usize) {
    let pool = pool_of(ctx);
    // Where a child cannot know whose it is, nothing is freed.
    if old.is_null() || pool.owns(old as u64) != Some(false) {
        if !old.is_null() && !pool.is_foreign() {
            pool.free(old as u64);
        }
        return;
    }
    // SAFETY: as in `realloc`.
    unsafe { libc::free(old) };
}

extern "C" fn drop_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: called once by the interpreter for the capsule that `handler` made.
    unsafe {
        let held = ffi::PyCapsule_GetPointer(capsule, CAPSULE.as_ptr());
        if !held.is_null() {
            drop(Box::from_raw(held.cast::<Handler>()));
        }
    }
}

/// A capsule for `PyDataMem_SetHandler` that allocates from a pool.
pub fn handler(py: Python<'_>, pool: Arc<Pool>) -> PyResult<Bound<'_, PyCapsule>> {
    let mut name = [0; 127];
    for (to, from) in name.iter_mut().zip(b"pmemkit_pool") {
        *to = *from as c_char;
    }
    let ctx = Arc::as_ptr(&pool).cast_mut().cast();
    let held = Box::new(Handler { name, version: 1, ctx, malloc, calloc, realloc, free, pool });
    let raw = Box::into_raw(held);
    // SAFETY: a new handler that only the capsule knows; `drop_capsule` takes it back.
    unsafe {
        let made = ffi::PyCapsule_New(raw.cast(), CAPSULE.as_ptr(), Some(drop_capsule));
        if made.is_null() {
            drop(Box::from_raw(raw));
            return Err(PyErr::fetch(py));
        }
        Ok(Bound::from_owned_ptr(py, made).cast_into_unchecked())
    }
}

/// Makes a handler NumPy's in this context; `None` is NumPy's own. Gives the one before.
pub fn set_handler<'py>(
    py: Python<'py>,
    handler: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let table = py.import("numpy._core._multiarray_umath")?.getattr("_ARRAY_API")?;
    let new = handler.map_or(std::ptr::null_mut(), Bound::as_ptr);
    // SAFETY: NumPy's capsule holds its table of functions; this entry takes a capsule or null and
    // gives a new reference.
    unsafe {
        let functions = ffi::PyCapsule_GetPointer(table.as_ptr(), std::ptr::null());
        if functions.is_null() {
            return Err(to_py(Error::new(Kind::NotSupported, "numpy", "NumPy has no C API")));
        }
        let entry = *functions.cast::<*const c_void>().add(SET_HANDLER);
        type SetHandler = unsafe extern "C" fn(*mut ffi::PyObject) -> *mut ffi::PyObject;
        let set: SetHandler = std::mem::transmute(entry);
        Bound::from_owned_ptr_or_err(py, set(new))
    }
}
