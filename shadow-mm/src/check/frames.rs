//! The database against the walk: states, lists, share counts, clone blocks.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::Violation;
use super::walk::Seen;
use crate::addr::Pfn;
use crate::pfn::{Original, Owner, PfnDatabase, PfnFlags, PfnState, Zone, ZoneKind};
use crate::proto::{Block, BlockContent, BlockId, HeaderId};

pub(super) fn check_frames(db: &PfnDatabase, seen: &mut Seen) -> Result<(), Violation> {
    check_zone(db, ZoneKind::Data, &seen.mapped)?;
    check_zone(db, ZoneKind::Tables, &seen.tables)?;
    for (&frame, &space) in &seen.writers {
        if seen.mapped.get(&frame).is_some_and(|entries| *entries > 1) {
            return Err(Violation::SharedWritable { frame, space });
        }
    }
    check_owners(db, seen)
}

/// Frames in transition and their owners know each other, and the slots that frames have.
fn check_owners(db: &PfnDatabase, seen: &mut Seen) -> Result<(), Violation> {
    for (frame, entry) in db.zone(ZoneKind::Data).iter() {
        let state = entry.state();
        let named = match entry.owner {
            Owner::None => entry.share() == 0 || seen.lost.contains(&frame),
            // Of a mapped frame the walk has looked at the owner.
            Owner::Entry { table, index } => {
                state == PfnState::Active || seen.transition.remove(&frame) == Some((table, index))
            }
            Owner::Entries => seen.forked.contains(&frame),
            Owner::Clone(block) => db.clones.content(block) == BlockContent::Resident(frame),
            // The sections are looked at by themselves.
            Owner::Section { .. } => true,
            Owner::Root | Owner::Supervisor | Owner::Tables => false,
        };
        let modified = entry.flags.contains(PfnFlags::MODIFIED);
        let listed_right = match state {
            PfnState::Standby => !modified && entry.owner != Owner::None,
            PfnState::Modified | PfnState::ModifiedNoWrite => {
                let of_file = match entry.owner {
                    Owner::Section { section, .. } => db.sections.is_of_file(section),
                    _ => false,
                };
                let right = of_file == (state == PfnState::ModifiedNoWrite);
                modified && right && entry.owner != Owner::None
            }
            PfnState::Zeroed | PfnState::Free => entry.owner == Owner::None,
            PfnState::Active | PfnState::InFlight => true,
        };
        if !named || !listed_right {
            return Err(Violation::LostOwner { frame, state });
        }
        if let Original::Slot(slot) = entry.original() {
            seen.add_slot(slot)?;
        }
    }
    match seen.transition.first_key_value() {
        Some((&frame, _)) => {
            let state = db.entry(frame).state();
            Err(Violation::LostOwner { frame, state })
        }
        None => Ok(()),
    }
}

/// Every slot that is taken has exactly one owner: an entry, a clone block, a frame, or a write.
pub(super) fn check_slots(db: &PfnDatabase, seen: &Seen) -> Result<(), Violation> {
    if let Some(&slot) = seen.slots.iter().find(|slot| !db.slots.is_taken(**slot)) {
        return Err(Violation::SharedSlot { slot });
    }
    let counted = seen.slots.len() as u64 + u64::from(db.slots_in_write);
    let taken = u64::from(db.slots.used());
    if taken == counted {
        Ok(())
    } else {
        Err(Violation::WrongSlots { taken, counted })
    }
}

/// `counts` is what the walk counted for each frame of the zone.
fn check_zone(
    db: &PfnDatabase,
    kind: ZoneKind,
    counts: &BTreeMap<Pfn, u32>,
) -> Result<(), Violation> {
    let (zone, tables) = (db.zone(kind), kind == ZoneKind::Tables);
    let listed = PfnState::ALL.map(|state| (state, check_list(zone, state)));
    let mut lists = Vec::new();
    for (state, list) in listed {
        lists.push((state, list?));
    }
    let on_list = |frame: &Pfn, wanted: PfnState| {
        lists
            .iter()
            .all(|(state, list)| list.contains(frame) == (*state == wanted))
    };
    let mut states = [0; PfnState::COUNT];
    for (frame, entry) in zone.iter() {
        let (share, refs, state) = (entry.share(), entry.refs(), entry.state());
        states[state as usize] += 1;
        let counted = counts.get(&frame).copied().unwrap_or(0);
        if share != counted {
            return Err(Violation::WrongShare {
                frame,
                share,
                counted,
            });
        }
        let fits = match state {
            PfnState::Zeroed
            | PfnState::Free
            | PfnState::Standby
            | PfnState::Modified
            | PfnState::ModifiedNoWrite => on_list(&frame, state),
            PfnState::Active => share > 0,
            PfnState::InFlight => share == 0 && refs > 0,
        };
        if !fits || (entry.write_pins() > refs && !tables) {
            return Err(Violation::WrongState {
                frame,
                state,
                share,
                refs,
            });
        }
    }
    check_states(zone, states)?;
    // Frames the database has never given out.
    let unknown = |frame: &Pfn| zone.entry(*frame).state() != PfnState::Active;
    match counts.iter().find(|(frame, _)| unknown(frame)) {
        Some((&frame, &counted)) => Err(Violation::WrongShare {
            frame,
            share: 0,
            counted,
        }),
        None => Ok(()),
    }
}

fn check_states(zone: &Zone, mut states: [u32; PfnState::COUNT]) -> Result<(), Violation> {
    states[PfnState::Zeroed as usize] += zone.untouched();
    for state in PfnState::ALL {
        let (found, believed) = (states[state as usize], zone.in_state(state));
        if found != believed {
            return Err(Violation::WrongList {
                state,
                found,
                believed,
            });
        }
    }
    Ok(())
}

/// The frames on a list, if every one belongs there and none is there twice.
fn check_list(zone: &Zone, state: PfnState) -> Result<BTreeSet<Pfn>, Violation> {
    let mut frames = BTreeSet::new();
    let mut steps = 0;
    for frame in zone.listed(state) {
        steps += 1;
        if zone.entry(frame).state() == state {
            frames.insert(frame);
        }
    }
    let (found, believed) = (frames.len() as u32, zone.list_len(state));
    if found == believed && steps == found && zone.is_linked_both_ways(state) {
        Ok(frames)
    } else {
        Err(Violation::WrongList {
            state,
            found,
            believed,
        })
    }
}

pub(super) fn check_clones(db: &PfnDatabase, seen: &mut Seen) -> Result<(), Violation> {
    let mut total = 0;
    for (id, header) in db.clones.iter() {
        let mut live = 0;
        for (index, block) in (0..).zip(header.blocks()) {
            live += check_block(db, seen, BlockId { header: id, index }, block)?;
        }
        let spaces = seen.headers.get(&id).copied().unwrap_or(0);
        if live != header.live() || spaces != header.spaces() || spaces == 0 || live == 0 {
            return Err(Violation::WrongHeader { header: id });
        }
        total += u64::from(live);
    }
    let mut live = 0;
    for (index, block) in db.clones.lazy.iter() {
        let header = HeaderId::LAZY;
        live += u64::from(check_block(db, seen, BlockId { header, index }, block)?);
    }
    if live != db.clones.lazy.live() {
        let header = HeaderId::LAZY;
        return Err(Violation::WrongHeader { header });
    }
    total += live;
    let dead = seen
        .headers
        .keys()
        .find(|id| db.clones.header(**id).is_none());
    match dead.copied().or((total != db.clones.live_blocks())
        .then(|| first_header(seen))
        .flatten())
    {
        Some(header) => Err(Violation::WrongHeader { header }),
        None => Ok(()),
    }
}

/// One if the block lives, and zero if not.
fn check_block(
    db: &PfnDatabase,
    seen: &mut Seen,
    id: BlockId,
    block: &Block,
) -> Result<u32, Violation> {
    let counted = seen.blocks.get(&id).copied().unwrap_or(0);
    if block.count() != counted {
        return Err(Violation::WrongBlock {
            block: id,
            count: block.count(),
            counted,
        });
    }
    match block.content() {
        Some(BlockContent::PageFile(slot)) => seen.add_slot(slot)?,
        Some(BlockContent::Resident(frame)) if db.entry(frame).owner != Owner::Clone(id) => {
            let state = db.entry(frame).state();
            return Err(Violation::LostOwner { frame, state });
        }
        Some(BlockContent::Resident(_) | BlockContent::Zero) | None => {}
    }
    Ok(u32::from(counted > 0))
}

fn first_header(seen: &Seen) -> Option<HeaderId> {
    seen.headers.keys().next().copied()
}
