//! The stack's promises, one test each, over anonymous memory.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::error::Kind;
use crate::media::Mapped;

const SIZE: u64 = 1 << 20;

fn stack() -> Stack {
    let medium = Mapped::anonymous(SIZE, false).expect("1 MiB of memory");
    Stack::new(Arc::new(Raw::new(Arc::new(medium), false)))
}

fn write(channel: &Channel, at: u64, data: &[u8], flags: Flags) -> Result<()> {
    // SAFETY: the slice outlives the call, and a write only reads from it.
    let sg = unsafe { Sg::host(data.as_ptr().cast_mut(), data.len() as u64) };
    channel.submit(&Request { op: Op::Write, at, len: data.len() as u64, flags, sg: &sg })
}

fn read(channel: &Channel, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut data = vec![0xee; len as usize];
    // SAFETY: the vector outlives the call.
    let sg = unsafe { Sg::host(data.as_mut_ptr(), len) };
    channel.submit(&Request { op: Op::Read, at, len, flags: Flags::empty(), sg: &sg })?;
    Ok(data)
}

fn plain(channel: &Channel, op: Op, at: u64, len: u64, flags: Flags) -> Result<()> {
    channel.submit(&Request { op, at, len, flags, sg: &Sg::new() })
}

#[test]
fn what_is_written_is_read_through_any_number_of_layers() {
    let mut stack = stack();
    for _ in 0..8 {
        stack = stack.layer(|next| Arc::new(Noop::new(next)));
    }
    let channel = stack.channel(false);
    write(&channel, 4095, b"over a frame's edge", Flags::FUA).unwrap();
    assert_eq!(read(&channel, 4095, 19).unwrap(), b"over a frame's edge");
    plain(&channel, Op::Zero, 4096, 4, Flags::NO_HOLE).unwrap();
    assert_eq!(read(&channel, 4095, 6).unwrap(), b"o\0\0\0\0a");
}

#[test]
fn a_list_of_several_segments_is_one_transfer() {
    let channel = stack().channel(false);
    let parts = [b"one".to_vec(), b"and".to_vec(), b"two".to_vec()];
    let mut sg = Sg::new();
    for part in &parts {
        // SAFETY: the parts outlive the call, and a write only reads from them.
        unsafe { sg.push_host(part.as_ptr().cast_mut(), part.len() as u64) };
    }
    let flags = Flags::empty();
    channel.submit(&Request { op: Op::Write, at: 7, len: 9, flags, sg: &sg }).unwrap();
    assert_eq!(read(&channel, 7, 9).unwrap(), b"oneandtwo");
}

#[test]
fn the_door_refuses_what_was_not_offered_before_any_layer_sees_it() {
    let log = Arc::new(TraceLog::new(16));
    let sink = log.clone();
    let stack = stack().layer(|next| Arc::new(Trace::new(next, sink)));
    let (all, ro) = (stack.channel(false), stack.channel(true));
    let none = Flags::empty();
    let kind = |result: Result<()>| result.unwrap_err().kind;
    assert_eq!(kind(write(&ro, 0, b"x", none)), Kind::ReadOnly);
    assert_eq!(kind(plain(&ro, Op::Discard, 0, 1, none)), Kind::ReadOnly);
    assert_eq!(kind(write(&all, SIZE, b"x", none)), Kind::OutOfRange);
    assert_eq!(kind(write(&all, u64::MAX, b"x", none)), Kind::OutOfRange);
    assert_eq!(kind(write(&all, 0, b"x", Flags::NO_HOLE)), Kind::NotSupported);
    let long = u64::from(all.info().payload_size_max) + 1;
    assert_eq!(kind(plain(&all, Op::Read, 0, long, none)), Kind::OutOfRange);
    assert!(log.entries().is_empty(), "{:?}", log.entries());
}

#[test]
fn a_trace_sees_every_path_and_its_outcome() {
    let log = Arc::new(TraceLog::new(3));
    let sink = log.clone();
    let stack = stack().layer(|next| Arc::new(Trace::new(next, sink)));
    let channel = stack.channel(false);
    write(&channel, 0, b"abc", Flags::FUA).unwrap();
    channel.extents(0, SIZE).unwrap();
    let mut segments = Sg::new();
    let sg = Sg::new();
    let request = Request { op: Op::Write, at: 8, len: 8, flags: Flags::empty(), sg: &sg };
    channel.map(&request, &mut segments).unwrap();
    channel.commit(&request).unwrap();
    let seen: Vec<_> = log.entries().iter().map(|entry| (entry.op, entry.at)).collect();
    assert_eq!(seen, [("extents", 0), ("map", 8), ("commit", 8)]);
    assert_eq!(log.dropped(), 1);
    assert_eq!(segments.len(), 8);
}

#[test]
fn bounce_hides_map() {
    let channel = stack().layer(|next| Arc::new(Bounce::new(next))).channel(false);
    let sg = Sg::new();
    let request = Request { op: Op::Read, at: 0, len: 8, flags: Flags::empty(), sg: &sg };
    assert_eq!(channel.map(&request, &mut Sg::new()).unwrap_err().kind, Kind::NotSupported);
    assert_eq!(read(&channel, 0, 8).unwrap(), [0; 8]);
}

fn faulty(ops: OpSet, nth: u64, count: u64) -> Stack {
    let rule = FaultRule { ops, nth, count, at: 4096, len: 4096, errno: libc::EIO };
    stack().layer(|next| Arc::new(Fault::new(next, rule).unwrap()))
}

#[test]
fn a_fault_hits_the_nth_matching_request_in_its_range_only() {
    let channel = faulty(OpSet::READ, 2, 1).channel(false);
    read(&channel, 0, 4096).unwrap();
    read(&channel, 4096, 1).unwrap();
    read(&channel, 8192, 4096).unwrap();
    assert_eq!(read(&channel, 8191, 2).unwrap_err().kind, Kind::Media);
    read(&channel, 4096, 1).unwrap();
}

#[test]
fn a_failed_read_fails_alone() {
    let stack = faulty(OpSet::READ, 1, 0);
    let channel = stack.channel(false);
    read(&channel, 4096, 8).unwrap_err();
    assert!(stack.latch().reason().is_none());
    write(&channel, 4096, b"still writable", Flags::empty()).unwrap();
}

#[test]
fn a_failed_write_or_flush_latches_every_channel() {
    for ops in [OpSet::WRITE, OpSet::FLUSH, OpSet::DISCARD, OpSet::ZERO] {
        let stack = faulty(ops, 1, 1);
        let (channel, other) = (stack.channel(false), stack.channel(false));
        let op = Op::ALL.into_iter().find(|op| op.set() == ops).unwrap();
        let len = if op == Op::Flush { 0 } else { 512 };
        let failed = match op {
            Op::Write => write(&channel, 4096, &[1; 512], Flags::empty()),
            _ => plain(&channel, op, if len == 0 { 0 } else { 4096 }, len, Flags::empty()),
        };
        assert_eq!(failed.unwrap_err().kind, Kind::Media, "{op:?}");
        let refused = write(&other, 0, b"x", Flags::empty()).unwrap_err();
        assert_eq!(refused.kind, Kind::Latched, "{op:?}");
        assert!(refused.detail.contains("planted fault"), "{refused}");
        let flush = plain(&other, Op::Flush, 0, 0, Flags::empty());
        assert_eq!(flush.unwrap_err().kind, Kind::Latched, "{op:?}");
        read(&other, 4096, 8).unwrap();
    }
}

#[test]
fn a_refused_request_does_not_latch() {
    let stack = stack();
    let channel = stack.channel(false);
    write(&channel, SIZE, b"x", Flags::empty()).unwrap_err();
    assert!(stack.latch().reason().is_none());
}

#[test]
fn a_fault_rule_without_sense_is_refused() {
    let rule = FaultRule { ops: OpSet::READ, nth: 0, count: 1, at: 0, len: 1, errno: libc::EIO };
    let next = stack().top().clone();
    assert!(Fault::new(next, rule).is_err());
}

#[test]
fn a_delay_declares_that_its_ops_block() {
    let stack = stack();
    assert!(!stack.channel(false).blocks(Op::Read, Flags::empty()));
    let wait = Duration::from_millis(1);
    let slow = stack.layer(|next| Arc::new(Delay::new(next, OpSet::READ, wait)));
    assert!(slow.channel(false).blocks(Op::Read, Flags::empty()));
    assert_eq!(read(&slow.channel(false), 0, 1).unwrap(), [0]);
}
