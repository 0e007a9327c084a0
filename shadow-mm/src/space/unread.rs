//! A page of a section that is in an image: a snapshot's shared memory, and its files in memory, of which a page is read
//! when it is wanted for the first time.
//!
//! The section over the image has the page read, as for any other view of it, so that a second reader waits for the first. The
//! page is then copied into a frame of the section's own, together with what else was read around it, and is cut out of what
//! the section has in the image. Nobody can have an entry for it before that, so nothing has to be flushed: that is what sets
//! it apart from a thaw ([`Manager::thaw`]). The image's frames go at once if nobody maps them: they are not wanted twice.
//!
//! What was read counts as modified: if frames are short it goes to the page file, as any other page of shared memory.

use alloc::vec::Vec;

use crate::addr::Pfn;
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultOf, FaultOutcome, IoTicket};
use crate::pfn::{PfnDatabase, PfnState, Want};
use crate::proto::{Pending, Proto, Section, SectionId, SectionPage};
use crate::space::file_read::Started;
use crate::stats::add;

/// What it takes to have a page out of an image.
pub(crate) enum Unread<P: Platform> {
    /// This is to be read.
    Read(IoTicket<P>),
    /// Somebody reads it.
    Wait(Pending),
    /// It is the section's now, or was cut: look again.
    Again,
    /// No frame is left.
    NoMemory,
}

/// A page of a section that is to be copied: itself, the image's page, and the frame that has it, held.
struct Copied {
    page: SectionPage,
    stored: SectionPage,
    from: Pfn,
}

impl<P: Platform> Manager<P> {
    /// Has a page of an image be the section's own, or says what must be read for that. A read is for an aligned window of the
    /// image, of the same size whoever asks: what of it was copied is not there to be found, and would be read again.
    pub(crate) fn take_from_image(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
        fault: Option<FaultOf<P>>,
    ) -> Unread<P> {
        let Some(image) = section.image() else {
            debug_assert!(false, "{page:?} of {section:?} is in no image");
            return Unread::NoMemory;
        };
        let stored = {
            let db = self.pfns.lock();
            let Some(stored) = db.sections.get(section.id()).unread(page) else {
                return Unread::Again;
            };
            match db.sections.get(image.id()).pages.get(&stored) {
                Some(Proto::Reading(record)) => return Unread::Wait(Pending::new(record)),
                Some(Proto::Resident(_)) => None,
                Some(Proto::PageFile(_) | Proto::Zeroes) | None => Some(stored),
            }
        };
        let window = self.clusters.file;
        match stored.map(|stored| self.start_read(image, (stored, window), fault)) {
            Some(Started::Read(ticket)) => Unread::Read(ticket),
            Some(Started::NoMemory) => Unread::NoMemory,
            Some(Started::Again) => Unread::Again,
            None => self.copy_from_image(section, image, page),
        }
    }

    /// The same, for an embedder that has no fault; counted as one.
    pub(crate) fn take_for_bytes(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
    ) -> Unread<P> {
        match self.take_from_image(section, page, None) {
            Unread::Read(ticket) => {
                let outcome = FaultOutcome::Read(ticket);
                self.count(&outcome);
                match outcome {
                    FaultOutcome::Read(ticket) => Unread::Read(ticket),
                    _ => Unread::Again,
                }
            }
            other => other,
        }
    }

    /// Copies a page that the image has in memory, and those around it.
    fn copy_from_image(
        &self,
        section: &Section<P::Backing>,
        image: &Section<P::Backing>,
        page: SectionPage,
    ) -> Unread<P> {
        let (id, image) = (section.id(), image.id());
        let window = u64::from(self.clusters.file);
        let mut sources = sources(&mut self.pfns.lock(), (id, image), (page, window));
        if sources.is_empty() {
            return Unread::Again;
        }
        let demand = Demand {
            tables: 0,
            data: 1,
            extra: sources.len() - 1,
            want: Want::Anything,
        };
        let reserve = self.reserve(demand).or_else(|| {
            // What is held of the others may be all there is.
            let others = sources.split_off(1);
            release(&mut self.pfns.lock(), &others);
            self.reserve(Demand::one_page())
        });
        let Some(reserve) = reserve else {
            release(&mut self.pfns.lock(), &sources);
            return Unread::NoMemory;
        };
        let unused = sources.split_off(reserve.data.len().min(sources.len()));
        let frames = reserve.data.into_iter().map(|frame| frame.forget_content());
        let copies: Vec<_> = frames
            .zip(&sources)
            .map(|(frame, source)| frame.copy_of(source.from, &self.store))
            .collect();
        let mut made = 0;
        let mut db = self.pfns.lock();
        for (copy, source) in copies.into_iter().zip(&sources) {
            let state = db.sections.get_mut(id);
            // Somebody else may have copied it, or cut it off.
            if state.unread(source.page) != Some(source.stored) && cfg!(not(mutant = "read_twice"))
            {
                db.discard(copy);
                continue;
            }
            let number = source.page.get();
            state.cut_frozen(number..number + 1);
            let pfn = db.begin_thaw(id, source.page, copy);
            db.end_thaw(pfn);
            made += 1;
        }
        release(&mut db, &unused);
        release(&mut db, &sources);
        for source in &sources {
            forget(&mut db, image, source);
        }
        drop(db);
        add(&self.counters.pages_from_image, made);
        Unread::Again
    }
}

/// The wanted page and others around it that the image has in memory, with their frames, held; none if the wanted one is not
/// there.
fn sources(
    db: &mut PfnDatabase,
    (id, image): (SectionId, SectionId),
    (wanted, window): (SectionPage, u64),
) -> Vec<Copied> {
    let found = |db: &PfnDatabase, page: u64| {
        let page = SectionPage::new(page)?;
        let stored = db.sections.get(id).unread(page)?;
        let from = db.mappable(image, stored)?;
        Some(Copied { page, stored, from })
    };
    let Some(first) = found(db, wanted.get()) else {
        return Vec::new();
    };
    // The pages of the image's window, if they are neighbours here too.
    let before = first.stored.get() % window;
    let start = wanted.get().saturating_sub(before);
    let end = wanted.get() + window - before;
    let others = (start..end).filter(|page| *page != wanted.get());
    let others = others.filter_map(|page| found(db, page));
    let sources: Vec<_> = core::iter::once(first).chain(others).collect();
    for source in &sources {
        db.hold(source.from);
    }
    sources
}

/// Lets go of the image's frames.
fn release(db: &mut PfnDatabase, sources: &[Copied]) {
    for source in sources {
        db.release(source.from);
    }
}

/// Frees the image's frame of a page that was copied, if nobody else wants it.
fn forget(db: &mut PfnDatabase, image: SectionId, source: &Copied) {
    let idle = db.entry(source.from).state() == PfnState::Standby;
    if idle && db.sections.get(image).resident(source.stored) == Some(source.from) {
        db.forget_page(image, source.stored);
    }
}
