//! The file's promises over anonymous memory. The mount itself is tested from Python, by root.

use std::sync::Arc;
use std::time::Duration;

use super::file::{mode, ExportFile};
use super::session::Handles;
use crate::block::{Caps, Device, Info, Raw, Request, Stack, Trace, TraceLog};
use crate::error::{Kind, Result};
use crate::media::Mapped;

const SIZE: u64 = 1 << 20;

/// A layer that demands sectors and small requests, and may not know quick zeroing.
struct Sectors {
    next: Arc<dyn Device>,
    info: Info,
}

impl Device for Sectors {
    fn next(&self) -> Option<&Arc<dyn Device>> {
        Some(&self.next)
    }

    fn info(&self) -> &Info {
        &self.info
    }

    fn submit(&self, request: &Request<'_>) -> Result<()> {
        assert_eq!((request.at | request.len) % 512, 0);
        assert!(request.sg.len() <= 4096);
        self.next.submit(request)
    }
}

fn stack(read_only: bool) -> Stack {
    let medium = Arc::new(Mapped::anonymous(SIZE, false).unwrap());
    Stack::new(Arc::new(Raw::new(medium, read_only)))
}

fn sectors(stack: &Stack, fast: bool) -> ExportFile {
    let sectors = stack.layer(|next| {
        let mut info = *next.info();
        (info.block_size_min, info.payload_size_max) = (512, 4096);
        info.caps.set(Caps::FAST_ZERO, fast);
        Arc::new(Sectors { next, info })
    });
    ExportFile::new(sectors.channel(false))
}

fn read(file: &ExportFile, at: u64, len: u32) -> Vec<u8> {
    let mut buffer = vec![0xee; 3];
    let range = file.read(at, len, &mut buffer).unwrap();
    buffer[range].to_vec()
}

#[test]
fn reads_of_any_range_of_a_sector_device() {
    let file = sectors(&stack(false), true);
    let data: Vec<u8> = (0..SIZE).map(|at| (at / 7) as u8).collect();
    file.write(0, &data).unwrap();
    for (at, len) in [(0, 1), (1, 510), (511, 2), (513, 20_000), (4096, 8192), (SIZE - 5, 5)] {
        let expected = &data[at as usize..at as usize + len as usize];
        assert_eq!(read(&file, at, len), expected, "{len} bytes at {at}");
    }
}

#[test]
fn a_read_ends_where_the_file_ends() {
    let file = ExportFile::new(stack(false).channel(false));
    assert_eq!(read(&file, SIZE - 10, 4096).len(), 10);
    for at in [SIZE, SIZE + 1, u64::MAX] {
        assert_eq!(read(&file, at, u32::MAX).len(), 0);
    }
}

#[test]
fn a_write_past_the_end_writes_nothing() {
    let file = ExportFile::new(stack(false).channel(false));
    for at in [SIZE - 4095, SIZE, u64::MAX - 1, u64::MAX] {
        assert_eq!(file.write(at, &[1; 4096]).unwrap_err().kind, Kind::NoSpace, "at {at}");
    }
    assert_eq!(read(&file, SIZE - 4096, 4096), vec![0; 4096]);
    file.write(SIZE - 4096, &[1; 4096]).unwrap();
}

#[test]
fn a_write_that_splits_a_sector_is_refused() {
    let file = sectors(&stack(false), true);
    assert_eq!(file.write(0, &[1; 100]).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(file.write(100, &[1; 512]).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn holes_and_zeroes_read_as_zeroes() {
    let file = sectors(&stack(false), true);
    for how in [mode::PUNCH_HOLE | mode::KEEP_SIZE, mode::ZERO_RANGE, mode::ZERO_RANGE | 1] {
        file.write(0, &[0xaa; 64 << 10]).unwrap();
        file.allocate(how, 512, 8192).unwrap();
        assert_eq!(read(&file, 512, 8192), vec![0; 8192]);
        assert_eq!(read(&file, 0, 512), vec![0xaa; 512]);
        assert_eq!(read(&file, 8704, 512), vec![0xaa; 512]);
    }
}

#[test]
fn other_kinds_of_allocation_are_not_supported() {
    let file = sectors(&stack(false), true);
    for how in [0, mode::KEEP_SIZE, 0x08, 0x20, 0x40, mode::PUNCH_HOLE | mode::ZERO_RANGE, -1] {
        assert_eq!(file.allocate(how, 0, 4096).unwrap_err().errno(), libc::EOPNOTSUPP, "{how:#x}");
    }
    for (at, len) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX, u64::MAX), (0, u64::MAX)] {
        let error = file.allocate(mode::PUNCH_HOLE, at, len).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{len} bytes at {at}");
    }
}

#[test]
fn a_discard_that_would_be_written_out_is_refused() {
    let file = sectors(&stack(false), false);
    let error = file.allocate(mode::PUNCH_HOLE | mode::KEEP_SIZE, 0, 4096).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    file.allocate(mode::ZERO_RANGE, 0, 4096).unwrap();
}

#[test]
fn a_flush_reaches_the_device_and_a_reader_needs_none() {
    let log = Arc::new(TraceLog::new(16));
    let traced = stack(false).layer(|next| Arc::new(Trace::new(next, log.clone())));
    ExportFile::new(traced.channel(false)).flush().unwrap();
    assert_eq!(log.entries().iter().map(|entry| entry.op).collect::<Vec<_>>(), ["flush"]);
    let reader = ExportFile::new(traced.channel(true));
    reader.flush().unwrap();
    assert_eq!(log.entries().len(), 1);
    assert_eq!(reader.write(0, &[0; 512]).unwrap_err().kind, Kind::ReadOnly);
    assert_eq!(reader.allocate(mode::PUNCH_HOLE, 0, 512).unwrap_err().kind, Kind::ReadOnly);
}

#[test]
fn the_last_release_wakes_who_waits() {
    let handles = Arc::<Handles>::default();
    assert!(handles.wait_unused(Duration::ZERO));
    handles.opened();
    handles.opened();
    assert!(!handles.wait_unused(Duration::ZERO));
    let waiting = handles.clone();
    let waiter = std::thread::spawn(move || waiting.wait_unused(Duration::from_secs(60)));
    handles.closed();
    assert!(!handles.wait_unused(Duration::ZERO));
    handles.closed();
    assert!(waiter.join().unwrap());
}
