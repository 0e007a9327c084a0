//! The sections against the database: who has which frame.

use alloc::sync::Arc;

use super::Violation;
use super::walk::Seen;
use crate::pfn::{Owner, PfnDatabase, ZoneKind};
use crate::proto::Proto;
use crate::section::Charge;

pub(super) fn check_sections(db: &PfnDatabase, seen: &mut Seen) -> Result<(), Violation> {
    let mut counted = 0;
    for (id, section) in db.sections.iter() {
        for (&page, proto) in &section.pages {
            let wrong = Violation::WrongPrototype { section: id, page };
            let fits = section.contains(page)
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
