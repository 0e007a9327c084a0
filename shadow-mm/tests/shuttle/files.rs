//! Faults on pages of files.

use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{Access, Denied, FaultOutcome, IoFailed, MapKind, PAGE_SIZE, Sharing};
use shuttle::thread;

use crate::guest::{BASE, Guest, file_byte, finish, machine, pages, vpn};
use crate::schedules;

fn view(guest: &Guest, count: u64, sharing: Sharing) -> MapKind<SimFile> {
    let bytes = count * PAGE_SIZE as u64;
    let section = guest.mm.create_section(Some(SimFile(1)), bytes);
    MapKind::View {
        section: section.expect("a section"),
        offset: 0,
        sharing,
    }
}

fn with_file(count: u64) -> Arc<Guest> {
    let guest = Guest::new(&machine());
    guest.map(count, view(&guest, count, Sharing::Private));
    guest
}

#[test]
fn faults_on_one_file_page_keep_every_store() {
    schedules(|| {
        let guest = with_file(2);
        let threads = [0, 1].map(|cpu| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                guest.store(cpu, BASE, 1 + cpu, 7).expect("a store");
                assert_eq!(guest.load(cpu, BASE + 1, 0), Ok(file_byte(1)));
            })
        });
        for t in threads {
            t.join().expect("a thread");
        }
        let seen = [0, 1, 2].map(|at| guest.load(0, BASE, at));
        assert_eq!(seen, [Ok(file_byte(0)), Ok(7), Ok(7)]);
        finish(&guest.mm, &[&guest]);
    });
}

/// A read that comes back to a range that is something else by now brings nothing.
#[test]
fn read_against_mapping_over_it() {
    schedules(|| {
        let guest = with_file(2);
        let reading = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.load(0, BASE, 0))
        };
        guest.map(2, MapKind::Anonymous);
        assert_eq!(guest.load(1, BASE, 0), Ok(0), "the file's byte");
        let seen = reading.join().expect("a thread");
        assert!(seen == Ok(0) || seen == Ok(file_byte(0)), "{seen:?}");
        assert_eq!(guest.load(1, BASE, 0), Ok(0), "the file's byte");
        finish(&guest.mm, &[&guest]);
    });
}

#[test]
fn read_against_fork_and_unmap() {
    schedules(|| {
        let guest = with_file(2);
        let reading = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                let _ = guest.load(0, BASE, 0);
            })
        };
        let child = guest.fork().expect("a fork");
        let flush = guest.mm.unmap(&guest.space, pages(BASE, 2));
        guest.shoot(flush.expect("an unmap"));
        assert_eq!(child.load(0, BASE, 0), Ok(file_byte(0)));
        reading.join().expect("a thread");
        finish(&guest.mm, &[&guest, &child]);
    });
}

/// A read of a page fails: its own access fails, and that of who waits for it; not that of who comes
/// later.
#[test]
fn failed_read_against_one_that_may_wait_for_it() {
    schedules(|| {
        let guest = with_file(1);
        let failing = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                let outcome = guest.mm.fault(&guest.space, vpn(BASE).va(), Access::Read);
                match outcome {
                    FaultOutcome::Read(ticket) => {
                        let _ = guest.settle(guest.mm.complete_read(ticket, Err(IoFailed)));
                    }
                    other => guest.settle(other).expect("resolved"),
                }
            })
        };
        let seen = guest.load(1, BASE, 0);
        assert!(
            seen == Ok(file_byte(0)) || seen == Err(Denied::IoError),
            "{seen:?}"
        );
        failing.join().expect("a thread");
        assert_eq!(guest.load(0, BASE, 0), Ok(file_byte(0)));
        finish(&guest.mm, &[&guest]);
    });
}

/// A truncation takes the page from whoever maps it: a store is seen by the other, or refused, and
/// nothing is left of the page.
#[test]
fn truncation_against_faults_and_fork() {
    schedules(|| {
        let guest = Guest::new(&machine());
        let kind = view(&guest, 2, Sharing::Shared);
        let MapKind::View { section, .. } = &kind else {
            unreachable!("a view");
        };
        let section = section.clone();
        guest.map(2, kind.clone());
        drop(kind);
        let storing = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.store(0, BASE + 1, 0, 7))
        };
        let truncating = {
            let guest = Arc::clone(&guest);
            let section = section.clone();
            thread::spawn(move || {
                let flushes = guest.mm.resize_section(&section, PAGE_SIZE as u64);
                for flush in flushes.expect("files are not charged") {
                    guest.shoot(flush);
                }
            })
        };
        let child = guest.fork().expect("a fork");
        let stored = storing.join().expect("a thread");
        assert!(matches!(stored, Ok(()) | Err(Denied::BeyondEnd)));
        truncating.join().expect("a thread");
        for who in [&guest, &child] {
            assert_eq!(who.load(1, BASE + 1, 0), Err(Denied::BeyondEnd));
        }
        drop(section);
        finish(&guest.mm, &[&guest, &child]);
    });
}
