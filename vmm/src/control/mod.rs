//! Talking to a running guest's VMM: its run directory ([`rundir`]), the socket in it ([`server`],
//! [`client`]) and what is said there ([`protocol`]; `docs/control.md`).
//!
//! The socket is the VMM's, not the guest's: a guest's sockets exist inside its machine only, and host
//! sockets in directories that were shown to it cannot be opened from there. What is answered never
//! waits for the guest, and holds no lock for long.

pub mod client;
mod porter;
pub mod protocol;
pub mod ready;
pub mod rundir;
pub mod server;
