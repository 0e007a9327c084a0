//! Prototype entries: the one authoritative entry of a page that several page-table entries share.
//!
//! There are two kinds: the fork prototype of [`clone_block`], and the page of a [`section`].

mod bell;
mod clone_block;
mod frozen;
mod kept;
mod lazy;
mod pending;
mod section;

pub(crate) use clone_block::{Block, BlockContent, CloneTable, CloneTableFull, Header};
pub use clone_block::{BlockId, HeaderId};
pub(crate) use frozen::{Below, FrozenPages};
pub use frozen::{Extent, Extents};
pub(crate) use pending::{Claim, Record};
pub use pending::{Pending, Progress};
pub(crate) use section::{Direction, Dropped, Proto, Run, SectionState, SectionTable};
pub use section::{Section, SectionId, SectionPage};
