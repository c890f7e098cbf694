//! The aarch64 half of the port. It is not built on x86-64 machines: there a test assembles
//! `port_aarch64.S`, which holds the leaf routines.
//!
//! Preconditions: those at the head of `port_aarch64.S`, which [`crate::media::guard`] relies on.
//!
//! There are no non-temporal stores here that a fence would cover: [`super::select`] never stores
//! around the cache where copies are `Generic`.

use std::arch::global_asm;
use std::ffi::c_void;

use super::{CopyFn, CopyWith, Features, Flush, FlushFn, Outcome};

/// What every aarch64 CPU has.
pub const FLUSH_ALWAYS_THERE: Flush = Flush::DcCvac;

/// `HWCAP_DCPOP`: the CPU cleans to the point of persistence.
const HWCAP_DCPOP: u64 = 1 << 16;

global_asm!(include_str!("port_aarch64.S"), options(raw));

extern "C" {
    static pmemkit_leaf_start: u8;
    static pmemkit_leaf_end: u8;
    static pmemkit_landing: u8;
    fn pmemkit_copy(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_flush_cvap(address: *const u8, len: u64) -> Outcome;
    fn pmemkit_flush_cvac(address: *const u8, len: u64) -> Outcome;
    fn pmemkit_load_u64(address: *const u8) -> Outcome;
    fn pmemkit_store_u64(address: *mut u8, value: u64) -> Outcome;
    fn pmemkit_fence();
}

/// Asks the kernel what the CPU can clean.
pub fn detect() -> Features {
    // SAFETY: takes a number, returns a number.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
    let mut flush = vec![Flush::DcCvac];
    if capabilities & HWCAP_DCPOP != 0 {
        flush.insert(0, Flush::DcCvap);
    }
    Features { flush, copy: vec![CopyWith::Generic], repeat: false }
}

/// The one copy there is. Its second half would be the non-temporal one.
pub fn copy_routines(_with: CopyWith) -> (CopyFn, CopyFn) {
    (pmemkit_copy, pmemkit_copy)
}

/// The routine that cleans lines with an instruction.
pub fn flush_routine(with: Flush) -> FlushFn {
    match with {
        Flush::DcCvap => pmemkit_flush_cvap,
        _ => pmemkit_flush_cvac,
    }
}

/// Copies; there is no instruction that does it all.
///
/// # Safety
/// As for [`super::Port::copy`].
pub unsafe fn copy_repeat(target: *mut u8, source: *const u8, len: u64) -> Outcome {
    // SAFETY: the caller vouches for the ranges.
    unsafe { pmemkit_copy(target, source, len) }
}

/// Loads an aligned u64 into the outcome's value.
///
/// # Safety
/// The address must be mapped and a multiple of 8.
pub unsafe fn load_u64(address: *const u8) -> Outcome {
    // SAFETY: the caller vouches for the address.
    unsafe { pmemkit_load_u64(address) }
}

/// Stores an aligned u64.
///
/// # Safety
/// The address must be mapped and a multiple of 8.
pub unsafe fn store_u64(address: *mut u8, value: u64) -> Outcome {
    // SAFETY: the caller vouches for the address.
    unsafe { pmemkit_store_u64(address, value) }
}

/// Waits for cleaned lines.
pub fn fence() {
    // SAFETY: two barriers and a return.
    unsafe { pmemkit_fence() }
}

/// No hint is given here.
#[inline(always)]
pub fn hint_load(_address: *const u8) {}

/// No hint is given here.
#[inline(always)]
pub fn hint_store(_address: *const u8) {}

/// Where a faulted leaf routine goes on.
pub fn landing() -> usize {
    &raw const pmemkit_landing as usize
}

/// Makes the interrupted thread leave its leaf routine with a fault at `address`. False, and
/// nothing changed, where it was not in one.
///
/// # Safety
/// `context` must be the `ucontext_t` that the kernel gave to a signal handler.
pub unsafe fn leave(context: *mut c_void, address: u64, landing: usize) -> bool {
    let context = context.cast::<libc::ucontext_t>();
    let leaf = (&raw const pmemkit_leaf_start as usize)..(&raw const pmemkit_leaf_end as usize);
    // SAFETY: the kernel's frame is ours to change until the handler returns.
    let registers = unsafe { &mut (*context).uc_mcontext };
    if !leaf.contains(&(registers.pc as usize)) {
        return false;
    }
    registers.regs[0] = 1;
    registers.regs[1] = address;
    registers.pc = landing as u64;
    true
}
