//! Counters: what happened, and where the frames are.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::commit::CommitLimit;
use crate::outcome::FaultKind;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// Running counters of one manager. They are for people: nothing is decided by them.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        /// What the counters said at one moment, and the frames by state.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct StatsSnapshot {
            $($(#[doc = $doc])+ pub $name: u64,)*
            /// Clone blocks that are referred to.
            pub clone_blocks: u64,
            /// Pages that forks share and that need no clone block yet.
            pub forked_pages: u64,
            /// Pages promised to guests.
            pub commit_charged: u64,
            /// Most that ever were.
            pub commit_peak: u64,
            /// Slots of the page file.
            pub page_file_slots: u64,
            /// Those that are taken.
            pub page_file_used: u64,
            /// Most that ever were.
            pub page_file_peak: u64,
            /// Clone headers alive.
            pub clone_headers: u64,
            /// Sections alive.
            pub sections: u64,
            /// Frames that sections have.
            pub section_pages: u64,
            /// Frames of sections that were taken for something else.
            pub section_pages_evicted: u64,
            /// Guest pages' frames.
            pub data: ZoneStats,
            /// Page tables' frames.
            pub tables: ZoneStats,
        }

        impl Counters {
            /// The counters; the rest is for the caller to fill in.
            pub(crate) fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.load(Relaxed),)* ..StatsSnapshot::default() }
            }
        }
    };
}

counters! {
    /// Faults that made a page of zeroes.
    faults_demand_zero,
    /// Faults that read a file.
    faults_file_read,
    /// Faults that mapped a page a section had already.
    faults_mapped,
    /// Pages of sections that were mapped because a neighbour faulted.
    pages_mapped_around,
    /// Entries made for pages of frozen layers.
    pages_frozen,
    /// Pages of a layer that sections have copies of, because they were stored to.
    pages_thawed,
    /// Pages of images that were copied for sections laid over them: shared memory and files in memory.
    pages_from_image,
    /// Pages of sections that were copied before they were stored to, because the section was kept as it was.
    pages_put_aside,
    /// Times a space went back to what lies under it.
    resets,
    /// Pages that spaces gave up then.
    pages_reset,
    /// Pages that they kept then, with what lies under them copied there.
    pages_put_back,
    /// Pages of spaces that came to lie on a layer to which they had been copied.
    pages_rebased,
    /// Faults that copied a page.
    faults_copy_on_write,
    /// Faults that made a page writable in place.
    faults_made_writable,
    /// Faults that needed no more than a table of the space's own.
    faults_unshared,
    /// Faults with nothing to do.
    faults_spurious,
    /// Faults that were the guest's own.
    faults_denied,
    /// Faults that found no frame.
    faults_no_memory,
    /// Pages copied, by faults and by forks.
    pages_copied,
    /// Free frames whose memory the host got back.
    pages_discarded,
    /// Frames zeroed because no zeroed one was left.
    pages_zeroed,
    /// Leaf entries written.
    entries_written,
    /// Page tables made.
    tables_made,
    /// Forks that succeeded.
    forks,
    /// Entries visited by all forks.
    fork_entries,
    /// Entries visited by the last fork.
    fork_entries_last,
    /// Tables that forks shared instead of copying them, each space's counted by itself.
    tables_shared,
    /// Shared tables that were copied because a space changed something in them.
    tables_copied,
    /// Shared tables that nobody else had any more when a space changed something in them.
    tables_taken_over,
    /// The same, moved to another frame because a flush was under way.
    tables_moved,
    /// Private pages that became two entries' when a shared table was copied.
    pages_parted,
    /// Mappings made.
    maps,
    /// Ranges unmapped.
    unmaps,
    /// Ranges whose protection changed.
    protects,
    /// I/O tickets handed out.
    reads_issued,
    /// Pages those tickets were for.
    pages_read,
    /// Write-backs of sections to their files handed out.
    file_writes_issued,
    /// Pages those write-backs were for.
    file_pages_written,
    /// Faults that took a page back whose frame still had it.
    faults_soft,
    /// Faults that read a page from the page file.
    faults_paged_in,
    /// Faults on a page that somebody else was reading.
    faults_collided,
    /// Stores to a page of a layer that others share.
    faults_thaw,
    /// Reads of the page file handed out.
    page_ins,
    /// Pages those reads were for, neighbours included.
    pages_paged_in,
    /// Writes to the page file handed out.
    writes_issued,
    /// Pages that reached the page file.
    pages_written,
    /// Writes to the page file that failed.
    writes_failed,
    /// Pages the trimmer took from their spaces.
    pages_trimmed,
    /// Frames zeroed ahead of need.
    pages_zeroed_ahead,
}

/// The frames of one zone, by state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ZoneStats {
    /// Frames in the zone.
    pub total: u64,
    /// Zeroed, the never used included.
    pub zeroed: u64,
    /// Never used.
    pub untouched: u64,
    /// Free, with old content.
    pub free: u64,
    /// On the standby list: they can be taken, and their content is elsewhere too.
    pub standby: u64,
    /// On the modified list: their content is to be written out first.
    pub modified: u64,
    /// Pages of files that are modified and not mapped: their content is to be written back first.
    pub modified_no_write: u64,
    /// Mapped, or page tables in use.
    pub active: u64,
    /// Held by a flush, a read, a pin or an operation, and not mapped.
    pub in_flight: u64,
}

impl ZoneStats {
    /// Frames that can be taken.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.zeroed + self.free + self.standby
    }
}

/// The memory of one space.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SpaceUsage {
    /// Pages mapped.
    pub virtual_pages: u64,
    /// Most pages that were mapped.
    pub peak_virtual_pages: u64,
    /// Mappings.
    pub mappings: u64,
    /// Pages with a frame.
    pub resident: u64,
    /// Most pages that had a frame.
    pub peak_resident: u64,
    /// Pages this space owns alone, resident or not; the others belong to clone blocks.
    pub private: u64,
    /// Page tables, the root included, the supervisor's not.
    pub tables: u64,
    /// Pages its mappings are charged in the commit account.
    pub charged: u64,
    /// The most they may be charged.
    pub quota: CommitLimit,
    /// Resident pages the trimmer leaves unless nothing else is left.
    pub working_set_min: u64,
    /// Resident pages above which the trimmer comes without being called.
    pub working_set_max: u64,
}

impl Counters {
    pub(crate) fn resolved(&self, kind: FaultKind) {
        let counter = match kind {
            FaultKind::DemandZero => &self.faults_demand_zero,
            FaultKind::FileRead => &self.faults_file_read,
            FaultKind::Mapped => &self.faults_mapped,
            FaultKind::CopyOnWrite => &self.faults_copy_on_write,
            FaultKind::MadeWritable => &self.faults_made_writable,
            FaultKind::Soft => &self.faults_soft,
            FaultKind::PagedIn => &self.faults_paged_in,
            FaultKind::Unshared => &self.faults_unshared,
            FaultKind::Spurious => &self.faults_spurious,
        };
        add(counter, 1);
    }
}

/// Counts `n` more.
#[inline]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}
