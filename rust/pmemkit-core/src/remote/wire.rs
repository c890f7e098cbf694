//! Headers of the region protocol: 64 bytes, little-endian, in front of every request and reply.
//!
//! | offset | width | field | valid |
//! |---|---|---|---|
//! | 0 | 4 | magic | `PMRG` |
//! | 4 | 2 | version | what was agreed on; 1 in a hello |
//! | 6 | 2 | op | [`Op`] |
//! | 8 | 4 | flags | bit 0: a reply; the others are zero |
//! | 12 | 4 | status | zero, or in a reply the number of an error kind |
//! | 16 | 8 | tag | the request's, repeated in its reply |
//! | 24 | 8 | pfn | below 2^52 |
//! | 32 | 4 | offset | below 4096 |
//! | 36 | 4 | payload | bytes that follow; see [`Header::check`] |
//! | 40 | 8 | len | bytes of the range |
//! | 48 | 8 | reserved | zero |
//! | 56 | 4 | checksum | CRC-32C of the 56 bytes before |
//! | 60 | 4 | reserved | zero |
//!
//! Invariants:
//! 1. Whatever is not in the table is an error that names the field; nothing panics.
//! 2. A parsed header, written again, gives the same bytes.
//!
//! What this does not do: know sizes of regions or what a peer may do.

use crate::error::{Error, Kind, Result};
use crate::sg::{Pfn, FRAME_SHIFT, FRAME_SIZE};

/// Bytes of a header.
pub const HEADER_SIZE: usize = 64;
/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"PMRG";
/// The one version there is.
pub const VERSION: u16 = 1;
/// The most payload of one message.
pub const PAYLOAD_MAX: u32 = 1 << 20;
/// The most payload of a hello, an answer to it, or an error.
pub const TEXT_MAX: u32 = 1024;
/// The most runs of one answer to [`Op::Extents`], of 8 bytes each.
pub const EXTENTS_MAX: usize = 8192;

const CHECKED: usize = 56;
const REPLY: u32 = 1;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Which versions, which export; the answer says what it is.
    Hello = 1,
    /// Bytes of the region.
    CopyOut = 2,
    /// Bytes for the region.
    CopyIn = 3,
    /// Make a range durable at the target; all of it, where the range is empty.
    Commit = 4,
    /// Make a range read as zeroes.
    Zero = 5,
    /// Give the backing of a range back.
    Punch = 6,
    /// Data and holes of a range.
    Extents = 7,
}

impl Op {
    const ALL: [Op; 7] =
        [Op::Hello, Op::CopyOut, Op::CopyIn, Op::Commit, Op::Zero, Op::Punch, Op::Extents];

    /// The op of this number.
    pub fn from_number(number: u16) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == number)
    }
}

/// What stands in front of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version that the sender speaks.
    pub version: u16,
    /// What is asked for, or was.
    pub op: Op,
    /// True in an answer.
    pub reply: bool,
    /// Zero, or the number of the kind of error.
    pub status: u32,
    /// Tells which request an answer belongs to.
    pub tag: u64,
    /// The frame in which the range starts.
    pub pfn: Pfn,
    /// Where in that frame. Bytes.
    pub offset: u32,
    /// Bytes that follow.
    pub payload: u32,
    /// Bytes of the range.
    pub len: u64,
}

fn broken(text: String) -> Error {
    Error::new(Kind::Protocol, "remote", text)
}

/// The little-endian number of `N` bytes at `at`, which lie inside a header.
fn number<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Header {
    /// A request for a range of bytes.
    pub fn request(op: Op, tag: u64, at: u64, len: u64) -> Header {
        let payload = if op == Op::CopyIn { len as u32 } else { 0 };
        let (pfn, offset) = (Pfn(at >> FRAME_SHIFT), (at % FRAME_SIZE) as u32);
        let (reply, status) = (false, 0);
        Header { version: VERSION, op, reply, status, tag, pfn, offset, payload, len }
    }

    /// The answer to a request, with so many bytes of payload.
    pub fn answer(&self, payload: u32) -> Header {
        Header { reply: true, payload, ..*self }
    }

    /// The byte at which the range starts.
    pub fn at(&self) -> u64 {
        (self.pfn.0 << FRAME_SHIFT) + u64::from(self.offset)
    }

    /// The bytes of a header.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &self.version.to_le_bytes());
        put(6, &(self.op as u16).to_le_bytes());
        put(8, &(if self.reply { REPLY } else { 0 }).to_le_bytes());
        put(12, &self.status.to_le_bytes());
        put(16, &self.tag.to_le_bytes());
        put(24, &self.pfn.0.to_le_bytes());
        put(32, &self.offset.to_le_bytes());
        put(36, &self.payload.to_le_bytes());
        put(40, &self.len.to_le_bytes());
        let sum = crc32c(&bytes[..CHECKED]);
        bytes[CHECKED..CHECKED + 4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a header; the first field that is wrong is in the error.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Header> {
        if bytes[..4] != MAGIC {
            return Err(broken(format!("magic {:02x?}", &bytes[..4])));
        }
        let sum = u64::from(crc32c(&bytes[..CHECKED]));
        let said = number::<4>(bytes, CHECKED);
        if sum != said {
            return Err(broken(format!("checksum {said:#x}, the header has {sum:#x}")));
        }
        let op = number::<2>(bytes, 6) as u16;
        let op = Op::from_number(op).ok_or_else(|| broken(format!("op {op}")))?;
        let flags = number::<4>(bytes, 8) as u32;
        if flags & !REPLY != 0 {
            return Err(broken(format!("flags {flags:#x}")));
        }
        if number::<8>(bytes, 48) != 0 || number::<4>(bytes, 60) != 0 {
            return Err(broken("reserved bytes that are not zero".to_owned()));
        }
        let header = Header {
            version: number::<2>(bytes, 4) as u16,
            op,
            reply: flags & REPLY != 0,
            status: number::<4>(bytes, 12) as u32,
            tag: number::<8>(bytes, 16),
            pfn: Pfn(number::<8>(bytes, 24)),
            offset: number::<4>(bytes, 32) as u32,
            payload: number::<4>(bytes, 36) as u32,
            len: number::<8>(bytes, 40),
        };
        header.check().map(|()| header)
    }

    /// Refuses what no version of the protocol has.
    pub fn check(&self) -> Result<()> {
        if self.pfn.0 >> (64 - FRAME_SHIFT) != 0 {
            return Err(broken(format!("pfn {:#x}", self.pfn.0)));
        }
        if u64::from(self.offset) >= FRAME_SIZE {
            return Err(broken(format!("offset {} in a frame of {FRAME_SIZE}", self.offset)));
        }
        if self.status != 0 && (!self.reply || kind_of(self.status).is_none()) {
            return Err(broken(format!("status {}", self.status)));
        }
        let payload = self.payload;
        let good = match (self.reply, self.op) {
            _ if self.status != 0 => payload <= TEXT_MAX,
            (_, Op::Hello) => payload <= TEXT_MAX,
            (false, Op::CopyIn) | (true, Op::CopyOut) => {
                u64::from(payload) == self.len && payload <= PAYLOAD_MAX
            }
            (true, Op::Extents) => payload as usize <= EXTENTS_MAX * 8 && payload.is_multiple_of(8),
            (false, Op::CopyOut) => payload == 0 && self.len <= u64::from(PAYLOAD_MAX),
            _ => payload == 0,
        };
        if !good {
            let text = format!("{:?} with {payload} bytes of payload for {}", self.op, self.len);
            return Err(broken(text));
        }
        Ok(())
    }
}

/// The number of a kind of error in a reply.
pub fn status_of(kind: Kind) -> u32 {
    Kind::ALL.iter().position(|each| *each == kind).map_or(0, |index| index as u32) + 1
}

/// The kind of error of a number, if there is one.
pub fn kind_of(status: u32) -> Option<Kind> {
    Kind::ALL.get((status as usize).checked_sub(1)?).copied()
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
            bit += 1;
        }
        table[byte] = sum;
        byte += 1;
    }
    table
};

/// CRC-32C, as iSCSI and ext4 have it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| TABLE[((sum ^ u32::from(*byte)) & 0xff) as usize] ^ sum >> 8)
}
