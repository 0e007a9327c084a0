//! Making a mapping (`mmap`, `brk`, program loading). No page is made yet.

use crate::access::Prot;
use crate::addr::{PAGE_SIZE, Vpn, VpnRange};
use crate::backend::Platform;
use crate::commit::NoCommit;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::proto::SectionPage;
use crate::space::own::Owning;
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{FaultAround, MAX_MAPPINGS, MapKind, Vad, VadFlags, VadTag};

/// Where a mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Exactly here; what was mapped here goes (`MAP_FIXED`).
    Fixed(Vpn),
    /// Exactly here, if nothing is mapped here (`MAP_FIXED_NOREPLACE`).
    FixedNoReplace(Vpn),
    /// At the hint if that is free, else as high as possible.
    Anywhere {
        /// Where the guest would like it; `below` does not bind it.
        hint: Option<Vpn>,
        /// The page just above the highest that may be used.
        below: Vpn,
    },
}

/// A mapping to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapRequest<B> {
    /// Where.
    pub placement: Placement,
    /// How many pages; not zero.
    pub count: u64,
    /// What the guest may do with them.
    pub prot: Prot,
    /// What they are made of.
    pub kind: MapKind<B>,
    /// Properties.
    pub flags: VadFlags,
    /// The caller's word for it.
    pub tag: VadTag,
}

/// A mapping that was made.
#[derive(Debug)]
#[must_use]
pub struct Mapped {
    /// Its pages.
    pub range: VpnRange,
    /// What it replaced.
    pub flush: Flush,
}

/// Why a mapping cannot be made. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The space is being torn down.
    #[error("the address space is being torn down")]
    SpaceDeleted,
    /// No pages, or pages guests may not map (`EINVAL`, `ENOMEM`, `EPERM` by the caller's taste).
    #[error("{count} pages at {start:?} are not a range guests may map")]
    BadRange {
        /// The first page, if the request names one.
        start: Option<Vpn>,
        /// How many pages.
        count: u64,
    },
    /// Something is mapped there already (`EEXIST`).
    #[error("something is mapped in {range} already")]
    Overlap {
        /// The range asked for.
        range: VpnRange,
    },
    /// No hole is large enough (`ENOMEM`).
    #[error("no hole of {count} pages")]
    NoSpace {
        /// How many pages.
        count: u64,
    },
    /// So much private memory cannot be promised (`ENOMEM`).
    #[error("{pages} pages of private memory cannot be promised")]
    NoCommit {
        /// Pages that would be charged.
        pages: u64,
    },
    /// Shared tables on an edge of the range cannot be copied, for now (`ENOMEM`).
    #[error("no memory for copies of page tables")]
    NoMemory,
    /// The section is of a layer, and lies under mappings only.
    #[error("pages of a layer cannot be mapped by themselves")]
    Frozen,
    /// The space has as many mappings as it may have (`ENOMEM`).
    #[error("the address space has its {MAX_MAPPINGS} mappings")]
    TooManyMappings,
    /// The offset in the section is not page aligned, or the mapping's end is beyond 16 TiB (`EINVAL`,
    /// `EOVERFLOW`).
    #[error("file offset {offset:#x} cannot be mapped")]
    BadOffset {
        /// The offset in bytes.
        offset: u64,
    },
}

impl<P: Platform> Manager<P> {
    /// Makes a mapping, and takes away what was there if the placement says so.
    ///
    /// # Errors
    /// See [`MapError`]; nothing has changed then.
    pub fn map(
        &self,
        space: &Space<P>,
        request: MapRequest<P::Backing>,
    ) -> Result<Mapped, MapError> {
        check_kind(&request)?;
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if !state.alive {
            return Err(MapError::SpaceDeleted);
        }
        let range = self.place(&mut state, request.placement, request.count)?;
        if state.vads.len_without(range) >= MAX_MAPPINGS {
            return Err(MapError::TooManyMappings);
        }
        let MapRequest {
            prot,
            kind,
            flags,
            tag,
            ..
        } = request;
        if let MapKind::View { section, .. } = &kind {
            self.add_viewer(section, space.id());
        }
        let mut vad = Vad {
            range,
            prot,
            kind,
            flags: flags - VadFlags::CHARGED,
            tag,
            around: FaultAround::default(),
        };
        vad.flags.set(VadFlags::CHARGED, vad.needs_charge(prot));
        let edges = self.reserve_edges(space, range);
        let mut edges = edges.ok_or(MapError::NoMemory)?;
        let (released, charged) = (state.vads.charged_in(range), vad.charge());
        let commit = {
            let mut db = self.pfns.lock();
            db.reap();
            let within = state.check_quota(released, charged);
            within.and_then(|()| db.commit.exchange(released, charged))
        };
        if commit == Err(NoCommit) {
            self.give_back(edges);
            return Err(MapError::NoCommit { pages: charged });
        }
        let replaced = state.vads.carve(range);
        if !replaced.is_empty() {
            let owning = Owning {
                tables: &mut edges.tables,
                flush: &mut flush,
            };
            self.own_edges((space, &mut *state), range, owning);
            self.zap(space, &mut state, range, &mut flush);
        }
        self.give_back(edges);
        state.vads.insert(vad);
        state.update_peak_pages();
        drop(state);
        drop(replaced);
        add(&self.counters.maps, 1);
        Ok(Mapped {
            range,
            flush: flush.finish(),
        })
    }

    /// The range a placement means, checked against the user range and, if it must be, for being free.
    pub(super) fn place(
        &self,
        state: &mut SpaceState<P::Backing>,
        placement: Placement,
        count: u64,
    ) -> Result<VpnRange, MapError> {
        match placement {
            Placement::Fixed(start) => self.user_range(start, count),
            Placement::FixedNoReplace(start) => {
                let range = self.user_range(start, count)?;
                if state.vads.is_free(range) {
                    Ok(range)
                } else {
                    Err(MapError::Overlap { range })
                }
            }
            Placement::Anywhere { hint, below } => {
                if count == 0 {
                    return Err(MapError::BadRange { start: hint, count });
                }
                let free = |range: &VpnRange| state.vads.is_free(*range);
                let wished = hint.and_then(|hint| self.user_range(hint, count).ok());
                if let Some(range) = wished.filter(free) {
                    return Ok(range);
                }
                let below = below.get().min(self.limits.user_end.vpn().get());
                let min = self.limits.min_va.vpn();
                let start = state.vads.place(count, below, min);
                start
                    .and_then(|s| VpnRange::new(s, count))
                    .ok_or(MapError::NoSpace { count })
            }
        }
    }

    /// The range, if guests may map all of it.
    pub(super) fn user_range(&self, start: Vpn, count: u64) -> Result<VpnRange, MapError> {
        let limits = (self.limits.min_va.vpn(), self.limits.user_end.vpn().get());
        VpnRange::new(start, count)
            .filter(|range| range.start() >= limits.0 && range.end() <= limits.1)
            .ok_or(MapError::BadRange {
                start: Some(start),
                count,
            })
    }
}

fn check_kind<B>(request: &MapRequest<B>) -> Result<(), MapError> {
    let MapKind::View {
        section, offset, ..
    } = &request.kind
    else {
        return Ok(());
    };
    let offset = *offset;
    if section.is_frozen() {
        return Err(MapError::Frozen);
    }
    let first = offset / PAGE_SIZE as u64;
    let end = first.checked_add(request.count);
    if offset % PAGE_SIZE as u64 == 0 && end.is_some_and(|end| end <= SectionPage::COUNT) {
        Ok(())
    } else {
        Err(MapError::BadOffset { offset })
    }
}
