//! The extension module `pmemkit._native`: glue between the core and Python, no logic.
//!
//! One submodule an engine; the documentation of each stands in the stub of the same name.

mod bench;
mod block;
mod btt;
mod buffer;
mod cache;
mod dax;
mod direct;
mod error;
mod fault;
mod formats;
mod frames;
mod fuse;
mod media;
mod memory;
mod nbd;
mod numpy;
mod reader;
mod recording;
mod remote;
mod sg;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::bench::bench;
    #[pymodule_export]
    use crate::block::block;
    #[pymodule_export]
    use crate::btt::btt;
    #[pymodule_export]
    use crate::dax::dax;
    #[pymodule_export]
    use crate::direct::direct;
    #[pymodule_export]
    use crate::fault::fault;
    #[pymodule_export]
    use crate::formats::formats;
    #[pymodule_export]
    use crate::frames::frames;
    #[pymodule_export]
    use crate::fuse::fuse;
    #[pymodule_export]
    use crate::media::media;
    #[pymodule_export]
    use crate::memory::memory;
    #[pymodule_export]
    use crate::nbd::nbd;
    #[pymodule_export]
    use crate::remote::remote;
    #[pymodule_export]
    use crate::sg::sg;

    #[pymodule_export]
    const BUILD_PROFILE: &str = if cfg!(debug_assertions) { "debug" } else { "release" };
    #[pymodule_export]
    const PLANTED_FAULTS: bool = cfg!(feature = "planted-faults");
    #[pymodule_export]
    const NO_PAGE_MAP: bool = cfg!(feature = "no-page-map");

    #[pyfunction]
    fn version() -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    #[pyfunction]
    fn error_kinds() -> Vec<(&'static str, i32)> {
        crate::error::kinds()
    }

    #[pyfunction]
    fn constants() -> std::collections::BTreeMap<&'static str, u64> {
        crate::constants()
    }

    #[pyfunction]
    fn nothing() {}
}

/// Constants that both sides know.
fn constants() -> std::collections::BTreeMap<&'static str, u64> {
    use pmemkit_core::nbd::parse;
    std::collections::BTreeMap::from([
        ("FRAME_SIZE", pmemkit_core::sg::FRAME_SIZE),
        ("NBD_REQUEST_MAGIC", u64::from(parse::REQUEST_MAGIC)),
        ("NBD_SIMPLE_REPLY_MAGIC", u64::from(parse::SIMPLE_REPLY_MAGIC)),
        ("NBD_STRUCTURED_REPLY_MAGIC", u64::from(parse::STRUCTURED_REPLY_MAGIC)),
        ("NBD_FLAG_READ_ONLY", u64::from(parse::tx::READ_ONLY)),
        ("NBD_FLAG_SEND_FLUSH", u64::from(parse::tx::SEND_FLUSH)),
        ("NBD_FLAG_SEND_FUA", u64::from(parse::tx::SEND_FUA)),
        ("NBD_FLAG_SEND_TRIM", u64::from(parse::tx::SEND_TRIM)),
        ("NBD_FLAG_SEND_WRITE_ZEROES", u64::from(parse::tx::SEND_WRITE_ZEROES)),
        ("NBD_FLAG_SEND_DF", u64::from(parse::tx::SEND_DF)),
        ("NBD_FLAG_SEND_CACHE", u64::from(parse::tx::SEND_CACHE)),
        ("NBD_FLAG_SEND_FAST_ZERO", u64::from(parse::tx::SEND_FAST_ZERO)),
        ("PAYLOAD_SIZE_MAX", u64::from(pmemkit_core::block::PAYLOAD_SIZE_MAX)),
    ])
}
