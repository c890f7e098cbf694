//! Long arrays that are zero until they are touched, in memory of ours or in that of a medium.
//!
//! Invariants:
//! 1. The memory has `len` values of `T` and stays in its place as long as the table.
//! 2. Every value of `T` may consist of zero bytes, and is changed through `&T` only.
//!
//! What this does not do: survive that a file under a medium is cut off below it: as for any other
//! mapping, the process gets a SIGBUS.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8};
use std::sync::Arc;

use super::sys;
use crate::error::{Error, Kind, Result};
use crate::media::Medium;
use crate::sg::Segment;

/// What zero bytes are a value of.
///
/// # Safety
/// All bytes zero are a value, and what is shared of it may be changed by other threads.
pub unsafe trait Zeroed: Sync + Send {}

// SAFETY: atomics have the layout of their integers.
unsafe impl Zeroed for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zeroed for AtomicU16 {}
// SAFETY: as above.
unsafe impl Zeroed for AtomicU32 {}
// SAFETY: as above.
unsafe impl Zeroed for AtomicU64 {}

enum Keeper {
    Mapping { size: usize },
    Medium(#[allow(dead_code)] Arc<dyn Medium>),
}

/// An array of `T`.
pub struct Table<T: Zeroed> {
    base: NonNull<T>,
    len: usize,
    keeper: Keeper,
}

// SAFETY: the table owns its memory, and `T` may be shared and sent.
unsafe impl<T: Zeroed> Send for Table<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroed> Sync for Table<T> {}

impl<T: Zeroed> Table<T> {
    /// So many zeroes.
    pub fn new(len: usize) -> Result<Table<T>> {
        let refuse = || Error::new(Kind::NoSpace, "frames", format!("no memory for {len} entries"));
        let size = len.max(1).checked_mul(size_of::<T>()).ok_or_else(refuse)?;
        // Page-aligned, which is enough for every T here.
        let base = sys::map(size).ok_or_else(refuse)?.cast();
        Ok(Table { base, len, keeper: Keeper::Mapping { size } })
    }

    /// So many values in the bytes of a medium from `offset` on, which must be zero. Nobody else
    /// may use these bytes.
    pub fn over(medium: Arc<dyn Medium>, offset: u64, len: usize) -> Result<Table<T>> {
        let bytes = (len * size_of::<T>()) as u64;
        let address = medium.address(&Segment::new(medium.region(), offset, bytes))?.cast::<T>();
        let base = NonNull::new(address).filter(|base| base.is_aligned());
        let base = base.ok_or_else(|| {
            Error::new(Kind::Invalid, "frames", "the page map is not aligned").at(offset)
        })?;
        Ok(Table { base, len, keeper: Keeper::Medium(medium) })
    }
}

impl<T: Zeroed> Deref for Table<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: invariant 1 and, since the bytes were zero once, invariant 2.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl<T: Zeroed> Drop for Table<T> {
    fn drop(&mut self) {
        if let Keeper::Mapping { size } = self.keeper {
            // SAFETY: mapped in `new` with this size; no reference outlives the table.
            unsafe { sys::unmap(self.base.cast(), size) };
        }
    }
}
