//! Pages of a layer that processes share: read where they are, and thawed by whoever stores to them first.

use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{Charge, Extent, Extents, FrameStore, MapKind, PAGE_SIZE, Pfn, Section, Sharing};
use shuttle::thread;

use crate::guest::{BASE, Guest, LAYER, finish, layer, machine};
use crate::schedules;

/// Two processes that share all pages of a layer; page `n` of it is full of `n + 1`.
fn sharers() -> (Arc<Guest>, Arc<Guest>, Section<SimFile>) {
    let mm = machine();
    let frames = layer(&mm);
    for page in 0..LAYER {
        let frame = Pfn::new(frames.start.get() + page);
        mm.store().write(frame, 0, &[page as u8 + 1; 8]);
    }
    let count = u64::from(LAYER);
    let image = mm.create_frozen_section(SimFile(1), frames);
    let section = mm.create_shared_memory(count * PAGE_SIZE as u64, Charge::Charged);
    let (image, section) = (image.expect("a section"), section.expect("a section"));
    let all = Extent {
        first: 0,
        count,
        stored: 0,
    };
    let extents = Extents::new([all]).expect("a run");
    mm.lay_section(&section, &image, &extents)
        .expect("a layer below");
    let one = Guest::new(&mm);
    let other = one.another();
    for guest in [&one, &other] {
        let kind = MapKind::View {
            section: section.clone(),
            offset: 0,
            sharing: Sharing::Shared,
        };
        guest.map(count, kind);
    }
    (one, other, section)
}

fn end(guests: &[&Arc<Guest>], section: Section<SimFile>) {
    drop(section);
    let mm = Arc::clone(&guests[0].mm);
    let frames = layer(&mm);
    for page in 0..LAYER {
        let mut bytes = [0; 8];
        let frame = Pfn::new(frames.start.get() + page);
        mm.store().read(frame, 0, &mut bytes);
        assert_eq!(bytes, [page as u8 + 1; 8], "the layer");
    }
    finish(&mm, guests);
}

/// Who sees what was stored last has seen what was stored before it, whoever thaws which page.
#[test]
fn stores_are_seen_in_their_order() {
    schedules(|| {
        let (one, other, section) = sharers();
        assert_eq!(other.load(0, BASE, 0), Ok(1));
        assert_eq!(other.load(1, BASE + 1, 0), Ok(2));
        let storing = {
            let one = Arc::clone(&one);
            thread::spawn(move || {
                one.store(0, BASE, 0, 50).expect("a store");
                one.store(1, BASE + 1, 0, 60).expect("a store");
            })
        };
        // Somebody else's store to the same page, at another place.
        let third = {
            let other = Arc::clone(&other);
            thread::spawn(move || {
                other.store(1, BASE, 1, 70).expect("a store");
                other.load(0, BASE, 1).expect("a load")
            })
        };
        let flag = other.load(0, BASE + 1, 0).expect("a load");
        let data = other.load(1, BASE, 0).expect("a load");
        assert!(flag == 2 || data == 50, "{flag} {data}");
        storing.join().expect("a thread");
        assert_eq!(third.join().expect("a thread"), 70);
        for guest in [&one, &other] {
            let seen =
                [(0, 0), (0, 1), (0, 2), (1, 0)].map(|(page, at)| guest.load(0, BASE + page, at));
            assert_eq!(seen, [Ok(50), Ok(70), Ok(1), Ok(60)]);
        }
        end(&[&one, &other], section);
    });
}

/// A child that is made while a page is thawed sees what its parent sees.
#[test]
fn thaw_against_fork() {
    schedules(|| {
        let (one, other, section) = sharers();
        assert_eq!(one.load(0, BASE, 0), Ok(1));
        let storing = {
            let other = Arc::clone(&other);
            thread::spawn(move || other.store(0, BASE, 0, 50).expect("a store"))
        };
        let forking = {
            let one = Arc::clone(&one);
            thread::spawn(move || one.fork().expect("a fork"))
        };
        storing.join().expect("a thread");
        let child = forking.join().expect("a thread");
        for guest in [&one, &other, &child] {
            assert_eq!(guest.load(1, BASE, 0), Ok(50));
        }
        child.store(0, BASE, 0, 51).expect("a store");
        assert_eq!(one.load(0, BASE, 0), Ok(51));
        end(&[&one, &other, &child], section);
    });
}

/// A hole, or a shorter end, and a store: never what the layer has.
#[test]
fn thaw_against_hole_and_end() {
    schedules(|| {
        let (one, other, section) = sharers();
        assert_eq!(one.load(0, BASE, 0), Ok(1));
        assert_eq!(other.load(0, BASE + 1, 0), Ok(2));
        let storing = {
            let other = Arc::clone(&other);
            thread::spawn(move || {
                other.store(0, BASE, 1, 50).expect("a store");
                let _ = other.store(1, BASE + 1, 1, 60);
            })
        };
        let cutting = {
            let (one, section) = (Arc::clone(&one), section.clone());
            thread::spawn(move || {
                let punched = one.mm.punch_section(&section, 0..1);
                for flush in punched.expect("nothing is kept") {
                    one.shoot_any(flush);
                }
                let cut = one.mm.resize_section(&section, PAGE_SIZE as u64);
                for flush in cut.expect("shorter") {
                    one.shoot_any(flush);
                }
            })
        };
        storing.join().expect("a thread");
        cutting.join().expect("a thread");
        for guest in [&one, &other] {
            assert_eq!(guest.load(0, BASE, 0), Ok(0));
            let stored = guest.load(1, BASE, 1).expect("a load");
            assert!(stored == 0 || stored == 50, "{stored}");
            assert!(guest.load(0, BASE + 1, 0).is_err());
        }
        end(&[&one, &other], section);
    });
}
