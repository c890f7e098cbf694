//! On-media structures as the compiler lays them out, with every offset asserted.
//!
//! The tables stand in `src/pmemkit/formats` once more, as data with rules; a test compares them.
//! All integers are little endian on media.
//!
//! What this does not do: read or judge anything.

/// One field: name, offset and width in bytes.
pub type Field = (&'static str, usize, usize);

/// One structure: the name of its Python class, its size in bytes, its fields.
pub type Table = (&'static str, usize, &'static [Field]);

macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident: $size:literal {
        $($field:ident: $type:ty = $offset:literal,)*
    })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name {
                $(#[allow(missing_docs)] pub $field: $type,)*
            }

            const _: () = {
                assert!(std::mem::size_of::<$name>() == $size);
                $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
            };
        )*

        /// Every structure.
        pub const TABLES: &[Table] = &[
            $((
                stringify!($name),
                std::mem::size_of::<$name>(),
                &[$((
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    std::mem::size_of::<$type>(),
                ),)*],
            ),)*
        ];
    };
}

layouts! {
    /// The first bytes of a namespace index block; the bitmap of free slots follows.
    IndexHeader: 72 {
        sig: [u8; 16] = 0,
        flags: [u8; 3] = 16,
        labelsize: u8 = 19,
        seq: u32 = 20,
        myoff: u64 = 24,
        mysize: u64 = 32,
        otheroff: u64 = 40,
        labeloff: u64 = 48,
        nslot: u32 = 56,
        major: u16 = 60,
        minor: u16 = 62,
        checksum: u64 = 64,
    }
    /// A namespace label under index version 1.1.
    LabelV1: 128 {
        uuid: [u8; 16] = 0,
        name: [u8; 64] = 16,
        flags: u32 = 80,
        nlabel: u16 = 84,
        position: u16 = 86,
        isetcookie: u64 = 88,
        lbasize: u64 = 96,
        dpa: u64 = 104,
        rawsize: u64 = 112,
        slot: u32 = 120,
        unused: [u8; 4] = 124,
    }
    /// A namespace label under index version 1.2.
    LabelV2: 256 {
        uuid: [u8; 16] = 0,
        name: [u8; 64] = 16,
        flags: u32 = 80,
        nlabel: u16 = 84,
        position: u16 = 86,
        isetcookie: u64 = 88,
        lbasize: u64 = 96,
        dpa: u64 = 104,
        rawsize: u64 = 112,
        slot: u32 = 120,
        align: u8 = 124,
        reserved: [u8; 3] = 125,
        type_guid: [u8; 16] = 128,
        abstraction_guid: [u8; 16] = 144,
        reserved2: [u8; 88] = 160,
        checksum: u64 = 248,
    }
    /// The info block of a BTT arena.
    BttInfo: 4096 {
        signature: [u8; 16] = 0,
        uuid: [u8; 16] = 16,
        parent_uuid: [u8; 16] = 32,
        flags: u32 = 48,
        major: u16 = 52,
        minor: u16 = 54,
        external_lbasize: u32 = 56,
        external_nlba: u32 = 60,
        internal_lbasize: u32 = 64,
        internal_nlba: u32 = 68,
        nfree: u32 = 72,
        infosize: u32 = 76,
        nextoff: u64 = 80,
        dataoff: u64 = 88,
        mapoff: u64 = 96,
        logoff: u64 = 104,
        info2off: u64 = 112,
        padding: [u8; 3968] = 120,
        checksum: u64 = 4088,
    }
    /// One exchange in the log of a BTT lane.
    LogEntry: 16 {
        lba: u32 = 0,
        old_map: u32 = 4,
        new_map: u32 = 8,
        seq: u32 = 12,
    }
    /// The info block of mode fsdax; that of devdax differs in its signature only.
    PfnInfo: 4096 {
        signature: [u8; 16] = 0,
        uuid: [u8; 16] = 16,
        parent_uuid: [u8; 16] = 32,
        flags: u32 = 48,
        major: u16 = 52,
        minor: u16 = 54,
        dataoff: u64 = 56,
        npfns: u64 = 64,
        mode: u32 = 72,
        start_pad: u32 = 76,
        end_trunc: u32 = 80,
        align: u32 = 84,
        page_size: u32 = 88,
        page_struct_size: u16 = 92,
        padding: [u8; 3994] = 94,
        checksum: u64 = 4088,
    }
}
