//! The database against the walk: states, lists, share counts, clone blocks.

use alloc::collections::{BTreeMap, BTreeSet};

use super::Violation;
use super::walk::Seen;
use crate::addr::Pfn;
use crate::pfn::{PfnDatabase, PfnState, Zone, ZoneKind};
use crate::proto::BlockId;

pub(super) fn check_frames(db: &PfnDatabase, seen: &Seen) -> Result<(), Violation> {
    check_zone(db.zone(ZoneKind::Data), &seen.mapped)?;
    check_zone(db.zone(ZoneKind::Tables), &seen.tables)?;
    for (&frame, &space) in &seen.writers {
        if seen.mapped.get(&frame).is_some_and(|entries| *entries > 1) {
            return Err(Violation::SharedWritable { frame, space });
        }
    }
    Ok(())
}

/// `counts` is what the walk counted for each frame of the zone.
fn check_zone(zone: &Zone, counts: &BTreeMap<Pfn, u32>) -> Result<(), Violation> {
    let zeroed = check_list(zone, PfnState::Zeroed)?;
    let free = check_list(zone, PfnState::Free)?;
    let mut states = [0; PfnState::COUNT];
    for (frame, entry) in zone.iter() {
        let (share, refs, state) = (entry.share, entry.refs, entry.state);
        states[state as usize] += 1;
        let counted = counts.get(&frame).copied().unwrap_or(0);
        if share != counted {
            return Err(Violation::WrongShare {
                frame,
                share,
                counted,
            });
        }
        let idle = share == 0 && refs == 0;
        let fits = match state {
            PfnState::Zeroed => idle && zeroed.contains(&frame),
            PfnState::Free => idle && free.contains(&frame),
            PfnState::Active => share > 0,
            PfnState::InFlight => share == 0 && refs > 0,
        };
        if !fits || entry.write_pins > refs {
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
    let unknown = |frame: &Pfn| zone.entry(*frame).state != PfnState::Active;
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
    for state in [
        PfnState::Zeroed,
        PfnState::Free,
        PfnState::Active,
        PfnState::InFlight,
    ] {
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
        if zone.entry(frame).state == state {
            frames.insert(frame);
        }
    }
    let (found, believed) = (frames.len() as u32, zone.list_len(state));
    if found == believed && steps == found {
        Ok(frames)
    } else {
        Err(Violation::WrongList {
            state,
            found,
            believed,
        })
    }
}

pub(super) fn check_clones(db: &PfnDatabase, seen: &Seen) -> Result<(), Violation> {
    let mut total = 0;
    for (id, header) in db.clones.iter() {
        let mut live = 0;
        for (index, block) in header.blocks().iter().enumerate() {
            let block_id = BlockId {
                header: id,
                index: index as u32,
            };
            let counted = seen.blocks.get(&block_id).copied().unwrap_or(0);
            if block.count() != counted {
                let (block, count) = (block_id, block.count());
                return Err(Violation::WrongBlock {
                    block,
                    count,
                    counted,
                });
            }
            live += u32::from(counted > 0);
        }
        let spaces = seen.headers.get(&id).copied().unwrap_or(0);
        if live != header.live() || spaces != header.spaces() || spaces == 0 || live == 0 {
            return Err(Violation::WrongHeader { header: id });
        }
        total += u64::from(live);
    }
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

fn first_header(seen: &Seen) -> Option<crate::proto::HeaderId> {
    seen.headers.keys().next().copied()
}
