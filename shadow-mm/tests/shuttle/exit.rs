//! The end of a guest against everything else.

use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{Access, MapKind, PAGE_SIZE, PinOutcome, Prot, Sharing};
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine, pages, vpn};
use crate::schedules;

/// Something the embedder does to a guest that may be gone by now.
type Verb = fn(&Guest) -> Option<Arc<Guest>>;

/// Ends a guest with a file page and a shared page while `verb` runs.
fn exit_against(verb: Verb) {
    let mm = machine();
    let guest = Guest::with_pages(&mm, 4);
    guest.store(0, BASE, 0, 1).expect("a store");
    let sibling = guest.fork().expect("a fork");
    let working = {
        let guest = Arc::clone(&guest);
        thread::spawn(move || verb(&guest))
    };
    guest.delete();
    let made = working.join().expect("a thread");
    assert_eq!(sibling.load(0, BASE, 0), Ok(1));
    let mut left = vec![&sibling];
    left.extend(&made);
    finish(&mm, &left);
}

#[test]
fn exit_against_fault() {
    schedules(|| {
        exit_against(|guest| {
            for page in 0..2 {
                let at = vpn(BASE + page).va();
                let _ = guest.settle(guest.mm.fault(&guest.space, at, Access::Write));
            }
            None
        });
    });
}

#[test]
fn exit_against_fork() {
    schedules(|| exit_against(Guest::fork));
}

#[test]
fn exit_against_pin() {
    schedules(|| {
        exit_against(|guest| {
            let pinned = guest.mm.pin(&guest.space, vpn(BASE), Access::Write);
            if let PinOutcome::Pinned(pin, flush) = pinned {
                guest.shoot(flush);
                guest.mm.unpin(pin);
            }
            None
        });
    });
}

#[test]
fn exit_against_protect_and_discard() {
    schedules(|| {
        exit_against(|guest| {
            let done = guest.mm.protect(&guest.space, pages(BASE, 2), Prot::READ);
            guest.shoot(done.flush);
            let done = guest.mm.discard(&guest.space, pages(BASE, 4));
            guest.shoot(done.flush);
            None
        });
    });
}

#[test]
fn exit_against_file_read() {
    schedules(|| {
        exit_against(|guest| {
            let section = guest.mm.create_section(Some(SimFile(1)), PAGE_SIZE as u64);
            let kind = MapKind::View {
                section: section.expect("a section"),
                offset: 0,
                sharing: Sharing::Private,
            };
            let request = shadow_mm::MapRequest {
                placement: shadow_mm::Placement::Fixed(vpn(BASE + 8)),
                count: 1,
                prot: Prot::READ,
                kind,
                flags: shadow_mm::VadFlags::empty(),
                tag: shadow_mm::VadTag::default(),
            };
            if let Ok(mapped) = guest.mm.map(&guest.space, request) {
                guest.shoot(mapped.flush);
                let at = vpn(BASE + 8).va();
                let _ = guest.settle(guest.mm.fault(&guest.space, at, Access::Read));
            }
            None
        });
    });
}

/// Two ends at once: one of them does it.
#[test]
fn exit_against_exit() {
    schedules(|| {
        exit_against(|guest| {
            guest.delete();
            None
        });
    });
}
