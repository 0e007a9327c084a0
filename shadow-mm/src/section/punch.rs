//! Holes (`fallocate(FALLOC_FL_PUNCH_HOLE)`, `madvise(MADV_REMOVE)`) in a section over zeroes.

use alloc::vec::Vec;
use core::ops::Range;

use crate::addr::{PAGE_SIZE, Pfn, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::flush::Flush;
use crate::manager::Manager;
use crate::proto::{Proto, Section, SectionPage};
use crate::section::viewers::View;
use crate::section::{AT_ONCE, BeingKept};
use crate::vad::Sharing;

impl<P: Platform> Manager<P> {
    /// Makes whole pages zeroes, and gives back those that nobody maps: shared views lose theirs first. Copies
    /// that private views made stay; a page that a private view shows and did not copy is zeroed where it is. Gives
    /// back what each space with a shared view must flush.
    ///
    /// # Errors
    /// [`BeingKept`]; nothing has changed then.
    pub fn punch_section(
        &self,
        section: &Section<P::Backing>,
        pages: Range<u64>,
    ) -> Result<Vec<Flush>, BeingKept> {
        let mut flushes = Vec::new();
        // No fault maps a layer's page from here on.
        self.cut_frozen(section, pages.clone())?;
        self.for_each_viewer(section, |space, state, views| {
            let mut flush = space.no_flush();
            let private = views.iter().filter(|view| view.sharing == Sharing::Private);
            for range in private.filter_map(|view| part(view, &pages)) {
                self.drop_frozen(space, state, range, &mut flush);
            }
            let shared = views.iter().filter(|view| view.sharing == Sharing::Shared);
            for range in shared.filter_map(|view| part(view, &pages)) {
                self.own_edges_now((space, &mut *state), range, &mut flush);
                self.zap(space, state, range, &mut flush);
            }
            flushes.push(flush.finish());
        });
        let mut from = pages.start;
        while let Some(next) = self.punch_some(section, from..pages.end) {
            from = next;
        }
        Ok(flushes)
    }

    /// Takes from a section what of a range is a layer's, unless others of the pages have to stay.
    fn cut_frozen(
        &self,
        section: &Section<P::Backing>,
        pages: Range<u64>,
    ) -> Result<(), BeingKept> {
        let mut db = self.pfns.lock();
        db.reap();
        db.sections.get(section.id()).can_lose(pages.clone())?;
        let cut = db.sections.get_mut(section.id()).cut_frozen(pages);
        db.discharge_pages(section.id(), cut);
        Ok(())
    }

    /// The first pages of a hole; gives back where to go on.
    pub(super) fn punch_some(
        &self,
        section: &Section<P::Backing>,
        pages: Range<u64>,
    ) -> Option<u64> {
        static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        let id = section.id();
        let first = SectionPage::new(pages.start)?;
        let mut mapped: Vec<Pfn> = Vec::new();
        let mut db = self.pfns.lock();
        db.reap();
        let state = db.sections.get(id);
        let held = state.pages.range(first..).map(|(page, _)| *page);
        let held = held.take_while(|page| page.get() < pages.end);
        let held: Vec<_> = held.take(AT_ONCE).collect();
        for page in &held {
            let frame = match db.sections.get(id).pages.get(page) {
                Some(Proto::Resident(frame)) if db.entry(*frame).share() > 0 => Some(*frame),
                Some(Proto::Resident(_) | Proto::PageFile(_) | Proto::Zeroes) => None,
                // Of files only.
                Some(Proto::Reading(_)) | None => continue,
            };
            match frame {
                Some(frame) => {
                    db.hold(frame);
                    mapped.push(frame);
                }
                None => {
                    db.forget_page(id, *page);
                    db.discharge_pages(id, 1);
                }
            }
        }
        drop(db);
        for frame in &mapped {
            self.store.write(*frame, 0, &ZEROES);
        }
        let mut db = self.pfns.lock();
        for frame in mapped {
            db.mark_modified(frame);
            db.release(frame);
        }
        let last = held.last().filter(|_| held.len() == AT_ONCE)?;
        Some(last.get() + 1)
    }
}

/// The part of a view that shows pages of a range.
pub(super) fn part(view: &View, pages: &Range<u64>) -> Option<VpnRange> {
    let base = view.range.start().get();
    let ahead = pages.start.saturating_sub(view.first);
    let start = Vpn::new(base.checked_add(ahead)?)?;
    let end = pages.end.saturating_sub(view.first).saturating_add(base);
    VpnRange::between(start, end.min(view.range.end()))
}
