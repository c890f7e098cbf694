//! A block device as one regular file of a FUSE mount, for the kernel's loop device.
//!
//! The kernel's own file systems and page cache then sit on our device: a loop device with direct
//! I/O over the file sends every request of the block layer here, once, uncached.
//!
//! Reading order: [`file`] (what a request does to the device), [`filesystem`] (a directory with
//! that file in it, as FUSE asks for it), [`session`] (mount, threads, who has it open), [`sys`].

pub mod file;
pub mod filesystem;
pub mod session;
pub mod sys;
#[cfg(test)]
mod tests;

pub use file::ExportFile;
pub use session::{Options, Session};
pub use sys::allocate_without_write_back;
