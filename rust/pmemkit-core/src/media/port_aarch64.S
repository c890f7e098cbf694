/*
 * The leaf routines of the CPU port for aarch64. port_aarch64.rs includes this file.
 *
 * The Rust around it is not built on x86-64 machines; this file is assembled there by a test, with
 * the cross binutils, so that at least every instruction in it exists.
 *
 * Preconditions, as for x86-64: the routines lie between pmemkit_leaf_start and pmemkit_leaf_end
 * and nothing else does; they use no stack, keep the return address in x30 and change no register
 * that a callee must preserve; they answer in x0 (0, or 1 after a fault) and x1 (the address, or a
 * loaded value); ranges do not overlap; flush takes a length above 0.
 *
 * Cache lines are taken to be 64 bytes at least: a smaller step than the line costs time only.
 */

    .arch armv8.2-a
    .text

    .macro pmemkit_begin name
    .p2align 6
    .globl \name
    .hidden \name
    .type \name, %function
\name:
    .cfi_startproc
    .endm

    .macro pmemkit_end name
    .cfi_endproc
    .size \name, . - \name
    .endm

    .macro pmemkit_return
    mov x0, #0
    ret
    .endm

    .p2align 6
    .globl pmemkit_leaf_start
    .hidden pmemkit_leaf_start
pmemkit_leaf_start:

/* copy(x0 = target, x1 = source, x2 = length): 32 bytes, then 8, then 1 at a time. */
    pmemkit_begin pmemkit_copy
    cmp x2, #32
    b.lo 3f
2:
    ldp x3, x4, [x1]
    ldp x5, x6, [x1, #16]
    stp x3, x4, [x0]
    stp x5, x6, [x0, #16]
    add x1, x1, #32
    add x0, x0, #32
    sub x2, x2, #32
    cmp x2, #32
    b.hs 2b
3:
    cmp x2, #8
    b.lo 4f
    ldr x3, [x1], #8
    str x3, [x0], #8
    sub x2, x2, #8
    b 3b
4:
    cbz x2, 5f
    ldrb w3, [x1], #1
    strb w3, [x0], #1
    sub x2, x2, #1
    b 4b
5:
    pmemkit_return
    pmemkit_end pmemkit_copy

/* flush(x0 = address, x1 = length): every line of the range, to the point that was asked for. */
    .macro pmemkit_clean name, point
    pmemkit_begin \name
    add x1, x1, x0
    bic x0, x0, #63
2:
    dc \point, x0
    add x0, x0, #64
    cmp x0, x1
    b.lo 2b
    pmemkit_return
    pmemkit_end \name
    .endm

    pmemkit_clean pmemkit_flush_cvap, cvap
    pmemkit_clean pmemkit_flush_cvac, cvac

/* load_u64(x0 = address): the value in x1. */
    pmemkit_begin pmemkit_load_u64
    ldr x1, [x0]
    pmemkit_return
    pmemkit_end pmemkit_load_u64

/* store_u64(x0 = address, x1 = value) */
    pmemkit_begin pmemkit_store_u64
    str x1, [x0]
    pmemkit_return
    pmemkit_end pmemkit_store_u64

    .globl pmemkit_leaf_end
    .hidden pmemkit_leaf_end
pmemkit_leaf_end:

/*
 * Orders stores before what follows, then waits until the cleaned lines have arrived: dmb alone
 * orders a clean but does not wait for it.
 */
    pmemkit_begin pmemkit_fence
    dmb ishst
    dsb sy
    ret
    pmemkit_end pmemkit_fence

/* Where the guard resumes: x0 and x1 are already set. */
    pmemkit_begin pmemkit_landing
    ret
    pmemkit_end pmemkit_landing
