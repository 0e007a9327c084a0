//! The sections against the database: who has which frame.

use alloc::sync::Arc;

use super::Violation;
use super::walk::Seen;
use crate::pfn::{Owner, PfnDatabase, ZoneKind};
use crate::proto::{Proto, SectionId, SectionPage, SectionState};
use crate::section::Charge;

pub(super) fn check_sections(db: &PfnDatabase, seen: &mut Seen) -> Result<(), Violation> {
    let mut counted = 0;
    for (id, section) in db.sections.iter() {
        for (&page, proto) in &section.pages {
            let wrong = Violation::WrongPrototype { section: id, page };
            let fits = section.contains(page)
                && !section.is_below(page)
                && match proto {
                    Proto::Resident(frame) => {
                        counted += 1;
                        let entry = db.entry(*frame);
                        let owner = Owner::Section { section: id, page };
                        entry.owner == owner
                    }
                    Proto::PageFile(slot) => {
                        seen.add_slot(*slot)?;
                        !section.file
                    }
                    Proto::Zeroes => section.charge == Charge::ByPage,
                    Proto::Reading(record) => section
                        .runs
                        .iter()
                        .any(|run| Arc::ptr_eq(&run.record, record)),
                };
            if !fits {
                return Err(wrong);
            }
        }
    }
    let mut keeping = 0;
    for (id, section) in db.sections.iter() {
        check_frozen(id, section)?;
        check_image(db, id, section)?;
        keeping += u32::from(section.kept.is_some());
        check_kept(db, id, section)?;
    }
    if keeping != db.sections.keeping {
        let (counted, believed) = (keeping.into(), db.sections.keeping.into());
        return Err(Violation::WrongSections { counted, believed });
    }
    // Every frame that says a section owns it is that section's page.
    for (frame, entry) in db.zone(ZoneKind::Data).iter() {
        if let Owner::Section { section, page } = entry.owner {
            let named = db.sections.find(section).and_then(|s| s.resident(page));
            if named != Some(frame) {
                return Err(Violation::WrongPrototype { section, page });
            }
        }
    }
    let believed = db.sections.resident;
    if counted == believed {
        Ok(())
    } else {
        Err(Violation::WrongSections { counted, believed })
    }
}

/// What was put aside of a section that is kept is settled, and nothing else is in the copies.
fn check_kept(db: &PfnDatabase, id: SectionId, section: &SectionState) -> Result<(), Violation> {
    let Some(kept) = &section.kept else {
        return Ok(());
    };
    let copies = db.sections.find(kept.copies);
    let mut aside = copies.into_iter().flat_map(|copies| copies.pages.keys());
    match aside.find(|page| kept.is_pending(**page)) {
        Some(&page) => Err(Violation::WrongPrototype { section: id, page }),
        None => Ok(()),
    }
}

/// What a section has in a layer or an image lies before its end, and is counted.
fn check_frozen(id: SectionId, section: &SectionState) -> Result<(), Violation> {
    let Some(frozen) = &section.frozen else {
        return Ok(());
    };
    let mut counted = 0;
    for run in frozen.runs(0..SectionPage::COUNT) {
        counted += run.count;
        let last = SectionPage::new(run.first + run.count - 1);
        if let Some(page) = last.filter(|page| !section.contains(*page)) {
            return Err(Violation::WrongPrototype { section: id, page });
        }
    }
    let believed = frozen.count();
    match counted == believed {
        true => Ok(()),
        false => Err(Violation::WrongSections { counted, believed }),
    }
}

/// An image that a section has pages of lives, is over a file, and has them.
fn check_image(db: &PfnDatabase, id: SectionId, section: &SectionState) -> Result<(), Violation> {
    let frozen = section.frozen.as_ref();
    let Some((image, end)) = frozen.and_then(|f| Some((f.image()?, f.stored_end()))) else {
        return Ok(());
    };
    let image = db.sections.find(image);
    if image.is_some_and(|image| image.file && end <= image.page_count()) {
        return Ok(());
    }
    match SectionPage::new(0) {
        Some(page) => Err(Violation::WrongPrototype { section: id, page }),
        None => Ok(()),
    }
}
