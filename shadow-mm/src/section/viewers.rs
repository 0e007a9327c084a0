//! Which spaces have views of which section.
//!
//! A section knows every space that may have a view. Spaces are added when they map, and when they are
//! forked; they go when they are deleted, or when a look finds no view.

use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{SpaceId, VpnRange};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::proto::Section;
use crate::space::{Space, SpaceState};
use crate::vad::{MapKind, Sharing, Vad, VadInfo, VadSet};

/// How often spaces that appeared meanwhile are looked for. Each round meets the children of the spaces
/// of the round before.
const ROUNDS: usize = 64;

/// A view in one space: its pages, the section's page it begins with, and who sees the stores.
pub(super) struct View {
    pub(super) range: VpnRange,
    pub(super) first: u64,
    pub(super) sharing: Sharing,
}

impl<P: Platform> Manager<P> {
    /// The space, which is locked, is about to have a view.
    pub(crate) fn add_viewer(&self, section: &Section<P::Backing>, space: SpaceId) {
        let mut db = self.pfns.lock();
        let viewers = &mut db.sections.get_mut(section.id()).viewers;
        viewers.insert(space);
    }

    /// A space has these mappings from now on.
    pub(crate) fn add_viewers(&self, space: SpaceId, vads: &VadSet<P::Backing>) {
        let mut db = self.pfns.lock();
        for vad in vads.iter() {
            if let MapKind::View { section, .. } = &vad.kind {
                let viewers = &mut db.sections.get_mut(section.id()).viewers;
                viewers.insert(space);
            }
        }
    }

    /// A space that had these mappings is going.
    pub(crate) fn forget_viewer(&self, space: SpaceId, vads: &VadSet<P::Backing>) {
        let mut db = self.pfns.lock();
        for vad in vads.iter() {
            if let MapKind::View { section, .. } = &vad.kind {
                let viewers = &mut db.sections.get_mut(section.id()).viewers;
                viewers.remove(&space);
            }
        }
    }

    /// Whether any mapping that shows the section is as `test` says. Mappings made meanwhile may be missed.
    pub fn any_view(
        &self,
        section: &Section<P::Backing>,
        test: impl Fn(&VadInfo<P::Backing>) -> bool,
    ) -> bool {
        let mut any = false;
        self.for_each_viewer(section, |_, state, _| {
            let views = state
                .vads
                .iter()
                .filter(|vad| vad.view().is_some_and(|(seen, ..)| seen == section));
            any |= views.map(Vad::info).any(|info| test(&info));
        });
        any
    }

    /// Calls `visit` for every space with views of the section, locked, one at a time. Spaces forked
    /// meanwhile are visited too.
    pub(super) fn for_each_viewer(
        &self,
        section: &Section<P::Backing>,
        mut visit: impl FnMut(&Arc<Space<P>>, &mut SpaceState<P::Backing>, Vec<View>),
    ) {
        let mut visited = BTreeSet::new();
        for _ in 0..ROUNDS {
            let next: Vec<SpaceId> = {
                let db = self.pfns.lock();
                let viewers = &db.sections.get(section.id()).viewers;
                viewers.difference(&visited).copied().collect()
            };
            if next.is_empty() {
                return;
            }
            for id in next {
                visited.insert(id);
                let Some(space) = self.find_space(id) else {
                    continue;
                };
                let mut state = space.state.lock();
                let views = views(&state, section);
                if views.is_empty() {
                    let mut db = self.pfns.lock();
                    db.sections.get_mut(section.id()).viewers.remove(&id);
                } else {
                    visit(&space, &mut state, views);
                }
            }
        }
    }
}

fn views<B: Clone + Eq>(state: &SpaceState<B>, section: &Section<B>) -> Vec<View> {
    let all = state.vads.iter().filter_map(|vad| match vad.view() {
        Some((seen, first, sharing)) if seen == section => Some(View {
            range: vad.range,
            first,
            sharing,
        }),
        Some(_) | None => None,
    });
    all.collect()
}
