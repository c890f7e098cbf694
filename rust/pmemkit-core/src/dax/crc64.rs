//! CRC-64/XZ, eight bytes at a time: what tells a record that is whole from one that is not.
//!
//! Invariants:
//! 1. `finish(update(update(start, a), b))` is the checksum of `a` followed by `b`.
//!
//! What this does not do: keep anybody from forging a record.

const POLYNOMIAL: u64 = 0xc96c_5795_d787_0f42;

/// `TABLES[n][byte]`: the effect of a byte that `n` more follow.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let (mut value, mut bit) = (byte as u64, 0);
        while bit < 8 {
            value = (value >> 1) ^ (POLYNOMIAL * (value & 1));
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut level = 1;
    while level < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[level - 1][byte];
            tables[level][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        level += 1;
    }
    tables
}

/// The state before the first byte.
pub const START: u64 = u64::MAX;

/// The state after more bytes.
pub fn update(mut state: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let mixed = (state ^ u64::from_le_bytes(*word)).to_le_bytes();
        state = (0..8).fold(0, |sum, n| sum ^ TABLES[7 - n][usize::from(mixed[n])]);
    }
    for byte in rest {
        state = (state >> 8) ^ TABLES[0][usize::from(state as u8 ^ byte)];
    }
    state
}

/// The checksum.
pub fn finish(state: u64) -> u64 {
    !state
}

/// The checksum of some bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    finish(update(START, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_check_value_is_met() {
        assert_eq!(checksum(b"123456789"), 0x995d_c9bb_df19_39fa);
        assert_eq!(checksum(b""), 0);
        let parts = update(update(START, b"1234"), b"56789");
        assert_eq!(finish(parts), checksum(b"123456789"));
    }
}
