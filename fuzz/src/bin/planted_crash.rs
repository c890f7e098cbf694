//! A crash that only a fuzzer which sees coverage and compared values can find: it lies behind a
//! magic number, two byte tests and a checksum. `tools/fuzz prove` fails unless it is found, which
//! shows that the instrumentation of the other targets works.
#![no_main]

use libfuzzer_sys::fuzz_target;

const MAGIC: u32 = 0x2560_9513;

fn is_planted(data: &[u8]) -> bool {
    let [m0, m1, m2, m3, a, b, c, sum, ..] = *data else { return false };
    if u32::from_be_bytes([m0, m1, m2, m3]) != MAGIC {
        return false;
    }
    if a != b'p' {
        return false;
    }
    if b <= 0xf0 {
        return false;
    }
    sum == a ^ b ^ c.rotate_left(3)
}

fuzz_target!(|data: &[u8]| {
    assert!(!is_planted(data), "planted crash found");
});
