//! Typed addresses: one newtype for one address space, and nothing else.
//!
//! No function of this crate takes a bare integer where an address or a page number is meant. The
//! constructors check the range once, so the rest of the crate may rely on it.

use core::fmt;

/// Bytes in one page, and in one frame.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Entries in one page table of any level (Intel SDM vol 3, section 4.5).
pub const TABLE_ENTRIES: usize = 512;
/// log2 of [`TABLE_ENTRIES`].
const TABLE_SHIFT: u32 = 9;
/// First address that is no longer in the canonical lower half.
const LOWER_HALF_END: u64 = 1 << 47;
/// First page number that is no longer in the canonical lower half.
const VPN_END: u64 = LOWER_HALF_END >> PAGE_SHIFT;

/// A guest-virtual address in the canonical lower half: below 2^47.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestVa(u64);

impl GuestVa {
    /// The address, or `None` if it is not in the canonical lower half.
    #[must_use]
    #[inline]
    pub const fn new(address: u64) -> Option<Self> {
        if address < LOWER_HALF_END {
            Some(Self(address))
        } else {
            None
        }
    }

    /// The address in bytes.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page the address lies in.
    #[must_use]
    #[inline]
    pub const fn vpn(self) -> Vpn {
        Vpn(self.0 >> PAGE_SHIFT)
    }

    /// The byte within its page: 0 to 4095.
    #[must_use]
    #[inline]
    pub const fn offset(self) -> usize {
        (self.0 & (PAGE_SIZE as u64 - 1)) as usize
    }
}

/// A virtual page number: a [`GuestVa`] divided by [`PAGE_SIZE`], below 2^35.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vpn(u64);

impl Vpn {
    /// The page number, or `None` if it is not in the canonical lower half.
    #[must_use]
    #[inline]
    pub const fn new(number: u64) -> Option<Self> {
        if number < VPN_END {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The page number.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address of the page's first byte.
    #[must_use]
    #[inline]
    pub const fn va(self) -> GuestVa {
        GuestVa(self.0 << PAGE_SHIFT)
    }

    /// The page `pages` above, or `None` if that leaves the lower half.
    #[must_use]
    #[inline]
    pub const fn checked_add(self, pages: u64) -> Option<Self> {
        match self.0.checked_add(pages) {
            Some(number) => Self::new(number),
            None => None,
        }
    }

    /// The slot of a `level` table that translates this page.
    #[must_use]
    #[inline]
    pub const fn index(self, level: Level) -> EntryIndex {
        EntryIndex(((self.0 >> level.shift()) & (TABLE_ENTRIES as u64 - 1)) as u16)
    }
}

/// A non-empty run of virtual pages that lies in the canonical lower half.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VpnRange {
    start: Vpn,
    count: u64,
}

impl VpnRange {
    /// `count` pages from `start`, or `None` if that is empty or leaves the lower half.
    #[must_use]
    #[inline]
    pub const fn new(start: Vpn, count: u64) -> Option<Self> {
        if count == 0 || count > VPN_END - start.0 {
            None
        } else {
            Some(Self { start, count })
        }
    }

    /// The pages from `start` up to, but not including, page number `end`.
    #[must_use]
    #[inline]
    pub const fn between(start: Vpn, end: u64) -> Option<Self> {
        match end.checked_sub(start.0) {
            Some(count) => Self::new(start, count),
            None => None,
        }
    }

    /// The first page.
    #[must_use]
    #[inline]
    pub const fn start(self) -> Vpn {
        self.start
    }

    /// The page number just past the last page; may be 2^35, which is no page.
    #[must_use]
    #[inline]
    pub const fn end(self) -> u64 {
        self.start.0 + self.count
    }

    /// The last page.
    #[must_use]
    #[inline]
    pub const fn last(self) -> Vpn {
        Vpn(self.end() - 1)
    }

    /// How many pages; never zero.
    #[must_use]
    #[inline]
    pub const fn count(self) -> u64 {
        self.count
    }

    /// Whether the page is one of these.
    #[must_use]
    #[inline]
    pub const fn contains(self, vpn: Vpn) -> bool {
        self.start.0 <= vpn.0 && vpn.0 < self.end()
    }

    /// The pages both ranges have.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// The pages in rising order. The caller bounds the range: a guest's range may be enormous.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = Vpn> {
        (self.start.0..self.end()).map(Vpn)
    }
}

/// A guest-physical frame number: the guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(u32);

impl Pfn {
    /// The frame with this number.
    #[must_use]
    #[inline]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The frame number.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The guest-physical address of the frame's first byte.
    #[must_use]
    #[inline]
    pub const fn gpa(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
}

/// A run of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PfnRange {
    /// The first frame.
    pub start: Pfn,
    /// How many frames.
    pub count: u32,
}

impl PfnRange {
    /// The frame number just past the last frame, as wide as it may become.
    #[must_use]
    #[inline]
    pub const fn end(self) -> u64 {
        self.start.0 as u64 + self.count as u64
    }

    /// Whether the frame is one of these.
    #[must_use]
    #[inline]
    pub const fn contains(self, pfn: Pfn) -> bool {
        self.start.0 <= pfn.0 && (pfn.0 as u64) < self.end()
    }

    /// Whether the ranges have a frame in common.
    #[must_use]
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        (self.start.0 as u64) < other.end() && (other.start.0 as u64) < self.end()
    }
}

/// The slot of an entry in a page table: 0 to 511.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryIndex(u16);

impl EntryIndex {
    /// The slot, or `None` if a table has no such slot.
    #[must_use]
    #[inline]
    pub const fn new(index: u16) -> Option<Self> {
        if (index as usize) < TABLE_ENTRIES {
            Some(Self(index))
        } else {
            None
        }
    }

    /// The slot number: 0 to 511.
    #[must_use]
    #[inline]
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// The slots of a table from `first` on.
    pub(crate) fn onward(first: Self) -> impl Iterator<Item = Self> {
        (first.0..TABLE_ENTRIES as u16).map(Self)
    }

    /// The words of a table, each with its slot.
    #[inline]
    pub(crate) fn numbered(words: &[u64; TABLE_ENTRIES]) -> impl Iterator<Item = (Self, u64)> {
        Self::all().zip(words.iter().copied())
    }

    /// Every slot of a table.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..TABLE_ENTRIES as u16).map(Self)
    }
}

const WORD_BITS: usize = u64::BITS as usize;

/// Slots of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsedEntries([u64; TABLE_ENTRIES / WORD_BITS]);

impl UsedEntries {
    /// Those with a word that is not zero.
    #[must_use]
    #[inline]
    pub fn of(words: &[u64; TABLE_ENTRIES]) -> Self {
        let mut used = Self::default();
        for (bits, words) in used.0.iter_mut().zip(words.chunks(WORD_BITS)) {
            for (n, word) in words.iter().enumerate() {
                *bits |= u64::from(*word != 0) << n;
            }
        }
        used
    }

    /// One more.
    #[inline]
    pub fn insert(&mut self, index: EntryIndex) {
        self.0[index.get() / WORD_BITS] |= 1 << (index.get() % WORD_BITS);
    }

    /// All of them, rising.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = EntryIndex> {
        self.0
            .into_iter()
            .zip(0_u16..)
            .flat_map(|(mut bits, word)| {
                core::iter::from_fn(move || {
                    let bit = bits.trailing_zeros() as u16;
                    bits &= bits.checked_sub(1)?;
                    Some(EntryIndex(word * WORD_BITS as u16 + bit))
                })
            })
    }
}

/// The number of an address space; never used twice by one manager.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(u64);

impl SpaceId {
    /// The space with this number.
    #[must_use]
    #[inline]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A level of the four-level page table (Intel SDM vol 3, section 4.5).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// The leaf table (PT): an entry maps 4 KiB.
    Leaf,
    /// The page directory (PD): an entry names a leaf table, or maps 2 MiB.
    Directory,
    /// The page-directory-pointer table (PDPT): an entry names a page directory.
    Pointers,
    /// The top-level table (PML4), which CR3 names.
    Root,
}

impl Level {
    /// log2 of the pages one entry of this level covers.
    #[must_use]
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Leaf => 0,
            Self::Directory => TABLE_SHIFT,
            Self::Pointers => 2 * TABLE_SHIFT,
            Self::Root => 3 * TABLE_SHIFT,
        }
    }

    /// The pages one entry of this level covers.
    #[must_use]
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// The level a table entry of this level points to; a leaf table points to none.
    #[must_use]
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Leaf => None,
            Self::Directory => Some(Self::Leaf),
            Self::Pointers => Some(Self::Directory),
            Self::Root => Some(Self::Pointers),
        }
    }
}

macro_rules! debug_hex {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
debug_hex!(GuestVa, Vpn, Pfn, EntryIndex, SpaceId);

impl fmt::Debug for VpnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VpnRange({:#x}..{:#x})", self.start.0, self.end())
    }
}

impl fmt::Display for VpnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.0, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_canonical_address_is_refused() {
        assert!(GuestVa::new(1 << 47).is_none());
        assert!(GuestVa::new(u64::MAX).is_none());
        assert_eq!(GuestVa::new((1 << 47) - 1).map(GuestVa::offset), Some(4095));
    }

    #[test]
    fn range_past_the_lower_half_is_refused() {
        let last = Vpn::new((1 << 35) - 1).expect("the last page");
        assert!(VpnRange::new(last, 1).is_some());
        assert!(VpnRange::new(last, 2).is_none());
        assert!(VpnRange::new(last, u64::MAX).is_none());
        assert!(VpnRange::new(last, 0).is_none());
    }

    #[test]
    fn address_splits_into_four_indices() {
        let vpn = GuestVa::new(0x7f80_4060_3000).expect("canonical").vpn();
        let at = |level| vpn.index(level).get();
        assert_eq!(
            (
                at(Level::Root),
                at(Level::Pointers),
                at(Level::Directory),
                at(Level::Leaf)
            ),
            (255, 1, 3, 3)
        );
    }
}
