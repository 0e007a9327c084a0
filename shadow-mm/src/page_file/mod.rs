//! The page file, as far as the manager knows it: which slots are taken, which pages move. The file
//! itself, and all reading and writing, are the embedder's.

mod slots;
mod tickets;
mod write;

pub use slots::Slot;
pub(crate) use slots::{SlotMap, SlotRun};
pub use tickets::{PageIn, WriteTicket};
pub use write::Written;
