//! One NBD connection in the transmission phase.
//!
//! States: receiving -> (parse, execute, gather replies)* -> sending -> receiving. `stop` and the
//! end of the stream finish what was received and end; a broken magic or a dead socket ends it now.
//!
//! Invariants:
//! 1. No request is acknowledged before the device said it is done (and durable, with FUA).
//! 2. Before the loop waits for the client, every reply it owes has been sent.
//! 3. A payload that belongs to a refused write is consumed, never taken for requests.
//! 4. Whoever sends holds `sender`; a batch leaves whole.
//! 5. The channel's capabilities and the session do not change while the connection lives.
//!
//! What this does not do: negotiate, know Python, choose what may block (the device says so).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use smallvec::SmallVec;

use super::parse::{
    Accepted, Command, Errno, Header, Session, EXTENTS_MAX, REQUEST_SIZE, SKIP_SIZE_MAX,
};
use super::pool::{Job, Pool, Work};
use super::reply::Batch;
use super::sys::{self, Io};
use super::wait::Polling;
use crate::block::{Caps, Channel, Extent, Flags, Op, Request};
use crate::error::{Error, Kind};
use crate::media::{Medium, Store};
use crate::sg::{Segment, Sg};

/// Bytes received with one call, at most.
const RECEIVE_SIZE: usize = 256 << 10;
/// Replies to a whole queue of reads should fit into the socket: a server that waits for room must
/// be woken up by the client, which costs the client more than the copy.
const SEND_BUFFER_SIZE: libc::c_int = 4 << 20;
/// A write whose missing payload is at least this long is received straight into the mapping.
const DIRECT_SIZE_MIN: usize = 16 << 10;
/// A batch with this much payload is sent before the next request is looked at.
const BATCH_PAYLOAD_MAX: usize = 512 << 10;
/// A batch with this many replies is sent: the client works on them while we go on.
const BATCH_REPLIES_MAX: usize = 32;
/// Requests to zero or discard at least this much go to the pool; shorter ones are quick anywhere.
const SLOW_RANGE_SIZE: u32 = 256 << 10;

/// What is set for one connection beside what was negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Payload goes straight to and from media where the stack offers it.
    pub map: bool,
    /// Threads for requests that may block.
    pub workers: usize,
    /// The longest time to poll before blocking, in microseconds.
    pub poll_us: u64,
}

/// Totals of one connection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServeResult {
    /// Requests, refused ones included.
    pub requests: u64,
    /// Payload bytes of successful reads.
    pub bytes_read: u64,
    /// Payload bytes of successful writes.
    pub bytes_written: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Payload bytes that went straight to or from mapped media.
    pub direct_bytes: u64,
    /// CPU nanoseconds of the connection's threads.
    pub cpu_ns: u64,
    /// Why it ended.
    pub reason: String,
}

#[derive(Default)]
struct Totals {
    requests: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
    direct_bytes: AtomicU64,
}

impl Totals {
    fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// Why the loop ended.
enum End {
    Disconnect,
    Eof,
    Stopped,
    Protocol(String),
    System(i32),
}

impl End {
    fn reason(&self) -> String {
        match self {
            End::Disconnect => "disconnect".into(),
            End::Eof => "eof".into(),
            End::Stopped => "stopped".into(),
            End::Protocol(text) => format!("protocol: {text}"),
            End::System(errno) => {
                format!("system: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// What the connection's threads share.
struct Shared {
    socket: OwnedFd,
    session: Session,
    channel: Channel,
    media: Vec<Arc<dyn Medium>>,
    /// Held while a batch is sent.
    sender: Mutex<()>,
    totals: Totals,
}

impl Shared {
    fn send(&self, batch: &mut Batch) -> Result<(), End> {
        if batch.is_empty() {
            return Ok(());
        }
        let _sending = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let mended = batch.send(self.socket.as_fd(), &self.media).map_err(End::System)?;
        Totals::add(&self.totals.errors, mended);
        Ok(())
    }

    /// The address of a mapped segment, for the kernel.
    fn address(&self, segment: &Segment) -> Result<*mut u8, Error> {
        let medium = self.media.iter().find(|medium| medium.region() == segment.region);
        match medium {
            Some(medium) => medium.address(segment),
            None => {
                let text = format!("region {} is not of this device", segment.region.0);
                Err(Error::new(Kind::NotSupported, "map", text))
            }
        }
    }

    fn refuse(&self, batch: &mut Batch, header: &Header, errno: Errno) {
        Totals::add(&self.totals.errors, 1);
        batch.done(header.cookie, self.session.structured, Err(errno));
    }

    /// Answers a request that carries no payload back.
    fn answer(&self, batch: &mut Batch, accepted: &Accepted, result: Result<(), Error>) {
        match result {
            Ok(()) => {
                if accepted.command == Command::Io(Op::Write) {
                    Totals::add(&self.totals.bytes_written, u64::from(accepted.header.len));
                }
                batch.done(accepted.header.cookie, self.session.structured, Ok(()));
            }
            Err(error) => self.refuse(batch, &accepted.header, errno_of(&error)),
        }
    }

    /// Carries a request out whose payload, if it has one, is at `payload`.
    fn execute(&self, batch: &mut Batch, accepted: &Accepted, payload: *const u8, map: bool) {
        match accepted.command {
            Command::Io(Op::Read) => self.read(batch, accepted, map),
            Command::BlockStatus { one } => self.block_status(batch, accepted, one),
            Command::Io(op) => {
                let carried = if op == Op::Write { u64::from(accepted.header.len) } else { 0 };
                let mut sg = Sg::new();
                // SAFETY: a write's payload stays in the caller's buffer until this returns, and a
                // write only reads from it.
                unsafe { sg.push_host(payload.cast_mut(), carried) };
                let result = self.channel.submit(&request_of(accepted, op, &sg));
                self.answer(batch, accepted, result);
            }
            Command::Disconnect => unreachable!("the loop ends at a disconnect"),
        }
    }

    fn read(&self, batch: &mut Batch, accepted: &Accepted, map: bool) {
        let header = &accepted.header;
        if header.len == 0 {
            return self.answer(batch, accepted, Ok(()));
        }
        let result = if map {
            self.read_mapped(batch, accepted)
        } else {
            self.read_buffered(batch, accepted)
        };
        match result {
            Ok(()) => Totals::add(&self.totals.bytes_read, u64::from(header.len)),
            Err(error) => self.refuse(batch, header, errno_of(&error)),
        }
    }

    fn read_mapped(&self, batch: &mut Batch, accepted: &Accepted) -> Result<(), Error> {
        let header = &accepted.header;
        let mut segments = Sg::new();
        let nothing = Sg::new();
        self.channel.map(&request_of(accepted, Op::Read, &nothing), &mut segments)?;
        let mut addresses: SmallVec<[*mut u8; 2]> = SmallVec::new();
        for segment in segments.segments() {
            addresses.push(self.address(segment)?);
        }
        // Nothing can be refused any more: every address is known.
        batch.read_head(header.cookie, self.session.structured, header.offset, header.len);
        for (segment, address) in segments.segments().iter().zip(addresses) {
            batch.read_mapped(address, *segment);
        }
        Totals::add(&self.totals.direct_bytes, u64::from(header.len));
        Ok(())
    }

    fn read_buffered(&self, batch: &mut Batch, accepted: &Accepted) -> Result<(), Error> {
        let header = &accepted.header;
        let mut buffer = batch.buffer(header.len as usize);
        let mut sg = Sg::new();
        // SAFETY: the buffer is ours and as long as the request until the call returns.
        unsafe { sg.push_host(buffer.as_mut_ptr(), u64::from(header.len)) };
        self.channel.submit(&request_of(accepted, Op::Read, &sg))?;
        batch.read_head(header.cookie, self.session.structured, header.offset, header.len);
        batch.read_owned(buffer);
        Ok(())
    }

    fn block_status(&self, batch: &mut Batch, accepted: &Accepted, one: bool) {
        let header = &accepted.header;
        let context = self.session.allocation_context.expect("judged: the context was selected");
        match self.channel.extents(header.offset, u64::from(header.len)) {
            Ok(extents) => {
                let pairs = status_pairs(&extents, one);
                batch.block_status(header.cookie, context, &pairs);
            }
            Err(error) => self.refuse(batch, header, errno_of(&error)),
        }
    }

    /// True when a request should not run on the thread that reads the socket.
    fn blocks(&self, accepted: &Accepted) -> bool {
        let Command::Io(op) = accepted.command else { return false };
        let quick = matches!(op, Op::Discard | Op::Zero | Op::Cache)
            && accepted.header.len < SLOW_RANGE_SIZE
            && !accepted.flags.contains(Flags::FUA);
        self.channel.blocks(op, accepted.flags) && !quick
    }
}

/// The device request of an accepted wire request.
fn request_of<'a>(accepted: &Accepted, op: Op, sg: &'a Sg) -> Request<'a> {
    let header = &accepted.header;
    Request { op, at: header.offset, len: u64::from(header.len), flags: accepted.flags, sg }
}

/// The error number for the wire; anything without a place there is an I/O error.
fn errno_of(error: &Error) -> Errno {
    match error.kind {
        Kind::Invalid | Kind::OutOfRange => Errno::Inval,
        Kind::NotSupported => Errno::NotSup,
        Kind::ReadOnly => Errno::Perm,
        Kind::Latched if error.op == Op::Flush.name() => Errno::Io,
        Kind::Latched => Errno::Perm,
        Kind::NoSpace => Errno::NoSpc,
        Kind::Closed => Errno::Shutdown,
        Kind::Media | Kind::Truncated | Kind::Corrupt => Errno::Io,
        Kind::Busy | Kind::Protocol | Kind::System => Errno::Io,
    }
}

/// Extents as the wire has them: `base:allocation` flags, hole and zero together.
fn status_pairs(extents: &[Extent], one: bool) -> Vec<(u32, u32)> {
    const HOLE_AND_ZERO: u32 = 0b11;
    let most = if one { 1 } else { EXTENTS_MAX };
    let flags = |extent: &Extent| if extent.hole { HOLE_AND_ZERO } else { 0 };
    // A request is at most 2^32 - 1 bytes long, and so is each of its extents.
    let len = |extent: &Extent| u32::try_from(extent.len).expect("longer than the request");
    extents.iter().take(most).map(|extent| (len(extent), flags(extent))).collect()
}

/// One connection, ready to serve.
pub struct Connection {
    shared: Arc<Shared>,
    options: Options,
    leftover: Mutex<Option<Vec<u8>>>,
    stopping: AtomicBool,
}

impl Connection {
    /// A connection on `socket`; `leftover` is what the client sent right behind the handshake.
    pub fn new(
        socket: OwnedFd,
        channel: Channel,
        session: Session,
        leftover: Vec<u8>,
        options: Options,
    ) -> Result<Self, Error> {
        sys::set_blocking(socket.as_fd()).map_err(|cause| {
            let errno = cause.raw_os_error().unwrap_or(libc::EIO);
            Error::from_errno("serve", errno, "making the socket block")
        })?;
        sys::widen_send_buffer(socket.as_fd(), SEND_BUFFER_SIZE);
        let media = channel.media();
        let sender = Mutex::new(());
        let totals = Totals::default();
        let shared = Arc::new(Shared { socket, session, channel, media, sender, totals });
        let leftover = Mutex::new(Some(leftover));
        Ok(Connection { shared, options, leftover, stopping: AtomicBool::new(false) })
    }

    /// Asks [`Connection::serve`] to finish what was received, answer it and return.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        sys::shutdown(self.shared.socket.as_fd(), false);
    }

    /// Cuts the connection.
    pub fn abort(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        sys::shutdown(self.shared.socket.as_fd(), true);
    }

    /// Serves until the connection ends; once.
    pub fn serve(&self) -> Result<ServeResult, Error> {
        let mut leftover = self.leftover.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(received) = leftover.take() else {
            return Err(Error::new(Kind::Closed, "serve", "this connection was served already"));
        };
        drop(leftover);
        let cpu_start = sys::thread_cpu_ns();
        let mut reader = Reader::new(self, received);
        let end = reader.run();
        let sent = self.shared.send(&mut reader.batch);
        let pool_cpu = reader.pool.close();
        sys::shutdown(self.shared.socket.as_fd(), true);
        let end = match sent {
            Err(failed) if !matches!(end, End::System(_)) => failed,
            _ => end,
        };
        let totals = &self.shared.totals;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(ServeResult {
            requests: get(&totals.requests),
            bytes_read: get(&totals.bytes_read),
            bytes_written: get(&totals.bytes_written),
            errors: get(&totals.errors),
            direct_bytes: get(&totals.direct_bytes),
            cpu_ns: sys::thread_cpu_ns() - cpu_start + pool_cpu,
            reason: end.reason(),
        })
    }
}

/// The thread that reads the socket.
struct Reader<'a> {
    connection: &'a Connection,
    shared: &'a Arc<Shared>,
    /// Received bytes are `buffer[start..end]`; requests are parsed from its front.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    batch: Batch,
    pool: Pool,
    polling: Polling,
    /// Writes, and other requests, since the last look at the socket.
    writes: u32,
    others: u32,
    /// Payload of a long write to a stack that does not offer `map`.
    scratch: Vec<u8>,
    /// Reads may be answered straight from media.
    map: bool,
    /// Writes may be received straight into media.
    map_write: bool,
}

impl<'a> Reader<'a> {
    fn new(connection: &'a Connection, received: Vec<u8>) -> Self {
        let shared = &connection.shared;
        let end = received.len();
        let mut buffer = received;
        buffer.resize(RECEIVE_SIZE.max(end), 0);
        let offers = |cap| connection.options.map && shared.channel.info().caps.contains(cap);
        let (map, map_write) = (offers(Caps::MAP), offers(Caps::MAP_WRITE));
        let worker = shared.clone();
        let work: Work = Arc::new(move |job: Job| {
            let mut batch = Batch::default();
            worker.execute(&mut batch, &job.accepted, job.payload.as_ptr(), false);
            if worker.send(&mut batch).is_err() {
                // The reader finds the dead socket by itself; wake it.
                sys::shutdown(worker.socket.as_fd(), true);
            }
        });
        Reader {
            connection,
            shared,
            buffer,
            start: 0,
            end,
            batch: Batch::default(),
            pool: Pool::new(connection.options.workers, work),
            polling: Polling::new(connection.options.poll_us * 1000),
            writes: 0,
            others: 0,
            scratch: Vec::new(),
            map,
            map_write,
        }
    }

    fn run(&mut self) -> End {
        loop {
            let end = self.step();
            if let Err(end) = end {
                return end;
            }
        }
    }

    /// Handles the next request, receiving as needed.
    fn step(&mut self) -> Result<(), End> {
        if self.end - self.start < REQUEST_SIZE {
            self.receive(REQUEST_SIZE, true)?;
        }
        let mut bytes = [0u8; REQUEST_SIZE];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + REQUEST_SIZE]);
        let Some(header) = Header::parse(&bytes) else {
            let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            return Err(End::Protocol(format!("request magic {magic:#010x}")));
        };
        self.start += REQUEST_SIZE;
        Totals::add(&self.shared.totals.requests, 1);
        match header.payload_len() {
            0 => self.others += 1,
            _ => self.writes += 1,
        }
        match self.shared.session.judge(&header) {
            Ok(Accepted { command: Command::Disconnect, .. }) => return Err(End::Disconnect),
            Ok(accepted) => self.dispatch(&accepted)?,
            Err(errno) => {
                self.skip(header.payload_len())?;
                self.shared.refuse(&mut self.batch, &header, errno);
            }
        }
        let full = self.batch.is_full()
            || self.batch.payload() >= BATCH_PAYLOAD_MAX
            || self.batch.replies() >= BATCH_REPLIES_MAX;
        if full {
            self.shared.send(&mut self.batch)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, accepted: &Accepted) -> Result<(), End> {
        let payload = accepted.header.payload_len() as usize;
        if self.pool.is_enabled() && self.shared.blocks(accepted) {
            let mut copy = vec![0u8; payload];
            self.take(&mut copy)?;
            // A slow request must not hold back the replies of those before it.
            self.shared.send(&mut self.batch)?;
            let job = Job { accepted: *accepted, payload: copy };
            return self
                .pool
                .submit(job)
                .map_err(|cause| End::System(cause.raw_os_error().unwrap_or(libc::EAGAIN)));
        }
        let missing = payload.saturating_sub(self.end - self.start);
        if missing == 0 || (missing < DIRECT_SIZE_MIN && payload <= RECEIVE_SIZE / 2) {
            if missing > 0 {
                self.receive(payload, false)?;
            }
            let data = self.buffer[self.start..].as_ptr();
            self.shared.execute(&mut self.batch, accepted, data, self.map);
            self.start += payload;
            return Ok(());
        }
        if self.map_write {
            return self.write_direct(accepted);
        }
        let mut copy = std::mem::take(&mut self.scratch);
        copy.resize(payload, 0);
        self.take(&mut copy)?;
        self.shared.execute(&mut self.batch, accepted, copy.as_ptr(), false);
        self.scratch = copy;
        Ok(())
    }

    /// Receives a write's payload into its place on media.
    fn write_direct(&mut self, accepted: &Accepted) -> Result<(), End> {
        let nothing = Sg::new();
        let request = request_of(accepted, Op::Write, &nothing);
        let mut segments = Sg::new();
        let mut result = self.shared.channel.map(&request, &mut segments);
        if result.is_err() {
            self.skip(accepted.header.len)?;
        } else {
            let list: Vec<Segment> = segments.segments().to_vec();
            for segment in &list {
                let stored = self.fill(segment)?;
                result = result.and(stored);
            }
            result = result.and_then(|()| self.shared.channel.commit(&request));
            if result.is_ok() {
                Totals::add(&self.shared.totals.direct_bytes, request.len);
            }
        }
        self.shared.answer(&mut self.batch, accepted, result);
        Ok(())
    }

    /// Fills one segment: from what was received already, then from the socket.
    fn fill(&mut self, segment: &Segment) -> Result<Result<(), Error>, End> {
        let buffered = (self.end - self.start).min(segment.len as usize);
        let mut result = self.fill_buffered(segment, buffered);
        self.start += buffered;
        let mut done = buffered as u64;
        if done < segment.len {
            self.shared.send(&mut self.batch)?;
        }
        while done < segment.len {
            let left = segment.len - done;
            let rest = Segment::new(segment.region, segment.at() + done, left);
            let address = match self.shared.address(&rest) {
                Ok(address) if result.is_ok() => address,
                other => {
                    result = result.and(other.map(|_| ()));
                    self.skip(u32::try_from(left).expect("part of a request"))?;
                    return Ok(result);
                }
            };
            match self.receive_some(address, left as usize)? {
                Some(moved) => done += moved as u64,
                None => {
                    let text = "the mapping went away while data was received";
                    result = Err(Error::new(Kind::Truncated, "write", text).at(rest.at()));
                }
            }
        }
        Ok(result)
    }

    fn fill_buffered(&self, segment: &Segment, len: usize) -> Result<(), Error> {
        let region = |medium: &&Arc<dyn Medium>| medium.region() == segment.region;
        let medium = self.shared.media.iter().find(region);
        let medium = medium.ok_or_else(|| Error::new(Kind::NotSupported, "map", "no medium"))?;
        let source = self.buffer[self.start..self.start + len].as_ptr();
        // SAFETY: `source` is valid for `len` bytes: the slice above was checked.
        unsafe { medium.store(segment.at(), source, len as u64, Store::Cached) }
    }

    /// Receives at least one byte to `address`, waiting; `None` when the memory is not there.
    fn receive_some(&mut self, address: *mut u8, len: usize) -> Result<Option<usize>, End> {
        let mut parts = [libc::iovec { iov_base: address.cast(), iov_len: len }];
        match self.wait_for(&mut parts)? {
            Io::Moved(moved) => Ok(Some(moved)),
            _ => Ok(None),
        }
    }

    /// Drops `len` payload bytes of a refused write.
    fn skip(&mut self, len: u32) -> Result<(), End> {
        if len > SKIP_SIZE_MAX {
            return Err(End::Protocol(format!("a refused write of {len} bytes")));
        }
        let mut left = len as usize;
        loop {
            let buffered = (self.end - self.start).min(left);
            self.start += buffered;
            left -= buffered;
            if left == 0 {
                return Ok(());
            }
            self.receive(1, false)?;
        }
    }

    /// Copies the next `target.len()` bytes of the stream out.
    fn take(&mut self, target: &mut [u8]) -> Result<(), End> {
        let buffered = (self.end - self.start).min(target.len());
        target[..buffered].copy_from_slice(&self.buffer[self.start..self.start + buffered]);
        self.start += buffered;
        let mut done = buffered;
        if done < target.len() {
            self.shared.send(&mut self.batch)?;
        }
        while done < target.len() {
            let rest = &mut target[done..];
            match self.receive_some(rest.as_mut_ptr(), rest.len())? {
                Some(moved) => done += moved,
                None => return Err(End::System(libc::EFAULT)),
            }
        }
        Ok(())
    }

    /// Receives until `wanted` bytes are in the buffer. `between` says that no request is
    /// half-received, so that the stream may end here.
    fn receive(&mut self, wanted: usize, between: bool) -> Result<(), End> {
        self.shared.send(&mut self.batch)?;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buffer.len() - self.start < wanted.max(RECEIVE_SIZE / 2) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
        while self.end - self.start < wanted {
            let room = &mut self.buffer[self.end..];
            let mut parts =
                [libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() }];
            match self.wait_for(&mut parts) {
                Ok(Io::Moved(moved)) => self.end += moved,
                Ok(_) => return Err(End::System(libc::EFAULT)),
                Err(End::Eof) if !between || self.end > self.start => {
                    let cut = self.end - self.start;
                    return Err(self.stopped_or(End::Protocol(format!(
                        "the stream ended {cut} bytes into a request"
                    ))));
                }
                Err(end) => return Err(end),
            }
        }
        Ok(())
    }

    /// One receive: polls for a while if that pays, then blocks.
    fn wait_for(&mut self, parts: &mut [libc::iovec]) -> Result<Io, End> {
        let start = self.gather();
        let budget = self.polling.budget_ns();
        let mut polled = false;
        loop {
            match self.receive_once(parts, false)? {
                Io::WouldBlock if self.stopping() => return Err(End::Stopped),
                Io::WouldBlock if sys::now_ns() - start >= budget => break,
                Io::WouldBlock => {
                    polled = true;
                    sys::pause_between_polls();
                }
                io => {
                    if polled {
                        self.polling.hit();
                    }
                    return Ok(io);
                }
            }
        }
        let io = self.receive_once(parts, true)?;
        self.polling.blocked(sys::now_ns() - start);
        Ok(io)
    }

    /// Leaves the socket alone while the client fills it; returns the time afterwards.
    fn gather(&mut self) -> u64 {
        let mut now = sys::now_ns();
        let until = now + self.polling.gather_ns(self.writes, self.others);
        (self.writes, self.others) = (0, 0);
        while now < until {
            sys::pause_between_polls();
            now = sys::now_ns();
        }
        now
    }

    fn receive_once(&self, parts: &mut [libc::iovec], wait: bool) -> Result<Io, End> {
        // SAFETY: the ranges are parts of our buffers, or of a mapping.
        match unsafe { sys::receive(self.shared.socket.as_fd(), parts, wait) } {
            Io::Moved(0) => Err(self.stopped_or(End::Eof)),
            Io::Failed(errno) => Err(self.stopped_or(End::System(errno))),
            io => Ok(io),
        }
    }

    fn stopping(&self) -> bool {
        self.connection.stopping.load(Ordering::SeqCst)
    }

    fn stopped_or(&self, end: End) -> End {
        if self.stopping() {
            End::Stopped
        } else {
            end
        }
    }
}
