//! NBD transmission.
