//! Sections: pages that any number of views share, each with one authoritative entry, its *prototype*.
//!
//! A section stands over a file (its pages are read from it and written back to it) or over nothing but
//! zeroes (anonymous shared memory). What is kept for a page here is where it is: nothing at all (in
//! the file, or still zeroes), in a frame, on its way into one, or in the page file. Memory is used for pages that
//! have been touched only; what a section over zeroes may come to is charged when it is made.
//!
//! A frame of a section has the section as its owner, whatever number of entries map it. One that no entry maps
//! and nothing holds is on a list: on the standby list if its content is in the file or the page file too, or is
//! zeroes; else on the modified list, to be written to the page file, or on that of files' modified pages, to be
//! written back. Everything in this file but the handle is protected by the PFN lock.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::hash::{Hash, Hasher};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use once_cell::race::OnceBox;

use super::bell::Bell;
use super::frozen::FrozenPages;
use super::kept::KeptPages;
use super::pending::Record;
use crate::addr::{PAGE_SIZE, Pfn, PfnRange, SpaceId};
use crate::page_file::Slot;
use crate::pfn::Original;
use crate::section::{Allowance, Charge};

/// The number of a section; reused once the section is gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SectionId(u32);

impl SectionId {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A page of a section: its place in the file divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SectionPage(u32);

impl SectionPage {
    /// One past the last page number there can be: files end at 16 TiB here.
    pub const COUNT: u64 = 1 << 32;

    /// The page, or `None` if a section has no such page.
    #[must_use]
    pub fn new(number: u64) -> Option<Self> {
        u32::try_from(number).ok().map(Self)
    }

    /// The page number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0 as u64
    }

    /// Where the page begins in the file, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.get() * PAGE_SIZE as u64
    }
}

/// Whether anybody still has a handle of the section.
#[derive(Debug)]
struct Life {
    gone: AtomicBool,
    bell: Arc<Bell>,
}

/// A handle of a section: views of it, and whoever made it, hold one each. When the last is dropped the
/// section's frames return to the pool, with whatever was not written back.
pub struct Section<B> {
    inner: Arc<Inner<B>>,
    /// The file whose bytes the section itself is, as whoever has this handle knows it.
    label: Option<B>,
}

struct Inner<B> {
    id: SectionId,
    backing: Option<B>,
    /// The frames its pages are, if it is a layer's.
    layer: Option<PfnRange>,
    /// The section over an image that it has pages of, or had.
    image: OnceBox<Section<B>>,
    life: Arc<Life>,
}

impl<B> Drop for Inner<B> {
    fn drop(&mut self) {
        self.life.gone.store(true, Ordering::Release);
        self.life.bell.ring(self.id);
    }
}

impl<B> Section<B> {
    /// The section's number.
    #[must_use]
    pub fn id(&self) -> SectionId {
        self.inner.id
    }

    /// The file its pages come from; `None` if they begin as zeroes.
    #[must_use]
    pub fn backing(&self) -> Option<&B> {
        self.inner.backing.as_ref()
    }

    /// The same section, for views of a file whose bytes it has. The label is this handle's and its copies' own: a
    /// section that the labelled file refers to is gone once nobody has a labelled handle and the file is gone.
    #[must_use]
    pub fn labelled(&self, label: B) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            label: Some(label),
        }
    }

    /// The file that a view of it shows: the one its pages come from, or the one whose bytes it is.
    #[must_use]
    pub fn file(&self) -> Option<&B> {
        self.label.as_ref().or(self.backing())
    }

    /// The layer's frame that is a page of it; `None` if it has no such page, or is none of a layer.
    #[must_use]
    pub fn frozen(&self, page: SectionPage) -> Option<Pfn> {
        let layer = self.inner.layer?;
        let inside = page.get() < u64::from(layer.count);
        inside.then(|| Pfn::new(layer.start.get() + page.get() as u32))
    }

    /// The layer whose frames its pages are.
    pub(crate) fn layer(&self) -> Option<PfnRange> {
        self.inner.layer
    }

    /// Whether its pages are frames of a layer.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.inner.layer.is_some()
    }

    /// The section whose pages it has until it is asked for them ([`crate::Manager::lay_section`]), if any.
    #[must_use]
    pub fn image(&self) -> Option<&Self> {
        self.inner.image.get()
    }

    /// Keeps a handle of the section whose pages it is to have; false if there is one of another.
    pub(crate) fn keep_image(&self, image: &Self) -> bool
    where
        B: Clone,
    {
        let kept = self.inner.image.set(Box::new(image.clone()));
        kept.is_ok() || self.image() == Some(image)
    }

    /// Handles there are, views included: 1 means that nobody but the caller knows the section.
    #[must_use]
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.inner)
    }
}

impl<B: Clone> Clone for Section<B> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            label: self.label.clone(),
        }
    }
}

impl<B> PartialEq for Section<B> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl<B> Eq for Section<B> {}

impl<B> Hash for Section<B> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inner.id.hash(state);
    }
}

impl<B: fmt::Debug> fmt::Debug for Section<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Section")
            .field("id", &self.inner.id.0)
            .field("file", &self.file())
            .finish()
    }
}

/// Where a page of a section is, if it is not only in the file.
#[derive(Debug)]
pub(crate) enum Proto {
    /// In this frame.
    Resident(Pfn),
    /// Being read from the section's file.
    Reading(Arc<Record>),
    /// In this slot of the page file; of sections over zeroes only.
    PageFile(Slot),
    /// Nowhere: zeroes, but charged for; of sections only whose pages are charged one by one.
    Zeroes,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// A transfer under way, and the frames it holds.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) direction: Direction,
    /// The first page it is for, and how many there are from there to the last.
    pub(crate) first: SectionPage,
    pub(crate) span: usize,
    pub(crate) frames: Vec<Pfn>,
    pub(crate) record: Arc<Record>,
}

/// What is known of one section.
#[derive(Debug)]
pub(crate) struct SectionState {
    life: Arc<Life>,
    /// Whether pages come from a file.
    pub(crate) file: bool,
    pub(crate) bytes: u64,
    pub(crate) charge: Charge,
    /// Who else is asked before it has a page more.
    pub(crate) allowance: Option<Arc<dyn Allowance>>,
    pub(crate) pages: BTreeMap<SectionPage, Proto>,
    /// Pages that are a layer's, or in an image; none of them is among those.
    pub(crate) frozen: Option<FrozenPages>,
    /// If it is kept as it was.
    pub(crate) kept: Option<KeptPages>,
    /// The section whose pages these are, put aside.
    copies_of: Option<SectionId>,
    pub(crate) runs: Vec<Run>,
    /// Spaces that may have views; all that have are here.
    pub(crate) viewers: BTreeSet<SpaceId>,
}

impl SectionState {
    /// Pages that begin before the end.
    pub(crate) fn page_count(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE as u64)
    }

    /// Pages charged for it.
    pub(crate) fn charged(&self) -> u64 {
        match self.charge {
            Charge::Charged | Charge::Uncharged => self.charge.pages(self.bytes),
            Charge::ByPage => self.extent(),
        }
    }

    /// Pages it has, wherever they are.
    pub(crate) fn extent(&self) -> u64 {
        let frozen = self.frozen.as_ref().map_or(0, FrozenPages::count);
        self.pages.len() as u64 + frozen
    }

    /// The layer's frame that a page is.
    pub(crate) fn frozen(&self, page: SectionPage) -> Option<Pfn> {
        self.frozen.as_ref()?.frame(page)
    }

    /// The image's page that a page is, as long as nobody has asked for it.
    pub(crate) fn unread(&self, page: SectionPage) -> Option<SectionPage> {
        let frozen = self.frozen.as_ref()?;
        frozen.image()?;
        SectionPage::new(frozen.stored(page)?)
    }

    /// Whether a page is a layer's, or in an image.
    pub(crate) fn is_below(&self, page: SectionPage) -> bool {
        let frozen = self.frozen.as_ref();
        frozen.is_some_and(|frozen| frozen.stored(page).is_some())
    }

    /// Pages of a range are no layer's or image's any more; gives back how many were.
    pub(crate) fn cut_frozen(&mut self, pages: Range<u64>) -> u64 {
        let frozen = self.frozen.as_mut();
        frozen.map_or(0, |frozen| frozen.cut(pages))
    }

    /// Whether a store to the page has to wait until what it is has been put aside.
    pub(crate) fn is_to_be_kept(&self, page: SectionPage) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.is_pending(page))
    }

    /// The page has another content from now on.
    pub(crate) fn settle(&mut self, page: SectionPage) {
        if let Some(kept) = &mut self.kept {
            kept.settle(page);
        }
    }

    pub(crate) fn contains(&self, page: SectionPage) -> bool {
        page.get() < self.page_count()
    }

    /// The frame a page is in.
    pub(crate) fn resident(&self, page: SectionPage) -> Option<Pfn> {
        match self.pages.get(&page) {
            Some(Proto::Resident(frame)) => Some(*frame),
            Some(Proto::Reading(_) | Proto::PageFile(_) | Proto::Zeroes) | None => None,
        }
    }

    /// How many bytes of a page lie before the end.
    pub(crate) fn valid(&self, page: SectionPage) -> usize {
        let left = self.bytes.saturating_sub(page.offset());
        left.min(PAGE_SIZE as u64) as usize
    }
}

/// No further section can be made.
#[derive(Debug)]
pub(crate) struct SectionTableFull;

/// All sections of a manager.
#[derive(Debug, Default)]
pub(crate) struct SectionTable {
    sections: Vec<Option<SectionState>>,
    vacant: Vec<SectionId>,
    /// Sections that nobody has a handle of, and whose pages go by and by. Nothing is charged for them any more.
    dead: Vec<SectionId>,
    pub(crate) bell: Arc<Bell>,
    /// Sections that are kept as they were.
    pub(crate) keeping: u32,
    /// Frames sections have.
    pub(crate) resident: u64,
    /// Frames sections lost because others wanted them.
    pub(crate) taken: u64,
}

impl SectionTable {
    pub(crate) fn create<B>(
        &mut self,
        backing: Option<B>,
        (bytes, layer): (u64, Option<PfnRange>),
        (charge, allowance): (Charge, Option<Arc<dyn Allowance>>),
    ) -> Result<Section<B>, SectionTableFull> {
        let life = Arc::new(Life {
            gone: AtomicBool::new(false),
            bell: Arc::clone(&self.bell),
        });
        let state = SectionState {
            life: Arc::clone(&life),
            file: backing.is_some(),
            bytes,
            charge,
            allowance,
            pages: BTreeMap::new(),
            frozen: None,
            kept: None,
            copies_of: None,
            runs: Vec::new(),
            viewers: BTreeSet::new(),
        };
        let id = match self.vacant.pop() {
            Some(id) => id,
            None => {
                let id = u32::try_from(self.sections.len()).map_err(|_| SectionTableFull)?;
                self.sections.try_reserve(1).map_err(|_| SectionTableFull)?;
                self.sections.push(None);
                SectionId(id)
            }
        };
        self.sections[id.0 as usize] = Some(state);
        let inner = Inner {
            id,
            backing,
            layer,
            image: OnceBox::new(),
            life,
        };
        Ok(Section {
            inner: Arc::new(inner),
            label: None,
        })
    }

    /// A section somebody has a handle of, or that is about to be reaped.
    pub(crate) fn find(&self, id: SectionId) -> Option<&SectionState> {
        self.sections.get(id.0 as usize)?.as_ref()
    }

    /// A section somebody has a handle of.
    pub(crate) fn get(&self, id: SectionId) -> &SectionState {
        self.find(id).expect("a section with a handle lives")
    }

    /// A section somebody has a handle of, to change it.
    pub(crate) fn get_mut(&mut self, id: SectionId) -> &mut SectionState {
        self.sections
            .get_mut(id.0 as usize)
            .and_then(Option::as_mut)
            .expect("a section with a handle lives")
    }

    /// Whether a section's pages come from a file.
    pub(crate) fn is_of_file(&self, id: SectionId) -> bool {
        self.find(id).is_some_and(|section| section.file)
    }

    /// A section is kept as it is from now on, with `copies` to put pages aside in, which has none yet. It is no longer
    /// kept when that is reaped.
    pub(crate) fn keep(&mut self, id: SectionId, copies: SectionId) {
        let state = self.get_mut(id);
        let kept = KeptPages::new(copies, state.page_count());
        let before = state.kept.replace(kept);
        debug_assert!(before.is_none(), "{id:?} was kept already");
        self.get_mut(copies).copies_of = Some(id);
        self.keeping += 1;
    }

    /// A section is no longer kept, if it was with these copies.
    fn end_keep(&mut self, id: SectionId, copies: SectionId) {
        let state = self.sections.get_mut(id.0 as usize);
        let kept = state.and_then(Option::as_mut).map(|state| &mut state.kept);
        if let Some(kept) = kept
            && kept.as_ref().is_some_and(|kept| kept.copies == copies)
        {
            *kept = None;
            self.keeping -= 1;
        }
    }

    /// A page's frame is used for something else from now on; what it had is in `original`.
    pub(crate) fn lose_frame(&mut self, id: SectionId, page: SectionPage, original: Original) {
        let state = self.get_mut(id);
        let pages = &mut state.pages;
        let lost = match (original, state.charge) {
            (Original::Slot(slot), _) => pages.insert(page, Proto::PageFile(slot)),
            // The page keeps its charge.
            (Original::Zero, Charge::ByPage) => pages.insert(page, Proto::Zeroes),
            (Original::Zero | Original::File, _) => pages.remove(&page),
        };
        debug_assert!(
            matches!(lost, Some(Proto::Resident(_))),
            "{page:?}: {lost:?}"
        );
        self.resident -= 1;
        self.taken += 1;
    }

    /// Every section.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SectionId, &SectionState)> {
        let named = self.sections.iter().enumerate();
        named.filter_map(|(n, s)| Some((SectionId(n as u32), s.as_ref()?)))
    }

    /// If something was dropped since the last time: the sections nobody has a handle of, which are dead from now on,
    /// and the frames of dropped tickets.
    pub(crate) fn dropped(&mut self) -> Dropped {
        let mut dropped = Dropped::default();
        for mark in self.bell.silence() {
            for n in (mark..self.sections.len()).step_by(Bell::MARKS) {
                let Some(state) = &mut self.sections[n] else {
                    continue;
                };
                state.take_abandoned(&mut dropped);
                let id = SectionId(n as u32);
                // Of a ticket, the handle may go before the transfer is abandoned: that rings again.
                let gone = state.life.gone.load(Ordering::Acquire) && state.runs.is_empty();
                let of = state.copies_of;
                if gone && !self.dead.contains(&id) {
                    self.dead.push(id);
                    dropped.sections.push(id);
                    if let Some(of) = of {
                        self.end_keep(of, id);
                    }
                }
            }
        }
        dropped
    }

    /// Takes a page from a dead section; the section is gone with its last. `None` if no section is dead.
    pub(crate) fn bury_page(&mut self) -> Option<Proto> {
        while let Some(&id) = self.dead.last() {
            let state = self.sections[id.0 as usize].as_mut();
            let last = state.and_then(|state| state.pages.pop_first());
            if let Some((_, proto)) = last {
                return Some(proto);
            }
            self.dead.pop();
            let buried = self.sections[id.0 as usize].take();
            // Who kept it let go of it at the same time as of the copies, which may be known dead later.
            let kept = buried.is_some_and(|state| state.kept.is_some());
            self.keeping -= u32::from(kept);
            self.vacant.push(id);
        }
        None
    }
}

/// What was dropped and must be cleaned up.
#[derive(Debug, Default)]
pub(crate) struct Dropped {
    pub(crate) sections: Vec<SectionId>,
    /// Frames of reads nobody will complete.
    pub(crate) reads: Vec<Pfn>,
    /// Frames of writes nobody will complete: they count as not written.
    pub(crate) writes: Vec<Pfn>,
}

impl SectionState {
    /// Ends a transfer: what it was for is no longer being read, and its frames are the caller's.
    pub(crate) fn end_run(&mut self, record: &Arc<Record>) -> Option<Run> {
        let at = self
            .runs
            .iter()
            .position(|run| Arc::ptr_eq(&run.record, record))?;
        Some(self.runs.swap_remove(at))
    }

    fn take_abandoned(&mut self, dropped: &mut Dropped) {
        let Self { pages, runs, .. } = self;
        runs.retain_mut(|run| {
            if !run.record.is_abandoned() {
                return true;
            }
            match run.direction {
                Direction::Read => {
                    run.forget_pages(pages);
                    dropped.reads.append(&mut run.frames);
                }
                Direction::Write => dropped.writes.append(&mut run.frames),
            }
            false
        });
    }

    /// Nothing is charged for it any more; gives back what was, and whom else to tell of how many pages.
    pub(crate) fn uncharge(&mut self) -> (u64, Option<Arc<dyn Allowance>>) {
        let charged = self.charged();
        self.charge = Charge::Uncharged;
        self.bytes = 0;
        self.frozen = None;
        (charged, self.allowance.take())
    }
}

impl Run {
    /// The pages it was to bring are absent again.
    fn forget_pages(&self, pages: &mut BTreeMap<SectionPage, Proto>) {
        let numbers = self.first.get()..self.first.get() + self.span as u64;
        for page in numbers.filter_map(SectionPage::new) {
            if matches!(pages.get(&page), Some(Proto::Reading(record)) if Arc::ptr_eq(record, &self.record))
            {
                pages.remove(&page);
            }
        }
    }
}
