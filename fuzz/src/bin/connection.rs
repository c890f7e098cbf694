//! A whole NBD connection in process: whatever a client sends, it ends, and its replies add up.
//!
//! Input: a byte of modes (structured replies, allocation context, no mapping, read-only), a byte
//! that says how many bytes count as sent right behind the handshake, then what the client sends.
//! The replies are taken apart by a reader that only knows the protocol text: each must be well
//! formed, and every request that arrived whole must have exactly one answer.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use pmemkit_core::block::{Bounce, Device, Raw, Stack};
use pmemkit_core::media::Mapped;
use pmemkit_core::nbd::parse::{tx, Session, REQUEST_MAGIC, REQUEST_SIZE};
use pmemkit_core::nbd::parse::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use pmemkit_core::nbd::{Connection, Options};

const DEVICE_SIZE: u64 = 64 << 10;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLAG_DONE: u16 = 1;

#[derive(Clone, Copy)]
struct Modes {
    structured: bool,
    allocation: bool,
    map: bool,
    bounce: bool,
    read_only: bool,
}

impl Modes {
    fn from_byte(byte: u8) -> Self {
        let bit = |n: u8| byte & (1 << n) != 0;
        Modes {
            structured: bit(0),
            // The protocol has no block status without structured replies.
            allocation: bit(0) && bit(1),
            map: !bit(2),
            read_only: bit(3),
            bounce: bit(4),
        }
    }
}

fn connection(socket: UnixStream, modes: Modes, leftover: &[u8]) -> Connection {
    let medium = Arc::new(Mapped::anonymous(DEVICE_SIZE, false).expect("64 KiB of memory"));
    let mut stack = Stack::new(Arc::new(Raw::new(medium, modes.read_only)));
    if modes.bounce {
        stack = stack.layer(|next| -> Arc<dyn Device> { Arc::new(Bounce::new(next)) });
    }
    let channel = stack.channel(modes.read_only);
    let mut flags = 1 | tx::SEND_FLUSH | tx::SEND_FUA | tx::SEND_TRIM | tx::SEND_WRITE_ZEROES;
    flags |= tx::SEND_DF | tx::SEND_CACHE;
    if modes.read_only {
        flags |= tx::READ_ONLY;
    }
    let context = modes.allocation.then_some(1);
    let session = Session::new(channel.info(), flags, modes.structured, context);
    let options = Options { map: modes.map, workers: 2, poll_us: 0 };
    Connection::new(socket.into(), channel, session, leftover.to_vec(), options)
        .expect("a socket pair can be served")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

/// What a client has sent: requests that arrived whole, as (command, cookie, length).
struct Sent {
    whole: Vec<(u16, u64, u32)>,
    /// The stream ends where a request ends, or with a disconnect.
    clean: bool,
}

fn read_requests(mut bytes: &[u8]) -> Sent {
    let mut whole = Vec::new();
    while bytes.len() >= REQUEST_SIZE && u32_at(bytes, 0) == REQUEST_MAGIC {
        let (command, cookie, len) = (u16_at(bytes, 6), u64_at(bytes, 8), u32_at(bytes, 24));
        bytes = &bytes[REQUEST_SIZE..];
        if command == DISCONNECT {
            return Sent { whole, clean: true };
        }
        let payload = if command == WRITE { len as usize } else { 0 };
        if bytes.len() < payload {
            return Sent { whole, clean: false };
        }
        bytes = &bytes[payload..];
        whole.push((command, cookie, len));
    }
    Sent { whole, clean: bytes.is_empty() }
}

/// Counts the answers, or gives up (`None`) where cookies that stand for different reads leave the
/// length of a simple reply open.
fn count_answers(mut bytes: &[u8], sent: &Sent, structured: bool) -> Option<usize> {
    let mut answers = 0;
    while !bytes.is_empty() {
        assert!(bytes.len() >= 16, "a reply is cut off: {} bytes", bytes.len());
        let magic = u32_at(bytes, 0);
        let cookie = u64_at(bytes, 8);
        assert!(sent.whole.iter().any(|&(_, c, _)| c == cookie) || !sent.clean);
        let payload = match magic {
            STRUCTURED_REPLY_MAGIC => {
                assert!(structured, "a structured reply was not negotiated");
                let done = u16_at(bytes, 4) & FLAG_DONE != 0;
                answers += usize::from(done);
                20 + u32_at(bytes, 16) as usize
            }
            SIMPLE_REPLY_MAGIC => {
                answers += 1;
                16 + simple_payload(sent, cookie, u32_at(bytes, 4), structured)?
            }
            other => panic!("{other:#x} is no magic of a reply"),
        };
        assert!(bytes.len() >= payload, "a reply lacks its payload");
        bytes = &bytes[payload..];
    }
    Some(answers)
}

fn simple_payload(sent: &Sent, cookie: u64, errno: u32, structured: bool) -> Option<usize> {
    let mut named = sent.whole.iter().filter(|&&(_, c, _)| c == cookie);
    let Some(&(command, _, len)) = named.next() else { return Some(0) };
    if named.any(|&(other, _, l)| (other, l) != (command, len)) {
        return None;
    }
    assert!(!(structured && command == 0), "a read must have a structured reply");
    Some(if command == 0 && errno == 0 { len as usize } else { 0 })
}

fuzz_target!(|data: &[u8]| {
    let [modes, split, wire @ ..] = data else { return };
    let modes = Modes::from_byte(*modes);
    let (leftover, later) = wire.split_at(usize::from(*split).min(wire.len()));
    let (mut client, server) = UnixStream::pair().expect("a socket pair");
    client.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    let connection = connection(server, modes, leftover);
    // Fits the socket's buffer; the server may be gone before it has read all of it.
    let _ = client.write_all(later);
    let _ = client.shutdown(Shutdown::Write);
    let mut replies = Vec::new();
    let result = std::thread::scope(|scope| {
        let serving = scope.spawn(|| connection.serve());
        let ended = client.read_to_end(&mut replies);
        assert!(
            !matches!(&ended, Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock),
            "the connection did not end"
        );
        serving.join().expect("serving does not panic").expect("serving ends with totals")
    });
    let sent = read_requests(wire);
    assert!(result.requests as usize <= sent.whole.len() + 2);
    let Some(answers) = count_answers(&replies, &sent, modes.structured) else { return };
    if sent.clean {
        assert_eq!(answers, sent.whole.len(), "{:?} after {:?}", result, sent.whole);
    } else {
        assert!(answers <= sent.whole.len() + 1, "{answers} answers, {result:?}");
    }
});
