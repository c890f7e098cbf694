//! Faults that tests plant into the cache, to show that the tests see them. A normal build carries
//! the names and never acts on them.

/// One mistake a cache could make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Plant {
    /// None: the cache as it is.
    #[default]
    None,
    /// A flush leaves one shard out.
    FlushForgetsShard,
    /// Eviction does not look whether a block is dirty.
    EvictionDropsDirty,
    /// A block that is being written back may be evicted, and is read back before it is there.
    NoClaimInWriteBack,
    /// A read that misses does not wait for one that fills the block, nor do writes.
    NoClaimInFill,
    /// Write-back takes the lines that changed meanwhile for clean.
    CleanAfterWriteBack,
    /// FUA is not passed on.
    FuaForgotten,
    /// A discard leaves the blocks in RAM, dirty as they are.
    ZeroLeavesBlocks,
    /// There is no memory but for the first chunk.
    NoMemory,
}

impl Plant {
    /// The mistakes; [`Plant::NoMemory`] is a misfortune.
    pub const MISTAKES: [Plant; 7] = [
        Plant::FlushForgetsShard,
        Plant::EvictionDropsDirty,
        Plant::NoClaimInWriteBack,
        Plant::NoClaimInFill,
        Plant::CleanAfterWriteBack,
        Plant::FuaForgotten,
        Plant::ZeroLeavesBlocks,
    ];

    /// Those that one thread and a power failure are enough to see, by the name that the
    /// environment asks for them with.
    const NAMED: [(&'static str, Plant); 3] = [
        ("cache-flush", Plant::FlushForgetsShard),
        ("cache-eviction", Plant::EvictionDropsDirty),
        ("cache-fua", Plant::FuaForgotten),
    ];

    /// What `PMEMKIT_PLANT` asks for, in a build with planted faults.
    pub fn asked_for() -> Plant {
        if !cfg!(feature = "planted-faults") {
            return Plant::None;
        }
        let asked = std::env::var("PMEMKIT_PLANT").unwrap_or_default();
        let found = Plant::NAMED.iter().find(|(name, _)| *name == asked);
        found.map_or(Plant::None, |(_, plant)| *plant)
    }
}
