//! The x86-64 half of the port: one assembly template for 16-, 32- and 64-byte vectors.
//!
//! Preconditions: [`super`] and [`crate::media::guard`] rely on what holds for the leaf routines:
//! - they lie between `pmemkit_leaf_start` and `pmemkit_leaf_end` and nothing else does;
//! - they use no stack and no register that a callee must preserve, so the return address is on top
//!   of the stack at every instruction and "leave now" is a jump to a landing pad;
//! - they answer in `rax` (0, or 1 after a fault) and `rdx` (the address, or a loaded value);
//! - they copy forwards, and the ranges do not overlap;
//! - `stream` takes a target and a length that are multiples of 64, and a length above 0; `flush`
//!   takes a length above 0.
//!
//! The landing pad with `vzeroupper` is for CPUs with AVX only: elsewhere it is no instruction.

use std::arch::x86_64::{
    __cpuid, __cpuid_count, _mm_prefetch, _mm_sfence, _MM_HINT_ET0, _MM_HINT_T0,
};
use std::arch::{global_asm, is_x86_feature_detected};
use std::ffi::c_void;

use super::{CopyFn, CopyWith, Features, Flush, FlushFn, Outcome};

/// What every x86-64 CPU has.
pub const FLUSH_ALWAYS_THERE: Flush = Flush::Clflush;

global_asm!(
    r#"
    .macro pmemkit_begin name
        .p2align 6
        .globl \name
        .hidden \name
        .type \name, @function
    \name:
        .cfi_startproc
    .endm

    .macro pmemkit_end name
        .cfi_endproc
        .size \name, . - \name
    .endm

    # Moves `count` vectors from [rsi] to [rdi], all loads before all stores.
    .macro pmemkit_move count, load, store, v, w
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        .if \n < \count
        \load \v\()\n, [rsi + \n * \w]
        .endif
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        .if \n < \count
        \store [rdi + \n * \w], \v\()\n
        .endif
        .endr
    .endm

    # Moves the first and the last `half` vectors of a range of rdx bytes; they may overlap.
    .macro pmemkit_both_ends half, move, v, w
        .irp n, 0, 1, 2, 3
        .if \n < \half
        \move \v\()\n, [rsi + \n * \w]
        \move \v\()1\n, [rsi + rdx - (\n + 1) * \w]
        .endif
        .endr
        .irp n, 0, 1, 2, 3
        .if \n < \half
        \move [rdi + \n * \w], \v\()\n
        \move [rdi + rdx - (\n + 1) * \w], \v\()1\n
        .endif
        .endr
    .endm

    .macro pmemkit_return leave
        \leave
        xor eax, eax
        ret
    .endm

    # The routines of one vector size: `w` bytes in registers `v`.
    .macro pmemkit_vectors isa, move, stream, v, w, move16, leave
    pmemkit_begin pmemkit_copy_\isa
        cmp rdx, \w
        jb .Lbelow_\isa
        cmp rdx, 2 * \w
        ja .Lfour_\isa
        pmemkit_both_ends 1, \move, \v, \w
        pmemkit_return \leave
    .Lfour_\isa:
        cmp rdx, 4 * \w
        ja .Leight_\isa
        pmemkit_both_ends 2, \move, \v, \w
        pmemkit_return \leave
    .Leight_\isa:
        cmp rdx, 8 * \w
        ja .Lmany_\isa
        pmemkit_both_ends 4, \move, \v, \w
        pmemkit_return \leave
    .Lmany_\isa:
        # The first vector as it lies, then aligned targets, then the last four as they lie.
        \move \v\()0, [rsi]
        \move [rdi], \v\()0
        lea r8, [rdi + rdx]
        lea r9, [rsi + rdx]
        lea r10, [rdi + \w]
        and r10, -\w
        sub r10, rdi
        add rdi, r10
        add rsi, r10
        lea r10, [r8 - 4 * \w]
        .p2align 4
    .Lloop_\isa:
        pmemkit_move 4, \move, \move, \v, \w
        add rsi, 4 * \w
        add rdi, 4 * \w
        cmp rdi, r10
        jb .Lloop_\isa
        lea rdi, [r8 - 4 * \w]
        lea rsi, [r9 - 4 * \w]
        pmemkit_move 4, \move, \move, \v, \w
        pmemkit_return \leave
    .Lbelow_\isa:
        .if \w > 32
        cmp edx, 32
        jb .Lbelow32_\isa
        pmemkit_both_ends 1, vmovdqu, ymm, 32
        pmemkit_return \leave
    .Lbelow32_\isa:
        .endif
        .if \w > 16
        cmp edx, 16
        jb .Lbelow16_\isa
        pmemkit_both_ends 1, \move16, xmm, 16
        pmemkit_return
    .Lbelow16_\isa:
        .endif
        cmp edx, 8
        jb .Lbelow8_\isa
        mov rax, [rsi]
        mov rcx, [rsi + rdx - 8]
        mov [rdi], rax
        mov [rdi + rdx - 8], rcx
        pmemkit_return
    .Lbelow8_\isa:
        cmp edx, 4
        jb .Lbelow4_\isa
        mov eax, [rsi]
        mov ecx, [rsi + rdx - 4]
        mov [rdi], eax
        mov [rdi + rdx - 4], ecx
        pmemkit_return
    .Lbelow4_\isa:
        cmp edx, 2
        jb .Lbelow2_\isa
        movzx eax, word ptr [rsi]
        movzx ecx, byte ptr [rsi + rdx - 1]
        mov [rdi], ax
        mov [rdi + rdx - 1], cl
        pmemkit_return
    .Lbelow2_\isa:
        test edx, edx
        jz .Lnothing_\isa
        movzx eax, byte ptr [rsi]
        mov [rdi], al
    .Lnothing_\isa:
        pmemkit_return
    pmemkit_end pmemkit_copy_\isa

    pmemkit_begin pmemkit_stream_\isa
    .Lstream_\isa:
        cmp rdx, 16 * \w
        jb .Lstream256_\isa
        pmemkit_move 16, \move, \stream, \v, \w
        add rsi, 16 * \w
        add rdi, 16 * \w
        sub rdx, 16 * \w
        jmp .Lstream_\isa
    .Lstream256_\isa:
        cmp rdx, 256
        jb .Lstream64_\isa
        pmemkit_move 256 / \w, \move, \stream, \v, \w
        add rsi, 256
        add rdi, 256
        sub rdx, 256
        jmp .Lstream256_\isa
    .Lstream64_\isa:
        test rdx, rdx
        jz .Lstreamed_\isa
        pmemkit_move 64 / \w, \move, \stream, \v, \w
        add rsi, 64
        add rdi, 64
        sub rdx, 64
        jmp .Lstream64_\isa
    .Lstreamed_\isa:
        pmemkit_return \leave
    pmemkit_end pmemkit_stream_\isa
    .endm

    .macro pmemkit_writeback instruction
    pmemkit_begin pmemkit_flush_\instruction
        add rsi, rdi
        and rdi, -64
    .Lline_\instruction:
        \instruction [rdi]
        add rdi, 64
        cmp rdi, rsi
        jb .Lline_\instruction
        pmemkit_return
    pmemkit_end pmemkit_flush_\instruction
    .endm

    .text
    .p2align 6
    .globl pmemkit_leaf_start
    .hidden pmemkit_leaf_start
pmemkit_leaf_start:
    pmemkit_vectors sse2, movdqu, movntdq, xmm, 16, movdqu
    pmemkit_vectors avx2, vmovdqu, vmovntdq, ymm, 32, vmovdqu, vzeroupper
    pmemkit_vectors avx512f, vmovdqu64, vmovntdq, zmm, 64, vmovdqu, vzeroupper
    pmemkit_writeback clwb
    pmemkit_writeback clflushopt
    pmemkit_writeback clflush

    pmemkit_begin pmemkit_copy_repeat
        mov rcx, rdx
        rep movsb
        pmemkit_return
    pmemkit_end pmemkit_copy_repeat

    pmemkit_begin pmemkit_load_u64
        mov rdx, [rdi]
        pmemkit_return
    pmemkit_end pmemkit_load_u64

    pmemkit_begin pmemkit_store_u64
        mov [rdi], rsi
        pmemkit_return
    pmemkit_end pmemkit_store_u64
    .globl pmemkit_leaf_end
    .hidden pmemkit_leaf_end
pmemkit_leaf_end:

    # Where the guard resumes: rax and rdx are already set.
    pmemkit_begin pmemkit_landing_avx
        vzeroupper
        ret
    pmemkit_end pmemkit_landing_avx

    pmemkit_begin pmemkit_landing_sse
        ret
    pmemkit_end pmemkit_landing_sse
    "#,
    options(raw)
);

extern "C" {
    static pmemkit_leaf_start: u8;
    static pmemkit_leaf_end: u8;
    static pmemkit_landing_avx: u8;
    static pmemkit_landing_sse: u8;
    fn pmemkit_copy_sse2(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_copy_avx2(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_copy_avx512f(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_stream_sse2(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_stream_avx2(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_stream_avx512f(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_flush_clwb(address: *const u8, len: u64) -> Outcome;
    fn pmemkit_flush_clflushopt(address: *const u8, len: u64) -> Outcome;
    fn pmemkit_flush_clflush(address: *const u8, len: u64) -> Outcome;
    fn pmemkit_copy_repeat(target: *mut u8, source: *const u8, len: u64) -> Outcome;
    fn pmemkit_load_u64(address: *const u8) -> Outcome;
    fn pmemkit_store_u64(address: *mut u8, value: u64) -> Outcome;
}

/// Asks the CPU (and, for the vectors, the operating system that saves their registers).
pub fn detect() -> Features {
    // Leaf 7: the bits the standard library has no names for.
    let (ebx, edx) = if __cpuid(0).eax >= 7 {
        let leaf = __cpuid_count(7, 0);
        (leaf.ebx, leaf.edx)
    } else {
        (0, 0)
    };
    let has = |register: u32, bit: u32| register & (1 << bit) != 0;
    let flush = [(has(ebx, 24), Flush::Clwb), (has(ebx, 23), Flush::Clflushopt)];
    let copy = [
        (is_x86_feature_detected!("avx512f"), CopyWith::Avx512f),
        (is_x86_feature_detected!("avx2"), CopyWith::Avx2),
    ];
    let present =
        |ways: &[(bool, Flush)]| ways.iter().filter(|way| way.0).map(|way| way.1).collect();
    let mut features = Features { flush: present(&flush), copy: Vec::new(), repeat: false };
    features.flush.push(FLUSH_ALWAYS_THERE);
    features.copy.extend(copy.iter().filter(|way| way.0).map(|way| way.1));
    features.copy.push(CopyWith::Sse2);
    // Both "enhanced" and "fast short": without the latter the instruction starts slowly.
    features.repeat = has(ebx, 9) && has(edx, 4);
    features
}

/// The cached and the non-temporal copy of a vector size.
pub fn copy_routines(with: CopyWith) -> (CopyFn, CopyFn) {
    match with {
        CopyWith::Avx512f => (pmemkit_copy_avx512f, pmemkit_stream_avx512f),
        CopyWith::Avx2 => (pmemkit_copy_avx2, pmemkit_stream_avx2),
        CopyWith::Sse2 | CopyWith::Generic => (pmemkit_copy_sse2, pmemkit_stream_sse2),
    }
}

/// The routine that writes lines back with an instruction.
pub fn flush_routine(with: Flush) -> FlushFn {
    match with {
        Flush::Clwb => pmemkit_flush_clwb,
        Flush::Clflushopt => pmemkit_flush_clflushopt,
        Flush::Clflush | Flush::DcCvap | Flush::DcCvac => pmemkit_flush_clflush,
    }
}

/// Copies with the one instruction for it.
///
/// # Safety
/// As for [`super::Port::copy`].
pub unsafe fn copy_repeat(target: *mut u8, source: *const u8, len: u64) -> Outcome {
    // SAFETY: the caller vouches for the ranges.
    unsafe { pmemkit_copy_repeat(target, source, len) }
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

/// Waits for write-backs and non-temporal stores.
pub fn fence() {
    // SAFETY: sfence is part of SSE, which every x86-64 CPU has; it touches no memory.
    unsafe { _mm_sfence() }
}

/// Brings a line near that will be loaded.
#[inline(always)]
pub fn hint_load(address: *const u8) {
    // SAFETY: a prefetch touches nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

/// Brings a line near that will be stored to. CPUs without such a hint pass it over.
#[inline(always)]
pub fn hint_store(address: *const u8) {
    // SAFETY: a prefetch touches nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_ET0>(address.cast()) }
}

/// Where a faulted leaf routine goes on, for this CPU. Asks the CPU: not for signal handlers.
pub fn landing() -> usize {
    if is_x86_feature_detected!("avx") {
        &raw const pmemkit_landing_avx as usize
    } else {
        &raw const pmemkit_landing_sse as usize
    }
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
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    if !leaf.contains(&(registers[libc::REG_RIP as usize] as usize)) {
        return false;
    }
    registers[libc::REG_RAX as usize] = 1;
    registers[libc::REG_RDX as usize] = address as i64;
    registers[libc::REG_RIP as usize] = landing as i64;
    true
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::{select, Choice, Overrides, Port};
    use super::*;
    use crate::media::{guard, sys, Store};

    const CANARY: u8 = 0xa5;

    /// A port for every pair of instructions that this CPU has.
    fn ports() -> Vec<Port> {
        let features = detect();
        let mut ports = Vec::new();
        for &copy in &features.copy {
            for &flush in &features.flush {
                let choice = Choice { copy, flush, ..select(&features, &Overrides::default()) };
                // SAFETY: both come from what this CPU has.
                ports.push(unsafe { Port::new(choice) });
            }
        }
        ports
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
    }

    /// Runs `store` on a range in the middle of canaries and checks the range and all around it.
    fn check(
        target: &mut [u8],
        at: usize,
        expected: &[u8],
        store: impl FnOnce(*mut u8) -> Outcome,
    ) {
        target.fill(CANARY);
        let outcome = store(target[at..].as_mut_ptr());
        assert!(!outcome.is_fault());
        let (before, rest) = target.split_at(at);
        let (range, after) = rest.split_at(expected.len());
        assert!(range == expected, "{} bytes at {at}", expected.len());
        assert!(before.iter().chain(after).all(|&byte| byte == CANARY), "around {at}");
    }

    #[test]
    fn every_copy_moves_its_range_and_nothing_else() {
        let source = pattern(1024);
        let zeroes = vec![0; 1024];
        let mut target = vec![0; 1024];
        let line = target.as_ptr().align_offset(64);
        for port in ports().iter().step_by(detect().flush.len()) {
            for len in 0..=600usize {
                for shift in [0, 1, 7, 8, 15, 16, 31, 32, 48, 63] {
                    let at = line + shift;
                    let skew = (len * 7 + shift * 3) % 64;
                    let expected = &source[skew..skew + len];
                    let (from, size) = (expected.as_ptr(), len as u64);
                    // SAFETY: both ranges lie within their vectors.
                    unsafe {
                        check(&mut target, at, expected, |to| port.copy(to, from, size));
                        check(&mut target, at, expected, |to| copy_repeat(to, from, size));
                        for how in [Store::Auto, Store::Cached, Store::NonTemporal] {
                            let run = |to| port.store(to, from, size, how);
                            check(&mut target, at, expected, run);
                        }
                        let nothing = &zeroes[..len];
                        check(&mut target, at, nothing, |to| port.zero(to, size, Store::Auto));
                    }
                }
            }
        }
    }

    #[test]
    fn large_ranges_are_copied_by_every_pair() {
        let source = pattern((3 << 20) + 64);
        let zeroes = vec![0; source.len()];
        let mut target = vec![0; source.len() + 256];
        for port in ports() {
            for len in [1023, 1024, 4096, 4097, 65_535, (1 << 20) + 1, 3 << 20] {
                for (at, skew) in [(0, 0), (64, 1), (13, 0), (61, 61)] {
                    let expected = &source[skew..skew + len];
                    let (from, size) = (expected.as_ptr(), len as u64);
                    // SAFETY: both ranges lie within their vectors.
                    unsafe {
                        check(&mut target, at, expected, |to| port.copy_bulk(to, from, size));
                        for how in [Store::Auto, Store::Cached] {
                            let run = |to| port.store(to, from, size, how);
                            check(&mut target, at, expected, run);
                        }
                        let nothing = &zeroes[..len];
                        check(&mut target, at, nothing, |to| port.zero(to, size, Store::Auto));
                    }
                    port.fence();
                }
            }
        }
    }

    #[test]
    fn words_are_loaded_and_stored() {
        let mut words = [1u64, 2, 3];
        let base = words.as_mut_ptr().cast::<u8>();
        let port = &ports()[0];
        // SAFETY: the middle word is inside the array and aligned.
        let outcome = unsafe {
            assert!(!port.store_u64(base.add(8), 0x1122_3344_5566_7788).is_fault());
            port.load_u64(base.add(8))
        };
        assert_eq!((outcome.faulted, outcome.value), (0, 0x1122_3344_5566_7788));
        assert_eq!((words[0], words[2]), (1, 3));
    }

    /// Two mapped pages of a file that has only one.
    fn half_gone() -> *mut u8 {
        guard::install().unwrap();
        let file = sys::memfd("half", false).unwrap();
        sys::set_length(file.as_fd(), 8192).unwrap();
        let base = sys::map(file.as_fd(), 0, 8192, false, sys::Sharing::Shared).unwrap();
        sys::set_length(file.as_fd(), 4096).unwrap();
        base
    }

    #[test]
    fn every_routine_survives_a_fault_in_the_middle() {
        let base = half_gone();
        let edge = base as u64 + 4096;
        let mut memory = pattern(4096);
        let bytes = memory.as_mut_ptr();
        let faulted = |outcome: Outcome, what: &str| {
            assert!(outcome.is_fault(), "{what}");
            assert!((edge..edge + 4096).contains(&outcome.value), "{what}: {outcome:?}");
        };
        for port in ports() {
            for len in [2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 128, 200, 256, 512, 1000, 4000] {
                // SAFETY: the ranges are mapped, whatever the file has behind them.
                unsafe {
                    let start = base.add(4096 - len / 2);
                    let size = len as u64;
                    faulted(port.copy(start, bytes, size), "copy to");
                    faulted(port.copy(bytes, start, size), "copy from");
                    faulted(copy_repeat(start, bytes, size), "repeat to");
                    faulted(copy_repeat(bytes, start, size), "repeat from");
                    for how in [Store::Auto, Store::Cached, Store::NonTemporal] {
                        faulted(port.store(start, bytes, size, how), "store");
                        faulted(port.zero(start, size, how), "zero");
                    }
                    faulted(port.flush(base.add(4095), size), "flush");
                    faulted(port.load_u64(base.add(4096)), "load");
                    faulted(port.store_u64(base.add(8184 - len / 8 * 8), 1), "store");
                }
            }
        }
        // SAFETY: mapped by `half_gone` and not used any more.
        unsafe { sys::unmap(base, 8192) };
    }
}
