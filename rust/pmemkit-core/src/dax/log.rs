//! The redo log: several ranges of a mapping change all or not at all, whatever fails when.
//!
//! An area of the mapping, which the caller sets aside, holds one record at a time:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic; stored last when the area is laid out, so that half of a layout is none |
//! | 8 | 8 | version |
//! | 16 | 8 | bytes of the area |
//! | 24 | 8 | a random number, so that records of an earlier layout do not count |
//! | 32 | 24 | zero |
//! | 56 | 8 | CRC-64/XZ of the 48 bytes from 8 on |
//! | 64 | 8 | sequence number of the last record that was carried out |
//! | 72 | 56 | zero |
//! | 128 | 64 | record: sequence number, random number, ranges, data bytes, 24 zero bytes, CRC |
//! | 192 | | offset and length of each range, 16 bytes; then their data, one after the other |
//!
//! A commit has three steps, each durable before the next: the record is stored; the ranges are;
//! the word at 64 says so. The CRC covers the record with its own eight bytes as zero.
//!
//! Invariants:
//! 1. A record counts when its number is the one that follows the word at 64, the random number is
//!    the area's, and the CRC is right. All of it was durable before a range was touched.
//! 2. While the word at 64 is behind, the ranges hold any mix of old and new, and the record has
//!    all of the new: recovery stores them again. When it is not, the ranges are durable and the
//!    record counts no more, so that later stores to them, with or without a transaction, stay.
//! 3. Ranges lie in the mapping and outside the area; of ranges that overlap the last one wins.
//! 4. After a commit that failed nothing more is committed until the log is opened again: recovery
//!    decides what became of it.
//!
//! What this does not do: keep readers from seeing the second step half done, undo.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use super::crc64;
use super::mapping::Mapping;
use super::plant::Plant;
use crate::error::{Error, Kind, Result};
use crate::media::Store;

const MAGIC: u64 = u64::from_le_bytes(*b"pmkitRL1");
const VERSION: u64 = 1;
const HEADER_SIZE: usize = 64;
const APPLIED_AT: u64 = 64;
const RECORD_AT: u64 = 128;
const RECORD_HEADER_SIZE: usize = 64;
const RANGE_SIZE: usize = 16;
/// Where the CRC stands in a header and in the header of a record.
const CRC_AT: usize = 56;

/// Bytes of an area at least.
pub const LOG_SIZE_LEAST: u64 = 256;

/// How a log is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogOptions {
    /// Lay the area out anew, whatever is in it.
    pub create: bool,
    /// The random number of a new area, for tests.
    pub id: Option<u64>,
    /// For tests.
    pub plant: Plant,
}

struct State {
    /// The number of the last record.
    sequence: u64,
    /// Why nothing more is committed.
    latched: Option<String>,
}

/// A redo log in an area of a mapping.
pub struct Log {
    mapping: Arc<Mapping>,
    at: u64,
    len: u64,
    id: u64,
    recovered: u64,
    state: Mutex<State>,
    plant: Plant,
}

/// A range and what it is to hold.
pub type Change<'a> = (u64, &'a [u8]);

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn put_word(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn read(mapping: &Mapping, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    // SAFETY: the vector has `len` bytes.
    unsafe { mapping.load(at, bytes.as_mut_ptr(), len)? };
    Ok(bytes)
}

fn corrupt(at: u64, text: String) -> Error {
    Error::new(Kind::Corrupt, "log", text).at(at)
}

impl Log {
    /// Opens the log in an area of a mapping, and carries out what a crash left undone. An area
    /// whose first word is zero is laid out; anything else that is no log is [`Kind::Corrupt`].
    pub fn open(mapping: Arc<Mapping>, at: u64, len: u64, options: LogOptions) -> Result<Log> {
        let fits = at.checked_add(len).is_some_and(|end| end <= mapping.len());
        if !fits || !at.is_multiple_of(64) || !len.is_multiple_of(64) || len < LOG_SIZE_LEAST {
            let text = format!(
                "a log has whole lines of 64 bytes, {LOG_SIZE_LEAST} bytes at least, inside the \
                 {} bytes of its mapping: not {len} at {at}",
                mapping.len()
            );
            return Err(Error::new(Kind::Invalid, "log", text));
        }
        let blank = mapping.load_word(at)? == 0;
        let id = if blank || options.create {
            lay_out(&mapping, at, len, options.id)?
        } else {
            check_header(&mapping, at, len)?
        };
        let state = Mutex::new(State { sequence: 0, latched: None });
        let mut log = Log { mapping, at, len, id, recovered: 0, state, plant: options.plant };
        log.recovered = log.recover()?;
        Ok(log)
    }

    /// How many ranges were stored again when it was opened.
    pub fn recovered(&self) -> u64 {
        self.recovered
    }

    /// Bytes that the changes of one transaction may have, 16 of them a range.
    pub fn capacity(&self) -> u64 {
        self.len - RECORD_AT - RECORD_HEADER_SIZE as u64
    }

    /// Changes ranges, all or none of them, and returns when that is durable.
    pub fn commit(&self, changes: &[Change<'_>]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        changes.iter().try_for_each(|(at, data)| self.check_range(*at, data.len() as u64))?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &state.latched {
            let text = format!("until the log is opened again, after: {reason}");
            return Err(Error::new(Kind::Latched, "commit", text));
        }
        let sequence = state.sequence + u64::from(!self.plant.is(Plant::SequenceStuck));
        let record = self.record(sequence, changes)?;
        let done = self.carry_out(sequence, &record, changes);
        match &done {
            Ok(()) => state.sequence = sequence,
            Err(error) => state.latched = Some(error.to_string()),
        }
        done
    }

    /// Refuses ranges that recovery could not or must not store to.
    fn check_range(&self, at: u64, len: u64) -> Result<()> {
        let end = at.checked_add(len).filter(|end| *end <= self.mapping.len());
        let Some(end) = end else {
            let text =
                format!("{len} bytes at {at} end behind the {} there are", self.mapping.len());
            return Err(Error::new(Kind::OutOfRange, "commit", text).at(at));
        };
        if at < self.at + self.len && end > self.at && len > 0 {
            let text = format!("{len} bytes at {at} are in the log itself, at {}", self.at);
            return Err(Error::new(Kind::Invalid, "commit", text).at(at));
        }
        Ok(())
    }

    fn record(&self, sequence: u64, changes: &[Change<'_>]) -> Result<Vec<u8>> {
        let data: usize = changes.iter().map(|(_, data)| data.len()).sum();
        let needed = data + changes.len() * RANGE_SIZE;
        if needed as u64 > self.capacity() {
            let text = format!("a transaction of {needed} bytes, in a log for {}", self.capacity());
            return Err(Error::new(Kind::NoSpace, "commit", text));
        }
        let mut record = vec![0; RECORD_HEADER_SIZE];
        record.reserve_exact(needed);
        for (at, data) in changes {
            record.extend_from_slice(&at.to_le_bytes());
            record.extend_from_slice(&(data.len() as u64).to_le_bytes());
        }
        changes.iter().for_each(|(_, data)| record.extend_from_slice(data));
        for (place, value) in
            [sequence, self.id, changes.len() as u64, data as u64].iter().enumerate()
        {
            put_word(&mut record, place * 8, *value);
        }
        let crc = self.checksum(&record);
        put_word(&mut record, CRC_AT, crc);
        Ok(record)
    }

    /// Of a record, with zero where the checksum stands.
    fn checksum(&self, record: &[u8]) -> u64 {
        let (header, body) = record.split_at(RECORD_HEADER_SIZE);
        let state = crc64::update(crc64::START, &header[..CRC_AT]);
        let state = crc64::update(state, &[0; 8]);
        if self.plant.is(Plant::ChecksumOfHeader) {
            let ranges = word(header, 16) as usize * RANGE_SIZE;
            return crc64::finish(crc64::update(state, &body[..ranges]));
        }
        crc64::finish(crc64::update(state, body))
    }

    /// The three steps.
    fn carry_out(&self, sequence: u64, record: &[u8], changes: &[Change<'_>]) -> Result<()> {
        let place = (self.at + RECORD_AT, record.len() as u64);
        let cached = |lies: bool| if lies { Store::Cached } else { Store::Auto };
        let homes = || changes.iter().map(|(at, data)| (*at, data.len() as u64));
        let how = cached(self.plant.is(Plant::HomeStaysInCache));
        let store_homes =
            || changes.iter().try_for_each(|(at, data)| self.mapping.stage(*at, data, how));
        let early = self.plant.is(Plant::HomeBeforeRecord);
        if early {
            store_homes()?;
            self.mapping.settle_ranges(homes())?;
        }
        let how = cached(self.plant.is(Plant::RecordStaysInCache));
        self.mapping.stage(place.0, record, how)?;
        if !self.plant.is(Plant::NoOrderBeforeCommit) {
            self.mapping.settle_ranges([place].into_iter())?;
        }
        if !early {
            store_homes()?;
        }
        if !self.plant.is(Plant::NoOrderBeforeRetire) {
            self.mapping.settle_ranges(homes())?;
        }
        self.retire(sequence, !self.plant.is(Plant::RetiredLater))
    }

    /// Says that a record was carried out.
    fn retire(&self, sequence: u64, wait: bool) -> Result<()> {
        let at = self.at + APPLIED_AT;
        self.mapping.stage_word(at, sequence)?;
        if wait {
            self.mapping.settle_ranges([(at, 8)].into_iter())?;
        }
        Ok(())
    }

    /// Carries out the record that a crash left, if it counts; how many ranges it had.
    fn recover(&self) -> Result<u64> {
        let applied = self.mapping.load_word(self.at + APPLIED_AT)?;
        let sequence = applied + u64::from(!self.plant.is(Plant::SequenceStuck));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sequence = applied;
        if self.plant.is(Plant::NoRecovery) {
            return Ok(0);
        }
        let Some(record) = self.pending(sequence)? else { return Ok(0) };
        let changes = self.changes_of(&record)?;
        let forgets = usize::from(self.plant.is(Plant::RecoveryForgetsRange));
        let changes = &changes[..changes.len() - forgets];
        for (at, data) in changes {
            self.mapping.stage(*at, data, Store::Auto)?;
        }
        if !self.plant.is(Plant::NoOrderInRecovery) {
            let homes = changes.iter().map(|(at, data)| (*at, data.len() as u64));
            self.mapping.settle_ranges(homes)?;
        }
        self.retire(sequence, true)?;
        state.sequence = sequence;
        Ok(changes.len() as u64)
    }

    /// The record with this number, if it is there and whole.
    fn pending(&self, sequence: u64) -> Result<Option<Vec<u8>>> {
        let at = self.at + RECORD_AT;
        let header = read(&self.mapping, at, RECORD_HEADER_SIZE as u64)?;
        let [found, id, count, data] = [0, 8, 16, 24].map(|place| word(&header, place));
        let body = count.checked_mul(RANGE_SIZE as u64).and_then(|bytes| bytes.checked_add(data));
        let Some(body) = body.filter(|bytes| *bytes <= self.capacity()) else { return Ok(None) };
        if (found, id) != (sequence, self.id) || count == 0 {
            return Ok(None);
        }
        let record = read(&self.mapping, at, RECORD_HEADER_SIZE as u64 + body)?;
        let right = self.checksum(&record) == word(&record, CRC_AT);
        Ok((right || self.plant.is(Plant::ChecksumIgnored)).then_some(record))
    }

    /// What a record says. Its checksum was right, so what cannot be was written by somebody else.
    fn changes_of<'a>(&self, record: &'a [u8]) -> Result<Vec<Change<'a>>> {
        let count = word(record, 16) as usize;
        let (ranges, mut data) = record[RECORD_HEADER_SIZE..].split_at(count * RANGE_SIZE);
        let mut changes = Vec::with_capacity(count);
        for range in ranges.chunks_exact(RANGE_SIZE) {
            let (at, len) = (word(range, 0), word(range, 8));
            let own = usize::try_from(len).ok().and_then(|len| data.split_at_checked(len));
            let Some((own, rest)) = own else {
                let text =
                    format!("a range of {len} bytes, of which the record has {}", data.len());
                return Err(corrupt(self.at + RECORD_AT, text));
            };
            self.check_range(at, len).map_err(|cause| {
                corrupt(self.at + RECORD_AT, format!("a record to carry out: {}", cause.detail))
            })?;
            changes.push((at, own));
            data = rest;
        }
        Ok(changes)
    }
}

/// Lays an area out and gives its number. The old magic goes first, the new one comes last.
fn lay_out(mapping: &Mapping, at: u64, len: u64, id: Option<u64>) -> Result<u64> {
    let id = id.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    mapping.stage_word(at, 0)?;
    mapping.settle_ranges([(at, 8)].into_iter())?;
    let mut area = vec![0; HEADER_SIZE + APPLIED_AT as usize + RECORD_HEADER_SIZE];
    for (place, value) in [0, VERSION, len, id].iter().enumerate() {
        put_word(&mut area, place * 8, *value);
    }
    let crc = crc64::checksum(&area[8..CRC_AT]);
    put_word(&mut area, CRC_AT, crc);
    mapping.stage(at, &area, Store::Auto)?;
    mapping.settle_ranges([(at, area.len() as u64)].into_iter())?;
    mapping.stage_word(at, MAGIC)?;
    mapping.settle_ranges([(at, 8)].into_iter())?;
    Ok(id)
}

/// The number of an area that was laid out.
fn check_header(mapping: &Mapping, at: u64, len: u64) -> Result<u64> {
    let header = read(mapping, at, HEADER_SIZE as u64)?;
    let [magic, version, size, id] = [0, 8, 16, 24].map(|place| word(&header, place));
    if magic != MAGIC {
        return Err(corrupt(at, format!("the first word is {magic:#x} and not that of a log")));
    }
    let crc = crc64::checksum(&header[8..CRC_AT]);
    if crc != word(&header, CRC_AT) {
        let text = format!("the header's checksum is {:#x}, not {crc:#x}", word(&header, CRC_AT));
        return Err(corrupt(at, text));
    }
    if version != VERSION {
        return Err(corrupt(at, format!("a log of version {version}, not {VERSION}")));
    }
    if size != len {
        return Err(corrupt(at, format!("the log there has {size} bytes, not {len}")));
    }
    Ok(id)
}
