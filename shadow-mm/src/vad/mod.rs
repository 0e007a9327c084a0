//! Virtual address descriptors: what a space has mapped, range by range.

mod image;
mod place;
mod set;

use bitflags::bitflags;

use crate::access::Prot;
use crate::addr::{PAGE_SIZE, Vpn, VpnRange};
use crate::proto::Section;

pub use image::ImageRun;
pub(crate) use image::ImageSet;
pub(crate) use set::VadSet;

/// Most mappings one space may have; Linux' default `vm.max_map_count`.
pub const MAX_MAPPINGS: usize = 65_530;

bitflags! {
    /// Properties of a mapping.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct VadFlags: u8 {
        /// `MAP_NORESERVE`: the caller accounts no memory for it.
        const NO_RESERVE = 1;
        /// `MAP_GROWSDOWN`: kept and reported; growing is the caller's policy.
        const GROWS_DOWN = 2;
        /// `MADV_DONTFORK`: a fork's child does not get the mapping.
        const DONT_FORK = 4;
        /// `MADV_WIPEONFORK`: a fork's child gets the mapping empty.
        const WIPE_ON_FORK = 8;
        /// Its pages are charged. The manager's own: ignored in requests.
        const CHARGED = 16;
    }
}

/// A word of the caller's for each mapping, opaque here ("heap", "stack", ...). Mappings with
/// different tags are never merged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct VadTag(pub u32);

/// Who sees what a space stores to a view.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sharing {
    /// Only the space: a store copies the page first (`MAP_PRIVATE`).
    Private,
    /// Everybody with a view, and the file (`MAP_SHARED`).
    Shared,
}

/// What a mapping's pages are made of.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum MapKind<B> {
    /// Zeroes, made on first touch.
    Anonymous,
    /// A view of a section. Pages wholly beyond the section's end are [`crate::Denied::BeyondEnd`].
    View {
        /// The section.
        section: Section<B>,
        /// Where in the section the mapping starts: bytes, a multiple of [`PAGE_SIZE`].
        offset: u64,
        /// Who sees the stores.
        sharing: Sharing,
    },
}

/// How far the last fault-around of a mapping came. A fault exactly where it ended continues a sequential
/// walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct FaultAround {
    /// The page number just past the last page mapped ahead; zero: none yet.
    pub(crate) next: u64,
    /// Pages the last fault mapped.
    pub(crate) window: u8,
    pub(crate) stride: Stride,
}

/// How far apart the guest stores: each time as far from the last place as that was from the one before, or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Stride {
    /// The last page that was stored to, or dealt with ahead of a store; zero: none yet.
    pub(crate) last: u64,
    /// How many pages that was from the one before; negative: below it. Zero: not known.
    pub(crate) pages: i64,
    /// Pages the last store there dealt with.
    pub(crate) window: u8,
}

/// One range of an address space. Protected by the space's lock.
#[derive(Clone, Debug)]
pub(crate) struct Vad<B> {
    pub(crate) range: VpnRange,
    pub(crate) prot: Prot,
    pub(crate) kind: MapKind<B>,
    pub(crate) flags: VadFlags,
    pub(crate) tag: VadTag,
    pub(crate) around: FaultAround,
}

/// What a query tells about a mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VadInfo<B> {
    /// Its pages.
    pub range: VpnRange,
    /// Its protection.
    pub prot: Prot,
    /// What it is made of; a file's offset is that of `range`'s first page.
    pub kind: MapKind<B>,
    /// Its properties.
    pub flags: VadFlags,
    /// The caller's word for it.
    pub tag: VadTag,
    /// Whether its pages are charged: what was ever private and writable stays so.
    pub charged: bool,
}

impl<B> VadInfo<B> {
    /// The mapped file and the offset in bytes of the first page, if a file is mapped, one in memory included.
    #[must_use]
    pub fn file(&self) -> Option<(&B, u64)> {
        match &self.kind {
            MapKind::Anonymous => None,
            MapKind::View {
                section, offset, ..
            } => Some((section.file()?, *offset)),
        }
    }

    /// The section the mapping is a view of, if it is one, and the offset in bytes of the first page.
    #[must_use]
    pub fn view(&self) -> Option<(&Section<B>, u64)> {
        match &self.kind {
            MapKind::Anonymous => None,
            MapKind::View {
                section, offset, ..
            } => Some((section, *offset)),
        }
    }

    /// Whether stores are seen by others.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        match self.kind {
            MapKind::Anonymous => Sharing::Private,
            MapKind::View { sharing, .. } => sharing,
        }
    }
}

impl<B: Clone> VadInfo<B> {
    /// What it shows from this page of it on.
    #[must_use]
    pub fn kind_from(&self, page: Vpn) -> MapKind<B> {
        self.kind.advanced(page.get() - self.range.start().get())
    }
}

impl<B: Clone> MapKind<B> {
    /// What a mapping of this kind shows from `pages` further on.
    #[must_use]
    pub fn advanced(&self, pages: u64) -> Self {
        match self {
            Self::Anonymous => Self::Anonymous,
            Self::View {
                section,
                offset,
                sharing,
            } => Self::View {
                section: section.clone(),
                offset: offset + pages * PAGE_SIZE as u64,
                sharing: *sharing,
            },
        }
    }
}

impl<B: Clone + Eq> Vad<B> {
    /// Cuts the mapping at a page strictly inside it and gives back the upper part.
    fn split_off(&mut self, at: Vpn) -> Self {
        let pages = at.get() - self.range.start().get();
        let upper = Self {
            range: sub_range(at, self.range.end()),
            kind: self.kind.advanced(pages),
            around: FaultAround::default(),
            ..self.clone()
        };
        self.range = sub_range(self.range.start(), at.get());
        upper
    }

    /// Whether a mapping like this with protection `prot` must be charged.
    pub(crate) fn needs_charge(&self, prot: Prot) -> bool {
        // What a shared view shows is the section's, and charged there.
        let shared = matches!(
            self.kind,
            MapKind::View {
                sharing: Sharing::Shared,
                ..
            }
        );
        prot.contains(Prot::WRITE) && !shared && !self.flags.contains(VadFlags::NO_RESERVE)
    }

    /// Pages charged for it.
    pub(crate) fn charge(&self) -> u64 {
        if self.flags.contains(VadFlags::CHARGED) {
            self.range.count()
        } else {
            0
        }
    }

    /// Whether `next` continues this mapping without a seam.
    fn continues_into(&self, next: &Self) -> bool {
        self.range.end() == next.range.start().get()
            && (self.prot, self.flags, self.tag) == (next.prot, next.flags, next.tag)
            && self.kind.advanced(self.range.count()) == next.kind
    }

    /// The same mapping at another place.
    pub(crate) fn moved_to(&self, range: VpnRange) -> Self {
        Self {
            range,
            around: FaultAround::default(),
            ..self.clone()
        }
    }

    pub(crate) fn info(&self) -> VadInfo<B> {
        VadInfo {
            range: self.range,
            prot: self.prot,
            kind: self.kind.clone(),
            flags: self.flags - VadFlags::CHARGED,
            tag: self.tag,
            charged: self.charge() > 0,
        }
    }

    /// The section a mapping is a view of, the section's page at the view's start, and who sees stores.
    pub(crate) fn view(&self) -> Option<(&Section<B>, u64, Sharing)> {
        match &self.kind {
            MapKind::Anonymous => None,
            MapKind::View {
                section,
                offset,
                sharing,
            } => Some((section, offset / PAGE_SIZE as u64, *sharing)),
        }
    }
}

/// Part of a range that is known to be valid and not empty.
fn sub_range(start: Vpn, end: u64) -> VpnRange {
    VpnRange::between(start, end).expect("a non-empty part of a valid range")
}
