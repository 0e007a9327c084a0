//! Pages that leave memory and come back, against who uses them.

use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{MapKind, PAGE_SIZE, Section, Sharing};
use shuttle::thread;

use crate::guest::{BASE, Disk, Guest, finish, machine};
use crate::schedules;

/// Pages of each guest here.
const PAGES: u64 = 3;

fn stored(guest: &Guest) {
    for page in 0..PAGES {
        let byte = 1 + page as u8;
        guest.store(0, BASE + page, 0, byte).expect("a store");
    }
}

fn with_stored_pages() -> Arc<Guest> {
    let guest = Guest::with_pages(&machine(), PAGES);
    stored(&guest);
    guest
}

/// All pages are in the page file, and their frames are others'.
fn page_out(guest: &Guest) {
    guest.trim();
    guest.write_modified();
    guest.take_standby();
}

fn spawn(guest: &Arc<Guest>, body: impl FnOnce(&Guest) + Send + 'static) -> thread::JoinHandle<()> {
    let guest = Arc::clone(guest);
    thread::spawn(move || body(&guest))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("a thread");
    }
}

fn shared(section: &Section<SimFile>) -> MapKind<SimFile> {
    MapKind::View {
        section: section.clone(),
        offset: 0,
        sharing: Sharing::Shared,
    }
}

#[test]
fn trim_against_faults_and_stores() {
    schedules(|| {
        let guest = with_stored_pages();
        let trimming = spawn(&guest, |guest| {
            guest.trim();
            guest.write_modified();
            guest.trim();
        });
        let storing = spawn(&guest, |guest| {
            guest.store(0, BASE, 1, 7).expect("a store");
            guest.store(0, BASE + 1, 1, 8).expect("a store");
        });
        let loading = spawn(&guest, |guest| {
            for page in 0..PAGES {
                assert_eq!(guest.load(1, BASE + page, 0), Ok(1 + page as u8));
            }
        });
        join([trimming, storing, loading]);
        page_out(&guest);
        let seen = [(0, 1), (1, 1), (2, 0)].map(|(page, at)| guest.load(0, BASE + page, at));
        assert_eq!(seen, [Ok(7), Ok(8), Ok(3)]);
        finish(&guest.mm, &[&guest]);
    });
}

/// A page that is stored to while it is written is not taken for what was written.
#[test]
fn modified_write_against_redirtying() {
    schedules(|| {
        let guest = with_stored_pages();
        guest.trim();
        let writing = spawn(&guest, |guest| {
            guest.write_modified();
            guest.take_standby();
        });
        let storing = spawn(&guest, |guest| {
            for byte in 7..10 {
                guest.store(0, BASE + 1, 0, byte).expect("a store");
            }
            guest.trim();
        });
        join([writing, storing]);
        page_out(&guest);
        let seen = [0, 1, 2].map(|page| guest.load(1, BASE + page, 0));
        assert_eq!(seen, [Ok(1), Ok(9), Ok(3)]);
        finish(&guest.mm, &[&guest]);
    });
}

/// Both virtual CPUs of a guest and one of its child's want pages of one run of the page file.
#[test]
fn collided_reads() {
    schedules(|| {
        let guest = with_stored_pages();
        let child = guest.fork().expect("a fork");
        child.trim();
        page_out(&guest);
        let reading = [(&guest, 0, 0), (&guest, 1, 1), (&child, 0, 0)].map(|(who, cpu, page)| {
            spawn(who, move |who| {
                assert_eq!(who.load(cpu, BASE + page, 0), Ok(1 + page as u8));
                who.store(cpu, BASE + page, 1 + cpu, 7).expect("a store");
            })
        });
        join(reading);
        let seen = [(0, 1), (1, 2), (2, 0)].map(|(page, at)| guest.load(0, BASE + page, at));
        assert_eq!(seen, [Ok(7), Ok(7), Ok(3)]);
        assert_eq!(child.load(1, BASE + 1, 2), Ok(0), "the parent's store");
        finish(&guest.mm, &[&guest, &child]);
    });
}

#[test]
fn fork_and_exit_against_page_in() {
    schedules(|| {
        let guest = with_stored_pages();
        page_out(&guest);
        let reading = spawn(&guest, |guest| {
            assert_eq!(guest.load(1, BASE + 2, 0), Ok(3));
        });
        let child = guest.fork().expect("a fork");
        let ending = spawn(&child, |child| {
            assert_eq!(child.load(0, BASE + 2, 0), Ok(3));
            child.delete();
        });
        join([reading, ending]);
        assert_eq!(guest.load(0, BASE, 0), Ok(1));
        finish(&guest.mm, &[&guest]);
    });
}

/// Shared memory leaves memory while one guest stores to it and the other reads it back.
#[test]
fn shared_memory_against_trims() {
    schedules(|| {
        let guest = Guest::new(&machine());
        let section = guest.mm.create_section(None, PAGES * PAGE_SIZE as u64);
        let section = section.expect("a section");
        let other = guest.another();
        for who in [&guest, &other] {
            who.map(PAGES, shared(&section));
        }
        drop(section);
        stored(&guest);
        let trimming = spawn(&guest, |guest| {
            guest.trim();
            guest.write_modified();
            guest.take_standby();
        });
        let storing = spawn(&guest, |guest| {
            guest.store(0, BASE, 0, 7).expect("a store");
        });
        let loading = spawn(&other, |other| {
            let seen = other.load(0, BASE, 0).expect("a load");
            assert!(seen == 1 || seen == 7, "{seen}");
            assert_eq!(other.load(1, BASE + 2, 0), Ok(3));
            other.trim();
        });
        join([trimming, storing, loading]);
        guest.trim();
        page_out(&other);
        assert_eq!(other.load(0, BASE, 0), Ok(7));
        assert_eq!(guest.load(0, BASE + 1, 0), Ok(2));
        finish(&guest.mm, &[&guest, &other]);
    });
}

/// One write-back, as an embedder does it: take the dirty bits, flush, and only then read the pages.
fn write_back(guest: &Guest, section: &Section<SimFile>, disk: &Disk) {
    for flush in guest.mm.collect_dirty(section) {
        guest.shoot(flush);
    }
    let mut from = 0;
    while let Some(ticket) = guest.mm.write_back(section, from..u64::MAX) {
        from = ticket.offset() + (ticket.frames().len() * PAGE_SIZE) as u64;
        guest.copy_out(disk, ticket.offset(), ticket.frames());
        guest.mm.complete_write_back(ticket, Ok(()));
    }
}

/// What is stored while a write-back takes the dirty bits is written by it or by the next.
#[test]
fn write_back_against_stores() {
    schedules(|| {
        let guest = Guest::new(&machine());
        let section = guest
            .mm
            .create_section(Some(SimFile(1)), PAGE_SIZE as u64)
            .expect("a section");
        guest.map(1, shared(&section));
        guest.store(0, BASE, 0, 1).expect("a store");
        let disk = Disk::default();
        let writing = {
            let (guest, section, disk) = (Arc::clone(&guest), section.clone(), disk.clone());
            thread::spawn(move || write_back(&guest, &section, &disk))
        };
        let storing = spawn(&guest, |guest| {
            for byte in 2..5 {
                guest.store(0, BASE, 0, byte).expect("a store");
            }
        });
        join([writing, storing]);
        write_back(&guest, &section, &disk);
        let written = disk.lock().expect("a disk")[&0];
        assert_eq!((written[0], guest.load(1, BASE, 0)), (4, Ok(4)));
        drop(section);
        finish(&guest.mm, &[&guest]);
    });
}
