//! Sections that are kept as they were, and read while others store to them.

use std::sync::Arc;

use shadow_mm::{
    Charge, FrameStore, KeptPage, MapKind, PAGE_SIZE, SectionPage, SectionStore, Sharing,
};
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine};
use crate::schedules;

const PAGES: u64 = 3;

/// Whoever stores to a page, by a view or without one, while it is read: it is read as it was.
#[test]
fn keeper_against_stores() {
    schedules(|| {
        let mm = machine();
        mm.set_fork_mode(shadow_mm::ForkMode::Shared);
        let section = mm.create_shared_memory(PAGES * PAGE_SIZE as u64, Charge::Charged);
        let section = section.expect("a section");
        let one = Guest::new(&mm);
        let other = one.another();
        for guest in [&one, &other] {
            let kind = MapKind::View {
                section: section.clone(),
                offset: 0,
                sharing: Sharing::Shared,
            };
            guest.map(PAGES, kind);
        }
        one.store(0, BASE, 0, 1).expect("a store");
        one.store(0, BASE + 1, 0, 2).expect("a store");
        other.load(0, BASE, 0).expect("a load");
        for guest in [&one, &other] {
            let kept = mm.keep(&guest.space).expect("it is kept");
            guest.shoot(kept.flush);
            guest.shoot_any(mm.delete_space(&kept.child));
        }
        let kept = mm.keep_section(&section).expect("it is kept");
        let storing = [(Arc::clone(&one), 0), (Arc::clone(&other), 1)].map(|(guest, cpu)| {
            thread::spawn(move || {
                guest.store(cpu, BASE, cpu + 1, 50).expect("a store");
                guest.store(cpu, BASE, 0, 51).expect("a store");
                guest.store(cpu, BASE + 2, 0, 52).expect("a store");
            })
        });
        let writing = {
            let (one, section) = (Arc::clone(&one), section.clone());
            thread::spawn(move || {
                let page = SectionPage::new(1).expect("a page");
                if let SectionStore::There(pin) = one.mm.section_page_to_store(&section, page) {
                    one.mm.store().write(pin.pfn(), 0, &[60]);
                    one.mm.unpin_stored(pin);
                }
            })
        };
        let mut was = Vec::new();
        let (mut bytes, mut from) = (Box::new([0; PAGE_SIZE]), SectionPage::new(0));
        while let Some((page, what)) = from.and_then(|at| mm.next_kept(&kept, at, &mut bytes)) {
            match what {
                KeptPage::Bytes if bytes[0] != 0 => {
                    was.push((page.get(), [bytes[0], bytes[1], bytes[2]]));
                }
                KeptPage::Bytes | KeptPage::Zero => {}
                other @ (KeptPage::Slot(_) | KeptPage::Busy) => panic!("{page:?}: {other:?}"),
            }
            from = SectionPage::new(page.get() + 1);
        }
        assert_eq!(was, [(0, [1, 0, 0]), (1, [2, 0, 0])]);
        drop(kept);
        storing
            .into_iter()
            .for_each(|t| t.join().expect("a thread"));
        writing.join().expect("a thread");
        let seen = [0, 1, 2].map(|at| one.load(0, BASE, at).expect("a load"));
        assert_eq!(seen, [51, 50, 50]);
        assert_eq!(other.load(0, BASE + 1, 0), Ok(60));
        drop(section);
        finish(&mm, &[&one, &other]);
    });
}
