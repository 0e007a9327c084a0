//! A memory manager for guest address spaces, in the manner of NT: frames, entries and lists.
//!
//! The crate owns the memory of *guest processes*: it maps their address ranges, resolves their page
//! faults, makes copy-on-write clones of them, and builds the x86-64 page tables their CR3 points at. It
//! is pure: it knows no KVM, no files, no threads and no system calls. Guest RAM is reached
//! through [`FrameStore`]; what must be done outside is returned as `#[must_use]` values, a [`Flush`] or
//! an [`IoTicket`].
//!
//! # Locks
//!
//! Entry points take `&self`. The locks are a tree, taken from left to right:
//!
//! ```text
//! Space::state (one for each space, never two at once) ──┐
//! Manager::supervisor_lock ──────────────────────────────┴──> Manager::pfns (the PFN lock) ──> Manager::spaces
//! ```
//!
//! * The **space lock** protects a space's mappings, counts, clone descriptors, and everything in its
//!   page tables except the bits hardware sets.
//!   Which tables it reaches changes under this lock; but what is in a table that it shares does not belong to it alone.
//! * The **PFN lock** protects the PFN database, the lists, all clone headers and blocks, the prototypes
//!   of all sections, the slots of the page file, the commit account, and the entries of pages in
//!   transition, in whatever space. It is held
//!   for one leaf table's entries, or one walk of the tables above, and never while a frame's content is copied or zeroed.
//! * A **shared table**'s leaf entries change under the PFN lock only, and whoever acts upon one has looked at it with
//!   that lock held; how many entries name a table changes under it too. A space that wants more owns the table first:
//!   see `space/own.rs`.
//! * A fork holds its parent's space lock; the child has no lock to take until it is published.
//! * [`Manager::check`] alone locks several spaces, in the order of their numbers.
//!
//! The list of spaces has a lock of its own, a leaf.
//!
//! [`Locks`] gives each place a type of its own, so that an embedder can check the order whenever a lock is
//! taken; `tests/shuttle` runs the verbs against each other under made-up schedules.
//!
//! # Invariants
//!
//! [`Manager::check`] verifies them all; its [`Violation`] names each.
//!
//! # Known holes
//!
//! Page tables are never taken from a space that has them, and pages of anonymous shared memory neither.
//! The pages of a table that spaces share age once for each of them.
#![no_std]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

extern crate alloc;

mod access;
mod addr;
mod backend;
mod check;
mod commit;
mod flush;
mod limits;
mod manager;
mod outcome;
mod page_file;
mod pfn;
mod pool;
mod proto;
pub mod pte;
mod section;
mod shadow;
pub mod sim;
mod snapshot;
mod space;
mod stats;
mod supervisor;
mod vad;

pub use access::{Access, Denied, Prot};
pub use addr::{
    EntryIndex, GuestVa, Level, PAGE_SHIFT, PAGE_SIZE, Pfn, PfnRange, SpaceId, TABLE_ENTRIES,
    UsedEntries, Vpn, VpnRange,
};
pub use backend::{FrameStore, Locks, Platform, exchange_word};
pub use check::{Count, Promised, Violation};
pub use commit::CommitLimit;
pub use flush::{Flush, FlushEntry, ForkUnderWay, MAX_EDITS_PER_TABLE};
#[cfg(feature = "fault-injection")]
pub use limits::FailPlan;
pub use limits::{Clusters, LayoutError, Limits, PoolLayout};
pub use manager::{CreateError, Manager};
pub use outcome::{FaultKind, FaultOutcome, IoFailed, IoTicket, Pin, PinOutcome, Resolution};
pub use page_file::{PageIn, Slot, WriteTicket, Written};
pub use pfn::PfnState;
pub use pool::{
    NonPagedPool, NotAllocated, PoolFull, PoolMode, PoolPages, PoolUsage, Quarantine,
    QuarantineLimits, SLACK_BYTE, slack_damage,
};
pub use proto::{
    BlockId, Extent, Extents, HeaderId, Pending, Progress, Section, SectionId, SectionPage,
};
pub use section::{
    Allowance, BeingKept, Charge, KeepSectionError, KeptPage, KeptSection, LayError, NoFrame,
    NoSpace, ResetSectionError, SectionAt, SectionError, SectionIn, SectionStore, Thaw, WriteBack,
    WriteFailed,
};
pub use snapshot::{FrameInfo, FrameOwner, FrameRun, FrameZone};
pub use space::{
    AdviseError, DiscardError, Discarded, ForkError, ForkMode, Forked, GoneBack, ImageError, Keep,
    MapError, MapRequest, Mapped, PageInfo, PageKey, Placement, ProtectError, Protected,
    RebaseError, Rebased, RemapError, RemapRequest, ResetError, SavedPage, Shape, Space, TrimMode,
    Trimmed, UnmapError, VadAdvice,
};
pub use stats::{SpaceUsage, StatsSnapshot, ZoneStats};
pub use supervisor::{SupervisorError, SupervisorRights};
pub use vad::{ImageRun, MAX_MAPPINGS, MapKind, Sharing, VadFlags, VadInfo, VadTag};
