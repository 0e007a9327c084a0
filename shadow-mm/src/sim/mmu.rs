//! A CPU's address translation in software: the walk of Intel SDM vol 3, section 4.5, in ring 3, with
//! accessed and dirty bits and a TLB that believes what it knows until it is told otherwise.

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

/// A simulated vCPU's translation, running one root.
#[derive(Clone, Debug)]
pub struct SimMmu {
    root: Pfn,
    tlb: BTreeMap<Vpn, Cached>,
}

impl SimMmu {
    /// A vCPU with this root and an empty TLB.
    #[must_use]
    pub fn new(root: Pfn) -> Self {
        Self {
            root,
            tlb: BTreeMap::new(),
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
                let cached = walk(store, self.root, va, access)?;
                self.tlb.insert(vpn, cached.clone());
                cached.entry
            }
        };
        Ok(Translation {
            frame: entry.frame,
            offset: va.offset(),
        })
    }

    /// Drops the translations a flush names, and no other.
    pub fn flush(&mut self, flush: &Flush) {
        self.tlb.retain(|_, cached| {
            !cached.path.iter().any(|(table, index)| {
                let entry = |e: &crate::flush::FlushEntry| (e.table, e.index) == (*table, *index);
                flush.tables().contains(table) || flush.entries().iter().any(entry)
            })
        });
    }

    /// Drops every translation.
    pub fn flush_all(&mut self) {
        self.tlb.clear();
    }
}

/// Walks the tables once, and sets the bits of the leaf.
fn walk(
    store: &impl FrameStore,
    root: Pfn,
    va: GuestVa,
    access: Access,
) -> Result<Cached, PageFault> {
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
                let entry = ValidEntry { frame, flags };
                let allowed = allows(entry, access).then_some(Cached { entry, path });
                return allowed.ok_or(PageFault { va, present: true });
            }
            Some(UpperEntry::Empty) | None => return Err(absent),
        }
    }
    let index = vpn.index(Level::Leaf);
    path.push((table, index));
    let entry = use_leaf(store, (table, index), (va, denied), access)?;
    Ok(Cached { entry, path })
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
