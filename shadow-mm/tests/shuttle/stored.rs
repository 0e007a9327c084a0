//! Sections that are a file's bytes: stored to by descriptor and through views, promised, with holes made in them,
//! leaving memory and coming back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Allowance, FrameStore, MapKind, NoSpace, PAGE_SIZE, Section, SectionAt, SectionIn, SectionPage,
    SectionStore, Sharing,
};
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine};
use crate::platform::Model;
use crate::schedules;

/// Pages of each file.
const PAGES: u64 = 3;

/// A file system with so many pages left.
#[derive(Debug)]
struct Room(AtomicU64);

impl Allowance for Room {
    fn take(&self, pages: u64) -> bool {
        let less = |left: u64| left.checked_sub(pages);
        self.0.fetch_update(SeqCst, SeqCst, less).is_ok()
    }

    fn give(&self, pages: u64) {
        self.0.fetch_add(pages, SeqCst);
    }
}

/// A file in memory, and a guest that shares it. Both ends of a race get a copy.
#[derive(Clone)]
struct Stored {
    guest: Arc<Guest>,
    section: Section<SimFile>,
    room: Arc<Room>,
}

impl Stored {
    fn new(room: u64) -> Self {
        let guest = Guest::new(&machine());
        let room = Arc::new(Room(AtomicU64::new(room)));
        let section = guest.mm.create_file_section(Arc::clone(&room) as _);
        let section = section.expect("a section");
        let sized = guest
            .mm
            .resize_section(&section, PAGES * PAGE_SIZE as u64)
            .expect("a size");
        assert!(sized.is_empty());
        let kind = MapKind::View {
            section: section.clone(),
            offset: 0,
            sharing: Sharing::Shared,
        };
        guest.map(PAGES, kind);
        Self {
            guest,
            section,
            room,
        }
    }

    fn bring(&self, how: SectionIn<Model>) {
        match how {
            SectionIn::PageIn(ticket) => {
                self.guest.read_slots(&ticket);
                let length = ticket.length();
                let done = self.guest.mm.complete_page_in(ticket, Ok(length));
                let _ = self.guest.settle(done);
            }
            SectionIn::Read(ticket) => panic!("no image: {ticket:?}"),
            SectionIn::Collided | SectionIn::NoMemory | SectionIn::Again => thread::yield_now(),
        }
    }

    /// Stores a byte as `write` does.
    fn write(&self, page: u64, at: usize, byte: u8) -> Result<(), NoSpace> {
        let page = SectionPage::new(page).expect("a page");
        for _ in 0..10_000 {
            match self.guest.mm.section_page_to_store(&self.section, page) {
                SectionStore::There(pin) => {
                    self.guest.mm.store().write(pin.pfn(), at, &[byte]);
                    self.guest.mm.unpin_stored(pin);
                    return Ok(());
                }
                SectionStore::In(how) => self.bring(how),
                SectionStore::Frozen(thaw) => {
                    let _ = self.guest.thaw(&thaw);
                }
                SectionStore::NoSpace => return Err(NoSpace),
                SectionStore::BeyondEnd => panic!("the file is shorter"),
            }
        }
        panic!("{page:?} is never there");
    }

    /// Loads a byte as `read` does.
    fn read(&self, page: u64, at: usize) -> u8 {
        let page = SectionPage::new(page).expect("a page");
        for _ in 0..10_000 {
            match self.guest.mm.section_page(&self.section, page) {
                SectionAt::Absent => return 0,
                SectionAt::PagedOut => {
                    self.bring(self.guest.mm.section_page_in(&self.section, page));
                }
                SectionAt::Resident(pin) => {
                    let mut byte = [0];
                    self.guest.mm.store().read(pin.pfn(), at, &mut byte);
                    self.guest.mm.unpin(pin);
                    return byte[0];
                }
                SectionAt::Reading(pending) => panic!("no file: {pending:?}"),
            }
        }
        panic!("{page:?} is never there");
    }

    fn punch(&self, pages: core::ops::Range<u64>) {
        let punched = self.guest.mm.punch_section(&self.section, pages);
        for flush in punched.expect("nothing is kept") {
            self.guest.shoot(flush);
        }
    }

    fn spawn<T: Send + 'static>(
        &self,
        body: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let copy = self.clone();
        thread::spawn(move || body(&copy))
    }

    /// Makes everything leave memory.
    fn page_out(&self) {
        self.guest.trim();
        self.guest.write_modified();
        self.guest.take_standby();
    }

    /// What the file system gave is what the section has; then everything goes.
    fn finish(self, room: u64, others: &[&Arc<Guest>]) {
        let extent = self.guest.mm.section_extent(&self.section);
        assert_eq!(self.room.0.load(SeqCst), room - extent);
        drop(self.section);
        let mm = Arc::clone(&self.guest.mm);
        let guests: Vec<_> = core::iter::once(&self.guest)
            .chain(others.iter().copied())
            .collect();
        finish(&mm, &guests);
        assert_eq!(self.room.0.load(SeqCst), room);
    }
}

/// A byte stored by descriptor and one stored through the view are both there, however often the page left memory.
#[test]
fn writes_against_stores_and_trims() {
    schedules(|| {
        let stored = Stored::new(PAGES);
        stored.write(0, 0, 1).expect("room");
        let writing = stored.spawn(|s| {
            s.write(0, 1, 5).expect("room");
            s.write(1, 1, 6).expect("room");
        });
        let storing = stored.spawn(|s| {
            s.guest.store(0, BASE, 2, 7).expect("a store");
            s.guest.store(0, BASE + 1, 2, 8).expect("a store");
        });
        let trimming = stored.spawn(Stored::page_out);
        for thread in [writing, storing, trimming] {
            thread.join().expect("a thread");
        }
        stored.page_out();
        let read = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)].map(|(p, at)| stored.read(p, at));
        assert_eq!(read, [1, 5, 7, 6, 8]);
        assert_eq!(stored.guest.load(1, BASE + 1, 1), Ok(6));
        stored.finish(PAGES, &[]);
    });
}

/// What was stored before a hole is gone, and what was stored after it is there: never a part of either.
#[test]
fn hole_against_stores_and_trims() {
    schedules(|| {
        let stored = Stored::new(PAGES);
        for page in 0..PAGES {
            stored.write(page, 0, 9).expect("room");
            assert_eq!(stored.guest.load(0, BASE + page, 0), Ok(9));
        }
        let punching = stored.spawn(|s| {
            s.punch(0..2);
            s.write(0, 1, 5).expect("room");
        });
        let storing = stored.spawn(|s| {
            s.guest.store(0, BASE + 1, 1, 7).expect("a store");
            s.guest.store(1, BASE + 2, 1, 8).expect("a store");
        });
        let trimming = stored.spawn(Stored::page_out);
        for thread in [punching, storing, trimming] {
            thread.join().expect("a thread");
        }
        let seen = [0, 1, 2].map(|page| (stored.read(page, 0), stored.read(page, 1)));
        assert_eq!((seen[0], seen[2]), ((0, 5), (9, 8)));
        assert!(seen[1] == (0, 0) || seen[1] == (0, 7), "{seen:?}");
        for page in 0..PAGES {
            let loaded = [0, 1].map(|at| stored.guest.load(0, BASE + page, at).expect("a load"));
            assert_eq!(loaded, [stored.read(page, 0), stored.read(page, 1)]);
        }
        stored.finish(PAGES, &[]);
    });
}

/// A child that is made while a hole is does not keep what was there.
#[test]
fn hole_against_fork() {
    schedules(|| {
        let stored = Stored::new(PAGES);
        stored.write(0, 0, 9).expect("room");
        assert_eq!(stored.guest.load(0, BASE, 0), Ok(9));
        let punching = stored.spawn(|s| s.punch(0..1));
        let forking = stored.spawn(|s| s.guest.fork().expect("a fork"));
        punching.join().expect("a thread");
        let child = forking.join().expect("a thread");
        assert_eq!(child.load(0, BASE, 0), Ok(0));
        assert_eq!(stored.guest.load(0, BASE, 0), Ok(0));
        child.store(1, BASE, 0, 3).expect("a store");
        assert_eq!(stored.guest.load(1, BASE, 0), Ok(3));
        stored.finish(PAGES, &[&child]);
    });
}

/// All or nothing is promised, whoever else takes pages meanwhile; what was promised needs no room.
#[test]
fn promise_against_writes_and_holes() {
    schedules(|| {
        let stored = Stored::new(PAGES - 1);
        let writing = stored.spawn(|s| s.write(0, 0, 4));
        let promising = stored.spawn(|s| s.guest.mm.reserve_section(&s.section, 0..PAGES));
        let punching = stored.spawn(|s| s.punch(2..3));
        let written = writing.join().expect("a thread");
        assert_eq!(promising.join().expect("a thread"), Err(NoSpace));
        punching.join().expect("a thread");
        let expected = if written.is_ok() { (1, 4) } else { (0, 0) };
        let extent = stored.guest.mm.section_extent(&stored.section);
        assert_eq!((extent, stored.read(0, 0)), expected);
        let promised = stored.guest.mm.reserve_section(&stored.section, 0..2);
        assert_eq!(promised, Ok(()));
        assert_eq!(stored.write(2, 0, 1), Err(NoSpace));
        stored.write(1, 0, 1).expect("promised");
        stored.finish(PAGES - 1, &[]);
    });
}
