//! The PFN database: one compact entry for every frame of the pool, and the lists.
//!
//! Invariants (checked by [`crate::check`]):
//! * a frame is on exactly one list, or has a share count or a reference count;
//! * an owner's entry or prototype names the frame: valid, or in transition;
//! * a data frame's share count is the number of valid entries that map it;
//! * a table frame's share count is the number of entries in it that are in use, plus one for being a
//!   table: a table at one is empty and can be freed. Its *parents* are the entries of upper tables that
//!   name it: more than one if it is shared.
//!
//! Everything here is protected by the PFN lock. No frame's content is touched under it: tokens
//! ([`FreeFrame`], [`ZeroedFrame`]) carry a frame out of the lock and back.

mod database;
mod entry;
mod sections;
mod sharing;
mod token;
mod transition;
mod zone;

pub(crate) use database::{PfnDatabase, Want, ZoneKind};
pub use entry::PfnState;
pub(crate) use entry::{Original, Owner, PfnEntry, PfnFlags};
pub(crate) use sharing::Sharing;
pub(crate) use token::{FreeFrame, ReadyFrame, Taken, ZeroedFrame};
pub(crate) use zone::Zone;
