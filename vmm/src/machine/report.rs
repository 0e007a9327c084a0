//! What `--stats` prints.

use std::fmt;

use serde::Serialize;
use shadow_mm::{StatsSnapshot, ZoneStats};

use super::stats::Exits;
use crate::memory::{GuardReport, ShootdownStats};

/// Frames of a zone, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Frames {
    /// Frames in the zone.
    pub total: u64,
    /// Known to be zero.
    pub zeroed: u64,
    /// Free, with old content.
    pub free: u64,
    /// Unmapped, kept in case they are wanted, and free to take.
    pub standby: u64,
    /// Unmapped, to be written to the page file.
    pub modified: u64,
    /// Unmapped, to be written back to files.
    pub modified_no_write: u64,
    /// Mapped, or page tables in use.
    pub active: u64,
    /// Held by a flush or a read.
    pub in_flight: u64,
}

impl From<ZoneStats> for Frames {
    fn from(z: ZoneStats) -> Self {
        Self {
            total: z.total,
            zeroed: z.zeroed,
            free: z.free,
            standby: z.standby,
            modified: z.modified,
            modified_no_write: z.modified_no_write,
            active: z.active,
            in_flight: z.in_flight,
        }
    }
}

/// Faults by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Faults {
    pub demand_zero: u64,
    pub file_read: u64,
    pub mapped: u64,
    pub copy_on_write: u64,
    pub unshared: u64,
    pub made_writable: u64,
    pub spurious: u64,
    pub denied: u64,
    pub no_memory: u64,
    pub soft: u64,
    pub paged_in: u64,
    pub collided: u64,
}

/// What the pager and the zeroer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Paging {
    /// Pages of the page file, those in use, and the most that ever were.
    pub slots: u64,
    /// See `slots`.
    pub slots_used: u64,
    /// See `slots`.
    pub slots_peak: u64,
    /// Pages read back, and the reads it took.
    pub pages_in: u64,
    /// See `pages_in`.
    pub reads: u64,
    /// Pages written, the writes it took, and those that failed.
    pub pages_out: u64,
    /// See `pages_out`.
    pub writes: u64,
    /// See `pages_out`.
    pub failed_writes: u64,
    /// Pages promised to programs now, and the most that ever were.
    pub committed: u64,
    /// See `committed`.
    pub committed_peak: u64,
    /// Pages taken from processes.
    pub trimmed: u64,
    /// Frames zeroed ahead of need.
    pub zeroed_ahead: u64,
}

/// What the memory manager did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// Faults it was asked to resolve, by kind.
    pub faults: Faults,
    /// What became of pages there was no room for.
    pub paging: Paging,
    /// Pages copied.
    pub pages_copied: u64,
    /// Frames zeroed inline.
    pub pages_zeroed: u64,
    /// Pages read from files, and the reads they took.
    pub pages_read: u64,
    /// Pages of files that were mapped because a neighbour faulted.
    pub mapped_around: u64,
    /// Entries made for pages of a template, which take no frame.
    pub frozen_mapped: u64,
    /// Pages of a guest that was frozen that became its template's.
    pub rebased: u64,
    /// Free frames whose memory the host got back then.
    pub discarded: u64,
    /// Pages of files that were taken because frames were short.
    pub file_pages_evicted: u64,
    /// Pages written back to files, and the writes they took.
    pub file_pages_written: u64,
    /// See `file_pages_written`.
    pub file_writes: u64,
    /// See `pages_read`.
    pub reads: u64,
    /// Leaf entries written.
    pub entries_written: u64,
    /// Page tables made.
    pub tables_made: u64,
    /// Forks.
    pub forks: u64,
    /// Entries all forks visited, and the last one.
    pub fork_entries: u64,
    /// See `fork_entries`.
    pub fork_entries_last: u64,
    /// Tables that forks shared, each process's counted by itself.
    pub tables_shared: u64,
    /// Shared tables that were copied when somebody changed something in them, ...
    pub tables_copied: u64,
    /// ... that nobody else had any more by then, ...
    pub tables_taken_over: u64,
    /// ... and those of them that moved to another frame.
    pub tables_moved: u64,
    /// Private pages that became two processes' when a shared table was copied.
    pub pages_parted: u64,
    /// Clone blocks still referred to.
    pub clone_blocks: u64,
    /// Pages that forks still share, and that have no clone block because they are in memory.
    pub forked_pages: u64,
    /// Guest pages.
    pub data_frames: Frames,
    /// Page tables.
    pub table_frames: Frames,
    /// Frames guests still hold, tables included: zero after a machine has ended.
    pub frames_in_use: u64,
}

impl MemoryReport {
    /// From the manager's counters; `supervisor_tables` are the table frames that belong to no guest.
    #[must_use]
    pub fn new(s: &StatsSnapshot, supervisor_tables: u64) -> Self {
        let held =
            |z: &ZoneStats| z.active + z.in_flight + z.standby + z.modified + z.modified_no_write;
        Self {
            faults: Faults {
                demand_zero: s.faults_demand_zero,
                file_read: s.faults_file_read,
                mapped: s.faults_mapped,
                copy_on_write: s.faults_copy_on_write,
                made_writable: s.faults_made_writable,
                unshared: s.faults_unshared,
                spurious: s.faults_spurious,
                denied: s.faults_denied,
                no_memory: s.faults_no_memory,
                soft: s.faults_soft,
                paged_in: s.faults_paged_in,
                collided: s.faults_collided,
            },
            paging: Paging {
                slots: s.page_file_slots,
                slots_used: s.page_file_used,
                slots_peak: s.page_file_peak,
                pages_in: s.pages_paged_in,
                reads: s.page_ins,
                pages_out: s.pages_written,
                writes: s.writes_issued,
                failed_writes: s.writes_failed,
                committed: s.commit_charged,
                committed_peak: s.commit_peak,
                trimmed: s.pages_trimmed,
                zeroed_ahead: s.pages_zeroed_ahead,
            },
            pages_copied: s.pages_copied,
            pages_zeroed: s.pages_zeroed,
            pages_read: s.pages_read,
            mapped_around: s.pages_mapped_around,
            frozen_mapped: s.pages_frozen,
            rebased: s.pages_rebased,
            discarded: s.pages_discarded,
            file_pages_evicted: s.section_pages_evicted,
            file_pages_written: s.file_pages_written,
            file_writes: s.file_writes_issued,
            reads: s.reads_issued,
            entries_written: s.entries_written,
            tables_made: s.tables_made,
            forks: s.forks,
            fork_entries: s.fork_entries,
            fork_entries_last: s.fork_entries_last,
            tables_shared: s.tables_shared,
            tables_copied: s.tables_copied,
            tables_taken_over: s.tables_taken_over,
            tables_moved: s.tables_moved,
            pages_parted: s.pages_parted,
            clone_blocks: s.clone_blocks,
            forked_pages: s.forked_pages,
            data_frames: s.data.into(),
            table_frames: s.tables.into(),
            frames_in_use: (held(&s.data) + held(&s.tables)).saturating_sub(supervisor_tables),
        }
    }
}

/// Everything that was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Exits and what the workers did.
    pub exits: Exits,
    /// KVM ioctls, `KVM_RUN` included.
    pub ioctls: u64,
    /// Flushes of what other virtual CPUs were running.
    pub shootdowns: ShootdownStats,
    /// The memory manager's part.
    pub memory: MemoryReport,
    /// What `--guard-alloc` found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardReport>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (e, m) = (&self.exits, &self.memory);
        writeln!(
            f,
            "exits     {} system calls ({} unknown), {} page faults, {} exceptions, {} kicks, {} forged, {} broken",
            e.syscalls,
            e.unknown_syscalls,
            e.page_faults,
            e.exceptions,
            e.kicks,
            e.forged,
            e.broken
        )?;
        writeln!(f, "ioctls    {}", self.ioctls)?;
        writeln!(
            f,
            "flushes   {} entries by the monitor, {} words touched; FPU: {} saves, {} loads, {} of them by an ioctl",
            e.flushes, e.touches, e.fpu_saves, e.fpu_loads, e.fpu_loads_by_kvm
        )?;
        let d = &self.shootdowns;
        writeln!(
            f,
            "shootdown {} flushes kicked {} virtual CPUs, {} waits for them; {} flushes acknowledged, {} errands",
            d.shootdowns, d.kicks, d.waits, d.acknowledged, d.errands
        )?;
        let q = &m.faults;
        writeln!(
            f,
            "faults    {} demand zero, {} file, {} mapped, {} copy-on-write, {} made writable, {} soft, {} paged in, {} collided, {} unshared, {} spurious, {} denied, {} without memory",
            q.demand_zero,
            q.file_read,
            q.mapped,
            q.copy_on_write,
            q.made_writable,
            q.soft,
            q.paged_in,
            q.collided,
            q.unshared,
            q.spurious,
            q.denied,
            q.no_memory
        )?;
        writeln!(
            f,
            "pages     {} copied, {} zeroed, {} read in {} reads; {} entries written, {} tables made",
            m.pages_copied, m.pages_zeroed, m.pages_read, m.reads, m.entries_written, m.tables_made
        )?;
        let p = &m.paging;
        writeln!(
            f,
            "paging    {} trimmed, {} out in {} writes ({} failed), {} in in {} reads, {} zeroed ahead; page file: {} of {} pages used, {} at most; {} pages promised, {} at most",
            p.trimmed,
            p.pages_out,
            p.writes,
            p.failed_writes,
            p.pages_in,
            p.reads,
            p.zeroed_ahead,
            p.slots_used,
            p.slots,
            p.slots_peak,
            p.committed,
            p.committed_peak
        )?;
        writeln!(
            f,
            "forks     {}, {} entries visited ({} by the last); {} forked pages and {} clone blocks left",
            m.forks, m.fork_entries, m.fork_entries_last, m.forked_pages, m.clone_blocks
        )?;
        writeln!(
            f,
            "unshared  {} tables shared by forks; {} copied, {} taken over, {} moved; {} private pages shared",
            m.tables_shared, m.tables_copied, m.tables_taken_over, m.tables_moved, m.pages_parted
        )?;
        for (name, z) in [("data", &m.data_frames), ("tables", &m.table_frames)] {
            writeln!(
                f,
                "{name:<9} {} frames: {} zeroed, {} free, {} standby, {} modified, {} of files, {} active, {} in flight",
                z.total,
                z.zeroed,
                z.free,
                z.standby,
                z.modified,
                z.modified_no_write,
                z.active,
                z.in_flight
            )?;
        }
        if let Some(g) = &self.guard {
            writeln!(
                f,
                "guards    {} mappings ({} refused), {} damaged, {} faults; {} quarantined, {} released",
                g.guarded, g.refused, g.damaged, g.faults, g.quarantined, g.released
            )?;
        }
        writeln!(f, "in use    {} frames", m.frames_in_use)
    }
}
