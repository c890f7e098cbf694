//! Faults that tests plant into the engine, to show that the checker sees them. A normal build
//! carries the names and never acts on them.
//!
//! Invariants:
//! 1. [`Plant::ALL`] has every fault, so that a test which goes through it leaves none out.
//!
//! What this does not do: act; the places that do ask [`super::engine::Arena`].

/// One mistake an engine could make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Plant {
    /// None: the engine as it is.
    #[default]
    None,
    /// Data are stored and not written back.
    DataStaysInCache,
    /// The log entry commits before what it speaks of is on media.
    NoOrderBeforeCommit,
    /// The map changes, and the write is acknowledged, before the commit is on media.
    NoOrderAfterCommit,
    /// The log entry is not written back.
    LogStaysInCache,
    /// The map entry is not written back.
    MapStaysInCache,
    /// The map changes before the log says so.
    MapBeforeLog,
    /// The word with the sequence number is stored first.
    SequenceFirst,
    /// The entry goes over the newest one.
    WrongPlace,
    /// The sequence number does not move.
    SequenceStuck,
    /// A lane goes on with the block that it has just given away.
    LaneKeepsItsBlock,
    /// Map entries that another thread stored are taken for durable.
    UnfencedForgotten,
    /// A zeroed sector loses its block.
    ZeroForgetsBlock,
    /// A zeroed sector is acknowledged before the map is on media.
    NoOrderAfterZero,
    /// The log does not say that the block it freed has bad media.
    ErrorForgotten,
    /// Recovery does nothing.
    NoRecovery,
    /// Recovery leaves one lane out.
    RecoverySkipsLastLane,
    /// Recovery does not wait until the map is on media.
    NoOrderAfterRecovery,
    /// Readers do not say what they read.
    NoReadTracking,
    /// A reader does not look at the map again.
    NoSecondLook,
    /// A relocation changes the map before the log says so.
    RelocationMapFirst,
    /// A relocation copies half of the sector.
    RelocationCutsShort,
    /// A relocation does not zero the new block of a sector that reads as zeroes.
    RelocationSkipsZeroes,
    /// A relocation reads the sector before it has the lock of its entry.
    RelocationReadsUnlocked,
    /// A relocation stores into a block that is being read.
    RelocationIgnoresReaders,
}

impl Plant {
    /// Every fault.
    pub const ALL: [Plant; 24] = [
        Plant::DataStaysInCache,
        Plant::NoOrderBeforeCommit,
        Plant::NoOrderAfterCommit,
        Plant::LogStaysInCache,
        Plant::MapStaysInCache,
        Plant::MapBeforeLog,
        Plant::SequenceFirst,
        Plant::WrongPlace,
        Plant::SequenceStuck,
        Plant::LaneKeepsItsBlock,
        Plant::UnfencedForgotten,
        Plant::ZeroForgetsBlock,
        Plant::NoOrderAfterZero,
        Plant::ErrorForgotten,
        Plant::NoRecovery,
        Plant::RecoverySkipsLastLane,
        Plant::NoOrderAfterRecovery,
        Plant::NoReadTracking,
        Plant::NoSecondLook,
        Plant::RelocationMapFirst,
        Plant::RelocationCutsShort,
        Plant::RelocationSkipsZeroes,
        Plant::RelocationReadsUnlocked,
        Plant::RelocationIgnoresReaders,
    ];
}
