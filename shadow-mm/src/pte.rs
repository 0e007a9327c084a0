//! Raw page-table bits to owning enum, and back. No other file knows a bit position.
//!
//! The shadow tables hold the software states too: the architecture ignores every bit of an entry
//! whose present bit is clear (Intel SDM vol 3, section 4.5), but some CPUs use the frame number of such
//! an entry speculatively (L1TF). So a frame number, slot or block number in a non-present entry
//! is stored *inverted*: the address it would form lies far above any memory. All-zero is exempt:
//! it names frame 0, which is in no pool.
//!
//! | bits  | valid (bit 0 set)                              | not present (bit 0 clear)            |
//! |-------|------------------------------------------------|--------------------------------------|
//! | 1-3   | writable, user, (write-through)                | kind; all-zero entry: none           |
//! | 4-6   | (cache disable), accessed, dirty               | protection: read, write, execute     |
//! | 7     | large leaf, in a page directory                | block header number, bit 12          |
//! | 8     | (global)                                       | block header number, bit 13          |
//! | 9-11  | copy-on-write, logical write, prototype-owned  | block header number, bits 14 to 16   |
//! | 12-51 | frame number                                   | frame, slot or block index, inverted |
//! | 52-53 | age, counted by the trimmer                    | block header number, bits 0 to 1     |
//! | 54    | frozen: a frame of a layer                     | block header number, bit 2           |
//! | 55-62 | (ignored)                                      | block header number, bits 3 to 10    |
//! | 63    | no execute                                     | block header number, bit 11          |
//!
//! `PROT_NONE` over a resident page is a *valid* entry whose user bit is clear: a page only the
//! supervisor could touch. The frame thus keeps its one owner and its count, `mprotect` there and back
//! costs no copy and no state of its own, and the dirty bit has a place to live.

use bitflags::bitflags;

use crate::access::Prot;
use crate::addr::{PAGE_SHIFT, Pfn};
use crate::page_file::Slot;
use crate::proto::{BlockId, HeaderId};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;
const KIND_SHIFT: u32 = 1;
const KIND_MASK: u64 = 0b111 << KIND_SHIFT;
const PROT_SHIFT: u32 = 4;
const HEADER_LOW_SHIFT: u32 = 52;
const HEADER_LOW_BITS: u32 = 12;
const HEADER_HIGH_SHIFT: u32 = 7;
const HEADER_HIGH_BITS: u32 = 5;

const FROZEN: u64 = 1 << 54;
const AGE_SHIFT: u32 = 52;
const AGE_MAX: u64 = 3;

const KIND_DEMAND_ZERO: u64 = 1;
const KIND_DECOMMITTED: u64 = 2;
const KIND_PROTOTYPE: u64 = 3;
const KIND_TRANSITION: u64 = 4;
const KIND_PAGE_FILE: u64 = 5;

bitflags! {
    /// The bits of a valid entry besides its frame number (Intel SDM vol 3, table 4-20).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct EntryFlags: u64 {
        /// Hardware allows stores.
        const WRITABLE = 1 << 1;
        /// Ring 3 may touch the page.
        const USER = 1 << 2;
        /// Hardware has used the entry.
        const ACCESSED = 1 << 5;
        /// Hardware has stored through the entry.
        const DIRTY = 1 << 6;
        /// Software: a store must copy the page first.
        const COPY_ON_WRITE = 1 << 9;
        /// Software: the mapping's protection allows stores. Hardware's writable bit is set exactly
        /// when this is set and copy-on-write is clear.
        const LOGICAL_WRITE = 1 << 10;
        /// Software: the frame is owned by a prototype (a clone block), not by this entry.
        const PROTOTYPE = 1 << 11;
        /// Software: how often in a row the trimmer found the page not used, 0 to 3, low bit.
        const AGE_LOW = 1 << 52;
        /// Software: the age's high bit.
        const AGE_HIGH = 1 << 53;
        /// Hardware forbids instruction fetches.
        const NO_EXECUTE = 1 << 63;
    }
}

impl EntryFlags {
    /// What says how a page was used, and nothing of what it allows.
    pub const USE: Self = Self::ACCESSED
        .union(Self::DIRTY)
        .union(Self::AGE_LOW)
        .union(Self::AGE_HIGH);

    /// How often in a row the page was found not used: 0 to 3.
    #[must_use]
    pub fn age(self) -> u8 {
        ((self.bits() >> AGE_SHIFT) & AGE_MAX) as u8
    }

    /// These flags after a look at the page: a used one is young and not accessed yet, another is one
    /// look older.
    #[must_use]
    pub fn aged(self) -> Self {
        let age = if self.contains(Self::ACCESSED) {
            0
        } else {
            (u64::from(self.age()) + 1).min(AGE_MAX)
        };
        let rest = self - (Self::ACCESSED | Self::AGE_LOW | Self::AGE_HIGH);
        rest | Self::from_bits_retain(age << AGE_SHIFT)
    }

    /// The rights of a page its space owns alone.
    #[must_use]
    pub fn private(prot: Prot) -> Self {
        Self::empty().with_prot(prot)
    }

    /// These flags with the rights of another protection; copy-on-write, ownership, accessed and
    /// dirty stay.
    #[must_use]
    pub fn with_prot(self, prot: Prot) -> Self {
        let rights = Self::WRITABLE | Self::USER | Self::LOGICAL_WRITE | Self::NO_EXECUTE;
        let mut flags = self - rights;
        flags.set(Self::USER, !prot.is_empty());
        flags.set(Self::NO_EXECUTE, !prot.contains(Prot::EXEC));
        flags.set(Self::LOGICAL_WRITE, prot.contains(Prot::WRITE));
        flags.set(
            Self::WRITABLE,
            prot.contains(Prot::WRITE) && !self.contains(Self::COPY_ON_WRITE),
        );
        flags
    }

    /// These flags once the frame belongs to a prototype and stores must copy.
    #[must_use]
    #[inline]
    pub fn shared(self) -> Self {
        (self - Self::WRITABLE) | Self::COPY_ON_WRITE | Self::PROTOTYPE
    }

    /// These flags once the frame belongs to this entry again.
    #[must_use]
    #[inline]
    pub fn unshared(self) -> Self {
        let mut flags = self - (Self::COPY_ON_WRITE | Self::PROTOTYPE);
        flags.set(Self::WRITABLE, self.contains(Self::LOGICAL_WRITE));
        flags
    }

    /// Whether going from these flags to `new`, same frame, takes a right away, so that a stale
    /// translation would allow too much.
    #[must_use]
    pub fn loses_rights(self, new: Self) -> bool {
        let lost = self - new;
        lost.intersects(Self::WRITABLE | Self::USER)
            || (new.contains(Self::NO_EXECUTE) && !self.contains(Self::NO_EXECUTE))
    }
}

/// A valid leaf entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ValidEntry {
    /// The frame it maps.
    pub frame: Pfn,
    /// Rights, hardware's accessed and dirty bits, software bits.
    pub flags: EntryFlags,
}

impl ValidEntry {
    #[inline]
    fn present(self) -> u64 {
        PRESENT | self.frame.gpa() | self.flags.bits()
    }

    /// The same frame with other flags.
    #[must_use]
    #[inline]
    pub fn with_flags(self, flags: EntryFlags) -> Self {
        Self { flags, ..self }
    }
}

/// An entry of a leaf table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// All-zero: the VAD decides.
    Empty,
    /// Present, and maps a frame of the pool.
    Valid(ValidEntry),
    /// Present, and maps a frame of a layer: read-only whatever the mapping allows, and nowhere counted.
    Frozen(ValidEntry),
    /// A page of zeroes, not made yet, with a protection of its own.
    DemandZero(Prot),
    /// Given back: no page, and no charge.
    Decommitted,
    /// The page's authoritative entry is a clone block.
    Prototype(BlockId),
    /// The frame still holds the page, or is being filled with it, but is not mapped.
    Transition(Pfn),
    /// The page is in this slot of the page file.
    PageFile(Slot),
}

impl Entry {
    /// The bits to store in a leaf table.
    #[must_use]
    #[inline]
    pub fn encode(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Valid(entry) => entry.present(),
            Self::Frozen(entry) => entry.present() | FROZEN,
            Self::DemandZero(prot) => absent(KIND_DEMAND_ZERO, prot, 0),
            Self::Decommitted => absent(KIND_DECOMMITTED, Prot::empty(), 0),
            Self::Prototype(block) => {
                let header = u64::from(block.header.get());
                let low = header & ((1 << HEADER_LOW_BITS) - 1);
                let high = header >> HEADER_LOW_BITS;
                absent(KIND_PROTOTYPE, Prot::empty(), u64::from(block.index))
                    | (low << HEADER_LOW_SHIFT)
                    | (high << HEADER_HIGH_SHIFT)
            }
            Self::Transition(frame) => {
                absent(KIND_TRANSITION, Prot::empty(), u64::from(frame.get()))
            }
            Self::PageFile(slot) => absent(KIND_PAGE_FILE, Prot::empty(), u64::from(slot.get())),
        }
    }

    /// The entry these bits of a leaf table mean; `None` if no entry has them.
    #[must_use]
    #[inline]
    pub fn decode(raw: u64) -> Option<Self> {
        if raw == 0 {
            return Some(Self::Empty);
        }
        if raw & PRESENT != 0 {
            let frame = u32::try_from((raw & FRAME_MASK) >> PAGE_SHIFT).ok()?;
            let flags = EntryFlags::from_bits(raw & !(PRESENT | FROZEN | FRAME_MASK))?;
            let frame = Pfn::new(frame);
            let kind = if raw & FROZEN == 0 {
                Self::Valid
            } else {
                Self::Frozen
            };
            return Some(kind(ValidEntry { frame, flags }));
        }
        Self::decode_absent(raw)
    }

    /// Whether a raw leaf entry maps a frame of the pool.
    #[inline]
    pub(crate) fn is_resident(raw: u64) -> bool {
        raw & (PRESENT | FROZEN) == PRESENT
    }

    /// Whether a raw leaf entry is in use and not a layer's page.
    #[inline]
    pub(crate) fn is_unfrozen(raw: u64) -> bool {
        raw != 0 && raw & (PRESENT | FROZEN) != PRESENT | FROZEN
    }

    /// What hardware sees of the entry, if it is present.
    #[must_use]
    #[inline]
    pub fn present(self) -> Option<ValidEntry> {
        match self {
            Self::Valid(entry) | Self::Frozen(entry) => Some(entry),
            Self::Empty
            | Self::DemandZero(_)
            | Self::Decommitted
            | Self::Prototype(_)
            | Self::Transition(_)
            | Self::PageFile(_) => None,
        }
    }

    /// This entry, if it is present, with what `change` makes of it: a frozen one stays frozen.
    #[must_use]
    #[inline]
    pub fn map_present(self, change: impl FnOnce(ValidEntry) -> ValidEntry) -> Self {
        match self {
            Self::Valid(entry) => Self::Valid(change(entry)),
            Self::Frozen(entry) => Self::Frozen(change(entry)),
            Self::Empty
            | Self::DemandZero(_)
            | Self::Decommitted
            | Self::Prototype(_)
            | Self::Transition(_)
            | Self::PageFile(_) => self,
        }
    }

    fn decode_absent(raw: u64) -> Option<Self> {
        let number = (!raw & FRAME_MASK) >> PAGE_SHIFT;
        let prot = Prot::from_bits_truncate(((raw >> PROT_SHIFT) & 0b111) as u8);
        match (raw & KIND_MASK) >> KIND_SHIFT {
            KIND_DEMAND_ZERO => Some(Self::DemandZero(prot)),
            KIND_DECOMMITTED => Some(Self::Decommitted),
            KIND_PROTOTYPE => {
                let low = raw >> HEADER_LOW_SHIFT;
                let high = (raw >> HEADER_HIGH_SHIFT) & ((1 << HEADER_HIGH_BITS) - 1);
                let header = HeaderId::new((low | (high << HEADER_LOW_BITS)) as u32)?;
                Some(Self::Prototype(BlockId {
                    header,
                    index: u32::try_from(number).ok()?,
                }))
            }
            KIND_TRANSITION => Some(Self::Transition(Pfn::new(u32::try_from(number).ok()?))),
            KIND_PAGE_FILE => Slot::new(number).map(Self::PageFile),
            _ => None,
        }
    }
}

/// A raw leaf entry that maps a frame of the pool. Tables that are copied are full of them, so what a copy does with one
/// is done with the bits as they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappedWord(u64);

impl MappedWord {
    /// These bits of a leaf table, if they are such an entry.
    #[inline]
    pub(crate) fn new(raw: u64) -> Option<Self> {
        Entry::is_resident(raw).then_some(Self(raw))
    }

    /// Whether the frame is nobody else's.
    #[inline]
    pub(crate) fn is_private(self) -> bool {
        self.0 & EntryFlags::PROTOTYPE.bits() == 0
    }

    /// The frame it maps.
    #[inline]
    pub(crate) fn frame(self) -> Pfn {
        Pfn::new(((self.0 & FRAME_MASK) >> PAGE_SHIFT) as u32)
    }

    /// What hardware did with the entry, and what the entry allows.
    #[inline]
    pub(crate) fn flags(self) -> EntryFlags {
        EntryFlags::from_bits_truncate(self.0 & !FRAME_MASK)
    }

    /// The entry once the frame belongs to a prototype.
    #[inline]
    pub(crate) fn shared(self) -> u64 {
        PRESENT | (self.0 & FRAME_MASK) | self.flags().shared().bits()
    }
}

/// An entry of a table above the leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UpperEntry {
    /// Nothing below.
    Empty,
    /// A table one level down that only this path reaches. It allows everything: the leaf decides.
    Table(Pfn),
    /// A table one level down that is shared with other spaces, or counts as shared until somebody looks:
    /// nothing below it can be stored to.
    Shared(Pfn),
    /// In a page directory: 512 frames from an aligned one, mapped as a whole.
    Large(ValidEntry),
}

impl UpperEntry {
    /// Flags of an entry that names a table: the rights are the leaf's business. Accessed is set
    /// ahead of hardware, which then need not write the entry.
    const TABLE_FLAGS: u64 = EntryFlags::WRITABLE.bits() | Self::SHARED_FLAGS;
    /// The same without the writable bit.
    const SHARED_FLAGS: u64 = EntryFlags::USER.union(EntryFlags::ACCESSED).bits();

    /// The table it names, shared or not.
    #[must_use]
    #[inline]
    pub fn table(self) -> Option<Pfn> {
        match self {
            Self::Table(below) | Self::Shared(below) => Some(below),
            Self::Empty | Self::Large(_) => None,
        }
    }

    /// The bits to store in an upper table.
    #[must_use]
    #[inline]
    pub fn encode(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Table(frame) => PRESENT | frame.gpa() | Self::TABLE_FLAGS,
            Self::Shared(frame) => {
                let writable = if cfg!(mutant = "writable_link") {
                    EntryFlags::WRITABLE.bits()
                } else {
                    0
                };
                PRESENT | frame.gpa() | Self::SHARED_FLAGS | writable
            }
            Self::Large(entry) => PRESENT | LARGE | entry.frame.gpa() | entry.flags.bits(),
        }
    }

    /// The entry these bits of an upper table mean; `None` if no entry has them.
    #[must_use]
    #[inline]
    pub fn decode(raw: u64) -> Option<Self> {
        if raw == 0 {
            return Some(Self::Empty);
        }
        let frame = Pfn::new(u32::try_from((raw & FRAME_MASK) >> PAGE_SHIFT).ok()?);
        let flags = EntryFlags::from_bits(raw & !(PRESENT | LARGE | FRAME_MASK))?;
        match (raw & PRESENT != 0, raw & LARGE != 0) {
            (false, _) => None,
            (true, true) => Some(Self::Large(ValidEntry { frame, flags })),
            (true, false) => {
                let rights = EntryFlags::from_bits_retain(Self::SHARED_FLAGS);
                let walks = flags.contains(rights) && !flags.contains(EntryFlags::NO_EXECUTE);
                let own = flags.contains(EntryFlags::WRITABLE);
                let named = if own { Self::Table } else { Self::Shared };
                walks.then_some(named(frame))
            }
        }
    }
}

/// A non-present entry: kind, protection, and a number stored inverted.
fn absent(kind: u64, prot: Prot, number: u64) -> u64 {
    let inverted = !(number << PAGE_SHIFT) & FRAME_MASK;
    (kind << KIND_SHIFT) | (u64::from(prot.bits()) << PROT_SHIFT) | inverted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_prot() -> impl Strategy<Value = Prot> {
        (0u8..8).prop_map(Prot::from_bits_truncate)
    }

    fn any_flags() -> impl Strategy<Value = EntryFlags> {
        any::<u64>().prop_map(EntryFlags::from_bits_truncate)
    }

    fn any_valid() -> impl Strategy<Value = ValidEntry> {
        (any::<u32>(), any_flags()).prop_map(|(frame, flags)| ValidEntry {
            frame: Pfn::new(frame),
            flags,
        })
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let block =
            (0..HeaderId::COUNT, 0..BlockId::PER_HEADER).prop_map(|(header, index)| BlockId {
                header: HeaderId::new(header).expect("in range"),
                index,
            });
        prop_oneof![
            Just(Entry::Empty),
            any_valid().prop_map(Entry::Valid),
            any_valid().prop_map(Entry::Frozen),
            any_prot().prop_map(Entry::DemandZero),
            Just(Entry::Decommitted),
            block.prop_map(Entry::Prototype),
            any::<u32>().prop_map(|f| Entry::Transition(Pfn::new(f))),
            (0..Slot::COUNT).prop_map(|n| Entry::PageFile(Slot::new(n).expect("in range"))),
        ]
    }

    proptest! {
        #[test]
        fn entry_survives_encode_and_decode(entry in any_entry()) {
            prop_assert_eq!(Entry::decode(entry.encode()), Some(entry));
        }

        #[test]
        fn decoded_bits_encode_to_themselves(raw in any::<u64>()) {
            if let Some(entry @ (Entry::Valid(_) | Entry::Frozen(_))) = Entry::decode(raw) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }

        #[test]
        fn upper_entry_survives_encode_and_decode(entry in any_valid(), table in any::<u32>()) {
            let large = UpperEntry::Large(entry);
            prop_assert_eq!(UpperEntry::decode(large.encode()), Some(large));
            for table in [UpperEntry::Table(Pfn::new(table)), UpperEntry::Shared(Pfn::new(table))] {
                prop_assert_eq!(UpperEntry::decode(table.encode()), Some(table));
            }
        }

        #[test]
        fn absent_entry_points_above_any_memory(entry in any_entry()) {
            let raw = entry.encode();
            let names_memory = entry.present().is_some() || entry == Entry::Empty;
            // Bits 44 to 51 of an address all set: beyond 2^51 for every 32-bit number.
            if !names_memory {
                prop_assert_eq!(raw & PRESENT, 0);
                prop_assert_eq!(raw >> 44 & 0xff, 0xff);
            }
        }

        #[test]
        fn writable_bit_follows_the_rule(flags in any_flags(), prot in any_prot()) {
            for flags in [flags.with_prot(prot), flags.with_prot(prot).shared(),
                          flags.with_prot(prot).shared().unshared()] {
                let logical = flags.contains(EntryFlags::LOGICAL_WRITE);
                let cow = flags.contains(EntryFlags::COPY_ON_WRITE);
                prop_assert_eq!(flags.contains(EntryFlags::WRITABLE), logical && !cow);
            }
        }
    }

    #[test]
    fn age_counts_looks_since_the_last_use() {
        let mut flags = EntryFlags::private(Prot::READ) | EntryFlags::ACCESSED;
        let ages: [u8; 6] = core::array::from_fn(|_| {
            flags = flags.aged();
            flags.age()
        });
        assert_eq!(ages, [0, 1, 2, 3, 3, 3]);
        assert_eq!((flags | EntryFlags::ACCESSED).aged().age(), 0);
    }

    #[test]
    fn protect_there_and_back_keeps_copy_on_write() {
        let rw = Prot::READ | Prot::WRITE;
        let shared = EntryFlags::private(rw).shared();
        assert_eq!(shared.with_prot(Prot::empty()).with_prot(rw), shared);
        assert!(shared.loses_rights(shared.with_prot(Prot::empty())));
        assert!(!shared.with_prot(Prot::empty()).loses_rights(shared));
    }
}
