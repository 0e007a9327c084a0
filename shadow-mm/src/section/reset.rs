//! Going back to the layer: a clone's shared memory becomes its template's again.
//!
//! What the section has for itself is given up, wherever it is, and its views lose that; the layer's pages, which are mapped
//! there, stay. What it costs goes by the pages that were stored to.

use alloc::vec::Vec;
use core::ops::Range;

use crate::addr::VpnRange;
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::proto::Section;
use crate::section::punch::part;
use crate::section::{BeingKept, Charge};
use crate::stats::add;
use crate::vad::{MapKind, Sharing};

/// Why a section did not go back. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResetSectionError {
    /// It is kept as it was.
    #[error(transparent)]
    BeingKept(#[from] BeingKept),
    /// No layer lies under it, it does not have the length for that any more, or its pages are charged one by one.
    #[error("the section is not over a layer")]
    NotLaid,
    /// Private views show pages of it.
    #[error("private views show the section")]
    Shown,
}

impl<P: Platform> Manager<P> {
    /// Has a section that was laid over a layer ([`Self::lay_section`]), and was charged when it was made, be as it was
    /// then. Gives back what each space with a view must flush. Nobody may use the section meanwhile.
    ///
    /// # Errors
    /// See [`ResetSectionError`]; nothing has changed then.
    pub fn reset_section(
        &self,
        section: &Section<P::Backing>,
    ) -> Result<Vec<Flush>, ResetSectionError> {
        let own = self.own_pages(section)?;
        let private = |kind: &MapKind<_>| {
            matches!(
                kind,
                MapKind::View {
                    sharing: Sharing::Private,
                    ..
                }
            )
        };
        if self.any_view(section, |view| private(&view.kind)) {
            return Err(ResetSectionError::Shown);
        }
        let mut flushes = Vec::new();
        if !own.is_empty() {
            self.for_each_viewer(section, |space, state, views| {
                let mut flush = space.no_flush();
                let ranges = views
                    .iter()
                    .flat_map(|view| own.iter().map(|own| part(view, own)));
                let ranges: Vec<VpnRange> = ranges.flatten().collect();
                for range in ranges {
                    self.own_edges_now((space, &mut *state), range, &mut flush);
                    self.zap(space, state, range, &mut flush);
                }
                flushes.push(flush.finish());
            });
        }
        for pages in own {
            add(&self.counters.pages_reset, pages.end - pages.start);
            let mut from = pages.start;
            while let Some(next) = self.punch_some(section, from..pages.end) {
                from = next;
            }
        }
        let mut db = self.pfns.lock();
        let state = db.sections.get_mut(section.id());
        debug_assert!(state.pages.is_empty(), "{section:?} is used");
        if let Some(frozen) = state
            .frozen
            .as_mut()
            .filter(|_| cfg!(not(mutant = "reset_stays_cut")))
        {
            frozen.restore();
        }
        Ok(flushes)
    }

    /// The pages that a section over a layer has for itself, in runs.
    fn own_pages(
        &self,
        section: &Section<P::Backing>,
    ) -> Result<Vec<Range<u64>>, ResetSectionError> {
        let mut db = self.pfns.lock();
        db.reap();
        let state = db.sections.get(section.id());
        if state.kept.is_some() {
            return Err(BeingKept.into());
        }
        let frozen = state.frozen.as_ref();
        let laid =
            frozen.filter(|frozen| frozen.image().is_none() && state.charge != Charge::ByPage);
        if laid.is_none_or(|frozen| frozen.end() > state.page_count()) {
            return Err(ResetSectionError::NotLaid);
        }
        let mut own: Vec<Range<u64>> = Vec::new();
        for page in state.pages.keys().map(|page| page.get()) {
            match own.last_mut().filter(|last| last.end == page) {
                Some(last) => last.end += 1,
                None => own.push(page..page + 1),
            }
        }
        Ok(own)
    }
}
