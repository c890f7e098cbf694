//! A directory with one file in it, as the FUSE protocol asks for it.
//!
//! Invariants:
//! 1. There are two inodes, the directory and the file; their attributes never change, so that the
//!    kernel may remember them for as long as it likes.
//! 2. Every open of the file is direct: nothing of it stays in the kernel's page cache, where a
//!    second copy of what a file system above caches anyway would be.
//! 3. Each request is answered exactly once, with an errno where it failed.
//! 4. A read goes from the device into the buffer that the reply is sent from.
//!
//! What this does not do: create, remove, rename, truncate, change attributes, tell holes from
//! data.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use super::file::ExportFile;
use super::session::Handles;
use crate::error::{Error, Result};

/// The inode of the file; the directory has FUSE's root.
const FILE: INodeNo = INodeNo(2);
/// What never changes may be remembered.
const FOREVER: Duration = Duration::from_secs(1 << 30);
/// Direct requests of the loop device count as background: the default of 16 would hold them up.
const REQUESTS_AT_ONCE: u16 = 128;

thread_local! {
    /// What reads go into and replies are sent from; as large as the largest read so far.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The two inodes over an [`ExportFile`].
pub struct OneFile {
    file: ExportFile,
    name: OsString,
    handles: Arc<Handles>,
}

impl OneFile {
    /// A directory in which `file` has this name.
    pub fn new(file: ExportFile, name: OsString, handles: Arc<Handles>) -> Self {
        OneFile { file, name, handles }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 2, 0),
            FILE if self.file.writable() => (FileType::RegularFile, 0o600, 1, self.file.size()),
            FILE => (FileType::RegularFile, 0o400, 1, self.file.size()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: self.file.unit(),
            flags: 0,
        })
    }
}

fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

fn answer(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each is a wish: a kernel without it works, more slowly.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_background(REQUESTS_AT_ONCE);
        let most = self.file.payload_size_max();
        if let Err(nearest) = config.set_max_write(most) {
            let _ = config.set_max_write(nearest);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(found) if parent == INodeNo::ROOT && name == self.name => {
                reply.entry(&FOREVER, &found, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(found) => reply.attr(&FOREVER, &found),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Everything is as it is; only a truncation to the size that it has changes nothing.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let others = mode.is_some() || uid.is_some() || gid.is_some();
        match self.attributes(inode) {
            Some(found) if !others && size == Some(found.size) => reply.attr(&FOREVER, &found),
            _ => reply.error(Errno::EPERM),
        }
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::EISDIR);
        }
        if flags.acc_mode() != OpenAccMode::O_RDONLY && !self.file.writable() {
            return reply.error(Errno::EROFS);
        }
        self.handles.opened();
        let direct = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), direct);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.handles.closed();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| match self.file.read(offset, size, buffer) {
            Ok(range) => reply.data(buffer.get(range).unwrap_or_default()),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write(offset, data) {
            // A request is never longer than 16 MiB.
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.file.flush());
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.file.allocate(mode, offset, length));
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let (here, name) = (FileType::Directory, self.name.as_os_str());
        let entries = [
            (INodeNo::ROOT, here, OsStr::new(".")),
            (INodeNo::ROOT, here, OsStr::new("..")),
            (FILE, FileType::RegularFile, name),
        ];
        for ((inode, kind, name), next) in entries.into_iter().zip(1u64..) {
            if next > offset && reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    /// The block size is what the loop device discards in.
    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let unit = self.file.unit();
        let blocks = self.file.size() / u64::from(unit);
        reply.statfs(blocks, 0, 0, 1, 0, unit, 255, unit);
    }
}
