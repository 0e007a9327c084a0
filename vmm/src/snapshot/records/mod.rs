//! The records of a stopped process guest as plain data, and a guest made of them again.
//!
//! All state of a process guest is data the VMM owns ([`crate::linux`]); here it becomes data that can be
//! written down. The saved types are beside their owners, implement `serde`'s traits and say nothing about an
//! encoding. Objects that several records share (a pipe by its ends, a description by descriptors, an inode
//! by names) are in tables and named by their index there, so what was shared is shared again.
//!
//! What is in guest memory is not here: [`memory`] is the seam to whoever keeps it.

pub mod memory;

pub use crate::linux::fs::saved::HostDirectory;
pub use crate::linux::saved::{
    Damaged, Parts, Place, Records, Refused, RestoreError, restore, save,
};
pub use memory::{
    BytesRef, ContentRef, LoadBytes, LoadContents, LoadMemory, MemoryError, PAGE_BYTES, Page,
    SaveContents, SaveMemory, SpaceRef, SparseBytes,
};

/// Which of the guests made from one this is. The guest reads it from `/dev/vmm`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// What was set for it, as `NAME=VALUE`, without ends of lines.
    pub settings: Vec<Vec<u8>>,
}

/// What a guest is that was made of a saved one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// It goes on with what a file has.
    #[default]
    Restored,
    /// One of several made at once of a template.
    Clone {
        /// Its number among them, from 1.
        number: u32,
        /// How many were to be made.
        of: u32,
        /// The name of the guest that was frozen.
        template: String,
    },
}
