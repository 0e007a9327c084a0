//! Every internal allocation of every operation fails once, and once for good: the operation must say
//! so, and everything must be exactly as before.

use super::common::{BASE, Cpu, Guest, Mm, RW, layer, manager, map_anon, range, request, va, vpn};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, CommitLimit, FailPlan, FaultOutcome, ForkMode, ImageRun, Keep, MapKind, PageInfo, Pin,
    PinOutcome, Prot, RemapRequest, SectionPage, Sharing, SupervisorRights, TrimMode, VadAdvice,
    VadFlags, Vpn,
};

/// Pages on both sides of a leaf table's edge.
const EDGE: u64 = 512 * 300;
const FILE: u64 = EDGE + 4096;
/// Anonymous shared memory.
const ZEROES: u64 = EDGE + 8192;

/// A shared view of a section over zeroes.
fn zeroes(mm: &Mm) -> MapKind<SimFile> {
    MapKind::View {
        section: mm.create_section(None, 32 * 4096).expect("a section"),
        offset: 0,
        sharing: Sharing::Shared,
    }
}

/// Where the paged-out space has private pages, shared ones, and shared ones of zeroes.
const PRIVATE: u64 = BASE + 16;
const SHARED: u64 = BASE + 32;
const BLANK: u64 = BASE + 48;

/// A parent with private pages, clone pages, a pinned page, a file page, and a sibling.
struct Scene {
    mm: Mm,
    parent: Guest,
    sibling: Guest,
    pin: Option<Pin>,
    /// A space none of whose pages is in memory, and its child.
    paged: [Guest; 2],
}

/// A space with pages that are all in the page file, or nowhere, and a child it shares most of them with.
fn paged_out(mm: &Mm) -> [Guest; 2] {
    let paged = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&paged);
    map_anon(mm, &paged, BASE, 64, RW);
    for page in 0..8 {
        cpu.store(mm, SHARED + page, 1).expect("a store");
        cpu.load(mm, BLANK + page).expect("a load");
    }
    let forked = mm.fork(&paged).expect("a fork");
    cpu.flush(mm, forked.flush);
    (0..8).for_each(|page| cpu.store(mm, PRIVATE + page, 2).expect("a store"));
    for space in [&paged, &forked.child] {
        let trimmed = mm.trim(space, 99, TrimMode::Any);
        mm.flushed(trimmed.flush);
    }
    while let Some(ticket) = mm.start_write() {
        let _ = mm.complete_write(ticket, Ok(()));
    }
    // Another space uses every frame once.
    let eater = mm.create_space().expect("a space");
    map_anon(mm, &eater, BASE, 1000, RW);
    let mut cpu = Cpu::new(&eater);
    (BASE..)
        .take_while(|page| mm.available() > 0 && cpu.store(mm, *page, 3).is_ok())
        .for_each(drop);
    let flush = mm.delete_space(&eater);
    mm.flushed(flush);
    [paged, forked.child]
}

impl Scene {
    fn new(mode: ForkMode) -> Self {
        let mm = manager(200, 60);
        mm.set_fork_mode(mode);
        mm.add_page_file(64).expect("a page file");
        let paged = paged_out(&mm);
        let parent = mm.create_space().expect("a space");
        let mut cpu = Cpu::new(&parent);
        map_anon(&mm, &parent, EDGE - 8, 16, RW);
        map_anon(&mm, &parent, BASE, 4, RW);
        let file = mm.create_section(Some(SimFile(1)), 20 * 4096);
        let file = MapKind::View {
            section: file.expect("a section"),
            offset: 0,
            sharing: Sharing::Private,
        };
        let mapped = mm
            .map(&parent, request(ZEROES, 32, RW, zeroes(&mm)))
            .expect("a mapping");
        mm.flushed(mapped.flush);
        let mapped = mm
            .map(&parent, request(FILE, 32, RW, file))
            .expect("a mapping");
        mm.flushed(mapped.flush);
        (EDGE - 8..EDGE + 4).for_each(|page| cpu.store(&mm, page, page as u8).expect("a store"));
        let forked = mm.fork(&parent).expect("a fork");
        cpu.flush(&mm, forked.flush);
        (EDGE - 2..EDGE + 8).for_each(|page| cpu.store(&mm, page, !page as u8).expect("a store"));
        (BASE..BASE + 4).for_each(|page| cpu.store(&mm, page, 9).expect("a store"));
        cpu.load(&mm, FILE).expect("a load");
        let hidden = mm.advise(&parent, range(BASE + 3, 1), VadAdvice::DontFork);
        hidden.expect("advice");
        let pin = match mm.pin(&parent, vpn(EDGE), Access::Write) {
            PinOutcome::Pinned(pin, flush) => {
                cpu.flush(&mm, flush);
                Some(pin)
            }
            other => panic!("{other:?}"),
        };
        Self {
            mm,
            parent,
            sibling: forked.child,
            pin,
            paged,
        }
    }

    /// Everything about the parent's pages, and how many frames are left.
    fn photograph(&self) -> (Vec<(Vpn, PageInfo, u8)>, [u64; 4], u64) {
        let mut pages = Vec::new();
        let all = range(0, 1 << 35);
        self.mm
            .resident_pages(&self.parent, all, |vpn, page| pages.push((vpn, page)));
        let byte = |(vpn, page): (Vpn, PageInfo)| {
            let mut byte = [0];
            shadow_mm::FrameStore::read(self.mm.store(), page.frame, 0, &mut byte);
            (vpn, page, byte[0])
        };
        let stats = self.mm.stats();
        let (data, tables) = (stats.data, stats.tables);
        // What a read brought, or a page of zeroes of a section, stays the section's and can be taken: that is no trace.
        let frames = [
            data.available(),
            data.total,
            tables.available(),
            tables.in_flight,
        ];
        let blocks = stats.clone_blocks + stats.forked_pages + stats.clone_headers;
        let blocks = blocks + (stats.commit_charged << 32) + (stats.page_file_used << 16);
        (pages.into_iter().map(byte).collect(), frames, blocks)
    }

    fn check(&self, more: &[Guest]) {
        let mut spaces = vec![self.parent.clone(), self.sibling.clone()];
        spaces.extend_from_slice(&self.paged);
        spaces.extend_from_slice(more);
        assert_eq!(self.mm.check(&spaces), Ok(()));
    }

    fn close(mut self, more: &[Guest]) {
        if let Some(pin) = self.pin.take() {
            self.mm.unpin(pin);
        }
        let own = [&self.parent, &self.sibling];
        for space in own.into_iter().chain(&self.paged).chain(more) {
            let flush = self.mm.delete_space(space);
            self.mm.flushed(flush);
        }
        assert_eq!(self.mm.check(&[]), Ok(()));
        let stats = self.mm.stats();
        assert_eq!(stats.data.available(), stats.data.total);
        let blocks = stats.clone_blocks + stats.forked_pages;
        assert_eq!((blocks, stats.clone_headers), (0, 0));
        assert_eq!((stats.page_file_used, stats.commit_charged), (0, 0));
    }
}

/// Runs `operation` with its first, second, ... allocation failing, until none is left to fail. It
/// says whether it succeeded, and which spaces it made.
///
/// So it is with both kinds of fork; gives back how many allocations could fail with the eager one.
fn exhaust(operation: impl Fn(&Scene) -> (bool, Vec<Guest>)) -> u64 {
    exhaust_in(ForkMode::Shared, &operation);
    exhaust_in(ForkMode::Eager, &operation)
}

fn exhaust_in(mode: ForkMode, operation: impl Fn(&Scene) -> (bool, Vec<Guest>)) -> u64 {
    exhaust_after(mode, |_| Vec::new(), operation)
}

/// The same, of a scene to which something happened that made spaces.
fn exhaust_after(
    mode: ForkMode,
    before: impl Fn(&Scene) -> Vec<Guest>,
    operation: impl Fn(&Scene) -> (bool, Vec<Guest>),
) -> u64 {
    for nth in 0.. {
        let mut struck = false;
        for plan in [FailPlan::Once(nth), FailPlan::From(nth)] {
            let scene = Scene::new(mode);
            let others = before(&scene);
            let before = scene.photograph();
            scene.mm.fail_allocations(plan);
            let (succeeded, made) = operation(&scene);
            struck |= plan == FailPlan::Once(nth) && scene.mm.fail_plan() == FailPlan::Never;
            scene.mm.fail_allocations(FailPlan::Never);
            if !succeeded {
                assert!(made.is_empty());
                assert_eq!(scene.photograph(), before, "allocation {nth} left a trace");
            }
            let made = [made, others].concat();
            scene.check(&made);
            scene.close(&made);
        }
        if !struck {
            return nth;
        }
    }
    0
}

#[test]
fn failed_fork_leaves_no_trace() {
    let failures = exhaust(|scene| match scene.mm.fork(&scene.parent) {
        Ok(forked) => {
            scene.mm.flushed(forked.flush);
            (true, vec![forked.child])
        }
        Err(_) => (false, Vec::new()),
    });
    // The mappings, a root, seven tables, a copy of the pinned page, the clone blocks.
    assert!(failures >= 10, "only {failures} allocations could fail");
}

#[test]
fn failed_fork_that_shares_leaves_no_trace() {
    let failures = exhaust_in(ForkMode::Shared, |scene| {
        match scene.mm.fork(&scene.parent) {
            Ok(forked) => {
                scene.mm.flushed(forked.flush);
                (true, vec![forked.child])
            }
            Err(_) => (false, Vec::new()),
        }
    });
    // The mappings, the clone blocks, two roots, the paths to the pinned page and to the one that is hidden, a copy
    // of the pinned page.
    assert!(failures >= 8, "only {failures} allocations could fail");
}

#[test]
fn failed_keep_leaves_no_trace() {
    let failures = exhaust_in(ForkMode::Shared, |scene| {
        match scene.mm.keep(&scene.parent) {
            Ok(kept) => {
                scene.mm.flushed(kept.flush);
                (true, vec![kept.child])
            }
            Err(_) => (false, Vec::new()),
        }
    });
    // The mappings, the clone blocks, two roots, the path to the pinned page, a copy of it.
    assert!(failures >= 7, "only {failures} allocations could fail");
}

#[test]
fn failed_rebase_leaves_no_trace() {
    let keep = |scene: &Scene| {
        let kept = scene.mm.keep(&scene.parent).expect("it is kept");
        scene.mm.flushed(kept.flush);
        vec![kept.child]
    };
    let failures = exhaust_after(ForkMode::Shared, keep, |scene| {
        let spaces = scene.mm.spaces();
        let kept = spaces.last().expect("the kept one");
        let Ok(section) = (scene.mm).create_frozen_section(SimFile(8), layer(&scene.mm)) else {
            return (false, Vec::new());
        };
        let run = ImageRun {
            range: range(EDGE - 7, 1),
            section,
            first: SectionPage::new(0).expect("a page"),
        };
        let run = std::slice::from_ref(&run);
        match scene.mm.rebase(&scene.parent, kept, vpn(EDGE - 7), run) {
            Ok(done) => {
                assert_eq!(done.pages, 1);
                scene.mm.flushed(done.flush);
                (true, Vec::new())
            }
            Err(_) => (false, Vec::new()),
        }
    });
    // The section, and the leaf table: those above it are the space's own, for the pinned page.
    assert!(failures >= 2, "only {failures} allocations could fail");
}

/// After another fork, everything the parent has is shared but for the pinned page's path.
#[test]
fn failed_unsharing_leaves_no_trace() {
    type Verb = fn(&Scene) -> bool;
    let verbs: [(&str, u64, Verb); 7] = [
        ("store", 2, |scene| {
            let at = vpn(EDGE - 7).va();
            match scene.mm.fault(&scene.parent, at, Access::Write) {
                FaultOutcome::Resolved(done) => {
                    scene.mm.flushed(done.flush);
                    true
                }
                FaultOutcome::NoMemory => false,
                other => panic!("{other:?}"),
            }
        }),
        ("protect", 1, |scene| {
            let some = range(EDGE - 7, 10);
            let done = scene.mm.protect(&scene.parent, some, Prot::READ);
            scene.mm.flushed(done.flush);
            done.result.is_ok()
        }),
        ("unmap", 1, |scene| {
            let gone = scene.mm.unmap(&scene.parent, range(EDGE - 7, 10));
            gone.map(|flush| scene.mm.flushed(flush)).is_ok()
        }),
        ("discard", 1, |scene| {
            let done = scene.mm.discard(&scene.parent, range(EDGE - 7, 10));
            scene.mm.flushed(done.flush);
            done.result.is_ok()
        }),
        ("map", 1, |scene| {
            let over = request(EDGE - 7, 10, RW, MapKind::Anonymous);
            let mapped = scene.mm.map(&scene.parent, over);
            mapped.map(|done| scene.mm.flushed(done.flush)).is_ok()
        }),
        ("remap", 3, |scene| {
            let moved = RemapRequest {
                old: range(EDGE - 8, 16),
                new_count: 16,
                may_move: true,
                fixed: Some(vpn(5 << 27)),
            };
            let moved = scene.mm.remap(&scene.parent, moved);
            moved.map(|done| scene.mm.flushed(done.flush)).is_ok()
        }),
        ("reset", 1, |scene| {
            let back = scene
                .mm
                .reset_to_image(&scene.parent, Keep { most: 2, unseen: 1 });
            back.map(|back| scene.mm.flushed(back.flush)).is_ok()
        }),
    ];
    for (name, least, verb) in verbs {
        let fork = |scene: &Scene| {
            let forked = scene.mm.fork(&scene.parent).expect("a fork");
            scene.mm.flushed(forked.flush);
            vec![forked.child]
        };
        let failures = exhaust_after(ForkMode::Shared, fork, |scene| (verb(scene), Vec::new()));
        assert!(failures >= least, "{name}: {failures} allocations");
    }
}

#[test]
fn failed_fault_leaves_no_trace() {
    let touch = |page: u64, access: Access| {
        move |scene: &Scene| {
            let done = match scene.mm.fault(&scene.parent, vpn(page).va(), access) {
                FaultOutcome::Resolved(done) => {
                    scene.mm.flushed(done.flush);
                    true
                }
                FaultOutcome::Read(ticket) => {
                    let length = ticket.length();
                    match scene.mm.complete_read(ticket, Ok(length)) {
                        FaultOutcome::Resolved(done) => {
                            scene.mm.flushed(done.flush);
                            true
                        }
                        FaultOutcome::NoMemory => false,
                        other => panic!("{other:?}"),
                    }
                }
                FaultOutcome::PageIn(ticket) => {
                    let length = ticket.length();
                    match scene.mm.complete_page_in(ticket, Ok(length)) {
                        FaultOutcome::Resolved(done) => {
                            scene.mm.flushed(done.flush);
                            true
                        }
                        FaultOutcome::NoMemory => false,
                        other => panic!("{other:?}"),
                    }
                }
                FaultOutcome::NoMemory => false,
                FaultOutcome::Collided => panic!("nobody reads"),
                FaultOutcome::Thaw(thaw) => panic!("no layer: {thaw:?}"),
                FaultOutcome::Denied(denied) => panic!("{denied}"),
                FaultOutcome::Wait(pending) => panic!("{pending:?}"),
            };
            (done, Vec::new())
        }
    };
    assert!(exhaust(touch(EDGE - 7, Access::Write)) >= 1, "a copy");
    assert!(exhaust(touch(FILE + 17, Access::Read)) >= 1, "a file read");
    assert!(
        exhaust(touch(FILE + 17, Access::Write)) >= 2,
        "a file read and a copy"
    );
    assert!(
        exhaust(touch(FILE + 1, Access::Write)) >= 1,
        "a copy of a section's page"
    );
    assert!(
        exhaust(touch(ZEROES + 5, Access::Write)) >= 2,
        "a shared page and a table"
    );
    let far = |scene: &Scene| {
        // Not charged: the failed fault is to leave everything as it was before the mapping.
        let mut wanted = request(1 << 30, 1 << 20, RW, MapKind::Anonymous);
        wanted.flags = VadFlags::NO_RESERVE;
        let mapped = scene.mm.map(&scene.parent, wanted).expect("a mapping");
        scene.mm.flushed(mapped.flush);
        touch((1 << 30) + 9, Access::Write)(scene)
    };
    assert!(exhaust(far) >= 4, "a page and three tables");
}

#[test]
fn failed_fault_on_a_page_that_is_not_in_memory_leaves_no_trace() {
    let touch = |page: u64, access: Access| {
        move |scene: &Scene| {
            let mm = &scene.mm;
            let done = match mm.fault(&scene.paged[0], vpn(page).va(), access) {
                FaultOutcome::PageIn(ticket) => {
                    let length = ticket.length();
                    mm.complete_page_in(ticket, Ok(length))
                }
                other => other,
            };
            match done {
                FaultOutcome::Resolved(done) => {
                    mm.flushed(done.flush);
                    (true, Vec::new())
                }
                // The page has been read, and the copy found no frame: it is in memory now.
                FaultOutcome::NoMemory if mm.stats().page_ins > 0 => (true, Vec::new()),
                FaultOutcome::NoMemory if page >= BLANK && access == Access::Write => {
                    (mm.usage(&scene.paged[0]).resident > 0, Vec::new())
                }
                FaultOutcome::NoMemory => (false, Vec::new()),
                other => panic!("{other:?}"),
            }
        }
    };
    for (page, access, least) in [
        (PRIVATE + 3, Access::Read, 1),
        (PRIVATE + 3, Access::Write, 1),
        (SHARED + 3, Access::Read, 1),
        (SHARED + 3, Access::Write, 2),
        (BLANK + 3, Access::Read, 1),
        (BLANK + 3, Access::Write, 2),
    ] {
        let failures = exhaust(touch(page, access));
        assert!(failures >= least, "{page:#x}: only {failures} allocations");
    }
}

#[test]
fn failed_fork_of_pages_not_in_memory_leaves_no_trace() {
    let failures = exhaust(|scene| match scene.mm.fork(&scene.paged[0]) {
        Ok(forked) => {
            scene.mm.flushed(forked.flush);
            (true, vec![forked.child])
        }
        Err(_) => (false, Vec::new()),
    });
    // The mappings, a root, three tables, the clone blocks.
    assert!(failures >= 6, "only {failures} allocations could fail");
}

#[test]
fn fork_that_may_not_be_promised_leaves_no_trace() {
    let scene = Scene::new(ForkMode::Eager);
    let before = scene.photograph();
    let charged = scene.mm.stats().commit_charged;
    for more in 0..8 {
        scene
            .mm
            .set_commit_limit(CommitLimit::Pages(charged + more));
        assert!(scene.mm.fork(&scene.parent).is_err());
        assert_eq!(scene.photograph(), before);
    }
    scene.check(&[]);
    scene.close(&[]);
}

#[test]
fn failed_remap_leaves_no_trace() {
    let failures = exhaust(|scene| {
        let old = range(EDGE - 8, 16);
        let fixed = Some(vpn(5 << 27));
        let request = RemapRequest {
            old,
            new_count: 20,
            may_move: true,
            fixed,
        };
        match scene.mm.remap(&scene.parent, request) {
            Ok(mapped) => {
                scene.mm.flushed(mapped.flush);
                (true, Vec::new())
            }
            Err(_) => (false, Vec::new()),
        }
    });
    assert!(failures >= 3, "only {failures} allocations could fail");
}

#[test]
fn failed_section_leaves_no_trace() {
    let failures = exhaust(|scene| {
        let made = scene.mm.create_section(Some(SimFile(7)), 4096);
        (made.is_ok(), Vec::new())
    });
    assert_eq!(failures, 1);
}

#[test]
fn failed_creation_leaves_no_trace() {
    let failures = exhaust(|scene| match scene.mm.create_space() {
        Ok(space) => (true, vec![space]),
        Err(_) => (false, Vec::new()),
    });
    assert_eq!(failures, 1);
    let failures = exhaust(|scene| {
        let rights = SupervisorRights::EXEC;
        let mapped = scene.mm.map_supervisor(va(0x7f80_0000_0000), 1, 3, rights);
        (mapped.is_ok(), Vec::new())
    });
    assert!(failures >= 2, "only {failures} allocations could fail");
}

#[test]
fn fork_that_needs_one_table_too_many_leaves_no_trace() {
    let scene = Scene::new(ForkMode::Eager);
    // Spaces that only eat table frames, until a fork cannot have all it needs.
    let eaters: Vec<_> = core::iter::from_fn(|| scene.mm.create_space().ok()).collect();
    for (eaten, eater) in eaters.iter().enumerate().take(7) {
        let before = scene.photograph();
        assert!(
            scene.mm.fork(&scene.parent).is_err(),
            "with {eaten} table frames"
        );
        assert_eq!(scene.photograph(), before);
        let flush = scene.mm.delete_space(eater);
        scene.mm.flushed(flush);
    }
    for space in &eaters {
        let flush = scene.mm.delete_space(space);
        scene.mm.flushed(flush);
    }
    scene.close(&[]);
}
