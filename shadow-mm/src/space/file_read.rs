//! Reading a section's pages from its file: hand out one read for a run, take what it brought
//! (system 6, prefetch into transition).
//!
//! A run is an aligned window of the file, larger if the guest walks upwards. Its absent pages each get a frame and become *being read*,
//! so that whoever wants one meanwhile waits for this read instead of starting another. Pages in the
//! middle that are resident, or being read by somebody else, are covered by one dummy frame, so that a
//! single contiguous read serves the run; pages that are not absent at its ends are left out.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Denied;
use crate::addr::{PAGE_SIZE, Vpn};
use crate::backend::Platform;
use crate::limits::Clusters;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOf, FaultOutcome, IoFailed, IoTicket};
use crate::pfn::{FreeFrame, PfnDatabase, Taken, Want};
use crate::proto::{Claim, Direction, Proto, Record, Run, Section, SectionId, SectionPage};
use crate::space::SpaceState;
use crate::vad::FaultAround;

/// How often a run is planned anew because others changed the section meanwhile.
const PLANS: usize = 4;

/// How many pages a read of a file at `vpn` should be for: more and more if the guest reads on where the
/// last read ended.
pub(super) fn read_window<B: Clone + Eq>(
    state: &SpaceState<B>,
    vpn: Vpn,
    clusters: Clusters,
) -> u8 {
    let around = state.vads.find(vpn).map(|vad| vad.around);
    match around {
        Some(around) if around.next == vpn.get() => {
            let more = around.window.saturating_mul(2);
            more.clamp(clusters.file, clusters.file_most.max(clusters.file))
        }
        Some(_) | None => clusters.file,
    }
}

/// Remembers where a read for the page at `vpn` ends.
pub(super) fn note_read<P: Platform>(
    state: &mut SpaceState<P::Backing>,
    vpn: Vpn,
    window: u8,
    ticket: &IoTicket<P>,
) {
    let end = ticket.first.get() + ticket.tokens.len() as u64;
    if let Some(vad) = state.vads.find_mut(vpn) {
        vad.around = FaultAround {
            next: vpn.get() + end - ticket.wanted.get(),
            window,
            ..vad.around
        };
    }
}

/// What became of the wish to read.
pub(super) enum Started<P: Platform> {
    Read(IoTicket<P>),
    /// The page is not absent any more.
    Again,
    NoMemory,
}

/// Pages of a read, from `first` on: whether each gets a frame of its own.
#[derive(PartialEq, Eq)]
struct Plan {
    first: SectionPage,
    own: Vec<bool>,
}

impl Plan {
    /// The run around an absent page, in an aligned window of so many pages; `None` if the page is not
    /// absent.
    fn new(db: &PfnDatabase, id: SectionId, wanted: SectionPage, pages: u8) -> Option<Self> {
        let section = db.sections.get(id);
        let absent = |page: u64| {
            let page = SectionPage::new(page).filter(|page| section.contains(*page));
            page.is_some_and(|page| !section.pages.contains_key(&page))
        };
        if !absent(wanted.get()) {
            return None;
        }
        let base = wanted.get() - wanted.get() % u64::from(pages);
        let window = base..base + u64::from(pages);
        let first = window.clone().find(|page| absent(*page))?;
        let last = window.rev().find(|page| absent(*page))?;
        Some(Self {
            first: SectionPage::new(first)?,
            own: (first..=last).map(absent).collect(),
        })
    }

    fn frames(&self) -> usize {
        let own = self.own.iter().filter(|own| **own).count();
        own + usize::from(self.needs_dummy())
    }

    fn needs_dummy(&self) -> bool {
        self.own.contains(&false)
    }
}

impl<P: Platform> Manager<P> {
    /// Reserves frames for an absent page of a file and for its absent neighbours in a window of so many
    /// pages, and says what to read into them. A run that would leave frames short is refused for the page
    /// alone.
    pub(super) fn start_read(
        &self,
        section: &Section<P::Backing>,
        (wanted, window): (SectionPage, u8),
        fault: Option<FaultOf<P>>,
    ) -> Started<P> {
        let id = section.id();
        let mut short = false;
        for _ in 0..PLANS {
            let mut db = self.pfns.lock();
            short |= db.short();
            let window = if short { 1 } else { window };
            let Some(plan) = Plan::new(&db, id, wanted, window) else {
                return Started::Again;
            };
            drop(db);
            let demand = Demand {
                tables: 0,
                data: plan.frames(),
                extra: 0,
                want: Want::Anything,
            };
            let Some(reserve) = self.reserve(demand) else {
                if short {
                    return Started::NoMemory;
                }
                short = true;
                continue;
            };
            db = self.pfns.lock();
            if Plan::new(&db, id, wanted, window).as_ref() == Some(&plan) {
                return Started::Read(issue(
                    &mut db,
                    section,
                    &plan,
                    (wanted, fault, reserve.data),
                ));
            }
            drop(db);
            self.give_back(reserve);
        }
        Started::Again
    }

    /// Takes what a read brought: `result` says how many bytes, counted from the ticket's start.
    ///
    /// The answer is that of the fault, made again: [`FaultOutcome::Resolved`] if all is well. A page
    /// the read did not reach is [`Denied::BeyondEnd`] (the file became shorter), a failed read
    /// [`Denied::IoError`], for the fault and for all who wait for the ticket. A page that was wanted without a fault is in
    /// memory then: [`FaultOutcome::Collided`] says to look again.
    pub fn complete_read(
        &self,
        mut ticket: IoTicket<P>,
        result: Result<usize, IoFailed>,
    ) -> FaultOutcome<P> {
        let denied = match result {
            Err(IoFailed) => Some(Denied::IoError),
            Ok(bytes) => {
                let read = bytes.min(ticket.length).div_ceil(PAGE_SIZE) as u64;
                let reached = ticket.first.get() + read > ticket.wanted.get();
                (!reached).then_some(Denied::BeyondEnd)
            }
        };
        let fault = ticket.fault.take();
        self.finish_read(ticket, result);
        let outcome = match (denied, fault) {
            (Some(denied), _) => FaultOutcome::Denied(denied),
            (None, Some(FaultOf { space, va, access })) => {
                self.resolve(&space, &mut space.state.lock(), va.vpn(), access)
            }
            (None, None) => FaultOutcome::Collided,
        };
        let outcome = match outcome {
            FaultOutcome::Resolved(mut resolution) => {
                if resolution.kind == FaultKind::Mapped {
                    resolution.kind = FaultKind::FileRead;
                }
                FaultOutcome::Resolved(resolution)
            }
            other => other,
        };
        self.count(&outcome);
        outcome
    }

    /// Makes the pages that were read the section's, and ends the wait of others.
    fn finish_read(&self, ticket: IoTicket<P>, result: Result<usize, IoFailed>) {
        let IoTicket {
            section,
            first,
            length,
            tokens,
            dummy,
            claim,
            ..
        } = ticket;
        let id = section.id();
        let bytes = result.map_or(0, |bytes| bytes.min(length));
        let page_of = |n: usize| SectionPage::new(first.get() + n as u64);
        let valid: Vec<usize> = {
            let db = self.pfns.lock();
            let section = db.sections.get(id);
            let left = |n: usize| bytes.saturating_sub(n * PAGE_SIZE).min(PAGE_SIZE);
            let valid = |n| page_of(n).map_or(0, |page| section.valid(page).min(left(n)));
            (0..tokens.len()).map(valid).collect()
        };
        // Outside the PFN lock: what the read did not bring is zeroed.
        let filled = tokens.into_iter().zip(valid).map(|(token, valid)| {
            let token = token?;
            Some(match valid {
                0 => Err(token),
                valid => Ok(token.read_in(valid, &self.store)),
            })
        });
        let filled: Vec<_> = filled.collect();
        let mut db = self.pfns.lock();
        for (n, frame) in filled.into_iter().enumerate() {
            let (Some(frame), Some(page)) = (frame, page_of(n)) else {
                continue;
            };
            let pages = &mut db.sections.get_mut(id).pages;
            // A truncation meanwhile took the page away.
            let ours = matches!(pages.get(&page), Some(Proto::Reading(record))
                if Arc::ptr_eq(record, claim.record()));
            let ours = ours || cfg!(mutant = "skipped_recheck");
            if ours {
                pages.remove(&page);
            }
            match frame {
                Ok(frame) if ours => db.make_resident(id, page, frame),
                Ok(frame) => db.discard(frame),
                Err(token) => db.give_back(Taken::Free(token)),
            }
        }
        if let Some(dummy) = dummy {
            db.give_back(Taken::Free(dummy));
        }
        db.sections.get_mut(id).end_run(claim.record());
        match result {
            Ok(_) => claim.done(),
            Err(IoFailed) => claim.failed(),
        }
    }
}

/// Marks the plan's absent pages as being read into the frames.
fn issue<P: Platform>(
    db: &mut PfnDatabase,
    section: &Section<P::Backing>,
    plan: &Plan,
    (wanted, fault, frames): (SectionPage, Option<FaultOf<P>>, Vec<Taken>),
) -> IoTicket<P> {
    let mut frames = frames.into_iter().map(Taken::forget_content);
    let dummy = if plan.needs_dummy() {
        frames.next()
    } else {
        None
    };
    let bell = Arc::clone(&db.sections.bell);
    let state = db.sections.get_mut(section.id());
    let record = Arc::new(Record::default());
    let mut tokens: Vec<Option<FreeFrame>> = Vec::with_capacity(plan.own.len());
    for (n, own) in plan.own.iter().enumerate() {
        let page = SectionPage::new(plan.first.get() + n as u64).filter(|_| *own);
        if let Some(page) = page {
            state
                .pages
                .insert(page, Proto::Reading(Arc::clone(&record)));
        }
        tokens.push(page.and_then(|_| frames.next()));
    }
    let named = tokens.iter().map(|t| t.as_ref().or(dummy.as_ref()));
    let named: Vec<_> = named.flatten().map(FreeFrame::pfn).collect();
    let held = tokens.iter().flatten().chain(&dummy).map(FreeFrame::pfn);
    state.runs.push(Run {
        direction: Direction::Read,
        first: plan.first,
        span: plan.own.len(),
        frames: held.collect(),
        record: Arc::clone(&record),
    });
    let room = (plan.own.len() * PAGE_SIZE) as u64;
    let left = state.bytes.saturating_sub(plan.first.offset());
    IoTicket {
        section: section.clone(),
        first: plan.first,
        wanted,
        fault,
        length: room.min(left) as usize,
        frames: named,
        tokens,
        dummy,
        claim: Claim::new(&record, &bell, section.id()),
    }
}
