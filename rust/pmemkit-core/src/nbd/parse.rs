//! NBD requests: from 28 bytes on the wire to a checked request, or to the error that answers it.
//!
//! Numbers and rules: the NBD protocol text (`doc/proto.md` of the NBD project). All integers on
//! the wire are big-endian.
//!
//! Invariants:
//! 1. A verdict depends on the header and the frozen [`Session`] only. Nothing is trusted: every
//!    length is compared before it is added to anything.
//! 2. A request that passes uses only ops and flags that were advertised, and its range fits.
//! 3. After a refused write its payload is still consumed, unless it is longer than
//!    [`SKIP_SIZE_MAX`]; then the connection cannot be kept.
//!
//! What this does not do: read sockets, touch media.

use crate::block::{Flags, Info, Op};

/// First four bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Bytes of a request header.
pub const REQUEST_SIZE: usize = 28;
/// The longest payload of a refused write that is still skipped; past it the client is cut off.
pub const SKIP_SIZE_MAX: u32 = 128 << 20;
/// The most extents one block status reply may carry (the protocol's own limit is 2^20).
pub const EXTENTS_MAX: usize = 1 << 16;

/// Transmission flags, as advertised in the handshake.
pub mod tx {
    /// The export cannot be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is offered.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is offered.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is offered.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is offered.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag is offered.
    pub const SEND_DF: u16 = 1 << 7;
    /// `CACHE` is offered.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO flag is offered.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of one command.
pub mod cmd {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Write zeroes without giving the backing back.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Answer a read in one content chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough, and not longer than asked for.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Refuse to zero unless that is quick.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The error numbers that may stand in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is, or became, read-only.
    Perm = 1,
    /// The media failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// No room, or a write past the end.
    NoSpc = 28,
    /// Not offered, and quickly said.
    NotSup = 95,
    /// The server is going away.
    Shutdown = 108,
}

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A read, write, flush, trim, write-zeroes or cache request: an op of the block device.
    Io(Op),
    /// Finish what is outstanding and close; no reply.
    Disconnect,
    /// Data and holes of a range.
    BlockStatus {
        /// One extent is enough, and it must not be longer than the request.
        one: bool,
    },
}

/// A request as it stood on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// The client's name for the request, echoed in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Header {
    /// Takes a header apart; `None` when the magic is wrong, after which nothing makes sense.
    pub fn parse(bytes: &[u8; REQUEST_SIZE]) -> Option<Header> {
        let u32_at =
            |i: usize| u32::from_be_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let u16_at = |i: usize| u16::from_be_bytes([bytes[i], bytes[i + 1]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) << 32 | u64::from(u32_at(i + 4));
        (u32_at(0) == REQUEST_MAGIC).then(|| Header {
            flags: u16_at(4),
            command: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            len: u32_at(24),
        })
    }

    /// Payload bytes that follow this header on the wire.
    pub fn payload_len(&self) -> u32 {
        if self.command == WRITE {
            self.len
        } else {
            0
        }
    }
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

/// What was negotiated; frozen for the life of the connection.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// The 16 flags that were advertised.
    pub transmission_flags: u16,
    /// Replies to reads are structured.
    pub structured: bool,
    /// The id of `base:allocation`, if the client selected it.
    pub allocation_context: Option<u32>,
    /// Size of the export in bytes.
    pub size: u64,
    /// Offsets and lengths must be multiples of this.
    pub block_size_min: u32,
    /// The most payload of one read or write.
    pub payload_size_max: u32,
}

/// A request that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// What to do.
    pub command: Command,
    /// What else is asked of the device.
    pub flags: Flags,
    /// The header, for cookie, offset and length.
    pub header: Header,
}

impl Session {
    /// A session on a device whose [`Info`] is frozen.
    pub fn new(
        info: &Info,
        transmission_flags: u16,
        structured: bool,
        allocation_context: Option<u32>,
    ) -> Self {
        Session {
            transmission_flags,
            structured,
            allocation_context,
            size: info.size,
            block_size_min: info.block_size_min,
            payload_size_max: info.payload_size_max,
        }
    }

    /// Checks a header against what was negotiated.
    pub fn judge(&self, header: &Header) -> Result<Accepted, Errno> {
        let (command, allowed) = self.command(header)?;
        let fua = if self.offers(tx::SEND_FUA) { cmd::FUA } else { 0 };
        if header.flags & !(allowed | fua) != 0 {
            return Err(Errno::Inval);
        }
        self.check_range(command, header)?;
        let mut flags = Flags::empty();
        flags.set(Flags::FUA, header.flags & cmd::FUA != 0 && changes(command));
        flags.set(Flags::NO_HOLE, header.flags & cmd::NO_HOLE != 0);
        flags.set(Flags::FAST_ZERO, header.flags & cmd::FAST_ZERO != 0);
        Ok(Accepted { command, flags, header: *header })
    }

    fn offers(&self, flag: u16) -> bool {
        self.transmission_flags & flag != 0
    }

    /// The command of a header, if it was offered, and the flags it may carry beside FUA.
    fn command(&self, header: &Header) -> Result<(Command, u16), Errno> {
        let fast = if self.offers(tx::SEND_FAST_ZERO) { cmd::FAST_ZERO } else { 0 };
        let df = if self.offers(tx::SEND_DF) { cmd::DF } else { 0 };
        let one = header.flags & cmd::REQ_ONE != 0;
        let (command, allowed, offered) = match header.command {
            READ => (Command::Io(Op::Read), df, true),
            WRITE => (Command::Io(Op::Write), 0, true),
            // Nothing is answered to a disconnect, so nothing of it can be refused.
            DISC => (Command::Disconnect, u16::MAX, true),
            FLUSH => (Command::Io(Op::Flush), 0, self.offers(tx::SEND_FLUSH)),
            TRIM => (Command::Io(Op::Discard), 0, self.offers(tx::SEND_TRIM)),
            CACHE => (Command::Io(Op::Cache), 0, self.offers(tx::SEND_CACHE)),
            WRITE_ZEROES => {
                let offered = self.offers(tx::SEND_WRITE_ZEROES);
                (Command::Io(Op::Zero), cmd::NO_HOLE | fast, offered)
            }
            BLOCK_STATUS => {
                let offered = self.allocation_context.is_some();
                (Command::BlockStatus { one }, cmd::REQ_ONE, offered)
            }
            _ => return Err(Errno::Inval),
        };
        if changes(command) && self.offers(tx::READ_ONLY) {
            return Err(Errno::Perm);
        }
        if offered {
            Ok((command, allowed))
        } else {
            Err(Errno::Inval)
        }
    }

    fn check_range(&self, command: Command, header: &Header) -> Result<(), Errno> {
        let len = u64::from(header.len);
        let block = u64::from(self.block_size_min);
        let transfer = matches!(command, Command::Io(Op::Read | Op::Write));
        if matches!(command, Command::Disconnect) {
            return Ok(());
        }
        if command == Command::Io(Op::Flush) {
            let plain = header.offset == 0 && header.len == 0;
            return if plain { Ok(()) } else { Err(Errno::Inval) };
        }
        if transfer && header.len > self.payload_size_max {
            return Err(Errno::Inval);
        }
        if !header.offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(Errno::Inval);
        }
        if matches!(command, Command::BlockStatus { .. }) && len == 0 {
            return Err(Errno::Inval);
        }
        match header.offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ if matches!(command, Command::Io(Op::Write | Op::Zero)) => Err(Errno::NoSpc),
            _ => Err(Errno::Inval),
        }
    }
}

fn changes(command: Command) -> bool {
    matches!(command, Command::Io(Op::Write | Op::Discard | Op::Zero))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn session() -> Session {
        Session {
            transmission_flags: 0x0fff & !tx::READ_ONLY,
            structured: true,
            allocation_context: Some(1),
            size: SIZE,
            block_size_min: 512,
            payload_size_max: 1 << 19,
        }
    }

    fn header(command: u16, offset: u64, len: u32) -> Header {
        Header { flags: 0, command, cookie: 7, offset, len }
    }

    #[test]
    fn a_header_is_read_back() {
        let mut bytes = [0u8; REQUEST_SIZE];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&cmd::FUA.to_be_bytes());
        bytes[6..8].copy_from_slice(&WRITE.to_be_bytes());
        bytes[8..16].copy_from_slice(&0x0102_0304_0506_0708u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&4096u64.to_be_bytes());
        bytes[24..28].copy_from_slice(&512u32.to_be_bytes());
        let parsed = Header::parse(&bytes).unwrap();
        assert_eq!(parsed.cookie, 0x0102_0304_0506_0708);
        assert_eq!((parsed.offset, parsed.len, parsed.flags), (4096, 512, cmd::FUA));
        assert_eq!(parsed.payload_len(), 512);
        bytes[0] ^= 1;
        assert!(Header::parse(&bytes).is_none());
    }

    #[test]
    fn ranges_past_the_end_get_the_errno_of_their_command() {
        let s = session();
        for (command, errno) in [
            (READ, Errno::Inval),
            (WRITE, Errno::NoSpc),
            (TRIM, Errno::Inval),
            (CACHE, Errno::Inval),
            (WRITE_ZEROES, Errno::NoSpc),
            (BLOCK_STATUS, Errno::Inval),
        ] {
            assert!(s.judge(&header(command, SIZE - 512, 512)).is_ok());
            assert_eq!(s.judge(&header(command, SIZE, 512)), Err(errno));
            assert_eq!(s.judge(&header(command, u64::MAX - 511, 512)), Err(errno));
        }
    }

    #[test]
    fn a_read_only_export_refuses_every_change() {
        let mut s = session();
        s.transmission_flags |= tx::READ_ONLY;
        for command in [WRITE, TRIM, WRITE_ZEROES] {
            assert_eq!(s.judge(&header(command, 0, 512)), Err(Errno::Perm));
        }
        assert!(s.judge(&header(READ, 0, 512)).is_ok());
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let mut s = session();
        s.transmission_flags = 1;
        s.allocation_context = None;
        for command in [FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8, 99] {
            let len = if command == FLUSH { 0 } else { 512 };
            assert_eq!(s.judge(&header(command, 0, len)), Err(Errno::Inval), "{command}");
        }
        let mut fua = header(WRITE, 0, 512);
        fua.flags = cmd::FUA;
        assert_eq!(s.judge(&fua), Err(Errno::Inval));
    }

    #[test]
    fn flags_stand_only_where_they_belong() {
        let s = session();
        for (command, flag, ok) in [
            (READ, cmd::FUA, true),
            (READ, cmd::DF, true),
            (READ, cmd::NO_HOLE, false),
            (WRITE, cmd::DF, false),
            (WRITE, cmd::FAST_ZERO, false),
            (WRITE_ZEROES, cmd::NO_HOLE, true),
            (WRITE_ZEROES, cmd::FAST_ZERO, true),
            (BLOCK_STATUS, cmd::REQ_ONE, true),
            (READ, cmd::REQ_ONE, false),
            (WRITE, 1 << 5, false),
            (WRITE, 1 << 15, false),
        ] {
            let mut h = header(command, 0, 512);
            h.flags = flag;
            assert_eq!(s.judge(&h).is_ok(), ok, "command {command} flag {flag:#x}");
        }
    }

    #[test]
    fn misaligned_and_oversized_requests_are_refused() {
        let s = session();
        assert_eq!(s.judge(&header(READ, 1, 512)), Err(Errno::Inval));
        assert_eq!(s.judge(&header(READ, 0, 511)), Err(Errno::Inval));
        assert_eq!(s.judge(&header(READ, 0, (1 << 19) + 512)), Err(Errno::Inval));
        assert!(s.judge(&header(TRIM, 0, 1 << 20)).is_ok());
    }
}
