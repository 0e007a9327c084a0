//! The size of a section (`ftruncate`, and writes that reach beyond the end).

use alloc::vec::Vec;

use crate::addr::{PAGE_SIZE, Pfn, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::commit::NoCommit;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::proto::{Proto, Section, SectionPage};
use crate::section::viewers::View;
use crate::section::{Charge, SectionError, whole_pages};
use crate::space::Purpose;

impl<P: Platform> Manager<P> {
    /// Sets where a section ends: what is over zeroes ends with a whole page. Pages wholly beyond go, from the
    /// section and from every view of it, copies that private views made of them included, but for spaces that are kept
    /// as they were; the rest of a file's last page is zeroed. Gives back what each space with a view must flush.
    ///
    /// # Errors
    /// [`SectionError::NoCommit`] if shared memory is to grow, [`SectionError::BeingKept`] if it is to shrink; nothing has
    /// changed then.
    pub fn resize_section(
        &self,
        section: &Section<P::Backing>,
        bytes: u64,
    ) -> Result<Vec<Flush>, SectionError> {
        let mut flushes = Vec::new();
        let Some((first_gone, last)) = self.cut_section(section, bytes)? else {
            return Ok(flushes);
        };
        if let Some(last) = last {
            // The frame is held; who stores there meanwhile does so at his own risk, as ever.
            static ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
            let end = (bytes % PAGE_SIZE as u64) as usize;
            self.store.write(last, end, &ZEROES[end..]);
            self.pfns.lock().release(last);
        }
        self.for_each_viewer(section, |space, state, views| {
            let mut flush = space.no_flush();
            if state.purpose == Purpose::Keep && cfg!(not(mutant = "kept_truncated")) {
                for range in views.iter().filter_map(|view| beyond(view, first_gone)) {
                    self.drop_frozen(space, state, range, &mut flush);
                }
                flushes.push(flush.finish());
                return;
            }
            for range in views.iter().filter_map(|view| beyond(view, first_gone)) {
                self.own_edges_now((space, &mut *state), range, &mut flush);
                self.zap(space, state, range, &mut flush);
            }
            flushes.push(flush.finish());
        });
        Ok(flushes)
    }

    /// Sets the size; if the section became shorter, says which page is the first that is gone, and
    /// which frame, held, has bytes to be zeroed.
    fn cut_section(
        &self,
        section: &Section<P::Backing>,
        bytes: u64,
    ) -> Result<Option<(u64, Option<Pfn>)>, SectionError> {
        let mut db = self.pfns.lock();
        db.reap();
        let state = db.sections.get(section.id());
        let bytes = if state.file {
            bytes
        } else {
            whole_pages(bytes)
        };
        let first_gone = bytes.div_ceil(PAGE_SIZE as u64);
        state.can_lose(first_gone..SectionPage::COUNT)?;
        let (released, charged) = match state.charge {
            Charge::Charged | Charge::Uncharged => (state.charged(), state.charge.pages(bytes)),
            Charge::ByPage => (0, 0),
        };
        let promised = db.commit.exchange(released, charged);
        let pages = charged.saturating_sub(released);
        promised.map_err(|NoCommit| SectionError::NoCommit { pages })?;
        let state = db.sections.get_mut(section.id());
        let old = core::mem::replace(&mut state.bytes, bytes);
        if bytes >= old {
            return Ok(None);
        }
        let edge = bytes / PAGE_SIZE as u64;
        let mut gone = match SectionPage::new(first_gone) {
            Some(first) => state.pages.split_off(&first),
            None => return Ok(None),
        };
        let partial = SectionPage::new(edge).filter(|_| edge < first_gone);
        let mut last = None;
        if let Some(page) = partial {
            match state.pages.get(&page) {
                Some(Proto::Resident(frame)) => last = Some(*frame),
                // It would bring what lay beyond the new end.
                Some(Proto::Reading(_)) => gone.extend(state.pages.remove_entry(&page)),
                // Only what is over zeroes has such pages, and that ends with a whole page.
                Some(Proto::PageFile(_) | Proto::Zeroes) | None => {}
            }
        }
        let frozen = state.cut_frozen(first_gone..SectionPage::COUNT);
        last.into_iter().for_each(|frame| db.hold(frame));
        db.discharge_pages(section.id(), gone.len() as u64 + frozen);
        if cfg!(not(mutant = "truncated_stays")) {
            for proto in gone.into_values() {
                db.disown(Some(&proto));
            }
        }
        Ok(Some((first_gone, last)))
    }
}

/// The part of a view that shows pages from `first_gone` on.
fn beyond(view: &View, first_gone: u64) -> Option<VpnRange> {
    let kept = first_gone.saturating_sub(view.first);
    let start = Vpn::new(view.range.start().get().checked_add(kept)?)?;
    VpnRange::between(start, view.range.end())
}
