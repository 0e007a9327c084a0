//! The frames of sections: who has them, and how they come and go.

use super::database::PfnDatabase;
use super::entry::{Owner, PfnFlags, PfnState};
use super::token::ReadyFrame;
use crate::addr::Pfn;
use crate::commit::NoCommit;
use crate::proto::{Dropped, Proto, SectionId, SectionPage};
use crate::pte::{EntryFlags, ValidEntry};
use crate::section::{Charge, NoSpace};

/// Pages of dropped sections that one operation gives back.
const REAP_AT_ONCE: usize = 256;

impl PfnDatabase {
    /// A filled frame becomes a section's page, which is held and cannot be mapped yet: as if it were being read.
    /// [`Self::end_thaw`] ends that.
    pub(crate) fn begin_thaw(
        &mut self,
        id: SectionId,
        page: SectionPage,
        frame: ReadyFrame,
    ) -> Pfn {
        let pfn = frame.into_pfn();
        self.set_owner(pfn, Owner::Section { section: id, page });
        self.entry_mut(pfn).flags = match cfg!(mutant = "thawed_early") {
            true => PfnFlags::empty(),
            false => PfnFlags::READING,
        };
        let state = self.sections.get_mut(id);
        state.settle(page);
        let old = state.pages.insert(page, Proto::Resident(pfn));
        debug_assert!(old.is_none(), "{page:?} of a layer had {old:?} too");
        self.sections.resident += 1;
        pfn
    }

    /// The page can be mapped. The layer is no place to find it again.
    pub(crate) fn end_thaw(&mut self, pfn: Pfn) {
        self.now_read(pfn);
        if self.entry(pfn).owner != Owner::None && cfg!(not(mutant = "thawed_clean")) {
            self.mark_modified(pfn);
        }
        self.release(pfn);
    }

    /// A filled frame becomes a section's page, and can be taken until somebody maps it.
    pub(crate) fn make_resident(&mut self, id: SectionId, page: SectionPage, frame: ReadyFrame) {
        let pfn = frame.into_pfn();
        self.set_owner(pfn, Owner::Section { section: id, page });
        self.release(pfn);
        let state = self.sections.get_mut(id);
        if cfg!(not(mutant = "kept_with_later")) {
            state.settle(page);
        }
        let old = state.pages.insert(page, Proto::Resident(pfn));
        debug_assert!(
            !matches!(old, Some(Proto::Resident(_))),
            "{page:?} of a section was made resident twice"
        );
        self.sections.resident += 1;
    }

    /// The frame of a section's page that can be mapped now: it has one, and is not being read into it.
    pub(crate) fn mappable(&self, id: SectionId, page: SectionPage) -> Option<Pfn> {
        let section = self.sections.get(id);
        let frame = section.resident(page).filter(|_| section.contains(page))?;
        let reading = self.entry(frame).flags.contains(PfnFlags::READING);
        (!reading).then_some(frame)
    }

    /// Whether an entry maps a section's own frame, or one its section has lost.
    pub(crate) fn is_sections(&self, entry: ValidEntry) -> bool {
        let owner = self.entry(entry.frame).owner;
        let proto = entry.flags.contains(EntryFlags::PROTOTYPE);
        proto && matches!(owner, Owner::Section { .. } | Owner::None)
    }

    /// The section's page in a frame, if nobody may store there before that is put aside: its section is kept as it was.
    pub(crate) fn to_be_kept(&self, frame: Pfn) -> Option<(SectionId, SectionPage)> {
        if self.sections.keeping == 0 {
            return None;
        }
        let Owner::Section { section, page } = self.entry(frame).owner else {
            return None;
        };
        let state = self.sections.find(section);
        let pending = state.is_some_and(|state| state.is_to_be_kept(page));
        pending.then_some((section, page))
    }

    /// What a page of a section that is kept is goes to the copies; it may be stored to from now on.
    pub(crate) fn put_aside(&mut self, id: SectionId, page: SectionPage, copy: ReadyFrame) {
        let state = self.sections.get_mut(id);
        let Some(kept) = &mut state.kept else {
            return self.discard(copy);
        };
        let copies = kept.copies;
        kept.settle(page);
        let frame = self.begin_thaw(copies, page, copy);
        self.end_thaw(frame);
    }

    /// Whether the content differs from the file's, as far as the database knows.
    pub(crate) fn is_modified(&self, pfn: Pfn) -> bool {
        self.entry(pfn).flags.contains(PfnFlags::MODIFIED)
    }

    /// The content is about to be written where it belongs.
    pub(crate) fn clear_modified(&mut self, pfn: Pfn) {
        self.entry_mut(pfn).flags -= PfnFlags::MODIFIED;
    }

    /// One more operation holds the frame, mapped or not; [`Self::release`] ends that.
    pub(crate) fn hold(&mut self, pfn: Pfn) {
        if self.entry(pfn).state().is_listed() {
            self.zone_of(pfn).unlink(pfn);
        }
        *self.entry_mut(pfn).refs_mut() += 1;
    }

    /// A section loses a page. Entries that still map the frame keep it until they go.
    pub(crate) fn forget_page(&mut self, id: SectionId, page: SectionPage) {
        let gone = self.sections.get_mut(id).pages.remove(&page);
        self.disown(gone.as_ref());
    }

    /// What a prototype entry was for is no longer the section's. A page that is being read from a file is freed
    /// by its ticket, one that is mapped or held when that ends, any other at once.
    pub(crate) fn disown(&mut self, proto: Option<&Proto>) {
        match proto {
            Some(&Proto::Resident(frame)) => {
                self.sections.resident -= 1;
                if cfg!(not(mutant = "section_keeps_frame")) {
                    self.let_go(frame);
                }
            }
            Some(&Proto::PageFile(slot)) => self.slots.free(slot),
            Some(Proto::Reading(_) | Proto::Zeroes) | None => {}
        }
    }

    /// A section's frame has no owner any more.
    fn let_go(&mut self, pfn: Pfn) {
        self.forget_original(pfn);
        let listed = self.entry(pfn).state().is_listed();
        if listed {
            self.zone_of(pfn).unlink(pfn);
        }
        self.set_owner(pfn, Owner::None);
        if listed {
            self.zone_of(pfn).push_unowned(pfn, PfnState::Free);
        }
    }

    /// Charges a page that a section is about to have, if its pages are charged one by one. The caller makes
    /// it a page of the section's before it lets the lock go.
    pub(crate) fn charge_page(&mut self, id: SectionId, page: SectionPage) -> Result<(), NoSpace> {
        let state = self.sections.get(id);
        if state.charge != Charge::ByPage || state.pages.contains_key(&page) {
            return Ok(());
        }
        self.charge_more(id, 1)
    }

    /// Charges so many pages more to a section whose pages are charged one by one.
    pub(crate) fn charge_more(&mut self, id: SectionId, pages: u64) -> Result<(), NoSpace> {
        if let Some(allowance) = &self.sections.get(id).allowance
            && !allowance.take(pages)
        {
            return Err(NoSpace);
        }
        let charged = match self.injected_failure() {
            true => Err(NoCommit),
            false => self.commit.charge(pages),
        };
        if charged.is_err()
            && let Some(allowance) = &self.sections.get(id).allowance
        {
            allowance.give(pages);
        }
        charged.map_err(|NoCommit| NoSpace)
    }

    /// A section has lost so many pages for good.
    pub(crate) fn discharge_pages(&mut self, id: SectionId, pages: u64) {
        let state = self.sections.get(id);
        if state.charge == Charge::ByPage {
            state.allowance.iter().for_each(|a| a.give(pages));
            if cfg!(not(mutant = "hole_stays_charged")) {
                self.commit.release(pages);
            }
        }
    }

    /// Takes back the frames of tickets that were dropped, and what sections had that were dropped: what was charged at
    /// once, of their pages so many as can be looked at while others wait for the lock. True if there are more.
    pub(crate) fn reap(&mut self) -> bool {
        let Dropped {
            sections,
            reads,
            writes,
        } = self.sections.dropped();
        for frame in writes {
            self.mark_modified(frame);
            self.release(frame);
        }
        for frame in reads {
            self.release(frame);
        }
        for id in sections {
            let state = self.sections.get_mut(id);
            let pages = state.extent();
            let (charged, allowance) = state.uncharge();
            allowance.iter().for_each(|a| a.give(pages));
            self.commit.release(charged);
        }
        for _ in 0..REAP_AT_ONCE {
            match self.sections.bury_page() {
                Some(proto) => self.disown(Some(&proto)),
                None => return false,
            }
        }
        true
    }
}
