//! Prototype entries: the one authoritative entry of a page that several page-table entries share.
//!
//! Today there is one kind, the fork prototype of [`clone_block`]. Sections come later.

mod clone_block;

pub(crate) use clone_block::{BlockContent, CloneTable, CloneTableFull, Header};
pub use clone_block::{BlockId, HeaderId};
