//! The walk: every table once, every entry against its mapping and its frame.

use alloc::collections::{BTreeMap, BTreeSet};

use super::{Count, Violation};
use crate::addr::{EntryIndex, Level, Pfn, SpaceId, Vpn};
use crate::backend::{FrameStore, Platform};
use crate::manager::Manager;
use crate::page_file::Slot;
use crate::pfn::{Owner, PfnDatabase};
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::pte::{Entry, EntryFlags, UpperEntry, ValidEntry};
use crate::shadow::SUPERVISOR_SLOT;
use crate::space::{ForkMode, Purpose, Space, SpaceState, frozen_flags, view_flags};
use crate::vad::{Sharing, Vad};

/// What the walk found in all spaces.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Valid entries that map each data frame.
    pub(super) mapped: BTreeMap<Pfn, u32>,
    /// A space that can write the frame.
    pub(super) writers: BTreeMap<Pfn, SpaceId>,
    /// Entries in use in each table, and one for the table.
    pub(super) tables: BTreeMap<Pfn, u32>,
    /// Entries that refer to each clone block.
    pub(super) blocks: BTreeMap<BlockId, u32>,
    /// Spaces that describe each header.
    pub(super) headers: BTreeMap<HeaderId, u32>,
    /// Private pages in transition: each frame's entry.
    pub(super) transition: BTreeMap<Pfn, (Pfn, EntryIndex)>,
    /// Frames without an owner that spaces map which are kept as they were.
    pub(super) lost: BTreeSet<Pfn>,
    /// Slots of the page file that entries name.
    pub(super) slots: BTreeSet<Slot>,
    /// Entries of upper tables that name each table.
    pub(super) parents: BTreeMap<Pfn, u32>,
    /// Private pages in shared tables.
    pub(super) shared_private: u64,
    /// Frames of forked pages.
    pub(super) forked: BTreeSet<Pfn>,
    /// Tables of all spaces, each space's counted by itself, and the supervisor's.
    pub(super) charged_tables: u64,
}

/// How a space reaches a table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Alone, with all rights.
    Own,
    /// Through an entry without the writable bit. Each sharer looks at what is in such a table, and the
    /// first counts it.
    Shared { first: bool },
}

impl Reach {
    fn counts(self) -> bool {
        self != Self::Shared { first: false }
    }
}

/// What the walk found in one space.
#[derive(Debug, Default)]
struct Totals {
    resident: u64,
    private: u64,
    tables: u64,
    descriptors: BTreeMap<HeaderId, u64>,
}

/// A walk of one space.
struct Walk<'a, P: Platform> {
    manager: &'a Manager<P>,
    space: &'a Space<P>,
    state: &'a SpaceState<P::Backing>,
    db: &'a PfnDatabase,
    seen: &'a mut Seen,
    totals: Totals,
}

impl<P: Platform> Manager<P> {
    pub(super) fn walk_supervisor(&self, seen: &mut Seen) -> Result<(), Violation> {
        self.walk_supervisor_table(self.supervisor, Level::Pointers, seen)
    }

    fn walk_supervisor_table(
        &self,
        table: Pfn,
        level: Level,
        seen: &mut Seen,
    ) -> Result<(), Violation> {
        let mut used = 1;
        for index in EntryIndex::all() {
            let raw = self.store.load(table, index);
            used += u32::from(raw != 0);
            let bad = Violation::BadEntry { table, index, raw };
            let leaf = match level.below() {
                None => Entry::decode(raw).ok_or(bad)?.present(),
                Some(below) => match UpperEntry::decode(raw).ok_or(bad)? {
                    UpperEntry::Empty => None,
                    UpperEntry::Large(entry) => Some(entry),
                    UpperEntry::Shared(_) => return Err(bad),
                    UpperEntry::Table(child) => {
                        *seen.parents.entry(child).or_insert(0) += 1;
                        self.walk_supervisor_table(child, below, seen)?;
                        None
                    }
                },
            };
            let user_writable = EntryFlags::USER | EntryFlags::WRITABLE;
            if leaf.is_some_and(|leaf| leaf.flags.contains(user_writable)) {
                return Err(bad);
            }
        }
        seen.charged_tables += 1;
        seen.add_table(table, used)
    }

    pub(super) fn walk_space(
        &self,
        space: &Space<P>,
        state: &SpaceState<P::Backing>,
        db: &PfnDatabase,
        seen: &mut Seen,
    ) -> Result<(), Violation> {
        let totals = Totals::default();
        let mut walk = Walk {
            manager: self,
            space,
            state,
            db,
            seen,
            totals,
        };
        walk.upper(space.root(), Level::Root, 0, Reach::Own)?;
        walk.finish()
    }
}

impl<P: Platform> Walk<'_, P> {
    fn upper(
        &mut self,
        table: Pfn,
        level: Level,
        base: u64,
        reach: Reach,
    ) -> Result<(), Violation> {
        let mut used = 1;
        self.totals.tables += 1;
        for index in EntryIndex::all() {
            let raw = self.manager.store.load(table, index);
            let bad = Violation::BadEntry { table, index, raw };
            let found = UpperEntry::decode(raw).ok_or(bad)?;
            let child = match found {
                UpperEntry::Empty => continue,
                UpperEntry::Large(_) => return Err(bad),
                UpperEntry::Table(child) | UpperEntry::Shared(child) => child,
            };
            used += 1;
            if level == Level::Root && index == SUPERVISOR_SLOT {
                if found != UpperEntry::Table(self.manager.supervisor) {
                    return Err(bad);
                }
                continue;
            }
            if !self.manager.layout.tables.contains(child) {
                return Err(Violation::WrongZone {
                    table,
                    index,
                    frame: child,
                });
            }
            if reach.counts() {
                *self.seen.parents.entry(child).or_insert(0) += 1;
            }
            let below = self.reach_below((table, index), found, child, reach)?;
            let base = base + index.get() as u64 * level.pages();
            match level {
                Level::Directory => self.leaf_table(child, base, below)?,
                Level::Root => self.upper(child, Level::Pointers, base, below)?,
                Level::Pointers | Level::Leaf => {
                    self.upper(child, Level::Directory, base, below)?;
                }
            }
        }
        self.count_table(table, used, reach)
    }

    /// How a table is reached through an entry, if the entry may name it so.
    fn reach_below(
        &self,
        (table, index): (Pfn, EntryIndex),
        found: UpperEntry,
        child: Pfn,
        above: Reach,
    ) -> Result<Reach, Violation> {
        let owner = self.db.entry(child).owner;
        let owned = owner == Owner::Entry { table, index };
        let several = self.db.has_other_parents(child);
        let own = above == Reach::Own && found == UpperEntry::Table(child);
        // An entry with all rights names a table that no other does, even where it is shared from above.
        let alone = own || found == UpperEntry::Table(child);
        let fits = match alone {
            true => !several && (owned || (!own && owner == Owner::Tables)),
            false if several => owner == Owner::Tables,
            false => owned || owner == Owner::Tables,
        };
        if !fits {
            return Err(Violation::BadTable { table: child });
        }
        let first = !self.seen.tables.contains_key(&child);
        Ok(match own {
            true => Reach::Own,
            false => Reach::Shared { first },
        })
    }

    fn count_table(&mut self, table: Pfn, used: u32, reach: Reach) -> Result<(), Violation> {
        // A shared table is never freed because it is empty, nor is what unsharing made of it.
        if used == 1 && self.manager.fork_mode() == ForkMode::Eager {
            return Err(Violation::BadTable { table });
        }
        if reach.counts() {
            self.seen.add_table(table, used)
        } else {
            Ok(())
        }
    }

    fn leaf_table(&mut self, table: Pfn, base: u64, reach: Reach) -> Result<(), Violation> {
        let (mut used, mut frozen) = (1, 0);
        self.totals.tables += 1;
        for index in EntryIndex::all() {
            let raw = self.manager.store.load(table, index);
            let bad = Violation::BadEntry { table, index, raw };
            let vpn = Vpn::new(base + index.get() as u64).ok_or(bad)?;
            let entry = Entry::decode(raw).ok_or(bad)?;
            match entry {
                Entry::Empty => continue,
                Entry::Valid(entry) => self.page((table, index), vpn, entry, reach)?,
                Entry::Frozen(entry) => {
                    frozen += 1;
                    self.frozen(vpn, entry)?;
                }
                Entry::Transition(_) | Entry::PageFile(_) | Entry::Prototype(_) => {
                    self.absent((table, index), vpn, entry, reach)?;
                }
                Entry::DemandZero(_) | Entry::Decommitted => return Err(bad),
            }
            used += 1;
        }
        let unfrozen = u32::from(self.db.entry(table).unfrozen());
        let counted = used - 1 - frozen;
        if unfrozen != counted {
            return Err(Violation::WrongUnfrozen {
                table,
                unfrozen,
                counted,
            });
        }
        self.count_table(table, used, reach)
    }

    /// A private page was found.
    fn count_private(&mut self, reach: Reach) {
        match reach {
            Reach::Own => self.totals.private += 1,
            Reach::Shared { first } => self.seen.shared_private += u64::from(first),
        }
    }

    /// A page that is not mapped here.
    fn absent(
        &mut self,
        place: (Pfn, EntryIndex),
        vpn: Vpn,
        entry: Entry,
        reach: Reach,
    ) -> Result<(), Violation> {
        let space = self.space.id();
        if self.state.vads.find(vpn).is_none() {
            return Err(Violation::NoMapping { space, vpn });
        }
        match entry {
            Entry::Transition(frame) => {
                let mut fresh = || self.seen.transition.insert(frame, place).is_none();
                let known =
                    self.manager.layout.data.contains(frame) && (!reach.counts() || fresh());
                if !known {
                    return Err(Violation::WrongOwner { space, vpn, frame });
                }
                self.count_private(reach);
            }
            Entry::PageFile(slot) => {
                if reach.counts() {
                    self.seen.add_slot(slot)?;
                }
                self.count_private(reach);
            }
            Entry::Prototype(block) => self.refer(block, reach),
            Entry::Empty
            | Entry::Valid(_)
            | Entry::Frozen(_)
            | Entry::DemandZero(_)
            | Entry::Decommitted => {}
        }
        Ok(())
    }

    /// A layer's page is where the image says, cannot be stored to, and never was.
    fn frozen(&self, vpn: Vpn, entry: ValidEntry) -> Result<(), Violation> {
        let (space, frame) = (self.space.id(), entry.frame);
        let vad = self.state.vads.find(vpn);
        let vad = vad.ok_or(Violation::NoMapping { space, vpn })?;
        let run = self.state.images.find(vpn);
        let named = match run {
            Some(run) => run.page(vpn).and_then(|page| run.section.frozen(page)),
            None => self.state.source(vpn).and_then(|source| {
                let section = self.db.sections.get(source.section.id());
                section.frozen(source.page(vpn)?)
            }),
        };
        if named != Some(frame) {
            return Err(Violation::WrongFrozen { space, vpn, frame });
        }
        let expected = frozen_flags(vad.prot);
        let used = EntryFlags::ACCESSED;
        if entry.flags - used == expected && !expected.contains(EntryFlags::WRITABLE) {
            return Ok(());
        }
        let (flags, expected) = (entry.flags.bits(), expected.bits());
        Err(Violation::WrongRights {
            space,
            vpn,
            flags,
            expected,
        })
    }

    /// An entry refers to a clone block.
    fn refer(&mut self, block: BlockId, reach: Reach) {
        if reach.counts() {
            *self.seen.blocks.entry(block).or_insert(0) += 1;
        }
        if block.header == HeaderId::LAZY {
            return;
        }
        *self.totals.descriptors.entry(block.header).or_insert(0) += 1;
    }

    fn page(
        &mut self,
        (table, index): (Pfn, EntryIndex),
        vpn: Vpn,
        entry: ValidEntry,
        reach: Reach,
    ) -> Result<(), Violation> {
        let (space, frame) = (self.space.id(), entry.frame);
        let vad = self
            .state
            .vads
            .find(vpn)
            .ok_or(Violation::NoMapping { space, vpn })?;
        if !self.manager.layout.data.contains(frame) {
            return Err(Violation::WrongZone {
                table,
                index,
                frame,
            });
        }
        let wrong_owner = Violation::WrongOwner { space, vpn, frame };
        let mut expected = EntryFlags::empty();
        match self.db.entry(frame).owner {
            Owner::Clone(block) => {
                expected |= EntryFlags::PROTOTYPE | EntryFlags::COPY_ON_WRITE;
                let named = self.db.clones.block(block).and_then(|b| b.content());
                if named != Some(BlockContent::Resident(frame)) {
                    return Err(wrong_owner);
                }
                self.refer(block, reach);
            }
            Owner::Entries => {
                expected |= EntryFlags::PROTOTYPE | EntryFlags::COPY_ON_WRITE;
                self.seen.forked.insert(frame);
            }
            Owner::Section { section, page } => {
                let source = self.state.source(vpn).ok_or(wrong_owner)?;
                let named = self.db.sections.find(section);
                let named = named.and_then(|state| state.resident(page));
                let here = source.section.id() == section && source.page(vpn) == Some(page);
                if !here || named != Some(frame) {
                    return Err(wrong_owner);
                }
                expected = view_flags(source.prot, source.sharing);
                // Closed, because the section is kept or was when the entry was made.
                let kept = self.db.to_be_kept(frame).is_some() && reach == Reach::Own;
                if kept || entry.flags.contains(EntryFlags::COPY_ON_WRITE) {
                    expected = expected.shared();
                }
            }
            owner if owner == (Owner::Entry { table, index }) => {
                let pinned = self.db.entry(frame).write_pins() > 0;
                if pinned && self.db.has_other_parents(table) {
                    return Err(Violation::SharedPin { table, frame });
                }
                self.count_private(reach);
            }
            // A page that its section has lost stays with a space that is kept as it was.
            Owner::None if self.state.purpose == Purpose::Keep => {
                let source = self.state.source(vpn).ok_or(wrong_owner)?;
                expected = view_flags(source.prot, source.sharing);
                self.seen.lost.insert(frame);
            }
            _ => return Err(wrong_owner),
        }
        let expected = expected.with_prot(vad.prot);
        if entry.flags - EntryFlags::USE != expected {
            let (flags, expected) = (entry.flags.bits(), expected.bits());
            return Err(Violation::WrongRights {
                space,
                vpn,
                flags,
                expected,
            });
        }
        let shared = vad
            .view()
            .is_some_and(|(_, _, sharing)| sharing == Sharing::Shared);
        if entry.flags.contains(EntryFlags::WRITABLE) && !shared && reach == Reach::Own {
            self.seen.writers.insert(frame, space);
        }
        if reach.counts() {
            *self.seen.mapped.entry(frame).or_insert(0) += 1;
        }
        self.totals.resident += u64::from(reach == Reach::Own);
        Ok(())
    }

    fn finish(self) -> Result<(), Violation> {
        let (space, state, totals) = (self.space.id(), self.state, self.totals);
        self.seen.charged_tables += totals.tables;
        let pages = state.vads.iter().map(|vad| vad.range.count()).sum();
        let charged = state.vads.iter().map(Vad::charge).sum();
        let counts = [
            (Count::Resident, state.resident, totals.resident),
            (Count::Private, state.private, totals.private),
            (Count::Tables, state.tables, totals.tables),
            (Count::VirtualPages, state.vads.pages(), pages),
            (Count::Charged, state.vads.charged(), charged),
        ];
        for (section, _, _) in state.vads.iter().filter_map(Vad::view) {
            if !self.db.sections.get(section.id()).viewers.contains(&space) {
                return Err(Violation::UnknownViewer {
                    space,
                    section: section.id(),
                });
            }
        }
        for run in state.images.iter() {
            let private = |vpn| {
                let vad = state.vads.find(vpn)?;
                let shared = vad.view().is_some_and(|(_, _, s)| s == Sharing::Shared);
                (!shared).then_some(())
            };
            if let Some(vpn) = run.range.iter().find(|vpn| private(*vpn).is_none()) {
                return Err(Violation::StrayImage { space, vpn });
            }
        }
        for (count, has, counted) in counts {
            if has != counted {
                return Err(Violation::WrongCount {
                    space,
                    count,
                    has,
                    counted,
                });
            }
        }
        let mut counted = totals.descriptors;
        for (header, described) in state.descriptors.iter() {
            let counted = counted.remove(&header).unwrap_or(0);
            if described != counted || described == 0 {
                return Err(Violation::WrongDescriptor {
                    space,
                    header,
                    described,
                    counted,
                });
            }
            *self.seen.headers.entry(header).or_insert(0) += 1;
        }
        match counted.first_key_value() {
            Some((&header, &counted)) => Err(Violation::WrongDescriptor {
                space,
                header,
                described: 0,
                counted,
            }),
            None => Ok(()),
        }
    }
}

impl Seen {
    pub(super) fn add_slot(&mut self, slot: Slot) -> Result<(), Violation> {
        if self.slots.insert(slot) {
            Ok(())
        } else {
            Err(Violation::SharedSlot { slot })
        }
    }

    fn add_table(&mut self, table: Pfn, used: u32) -> Result<(), Violation> {
        match self.tables.insert(table, used) {
            Some(_) => Err(Violation::BadTable { table }),
            None => Ok(()),
        }
    }
}
