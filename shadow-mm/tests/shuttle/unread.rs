//! Pages of an image that processes share: read, and copied, by whoever wants them first.

use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Charge, Extent, Extents, FrameStore, MapKind, PAGE_SIZE, Section, SectionAt, SectionIn,
    SectionPage, Sharing,
};
use shuttle::thread;

use crate::guest::{BASE, Guest, file_byte, finish, machine};
use crate::schedules;

/// Pages of the image.
const PAGES: u64 = 3;

/// Two processes that share all pages of an image.
fn sharers() -> (Arc<Guest>, Arc<Guest>, Section<SimFile>) {
    let mm = machine();
    let bytes = PAGES * PAGE_SIZE as u64;
    let image = mm.create_section(Some(SimFile(1)), bytes);
    let section = mm.create_shared_memory(bytes, Charge::Charged);
    let (image, section) = (image.expect("a section"), section.expect("a section"));
    let all = Extent {
        first: 0,
        count: PAGES,
        stored: 0,
    };
    let extents = Extents::new([all]).expect("a run");
    mm.lay_section(&section, &image, &extents)
        .expect("an image below");
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
    (one, other, section)
}

fn end(guests: &[&Arc<Guest>], section: Section<SimFile>) {
    drop(section);
    finish(&Arc::clone(&guests[0].mm), guests);
}

/// Loads a byte of the section as a descriptor does.
fn read(guest: &Guest, section: &Section<SimFile>, page: u64, at: usize) -> u8 {
    let page = SectionPage::new(page).expect("a page");
    for _ in 0..10_000 {
        match guest.mm.section_page(section, page) {
            SectionAt::Absent => return 0,
            SectionAt::Resident(pin) => {
                let mut byte = [0];
                guest.mm.store().read(pin.pfn(), at, &mut byte);
                guest.mm.unpin(pin);
                return byte[0];
            }
            SectionAt::PagedOut => match guest.mm.section_page_in(section, page) {
                SectionIn::Read(ticket) => {
                    let length = guest.fill(&ticket);
                    let done = guest.mm.complete_read(ticket, Ok(length));
                    let _ = guest.settle(done);
                }
                SectionIn::PageIn(_) => panic!("nothing was trimmed"),
                SectionIn::Collided | SectionIn::NoMemory | SectionIn::Again => {
                    thread::yield_now();
                }
            },
            SectionAt::Reading(pending) => panic!("not the section's: {pending:?}"),
        }
    }
    panic!("{page:?} is never there");
}

/// Whoever brings a page, what others stored to it meanwhile is there.
#[test]
fn reads_against_stores_and_descriptors() {
    schedules(|| {
        let (one, other, section) = sharers();
        let first = {
            let one = Arc::clone(&one);
            thread::spawn(move || {
                one.store(0, BASE, 0, 50).expect("a store");
                one.store(1, BASE + 1, 0, 60).expect("a store");
            })
        };
        let second = {
            let other = Arc::clone(&other);
            thread::spawn(move || {
                other.store(1, BASE, 1, 70).expect("a store");
                other.load(0, BASE, 1).expect("a load")
            })
        };
        assert_eq!(read(&other, &section, 2, 0), file_byte(2));
        assert!([50, file_byte(0)].contains(&read(&one, &section, 0, 0)));
        first.join().expect("a thread");
        assert_eq!(second.join().expect("a thread"), 70);
        for guest in [&one, &other] {
            let seen =
                [(0, 0), (0, 1), (0, 2), (1, 0)].map(|(page, at)| guest.load(0, BASE + page, at));
            assert_eq!(seen, [Ok(50), Ok(70), Ok(file_byte(0)), Ok(60)]);
        }
        end(&[&one, &other], section);
    });
}

/// A hole, or a shorter end, and a store: never what the image has.
#[test]
fn reads_against_hole_and_end() {
    schedules(|| {
        let (one, other, section) = sharers();
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
