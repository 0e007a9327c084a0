//! Reading pages back from the page file: one read for a run of slots (system 6).
//!
//! While a page is read its frame is in transition and marked as being read; whoever else wants it
//! *collides*, waits until the read has ended one way or the other, and looks again. The pages around
//! the wanted one end in transition, on the standby list, and cost no more than a soft fault if they are
//! wanted, nor more than their frames if they are not.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Denied;
use crate::addr::{EntryIndex, Level, PAGE_SIZE, Pfn, Vpn};
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOf, FaultOutcome, IoFailed};
use crate::page_file::{PageIn, Slot};
use crate::pfn::{Owner, PfnDatabase, Taken, Want};
use crate::proto::BlockContent;
use crate::pte::Entry;
use crate::shadow::Cursor;
use crate::space::Space;
use crate::space::fault::resolution;
use crate::space::transition::Absent;

/// Neighbouring pages whose slots are neighbours too.
struct Cluster {
    first: Vpn,
    slot: Slot,
    pages: usize,
    /// How many of them lie before the wanted one.
    before: usize,
}

impl<P: Platform> Manager<P> {
    /// Reserves frames for the page and its neighbours, and says what to read into them.
    pub(super) fn start_page_in(
        &self,
        space: &Arc<Space<P>>,
        absent: Absent,
        slot: Slot,
    ) -> FaultOutcome<P> {
        let cluster = self.cluster(space, absent, slot);
        let demand = |data, extra| Demand {
            tables: 0,
            data,
            extra,
            want: Want::Anything,
        };
        let ahead = cluster.pages - cluster.before - 1;
        let short = self.pfns.lock().short();
        let whole = if short {
            None
        } else {
            self.reserve(demand(cluster.before + 1, ahead))
        };
        let (frames, first, slot) = match whole {
            Some(reserve) => (reserve.data, cluster.first, cluster.slot),
            None => match self.reserve(demand(1, 0)) {
                Some(reserve) => (reserve.data, absent.vpn, slot),
                None => return FaultOutcome::NoMemory,
            },
        };
        match self.begin_read(space, absent, (first, slot), frames) {
            Some(ticket) => FaultOutcome::PageIn(ticket),
            None => FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0)),
        }
    }

    /// The pages around the wanted one in its aligned window that one read can fill.
    fn cluster(&self, space: &Space<P>, absent: Absent, slot: Slot) -> Cluster {
        let cursor = space.cursor(&self.store);
        let db = self.pfns.lock();
        let at = absent.vpn.get() % u64::from(self.clusters.page_file);
        let alike = |ahead: i64| {
            let vpn = absent
                .vpn
                .get()
                .checked_add_signed(ahead)
                .and_then(Vpn::new)?;
            let expected = i64::from(slot.get()).checked_add(ahead)?;
            let index = vpn.index(Level::Leaf);
            let found = slot_of(&db, cursor.leaf(absent.place.0, index))?;
            (i64::from(found.get()) == expected).then_some((vpn, found))
        };
        let mut start = (absent.vpn, slot);
        let mut before = 0;
        while before < at as usize
            && let Some(found) = alike(-(before as i64) - 1)
        {
            start = found;
            before += 1;
        }
        let most = (u64::from(self.clusters.page_file) - at - 1) as i64;
        let ahead = (1..=most).take_while(|n| alike(*n).is_some()).count();
        Cluster {
            first: start.0,
            slot: start.1,
            pages: before + 1 + ahead,
            before,
        }
    }

    /// Puts frames in transition for the run of pages that still are where they were; `None` if the
    /// wanted one is not.
    fn begin_read(
        &self,
        space: &Arc<Space<P>>,
        absent: Absent,
        (first, slot): (Vpn, Slot),
        mut frames: Vec<Taken>,
    ) -> Option<PageIn<P>> {
        let cursor = space.cursor(&self.store);
        let mut db = self.pfns.lock();
        let table = absent.place.0;
        let at = |ahead: u64| -> Option<((Pfn, EntryIndex), Slot)> {
            let index = first.checked_add(ahead)?.index(Level::Leaf);
            Some(((table, index), slot.ahead(ahead as u32)?))
        };
        let still = |db: &PfnDatabase, ahead: u64| {
            at(ahead).is_some_and(|((table, index), slot)| {
                slot_of(db, cursor.leaf(table, index)) == Some(slot)
            })
        };
        let wanted = absent.vpn.get() - first.get();
        let mut run = wanted..wanted;
        if still(&db, wanted) {
            run.end = wanted + 1;
            while run.start > 0 && still(&db, run.start - 1) {
                run.start -= 1;
            }
            while run.end < frames.len() as u64 && still(&db, run.end) {
                run.end += 1;
            }
        }
        let pages: Vec<Pfn> = run
            .clone()
            .filter_map(|ahead| {
                let (at, frame) = at(ahead).zip(frames.pop())?;
                Some(self.read_into(&mut db, &cursor, at, frame))
            })
            .collect();
        frames.into_iter().for_each(|frame| db.give_back(frame));
        let (_, slot) = at(run.start).filter(|_| !pages.is_empty())?;
        Some(PageIn {
            fault: Some(FaultOf {
                space: Arc::clone(space),
                va: absent.vpn.va(),
                access: absent.access,
            }),
            slot,
            frames: pages,
            wanted: (wanted - run.start) as usize,
        })
    }

    /// Gives a page in the page file a frame to be read into.
    fn read_into(
        &self,
        db: &mut PfnDatabase,
        cursor: &Cursor<'_, P::Store>,
        (place, slot): ((Pfn, EntryIndex), Slot),
        frame: Taken,
    ) -> Pfn {
        let entry = cursor.leaf(place.0, place.1);
        let owner = match entry {
            Entry::Prototype(block) => Owner::Clone(block),
            _ => Owner::Entry {
                table: place.0,
                index: place.1,
            },
        };
        let pfn = db.begin_read(frame, owner, slot);
        match entry {
            Entry::Prototype(block) => db.clones.set_content(block, BlockContent::Resident(pfn)),
            _ => {
                cursor.replace(place, Entry::Transition(pfn));
            }
        }
        pfn
    }

    /// Takes what a read of the page file brought: `result` says how many bytes, counted from the
    /// ticket's first slot.
    ///
    /// Pages that were not read go back to the page file; if the wanted one is among them the answer is
    /// [`Denied::IoError`]. Whoever waited looks again, and reads for itself. A page that was wanted without a
    /// fault is in memory then: [`FaultOutcome::Collided`] says to look again.
    pub fn complete_page_in(
        &self,
        ticket: PageIn<P>,
        result: Result<usize, IoFailed>,
    ) -> FaultOutcome<P> {
        let PageIn {
            fault,
            frames,
            wanted,
            ..
        } = ticket;
        let read = result.map_or(0, |bytes| bytes / PAGE_SIZE);
        let mut arrived = None;
        let mut db = self.pfns.lock();
        for (n, pfn) in frames.into_iter().enumerate() {
            if n == wanted && n < read {
                // The ticket's reference keeps the frame until it is mapped.
                db.now_read(pfn);
                arrived = Some(pfn);
            } else {
                db.end_read(pfn, n < read, &self.store);
            }
        }
        drop(db);
        let outcome = match arrived {
            Some(frame) => {
                let outcome = match fault {
                    Some(fault) => self.map_paged_in(&fault, frame),
                    None => FaultOutcome::Collided,
                };
                self.pfns.lock().release(frame);
                outcome
            }
            None => FaultOutcome::Denied(Denied::IoError),
        };
        self.count(&outcome);
        outcome
    }

    /// Maps a page that was read, if it still is what its page number means.
    fn map_paged_in(
        &self,
        FaultOf { space, va, access }: &FaultOf<P>,
        frame: Pfn,
    ) -> FaultOutcome<P> {
        let (vpn, access) = (va.vpn(), *access);
        let mut state = space.state.lock();
        let again = FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0));
        if !state.alive {
            return again;
        }
        let found = space.cursor(&self.store).lookup(vpn);
        let same = match found.map(|found| found.entry) {
            Some(Entry::Transition(found)) => found == frame,
            Some(Entry::Prototype(block)) => {
                self.pfns.lock().clones.content(block) == BlockContent::Resident(frame)
            }
            // A page of shared memory.
            Some(Entry::Empty) | None => {
                let source = state.source(vpn);
                let page = source.and_then(|source| Some((source.page(vpn)?, source.section)));
                page.is_some_and(|(page, section)| {
                    self.pfns.lock().mappable(section.id(), page) == Some(frame)
                })
            }
            Some(_) => false,
        };
        let vad = state.vads.find(vpn);
        if !same || !vad.is_some_and(|vad| vad.prot.allows(access)) {
            return again;
        }
        match self.resolve(space, &mut state, vpn, access) {
            FaultOutcome::Resolved(mut done) => {
                done.kind = FaultKind::PagedIn;
                FaultOutcome::Resolved(done)
            }
            other => other,
        }
    }
}

/// The slot an entry's page is in, if it is in one.
fn slot_of(db: &PfnDatabase, entry: Entry) -> Option<Slot> {
    match entry {
        Entry::PageFile(slot) => Some(slot),
        Entry::Prototype(block) => match db.clones.content(block) {
            BlockContent::PageFile(slot) => Some(slot),
            BlockContent::Resident(_) | BlockContent::Zero => None,
        },
        Entry::Empty
        | Entry::Valid(_)
        | Entry::Frozen(_)
        | Entry::Transition(_)
        | Entry::DemandZero(_)
        | Entry::Decommitted => None,
    }
}
