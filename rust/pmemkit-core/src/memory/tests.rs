//! Pools over memfds: what is handed out, moved and taken back.
