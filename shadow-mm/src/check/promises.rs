//! Shared tables: who names them, and what was promised for the day they are not shared any more.

use super::walk::Seen;
use super::{Promised, Violation};
use crate::pfn::{Owner, PfnDatabase, PfnState, ZoneKind};

pub(super) fn check_promises(db: &PfnDatabase, seen: &Seen) -> Result<(), Violation> {
    check_parents(db, seen)?;
    let blocks = &db.clones.lazy;
    let zone = db.zone(ZoneKind::Tables);
    let free = zone.available() + zone.in_state(PfnState::InFlight);
    // What is in flight comes back before anybody needs it.
    let lacking = db.promised_tables().saturating_sub(free.into());
    let forked = seen.forked.len() as u64;
    let counts = [
        (
            Promised::Blocks,
            blocks.promised(),
            seen.shared_private + forked,
        ),
        (Promised::Forked, blocks.forked, forked),
        (Promised::Tables, db.charged_tables(), seen.charged_tables),
        (Promised::Frames, lacking, 0),
        (Promised::Pages, db.charged_for_blocks(), blocks.pages()),
    ];
    for (what, promised, counted) in counts {
        if promised != counted {
            return Err(Violation::WrongPromise {
                what,
                promised,
                counted,
            });
        }
    }
    Ok(())
}

fn check_parents(db: &PfnDatabase, seen: &Seen) -> Result<(), Violation> {
    for &table in seen.tables.keys() {
        let entry = db.entry(table);
        if matches!(entry.owner, Owner::Root | Owner::Supervisor) {
            continue;
        }
        let (parents, counted) = (
            entry.parents(),
            seen.parents.get(&table).copied().unwrap_or(0),
        );
        if parents != counted {
            return Err(Violation::WrongParents {
                table,
                parents,
                counted,
            });
        }
    }
    Ok(())
}
