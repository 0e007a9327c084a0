//! A CPU's address translation in software: the walk of Intel SDM vol 3, section 4.5, in ring 3, with
//! accessed and dirty bits, and a TLB and a cache of leaf tables (a *paging-structure cache*) that believe what they know
//! until they are told otherwise.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::access::Access;
use crate::addr::{EntryIndex, GuestVa, Level, Pfn, Vpn};
use crate::backend::FrameStore;
use crate::flush::Flush;
use crate::pte::{Entry, EntryFlags, UpperEntry, ValidEntry};

/// Where an address lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The frame.
    pub frame: Pfn,
    /// The byte in the frame.
    pub offset: usize,
}

/// The hardware refuses the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// The address.
    pub va: GuestVa,
    /// Whether a valid entry forbids the access (the P bit of the error code).
    pub present: bool,
}

/// What the TLB knows of one page, and the entries it knows it from.
#[derive(Clone, Debug)]
struct Cached {
    entry: ValidEntry,
    path: Vec<(Pfn, EntryIndex)>,
}

/// A leaf table, what the entries above it deny, and those entries.
#[derive(Clone, Debug)]
struct CachedTable {
    table: Pfn,
    denied: EntryFlags,
    path: Vec<(Pfn, EntryIndex)>,
}

/// A simulated vCPU's translation, running one root.
#[derive(Clone, Debug)]
pub struct SimMmu {
    root: Pfn,
    tlb: BTreeMap<Vpn, Cached>,
    /// By the number of the first page that the table translates, divided by how many it does.
    tables: BTreeMap<u64, CachedTable>,
}

impl SimMmu {
    /// A vCPU with this root and an empty TLB.
    #[must_use]
    pub fn new(root: Pfn) -> Self {
        Self {
            root,
            tlb: BTreeMap::new(),
            tables: BTreeMap::new(),
        }
    }

    /// Loads another root. What the TLB knows stays: nothing is dropped here that a flush must name.
    pub fn set_root(&mut self, root: Pfn) {
        self.root = root;
    }

    /// Translates for an access of ring 3, and sets accessed and dirty as hardware would. A translation
    /// that the TLB has is used even if the tables say something else by now.
    ///
    /// # Errors
    /// [`PageFault`] if the tables, asked again, forbid the access.
    pub fn translate(
        &mut self,
        store: &impl FrameStore,
        va: GuestVa,
        access: Access,
    ) -> Result<Translation, PageFault> {
        let vpn = va.vpn();
        let stored = access != Access::Write;
        let known = self.tlb.get(&vpn).map(|cached| cached.entry);
        // A store through an entry whose dirty bit is clear walks again, to set it.
        let usable =
            |e: &ValidEntry| allows(*e, access) && (stored || e.flags.contains(EntryFlags::DIRTY));
        let entry = match known.filter(usable) {
            Some(entry) => entry,
            None => {
                self.tlb.remove(&vpn);
                let cached = self.walk(store, va, access)?;
                self.tlb.insert(vpn, cached.clone());
                cached.entry
            }
        };
        Ok(Translation {
            frame: entry.frame,
            offset: va.offset(),
        })
    }

    /// Walks from the leaf table that is known, if one is, and from the root if that does not do: a page fault drops
    /// what is cached of its address.
    fn walk(
        &mut self,
        store: &impl FrameStore,
        va: GuestVa,
        access: Access,
    ) -> Result<Cached, PageFault> {
        let vpn = va.vpn();
        let span = vpn.get() / Level::Directory.pages();
        if let Some(known) = self.tables.get(&span) {
            match known.walk(store, va, access) {
                Ok(cached) => return Ok(cached),
                Err(_) => self.tables.remove(&span),
            };
        }
        let found = match walk_upper(store, self.root, va)? {
            Upper::Large(entry, path) => {
                let allowed = allows(entry, access).then_some(Cached { entry, path });
                return allowed.ok_or(PageFault { va, present: true });
            }
            Upper::Table(found) => found,
        };
        let cached = found.walk(store, va, access)?;
        self.tables.insert(span, found);
        Ok(cached)
    }

    /// Drops the translations a flush names, and no other.
    pub fn flush(&mut self, flush: &Flush) {
        let named = |path: &[(Pfn, EntryIndex)]| {
            path.iter().any(|(table, index)| {
                let entry = |e: &crate::flush::FlushEntry| (e.table, e.index) == (*table, *index);
                flush.tables().contains(table) || flush.entries().iter().any(entry)
            })
        };
        self.tlb.retain(|_, cached| !named(&cached.path));
        let whole = |known: &CachedTable| flush.tables().contains(&known.table);
        self.tables
            .retain(|_, known| !named(&known.path) && !whole(known));
    }

    /// Drops every translation.
    pub fn flush_all(&mut self) {
        self.tlb.clear();
        self.tables.clear();
    }
}

impl CachedTable {
    /// Walks the leaf, and sets its bits.
    fn walk(
        &self,
        store: &impl FrameStore,
        va: GuestVa,
        access: Access,
    ) -> Result<Cached, PageFault> {
        let leaf = (self.table, va.vpn().index(Level::Leaf));
        let entry = use_leaf(store, leaf, (va, self.denied), access)?;
        let mut path = self.path.clone();
        path.push(leaf);
        Ok(Cached { entry, path })
    }
}

/// Where the walk of the upper tables ends.
enum Upper {
    Table(CachedTable),
    /// A large page, as an entry for the page that was asked for.
    Large(ValidEntry, Vec<(Pfn, EntryIndex)>),
}

/// Walks the upper tables once.
fn walk_upper(store: &impl FrameStore, root: Pfn, va: GuestVa) -> Result<Upper, PageFault> {
    let vpn = va.vpn();
    let absent = PageFault { va, present: false };
    let mut path = Vec::new();
    let mut table = root;
    // What an entry on the way does not allow, the leaf cannot.
    let mut denied = EntryFlags::empty();
    for level in [Level::Root, Level::Pointers, Level::Directory] {
        let index = vpn.index(level);
        path.push((table, index));
        match UpperEntry::decode(store.load(table, index)) {
            Some(UpperEntry::Table(below)) => table = below,
            Some(UpperEntry::Shared(below)) => {
                table = below;
                denied = EntryFlags::WRITABLE;
            }
            Some(UpperEntry::Large(large)) => {
                let inside = vpn.get() % level.pages();
                let frame = Pfn::new(large.frame.get() + inside as u32);
                let flags = large.flags - denied;
                return Ok(Upper::Large(ValidEntry { frame, flags }, path));
            }
            Some(UpperEntry::Empty) | None => return Err(absent),
        }
    }
    Ok(Upper::Table(CachedTable {
        table,
        denied,
        path,
    }))
}

/// Checks a leaf entry and sets its accessed and dirty bits in one step.
fn use_leaf(
    store: &impl FrameStore,
    (table, index): (Pfn, EntryIndex),
    (va, denied): (GuestVa, EntryFlags),
    access: Access,
) -> Result<ValidEntry, PageFault> {
    loop {
        let raw = store.load(table, index);
        let found = Entry::decode(raw).unwrap_or(Entry::Empty);
        let Some(old) = found.present() else {
            return Err(PageFault { va, present: false });
        };
        let effective = old.with_flags(old.flags - denied);
        if !allows(effective, access) {
            return Err(PageFault { va, present: true });
        }
        let dirty = if access == Access::Write {
            EntryFlags::DIRTY
        } else {
            EntryFlags::empty()
        };
        let new = old.with_flags(old.flags | EntryFlags::ACCESSED | dirty);
        if store
            .compare_exchange(table, index, raw, found.map_present(|_| new).encode())
            .is_ok()
        {
            return Ok(new.with_flags(new.flags - denied));
        }
    }
}

fn allows(entry: ValidEntry, access: Access) -> bool {
    entry.flags.contains(EntryFlags::USER)
        && match access {
            Access::Read => true,
            Access::Write => entry.flags.contains(EntryFlags::WRITABLE),
            Access::Execute => !entry.flags.contains(EntryFlags::NO_EXECUTE),
        }
}
