//! What one space may be charged: at every place that charges, and nowhere else.

use super::common::{BASE, Guest, Mm, RW, manager, range, request};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    CommitLimit, ForkError, ForkMode, MapError, MapKind, Prot, ProtectError, RemapError,
    RemapRequest, Sharing, VadFlags,
};

/// A space with a quota of ten pages, six of them charged.
fn scene(mode: ForkMode) -> (Mm, Guest) {
    let mm = manager(64, 60);
    mm.set_fork_mode(mode);
    mm.set_first_quota(CommitLimit::Pages(10));
    let space = mm.create_space().expect("a space");
    assert_eq!(map(&mm, &space, BASE, 6, RW), Ok(()));
    (mm, space)
}

fn map(mm: &Mm, space: &Guest, at: u64, count: u64, prot: Prot) -> Result<(), MapError> {
    let mapped = mm.map(space, request(at, count, prot, MapKind::Anonymous))?;
    mm.flushed(mapped.flush);
    Ok(())
}

fn charged(mm: &Mm, space: &Guest) -> u64 {
    let usage = mm.usage(space);
    assert_eq!(usage.quota, CommitLimit::Pages(10));
    usage.charged
}

fn end(mm: &Mm, spaces: &[Guest]) {
    assert_eq!(mm.check(spaces), Ok(()));
    for space in spaces {
        let flush = mm.delete_space(space);
        mm.flushed(flush);
    }
    assert_eq!(mm.stats().commit_charged, 0);
    assert_eq!(mm.check(&[]), Ok(()));
}

#[test]
fn mapping_beyond_the_quota_is_refused() {
    let (mm, space) = scene(ForkMode::Eager);
    let refused = map(&mm, &space, BASE + 64, 5, RW);
    assert_eq!(refused, Err(MapError::NoCommit { pages: 5 }));
    assert_eq!(map(&mm, &space, BASE + 64, 4, RW), Ok(()));
    // What takes the place of something else is charged for the difference.
    assert_eq!(map(&mm, &space, BASE, 6, RW), Ok(()));
    assert_eq!(
        map(&mm, &space, BASE, 7, RW),
        Err(MapError::NoCommit { pages: 7 })
    );
    assert_eq!(charged(&mm, &space), 10);
    // What is not charged is not limited.
    assert_eq!(map(&mm, &space, BASE + 128, 50, Prot::READ), Ok(()));
    let mut lazy = request(BASE + 256, 50, RW, MapKind::<SimFile>::Anonymous);
    lazy.flags = VadFlags::NO_RESERVE;
    mm.flushed(mm.map(&space, lazy).expect("no charge").flush);
    let section = mm.create_section(None, 50 * 4096).expect("a section");
    let shared = MapKind::View {
        section,
        offset: 0,
        sharing: Sharing::Shared,
    };
    let mapped = mm.map(&space, request(BASE + 512, 50, RW, shared));
    mm.flushed(mapped.expect("charged elsewhere").flush);
    // One's quota is not another's.
    let other = mm.create_space().expect("a space");
    assert_eq!(map(&mm, &other, BASE, 10, RW), Ok(()));
    end(&mm, &[space, other]);
}

#[test]
fn protecting_and_growing_beyond_the_quota_is_refused() {
    let (mm, space) = scene(ForkMode::Eager);
    assert_eq!(map(&mm, &space, BASE + 64, 5, Prot::READ), Ok(()));
    let done = mm.protect(&space, range(BASE + 64, 5), RW);
    mm.flushed(done.flush);
    assert_eq!(done.result, Err(ProtectError::NoCommit { pages: 5 }));
    let remap = |new_count, fixed: Option<u64>| RemapRequest {
        old: range(BASE, 6),
        new_count,
        may_move: true,
        fixed: fixed.map(super::common::vpn),
    };
    for request in [remap(11, None), remap(11, Some(BASE + 1024))] {
        let refused = mm.remap(&space, request).map(|mapped| mapped.range);
        assert!(
            matches!(refused, Err(RemapError::Place(MapError::NoCommit { .. }))),
            "{refused:?}"
        );
    }
    let done = mm.protect(&space, range(BASE + 64, 4), RW);
    mm.flushed(done.flush);
    assert_eq!((done.result, charged(&mm, &space)), (Ok(()), 10));
    let gone = mm.unmap(&space, range(BASE + 64, 5)).expect("unmapped");
    mm.flushed(gone);
    let moved = mm.remap(&space, remap(10, Some(BASE + 1024)));
    mm.flushed(moved.expect("within it").flush);
    assert_eq!(charged(&mm, &space), 10);
    end(&mm, &[space]);
}

#[test]
fn child_has_its_parents_quota() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let (mm, parent) = scene(mode);
        let forked = mm.fork(&parent).expect("a fork");
        mm.flushed(forked.flush);
        let child = forked.child;
        assert_eq!(charged(&mm, &child), 6);
        assert_eq!(
            map(&mm, &child, BASE + 64, 5, RW),
            Err(MapError::NoCommit { pages: 5 })
        );
        // What has more than it may keeps it, and has no children.
        mm.set_quota(&parent, CommitLimit::Pages(5));
        let before = mm.stats();
        let refused = mm.fork(&parent).map(|forked| forked.child.id());
        assert_eq!(refused, Err(ForkError::NoCommit { pages: 6 }));
        let after = mm.stats();
        assert_eq!(
            (after.commit_charged, after.tables.available()),
            (before.commit_charged, before.tables.available())
        );
        assert_eq!(mm.usage(&parent).charged, 6);
        end(&mm, &[parent, child]);
    }
}
