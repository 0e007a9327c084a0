//! The frames of sections: who has them, and how they come and go.

use alloc::vec::Vec;

use super::database::PfnDatabase;
use super::entry::{Owner, PfnFlags, PfnState};
use super::token::ReadyFrame;
use crate::addr::Pfn;
use crate::proto::{Dropped, Proto, SectionId, SectionPage};
use crate::pte::{EntryFlags, ValidEntry};

impl PfnDatabase {
    /// A filled frame becomes a section's page. The token's reference is the section's from now on.
    pub(crate) fn make_resident(&mut self, id: SectionId, page: SectionPage, frame: ReadyFrame) {
        let pfn = frame.into_pfn();
        self.set_owner(pfn, Owner::Section { section: id, page });
        let pages = &mut self.sections.get_mut(id).pages;
        let old = pages.insert(page, Proto::Resident(pfn));
        debug_assert!(
            !matches!(old, Some(Proto::Resident(_))),
            "{page:?} of a section was made resident twice"
        );
        self.sections.resident += 1;
    }

    /// One more entry maps a frame that a section has.
    pub(crate) fn share_prototype(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert!(entry.share() > 0 || entry.refs() > 0, "{pfn:?} is free");
        *entry.share_mut() += 1;
        if entry.share() == 1 {
            self.zone_of(pfn).set_state(pfn, PfnState::Active);
        }
    }

    /// Whether an entry maps a section's own frame, or one its section has lost.
    pub(crate) fn is_sections(&self, entry: ValidEntry) -> bool {
        entry.flags.contains(EntryFlags::PROTOTYPE) && self.block_of(entry.frame).is_none()
    }

    /// Whether the content differs from the file's, as far as the database knows.
    pub(crate) fn is_modified(&self, pfn: Pfn) -> bool {
        self.entry(pfn).flags.contains(PfnFlags::MODIFIED)
    }

    /// The content is about to be written where it belongs.
    pub(crate) fn clear_modified(&mut self, pfn: Pfn) {
        self.entry_mut(pfn).flags -= PfnFlags::MODIFIED;
    }

    /// One more operation holds the frame; [`Self::release`] ends that.
    pub(crate) fn hold(&mut self, pfn: Pfn) {
        *self.entry_mut(pfn).refs_mut() += 1;
    }

    /// A section loses a page. Entries that still map the frame keep it until they go.
    pub(crate) fn forget_page(&mut self, id: SectionId, page: SectionPage) {
        let gone = self.sections.get_mut(id).pages.remove(&page);
        self.disown(gone.as_ref());
    }

    /// What a prototype entry was for is no longer the section's. A page that is being read is freed by
    /// its ticket.
    pub(crate) fn disown(&mut self, proto: Option<&Proto>) {
        if let Some(&Proto::Resident(frame)) = proto {
            self.set_owner(frame, Owner::None);
            self.sections.resident -= 1;
            if cfg!(not(mutant = "section_keeps_frame")) {
                self.release(frame);
            }
        }
    }

    /// Takes back the frames of sections and tickets that were dropped.
    pub(crate) fn reap(&mut self) {
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
        for section in sections {
            for proto in section.pages.into_values() {
                self.disown(Some(&proto));
            }
        }
    }

    /// Frees up to `most` pages of files that nobody maps or holds and that can be read again; gives back
    /// how many.
    pub(crate) fn evict_section_pages(&mut self, most: usize) -> usize {
        let mut victims = Vec::new();
        for (id, section) in self.sections.iter().filter(|(_, s)| s.file) {
            let resident = section
                .pages
                .iter()
                .filter_map(|(page, proto)| match proto {
                    Proto::Resident(frame) => Some((*page, *frame)),
                    Proto::Reading(_) => None,
                });
            let idle = resident.filter(|(_, frame)| self.is_idle(*frame));
            let left = most - victims.len();
            victims.extend(idle.take(left).map(|(page, _)| (id, page)));
            if victims.len() == most {
                break;
            }
        }
        for (id, page) in &victims {
            self.forget_page(*id, *page);
        }
        victims.len()
    }

    /// Whether only its section has the frame, and the file has its content.
    pub(crate) fn is_idle(&self, pfn: Pfn) -> bool {
        let entry = self.entry(pfn);
        entry.share() == 0 && entry.refs() == 1 && !self.is_modified(pfn)
    }
}
