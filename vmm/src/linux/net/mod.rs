//! Sockets: connections inside the machine.
//!
//! A machine has no network but itself: `AF_UNIX` streams with names in the tree or abstract ones
//! (unix(7)), and TCP over the loopback addresses of `AF_INET` and `AF_INET6`, which end in the same
//! machine. Every other address is unreachable (`ENETUNREACH`). A connection is two pipes in opposite
//! directions; nothing of it is the host's, so that it is data like everything else.
//!
//! What a guest can make the VMM hold is bounded by [`super::fd::pipe::PipeRoom`] (each connection is
//! two pipes, the waiting ones of a listener included) and by descriptors.
//!
//! Known holes: datagrams, sequenced packets, and descriptors in messages (`SCM_RIGHTS`) are refused;
//! options that bound the time of a call (`SO_RCVTIMEO`) too. A connection that was never accepted ends
//! with its listener as if it had been closed, without `ECONNRESET`.

mod address;
mod calls;
mod message;
mod names;
mod options;
mod saved;
mod socket;

pub use calls::TABLE;
pub use names::Names;
pub use saved::SavedSocket;
pub use socket::Socket;

#[cfg(test)]
mod tests;
