//! Faults that tests plant into mappings and their redo log, to show that the exploration sees
//! them. A normal build carries the names and never acts on them.

/// One mistake that could be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Plant {
    /// None: everything as it is.
    #[default]
    None,
    /// `persist` fences and does not write back.
    PersistForgetsFlush,
    /// `persist` writes back and does not fence.
    PersistForgetsFence,
    /// `copy_persist` returns before its stores are durable.
    CopyForgetsFence,
    /// `sync` leaves the last dirty range out.
    SyncForgetsRange,
    /// `sync` writes back and does not fence.
    SyncForgetsFence,
    /// `sync` does not look at the ranges of views.
    SyncForgetsViews,
    /// A store does not save what a snapshot has not copied yet.
    StoreForgetsSnapshot,
    /// A snapshot leaves the last unit out.
    SnapshotForgetsUnit,
    /// A snapshot is called done before its copy is durable.
    SnapshotForgetsSync,
    /// Ranges are changed while the record is not durable.
    NoOrderBeforeCommit,
    /// The record stays in the cache.
    RecordStaysInCache,
    /// Ranges are changed before there is a record of it.
    HomeBeforeRecord,
    /// A record is retired while the ranges are not durable.
    NoOrderBeforeRetire,
    /// The changed ranges stay in the cache.
    HomeStaysInCache,
    /// A commit returns before the record is retired for good.
    RetiredLater,
    /// The sequence number does not move.
    SequenceStuck,
    /// The checksum leaves the data out.
    ChecksumOfHeader,
    /// Recovery takes any record with the right number.
    ChecksumIgnored,
    /// Recovery does nothing.
    NoRecovery,
    /// Recovery leaves the last range out.
    RecoveryForgetsRange,
    /// Recovery retires the record while the ranges are not durable.
    NoOrderInRecovery,
}

impl Plant {
    /// Mistakes of `persist`, `copy_persist` and `sync`.
    pub const DURABILITY: [Plant; 6] = [
        Plant::PersistForgetsFlush,
        Plant::PersistForgetsFence,
        Plant::CopyForgetsFence,
        Plant::SyncForgetsRange,
        Plant::SyncForgetsFence,
        Plant::SyncForgetsViews,
    ];

    /// Mistakes of snapshots.
    pub const SNAPSHOTS: [Plant; 3] =
        [Plant::StoreForgetsSnapshot, Plant::SnapshotForgetsUnit, Plant::SnapshotForgetsSync];

    /// Mistakes of transactions.
    pub const TRANSACTIONS: [Plant; 12] = [
        Plant::NoOrderBeforeCommit,
        Plant::RecordStaysInCache,
        Plant::HomeBeforeRecord,
        Plant::NoOrderBeforeRetire,
        Plant::HomeStaysInCache,
        Plant::RetiredLater,
        Plant::SequenceStuck,
        Plant::ChecksumOfHeader,
        Plant::ChecksumIgnored,
        Plant::NoRecovery,
        Plant::RecoveryForgetsRange,
        Plant::NoOrderInRecovery,
    ];

    /// True where this mistake is to be made: in builds for tests only.
    #[inline(always)]
    pub(super) fn is(self, plant: Plant) -> bool {
        cfg!(any(test, feature = "planted-faults")) && self == plant
    }
}
