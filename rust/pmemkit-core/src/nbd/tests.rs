//! A connection against a client written byte by byte, over a socket pair.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::parse::{cmd, tx, Session, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use super::{Connection, Options, ServeResult};
use crate::block::{Bounce, Delay, Fault, FaultRule, OpSet, Raw, Stack};
use crate::media::{FileOptions, Granularity, Mapped};

const SIZE: u64 = 8 << 20;
const ALL_FLAGS: u16 = 1
    | tx::SEND_FLUSH
    | tx::SEND_FUA
    | tx::SEND_TRIM
    | tx::SEND_WRITE_ZEROES
    | tx::SEND_DF
    | tx::SEND_CACHE;

struct Client {
    socket: UnixStream,
    server: Option<JoinHandle<ServeResult>>,
    connection: Arc<Connection>,
}

fn stack() -> Stack {
    let medium = Mapped::anonymous(SIZE, false).expect("8 MiB of memory");
    Stack::new(Arc::new(Raw::new(Arc::new(medium), false)))
}

fn connect(stack: &Stack, structured: bool, leftover: Vec<u8>) -> Client {
    let (socket, theirs) = UnixStream::pair().expect("a socket pair");
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let channel = stack.channel(false);
    let context = structured.then_some(3);
    let session = Session::new(channel.info(), ALL_FLAGS, structured, context);
    let options = Options { map: true, workers: 2, poll_us: 50 };
    let connection = Connection::new(theirs.into(), channel, session, leftover, options).unwrap();
    let connection = Arc::new(connection);
    let serving = connection.clone();
    let server = Some(std::thread::spawn(move || serving.serve().expect("served once")));
    Client { socket, server, connection }
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn write_request(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = request(0, 1, cookie, offset, data.len() as u32);
    bytes.extend(data);
    bytes
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// A simple reply: cookie and errno.
    fn reply(&mut self) -> (u64, u32) {
        let bytes = self.take(16);
        assert_eq!(bytes[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let errno = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (u64::from_be_bytes(bytes[8..].try_into().unwrap()), errno)
    }

    /// A structured chunk: flags, type, cookie, payload.
    fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        let bytes = self.take(20);
        assert_eq!(bytes[..4], STRUCTURED_REPLY_MAGIC.to_be_bytes());
        let u16_at = |i: usize| u16::from_be_bytes(bytes[i..i + 2].try_into().unwrap());
        let cookie = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        let len = u32::from_be_bytes(bytes[16..].try_into().unwrap());
        (u16_at(4), u16_at(6), cookie, self.take(len as usize))
    }

    fn end(&mut self) -> ServeResult {
        self.server.take().unwrap().join().unwrap()
    }

    fn disconnect(mut self) -> ServeResult {
        self.send(&request(0, 2, 0, 0, 0));
        self.end()
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + seed + i / 251) as u8).collect()
}

#[test]
fn writes_of_every_size_are_read_back_byte_for_byte() {
    for bounced in [false, true] {
        let mut stack = stack();
        if bounced {
            stack = stack.layer(|next| Arc::new(Bounce::new(next)));
        }
        let mut client = connect(&stack, false, Vec::new());
        for (index, len) in [1, 511, 4096, 70_000, 300_001, 4 << 20].into_iter().enumerate() {
            let data = pattern(len, index);
            client.send(&write_request(index as u64, 33, &data));
            assert_eq!(client.reply(), (index as u64, 0));
            client.send(&request(0, 0, 77, 33, len as u32));
            assert_eq!(client.reply(), (77, 0));
            assert!(client.take(len) == data, "{len} bytes, bounced {bounced}");
        }
        let result = client.disconnect();
        assert_eq!(result.reason, "disconnect");
        assert_eq!((result.requests, result.errors), (13, 0));
        assert_eq!(result.bytes_read, result.bytes_written);
        assert_eq!(result.direct_bytes > 0, !bounced);
    }
}

#[test]
fn requests_that_came_with_the_handshake_are_served() {
    let mut early = write_request(1, 0, b"early");
    early.extend(request(0, 0, 2, 0, 5));
    early.extend(&request(0, 0, 3, 0, 2)[..11]);
    let mut client = connect(&stack(), false, early);
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(client.reply(), (2, 0));
    assert_eq!(client.take(5), b"early");
    client.send(&request(0, 0, 3, 0, 2)[11..]);
    assert_eq!(client.reply(), (3, 0));
    assert_eq!(client.take(2), b"ea");
    assert_eq!(client.disconnect().requests, 4);
}

#[test]
fn requests_arriving_byte_by_byte_are_served() {
    let mut client = connect(&stack(), false, Vec::new());
    for byte in write_request(9, 100, b"slow") {
        client.send(&[byte]);
    }
    assert_eq!(client.reply(), (9, 0));
    drop(client.socket.shutdown(std::net::Shutdown::Write));
    assert_eq!(client.end().reason, "eof");
}

#[test]
fn structured_replies_carry_data_errors_and_extents() {
    let mut client = connect(&stack(), true, Vec::new());
    client.send(&write_request(1, 512, b"data"));
    assert_eq!(client.chunk(), (1, 0, 1, vec![]));
    client.send(&request(cmd::DF, 0, 2, 512, 4));
    let (flags, kind, cookie, data) = client.chunk();
    assert_eq!((flags, kind, cookie), (1, 1, 2));
    assert_eq!(data, [&512u64.to_be_bytes()[..], b"data"].concat());
    client.send(&request(0, 0, 3, SIZE, 1));
    let (flags, kind, cookie, data) = client.chunk();
    assert_eq!((flags, kind, cookie), (1, 0x8001, 3));
    assert_eq!(data, [0, 0, 0, 22, 0, 0]);
    client.send(&request(0, 7, 4, 0, 4096));
    let (_, kind, _, data) = client.chunk();
    assert_eq!((kind, &data[..8]), (5, &[0, 0, 0, 3, 0, 0, 16, 0][..]));
    client.disconnect();
}

#[test]
fn a_refused_write_s_payload_is_consumed() {
    let mut client = connect(&stack(), false, Vec::new());
    client.send(&write_request(1, SIZE - 2, &pattern(400_000, 1)));
    assert_eq!(client.reply(), (1, 28));
    let mut fast = write_request(2, 0, &pattern(5000, 1));
    fast[5] = cmd::FAST_ZERO as u8;
    client.send(&fast);
    assert_eq!(client.reply(), (2, 22));
    client.send(&request(0, 42, 3, 0, 0));
    assert_eq!(client.reply(), (3, 22));
    client.send(&request(0, 0, 4, 0, 1));
    assert_eq!(client.reply(), (4, 0));
    client.take(1);
    assert_eq!(client.disconnect().errors, 3);
}

#[test]
fn absurd_payloads_and_broken_magic_end_the_connection() {
    let mut client = connect(&stack(), false, Vec::new());
    client.send(&request(0, 1, 1, 0, u32::MAX));
    assert!(client.end().reason.starts_with("protocol: a refused write of 4294967295"));
    let mut client = connect(&stack(), false, Vec::new());
    client.send(&[0x55; 28]);
    assert_eq!(client.end().reason, "protocol: request magic 0x55555555");
}

#[test]
fn a_slow_read_does_not_stall_what_comes_after_it() {
    let stack =
        stack().layer(|next| Arc::new(Delay::new(next, OpSet::READ, Duration::from_millis(300))));
    let mut client = connect(&stack, false, Vec::new());
    client.send(&[request(0, 0, 1, 0, 4), write_request(2, 4096, b"quick")].concat());
    assert_eq!(client.reply(), (2, 0));
    assert_eq!(client.reply(), (1, 0));
    client.take(4);
    client.disconnect();
}

#[test]
fn what_is_in_the_pool_is_answered_before_a_disconnect_ends() {
    let stack =
        stack().layer(|next| Arc::new(Delay::new(next, OpSet::WRITE, Duration::from_millis(50))));
    let mut client = connect(&stack, false, Vec::new());
    let mut bytes = Vec::new();
    for cookie in 0..6 {
        bytes.extend(write_request(cookie, cookie * 8, b"pending"));
    }
    bytes.extend(request(0, 2, 0, 0, 0));
    client.send(&bytes);
    let mut cookies: Vec<u64> = (0..6).map(|_| client.reply().0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [0, 1, 2, 3, 4, 5]);
    assert_eq!(client.end().bytes_written, 42);
}

#[test]
fn stop_answers_what_was_received_and_ends() {
    let mut client = connect(&stack(), false, Vec::new());
    client.send(&write_request(5, 0, b"last"));
    assert_eq!(client.reply(), (5, 0));
    client.connection.stop();
    assert_eq!(client.end().reason, "stopped");
    let again = client.connection.serve().unwrap_err();
    assert_eq!(again.kind, crate::error::Kind::Closed);
}

#[test]
fn a_media_error_latches_and_is_told_with_the_right_number() {
    let rule = FaultRule { ops: OpSet::WRITE, nth: 1, count: 1, at: 0, len: 8, errno: libc::EIO };
    let stack = stack().layer(|next| Arc::new(Fault::new(next, rule).unwrap()));
    let mut client = connect(&stack, false, Vec::new());
    client.send(&write_request(1, 0, b"fails"));
    assert_eq!(client.reply(), (1, 5));
    client.send(&write_request(2, 64, b"latched"));
    assert_eq!(client.reply(), (2, 1));
    client.send(&request(0, 3, 3, 0, 0));
    assert_eq!(client.reply(), (3, 5));
    client.disconnect();
}

/// A file of one MiB that is then cut to `kept` bytes under a connected client.
fn truncated(structured: bool, kept: u64) -> Client {
    let path = std::env::temp_dir().join(format!("pmemkit-cut-{}-{kept}", std::process::id()));
    let mut options = std::fs::File::options();
    let file = options.create_new(true).read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let options = FileOptions::new(Granularity::Page);
    let medium = Mapped::file(file.as_fd(), 1 << 20, options).unwrap();
    let stack = Stack::new(Arc::new(Raw::new(Arc::new(medium), false)));
    let client = connect(&stack, structured, Vec::new());
    file.set_len(kept).unwrap();
    client
}

#[test]
fn reads_of_a_truncated_file_are_io_errors_and_the_others_go_on() {
    let mut client = truncated(false, 8192);
    let reads = [
        request(0, 0, 1, 0, 4096),
        request(0, 0, 2, 65536, 4096),
        request(0, 0, 3, 4096, 4096),
        request(0, 0, 4, 4096, 8192),
    ];
    client.send(&reads.concat());
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(client.take(4096), [0; 4096]);
    assert_eq!(client.reply(), (2, 5));
    assert_eq!(client.reply(), (3, 0));
    assert_eq!(client.take(4096), [0; 4096]);
    assert_eq!(client.reply(), (4, 5));
    client.send(&write_request(5, 65536, &pattern(200_000, 1)));
    assert_eq!(client.reply(), (5, 5));
    assert_eq!(client.disconnect().errors, 3);
}

#[test]
fn a_structured_read_of_a_truncated_file_is_an_error_chunk() {
    let mut client = truncated(true, 0);
    client.send(&request(0, 0, 1, 0, 4096));
    let (flags, kind, cookie, data) = client.chunk();
    assert_eq!((flags, kind, cookie), (1, 0x8001, 1));
    assert_eq!(data, [0, 0, 0, 5, 0, 2, b'I', b'O']);
    client.disconnect();
}
