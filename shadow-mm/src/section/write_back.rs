//! Writing a section's modified pages back to its file (`msync`, `fsync`, the end of the last view).
//!
//! A page is modified if its frame says so, or if an entry of a shared view has the dirty bit. Before a write-back
//! the bits are moved from the entries to the frames, so that a page that nobody stores to any more is written once.
//! A vCPU that has the dirty translation would not set the bit again: only when the flushes of
//! [`Manager::collect_dirty`] are done may a page be read to be written, and what is stored after that is seen by
//! the next one.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::addr::{PAGE_SIZE, Pfn, VpnRange};
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::Manager;
use crate::pfn::PfnDatabase;
use crate::proto::{Claim, Direction, Record, Run, Section, SectionPage};
use crate::pte::{Entry, EntryFlags};
use crate::section::viewers::View;
use crate::shadow::{Cursor, LeafRun};
use crate::stats::add;
use crate::vad::Sharing;

/// Pages one write-back is for at most: 256 KiB.
const WRITE_PAGES: usize = 64;

/// The write of a [`WriteBack`] failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("modified pages could not be written to their file")]
pub struct WriteFailed;

/// A write the embedder must do: consecutive pages of a section, from their frames to its file.
///
/// Dropping it is as if the write had failed: the pages count as modified again.
#[must_use = "the pages count as written only after Manager::complete_write_back"]
#[derive(Debug)]
pub struct WriteBack<B> {
    section: Section<B>,
    first: SectionPage,
    length: usize,
    frames: Vec<Pfn>,
    claim: Claim,
}

impl<B> WriteBack<B> {
    /// The section whose file to write.
    #[must_use]
    pub fn section(&self) -> &Section<B> {
        &self.section
    }

    /// Where in the file the first page begins, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.first.offset()
    }

    /// How many bytes to write: the last page may end before the section does.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Where the bytes are: consecutive pages.
    #[must_use]
    pub fn frames(&self) -> &[Pfn] {
        &self.frames
    }
}

impl<P: Platform> Manager<P> {
    /// Takes the dirty bits from the shared views, so that [`Manager::write_back`] finds the pages that were stored
    /// to. Gives back what must be flushed *before* it is asked: every vCPU that runs one of the spaces must have
    /// dropped the translations, or left the space until it has.
    #[must_use = "a store through a translation that is not flushed is lost for the write-back"]
    pub fn collect_dirty(&self, section: &Section<P::Backing>) -> Vec<Flush> {
        let mut flushes = Vec::new();
        self.for_each_viewer(section, |space, _, views| {
            let cursor = space.cursor(&self.store);
            let mut flush = space.no_flush();
            let shared = |view: &&View| view.sharing == Sharing::Shared;
            let ranges = views.iter().filter(shared).map(|view| view.range);
            ranges.for_each(|range: VpnRange| {
                cursor.for_each_leaf(range, |run| {
                    let edits = self.collect_leaf(&cursor, run);
                    if run.shared && !edits.is_empty() {
                        flush.widen();
                    }
                    flush.absorb(edits);
                });
            });
            flushes.push(flush.finish());
        });
        flushes
    }

    /// Moves the dirty bits of one leaf table's pages to their frames.
    fn collect_leaf(&self, cursor: &Cursor<'_, P::Store>, run: LeafRun) -> TableEdits {
        let mut edits = TableEdits::new(run.table);
        let mut written = 0;
        let mut db = self.pfns.lock();
        for (index, vpn) in run.pages() {
            let dirty = EntryFlags::DIRTY | EntryFlags::PROTOTYPE;
            match cursor.leaf(run.table, index) {
                Entry::Valid(entry) if entry.flags.contains(dirty) => {
                    db.mark_modified(entry.frame);
                    if cfg!(not(mutant = "kept_dirty")) {
                        cursor.rewrite(run.table, index, |e| {
                            e.with_flags(e.flags - EntryFlags::DIRTY)
                        });
                    }
                    if cfg!(not(mutant = "unflushed_clean")) {
                        edits.add(index, vpn);
                    }
                    written += 1;
                }
                Entry::Valid(_)
                | Entry::Frozen(_)
                | Entry::Empty
                | Entry::Transition(_)
                | Entry::Prototype(_)
                | Entry::PageFile(_)
                | Entry::DemandZero(_)
                | Entry::Decommitted => {}
            }
        }
        drop(db);
        add(&self.counters.entries_written, written);
        edits
    }

    /// The next run of modified pages of a range, in bytes from the section's start; `None` if there is
    /// none.
    pub fn write_back(
        &self,
        section: &Section<P::Backing>,
        range: Range<u64>,
    ) -> Option<WriteBack<P::Backing>> {
        let mut db = self.pfns.lock();
        db.reap();
        let (first, frames) = modified_run(&db, section, range)?;
        for frame in &frames {
            db.hold(*frame);
            db.clear_modified(*frame);
        }
        let bell = Arc::clone(&db.sections.bell);
        let record = Arc::new(Record::default());
        let state = db.sections.get_mut(section.id());
        state.runs.push(Run {
            direction: Direction::Write,
            first,
            span: frames.len(),
            frames: frames.clone(),
            record: Arc::clone(&record),
        });
        let left = state.bytes.saturating_sub(first.offset());
        let length = left.min((frames.len() * PAGE_SIZE) as u64) as usize;
        drop(db);
        add(&self.counters.file_writes_issued, 1);
        add(&self.counters.file_pages_written, frames.len() as u64);
        Some(WriteBack {
            section: section.clone(),
            first,
            length,
            frames,
            claim: Claim::new(&record, &bell, section.id()),
        })
    }

    /// Takes a write's end. After a failure the pages count as modified again.
    pub fn complete_write_back(
        &self,
        ticket: WriteBack<P::Backing>,
        result: Result<(), WriteFailed>,
    ) {
        let mut db = self.pfns.lock();
        let state = db.sections.get_mut(ticket.section.id());
        let run = state.end_run(ticket.claim.record());
        for frame in run.into_iter().flat_map(|run| run.frames) {
            if result.is_err() && cfg!(not(mutant = "failed_write_forgotten")) {
                db.mark_modified(frame);
            }
            db.release(frame);
        }
        match result {
            Ok(()) => ticket.claim.done(),
            Err(WriteFailed) => ticket.claim.failed(),
        }
    }

    /// Whether a page has content that was not written back, as far as is known without looking through
    /// the views.
    #[must_use]
    pub fn section_modified(&self, section: &Section<P::Backing>) -> bool {
        modified_run(&self.pfns.lock(), section, 0..u64::MAX).is_some()
    }
}

/// The first modified pages of a range that follow each other.
fn modified_run<B>(
    db: &PfnDatabase,
    section: &Section<B>,
    range: Range<u64>,
) -> Option<(SectionPage, Vec<Pfn>)> {
    let state = db.sections.get(section.id());
    let first = SectionPage::new(range.start / PAGE_SIZE as u64)?;
    let end = range.end.div_ceil(PAGE_SIZE as u64).min(state.page_count());
    let pages = state.pages.range(first..);
    let modified = pages.filter_map(|(page, _)| {
        let frame = state.resident(*page)?;
        (page.get() < end && db.is_modified(frame)).then_some((*page, frame))
    });
    let mut run: Option<(SectionPage, Vec<Pfn>)> = None;
    for (page, frame) in modified {
        match &mut run {
            None => run = Some((page, Vec::from([frame]))),
            Some((first, frames)) => {
                let next = first.get() + frames.len() as u64;
                if page.get() != next || frames.len() == WRITE_PAGES {
                    break;
                }
                frames.push(frame);
            }
        }
    }
    run
}
