//! A guest of a few instructions over a template's pages: what it reads is the template's own memory, what it stores to is its
//! own, and a store that its page tables allow by mistake ends it. Skipped, aloud, without a usable `/dev/kvm`.

#[path = "common/guest.rs"]
mod guest;

use std::sync::Arc;

use guest::{DATA, Guest, PAGES, va};
use shadow_mm::pte::{Entry, EntryFlags, UpperEntry};
use shadow_mm::{FrameStore, Level, Manager, Pfn, PfnRange, SectionPage, Space, VpnRange};
use vmm::hv::Exit;
use vmm::memory::{Backing, Layer, Pool, VmmPlatform};
use vmm::snapshot::format::PartKind;
use vmm::snapshot::image::ImageContent;
use vmm::snapshot::read::{Snapshot, Trust};
use vmm::snapshot::write::Writer;

/// A template whose page `n` begins with the word `n + 1`.
fn template() -> Arc<Snapshot> {
    let mut writer = Writer::in_memory("a template").expect("a file in memory");
    for page in 0..PAGES {
        let mut bytes = [0; 4096];
        bytes[..8].copy_from_slice(&(page + 1).to_le_bytes());
        writer.add_page(&bytes).expect("room");
    }
    let written = writer.finish(&[(PartKind::Spaces, &[])]).expect("room");
    let path = "a template".to_owned();
    let snapshot = Snapshot::from_file(written.file, path, Trust::Sealed, None);
    Arc::new(snapshot.expect("a snapshot"))
}

/// Lays a template under the data of a space.
fn attach(g: &Guest, space: &Space<VmmPlatform>, template: &Arc<Snapshot>) -> PfnRange {
    let layer = template.layer().expect("mapped").expect("a sealed file");
    let frames = g.hardware.attach_layer(layer).expect("a slot");
    let manager = &g.hardware.memory.manager;
    let content = ImageContent::new(Arc::clone(template));
    let section = manager.create_frozen_section(Backing(Arc::new(content) as _), frames);
    let pages = VpnRange::new(va(DATA).vpn(), PAGES).expect("a range");
    let first = SectionPage::new(0).expect("a page");
    let attached = manager.attach_image(space, pages, &section.expect("a section"), first);
    attached.expect("an image");
    frames
}

/// The first word of a layer's page, as whoever maps the file sees it.
fn word(manager: &Manager<VmmPlatform>, frame: u32) -> u64 {
    let mut bytes = [0; 8];
    manager.store().read(Pfn::new(frame), 0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn reading_every_page_takes_no_frame_and_an_exit_for_each_table() {
    let Some(mut g) = Guest::new() else { return };
    let template = template();
    let space = g.space();
    attach(&g, &space, &template);
    assert_eq!(g.load(&space, DATA), Ok(1));
    let before = g.hardware.memory.manager.stats();
    let faults = g.faults;
    for page in 0..PAGES {
        assert_eq!(g.load(&space, DATA + page * 4096), Ok(page + 1));
    }
    let after = g.hardware.memory.manager.stats();
    assert_eq!(after.data.active, before.data.active);
    assert_eq!(after.pages_copied, 0);
    // The data begins and ends inside a table's 2 MiB.
    let tables = (DATA + PAGES * 4096).div_ceil(2 << 20) - DATA / (2 << 20);
    assert!(g.faults - faults < tables, "{} faults", g.faults - faults);
    g.end(&[space]);
}

#[test]
fn stored_pages_are_the_guests_and_the_template_stays() {
    let Some(mut g) = Guest::new() else { return };
    let template = template();
    let spaces = [g.space(), g.space()];
    let first = attach(&g, &spaces[0], &template).start.get();
    let again = attach(&g, &spaces[1], &template).start.get();
    assert_eq!(first, again, "a template lies under a machine once");
    let (third, other) = (g.space(), self::template());
    let second = attach(&g, &third, &other).start.get();
    assert_ne!(first, second, "another one has frames of its own");
    for (n, space) in (0_u64..).zip(&spaces) {
        for page in (0..PAGES).step_by(3) {
            let at = DATA + page * 4096;
            if page % 2 == 0 {
                assert_eq!(g.load(space, at), Ok(page + 1));
            }
            g.store(space, at, (n + 5) << 32 | page).expect("writable");
        }
    }
    for (n, space) in (0_u64..).zip(&spaces) {
        for page in 0..PAGES {
            let own = page % 3 == 0;
            let expected = if own { (n + 5) << 32 | page } else { page + 1 };
            assert_eq!(g.load(space, DATA + page * 4096), Ok(expected));
        }
    }
    let manager = &g.hardware.memory.manager;
    for page in 0..PAGES as u32 {
        assert_eq!(word(manager, first + page), u64::from(page) + 1);
        assert_eq!(word(manager, second + page), u64::from(page) + 1);
    }
    let [one, two] = spaces;
    g.end(&[one, two, third]);
}

/// The entry of a page, and where it is.
fn entry_of(pool: &Pool, root: Pfn, at: u64) -> (Pfn, shadow_mm::EntryIndex, Entry) {
    let vpn = va(at).vpn();
    let mut table = root;
    for level in [Level::Root, Level::Pointers, Level::Directory] {
        let found = UpperEntry::decode(pool.load(table, vpn.index(level)));
        table = found.and_then(UpperEntry::table).expect("a table");
    }
    let index = vpn.index(Level::Leaf);
    let entry = Entry::decode(pool.load(table, index)).expect("an entry");
    (table, index, entry)
}

/// The second wall: the page tables of the guest are wrong, and the template stays as it is.
#[test]
fn store_that_a_wrong_entry_allows_exits_and_changes_nothing() {
    let Some(mut g) = Guest::new() else { return };
    let template = template();
    let space = g.space();
    let layer = attach(&g, &space, &template);
    assert_eq!(g.load(&space, DATA), Ok(1));
    // Far from what was loaded, so that nobody knows the entry yet.
    let page = 100;
    let at = DATA + page * 4096;
    let pool = g.hardware.memory.manager.store();
    let (table, index, entry) = entry_of(pool, space.root(), at);
    let Entry::Frozen(frozen) = entry else {
        panic!("{entry:?} is no layer's");
    };
    let forged = frozen.with_flags(frozen.flags | EntryFlags::WRITABLE);
    pool.swap(table, index, Entry::Frozen(forged).encode());
    let exit = g.exit_of_store(&space, at, 0xdead);
    let Exit::Broken(what) = &exit else {
        panic!("{exit:?}");
    };
    assert!(what.contains("a template's memory"), "{what}");
    let manager = &g.hardware.memory.manager;
    assert_eq!(word(manager, layer.start.get() + page as u32), page + 1);
    manager.store().swap(table, index, entry.encode());
    // The virtual CPU has forgotten the store, and runs others.
    assert_eq!(g.load(&space, at), Ok(page + 1));
    assert_eq!(g.load(&space, DATA + 4096), Ok(2));
    g.end(&[space]);
}

#[test]
fn file_that_can_still_change_is_no_layer() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(8192).expect("room");
    assert!(Layer::map(&file, 0, 2).is_err());
    let template = template();
    assert!(Layer::map(template.file(), 4096, PAGES + 64).is_err());
    assert!(template.layer().expect("mapped").is_some());
}
