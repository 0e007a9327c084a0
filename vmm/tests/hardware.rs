//! The virtual machine, the memory manager and the flushes between them, with a guest of a few
//! instructions: no Linux layer. Skipped, aloud, without a usable `/dev/kvm`.

#[path = "common/guest.rs"]
mod guest;

use std::sync::Arc;

use guest::{DATA, Guest, PAGES, va};
use shadow_mm::Prot;

#[test]
fn fork_separates_parent_and_child() {
    let Some(mut g) = Guest::new() else { return };
    let parent = g.space();
    for page in 0..PAGES {
        g.store(&parent, DATA + page * 4096, page)
            .expect("writable");
    }
    let forked = g.hardware.memory.manager.fork(&parent).expect("memory");
    g.hardware.memory.submit(forked.flush);
    let child = forked.child;
    for page in 0..PAGES {
        let at = DATA + page * 4096;
        // The parent first on even pages, the child first on odd ones.
        if page % 2 == 0 {
            g.store(&parent, at, page + 10_000).expect("writable");
            g.store(&child, at, page + 20_000).expect("writable");
        } else {
            g.store(&child, at, page + 20_000).expect("writable");
            g.store(&parent, at, page + 10_000).expect("writable");
        }
        assert_eq!(g.load(&parent, at), Ok(page + 10_000));
        assert_eq!(g.load(&child, at), Ok(page + 20_000));
    }
    g.end(&[parent, child]);
}

#[test]
fn rights_taken_away_are_gone_at_once() {
    let Some(mut g) = Guest::new() else { return };
    let space = g.space();
    for page in 0..64 {
        g.store(&space, DATA + page * 4096, 7).expect("writable");
    }
    let memory = Arc::clone(&g.hardware.memory);
    let range = |at: u64, pages| shadow_mm::VpnRange::new(va(at).vpn(), pages).expect("a range");
    let protected = memory.manager.protect(&space, range(DATA, 32), Prot::READ);
    memory.submit(protected.flush);
    for page in 0..32 {
        let at = DATA + page * 4096;
        assert_eq!(g.load(&space, at), Ok(7));
        assert_eq!(g.store(&space, at, 8), Err(at));
    }
    let flush = memory
        .manager
        .unmap(&space, range(DATA + 32 * 4096, 32))
        .expect("unmapped");
    memory.submit(flush);
    for page in 32..64 {
        let at = DATA + page * 4096;
        assert_eq!(g.load(&space, at), Err(at));
    }
    g.end(&[space]);
}

#[test]
fn recycled_tables_show_no_old_translations() {
    let Some(mut g) = Guest::new() else { return };
    for round in 0..40_u64 {
        let space = g.space();
        for page in 0..32 {
            let at = DATA + page * 4096;
            assert_eq!(g.load(&space, at), Ok(0), "round {round}: not zero");
            g.store(&space, at, round * 1000 + page).expect("writable");
        }
        g.hardware.memory.delete_space(&space);
    }
    g.end(&[]);
}
