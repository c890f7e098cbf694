//! The NBD request parser against a slow judge that works in 128 bits.
//!
//! Input: 16 bytes that make up a session, then headers of 28 bytes. Whatever the parser accepts
//! must fit the export, be aligned, use only what was advertised and carry flags that mean
//! something; whatever it refuses must be refusable.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pmemkit_core::block::{Flags, Op};
use pmemkit_core::nbd::parse::{cmd, tx, Accepted, Command, Errno, Header, Session, REQUEST_SIZE};

const SESSION_SIZE: usize = 16;

fn session(bytes: &[u8; SESSION_SIZE]) -> Session {
    let [f0, f1, bits, shift, s0, s1, s2, s3, s4, s5, s6, s7, p0, p1, p2, p3] = *bytes;
    Session {
        transmission_flags: u16::from_be_bytes([f0, f1]),
        structured: bits & 1 != 0,
        allocation_context: (bits & 2 != 0).then_some(u32::from(bits)),
        size: u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        block_size_min: 1 << (shift % 17),
        payload_size_max: u32::from_be_bytes([p0, p1, p2, p3]),
    }
}

fn fits(session: &Session, header: &Header) -> bool {
    let block = u128::from(session.block_size_min);
    let (offset, len) = (u128::from(header.offset), u128::from(header.len));
    offset % block == 0 && len % block == 0 && offset + len <= u128::from(session.size)
}

fn offered(session: &Session, command: Command) -> bool {
    let has = |flag: u16| session.transmission_flags & flag != 0;
    let writable = !has(tx::READ_ONLY);
    match command {
        Command::Io(Op::Read) | Command::Disconnect => true,
        Command::Io(Op::Write) => writable,
        Command::Io(Op::Flush) => has(tx::SEND_FLUSH),
        Command::Io(Op::Discard) => writable && has(tx::SEND_TRIM),
        Command::Io(Op::Zero) => writable && has(tx::SEND_WRITE_ZEROES),
        Command::Io(Op::Cache) => has(tx::SEND_CACHE),
        Command::BlockStatus { .. } => session.allocation_context.is_some(),
    }
}

fn check_accepted(session: &Session, header: &Header, accepted: &Accepted) {
    assert_eq!(accepted.header, *header);
    assert!(offered(session, accepted.command), "{accepted:?} was not offered");
    if accepted.command == Command::Disconnect {
        return;
    }
    if accepted.command == Command::Io(Op::Flush) {
        assert!(header.offset == 0 && header.len == 0, "a flush has no range: {header:?}");
    } else {
        assert!(fits(session, header), "{header:?} does not fit {session:?}");
    }
    if matches!(accepted.command, Command::Io(Op::Read | Op::Write)) {
        assert!(header.len <= session.payload_size_max, "{header:?} is too long");
    }
    let has = |flag: u16| session.transmission_flags & flag != 0;
    let is_zero = accepted.command == Command::Io(Op::Zero);
    assert!(header.flags & cmd::FUA == 0 || has(tx::SEND_FUA));
    assert!(header.flags & cmd::DF == 0 || accepted.command == Command::Io(Op::Read));
    assert!(header.flags & cmd::DF == 0 || has(tx::SEND_DF));
    assert!(!accepted.flags.contains(Flags::FUA) || header.flags & cmd::FUA != 0);
    assert!(!accepted.flags.intersects(Flags::NO_HOLE | Flags::FAST_ZERO) || is_zero);
    assert!(!accepted.flags.contains(Flags::FAST_ZERO) || has(tx::SEND_FAST_ZERO));
    let known = cmd::FUA | cmd::NO_HOLE | cmd::DF | cmd::REQ_ONE | cmd::FAST_ZERO;
    assert!(header.flags & !known == 0, "unknown flags in {header:?}");
}

/// A plain read or write that fits, asks for nothing special and is permitted must pass.
fn must_pass(session: &Session, header: &Header) -> bool {
    let permitted = header.command == 0 || session.transmission_flags & tx::READ_ONLY == 0;
    header.command <= 1
        && header.flags == 0
        && permitted
        && header.len <= session.payload_size_max
        && fits(session, header)
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<SESSION_SIZE>() else { return };
    let session = session(head);
    for bytes in rest.chunks_exact(REQUEST_SIZE) {
        let bytes: &[u8; REQUEST_SIZE] = bytes.try_into().expect("chunks have this size");
        let Some(header) = Header::parse(bytes) else { continue };
        assert_eq!(header.payload_len(), if header.command == 1 { header.len } else { 0 });
        match session.judge(&header) {
            Ok(accepted) => check_accepted(&session, &header, &accepted),
            Err(errno) => {
                assert!(!must_pass(&session, &header), "{header:?} was refused: {errno:?}");
                assert!(!matches!(errno, Errno::Io | Errno::Shutdown), "{errno:?} is no verdict");
            }
        }
    }
});
