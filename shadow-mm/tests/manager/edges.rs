//! What hostile or unusual callers ask for.

use super::common::{BASE, Cpu, RW, manager, map_anon, range, request, va, vpn};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, Denied, FaultOutcome, MAX_MAPPINGS, MapError, MapKind, Placement, Prot, RemapError,
    RemapRequest, Sharing, SupervisorError, SupervisorRights, UnmapError, VadFlags, VadTag,
};

#[test]
fn huge_reservation_costs_no_tables() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    let pages = (64u64 << 30) / 4096;
    let mut wanted = request(0, pages, Prot::empty(), MapKind::Anonymous);
    wanted.placement = Placement::Anywhere {
        hint: None,
        below: vpn(1 << 34),
    };
    wanted.flags = VadFlags::NO_RESERVE;
    let mapped = mm.map(&space, wanted).expect("a reservation");
    mm.flushed(mapped.flush);
    assert_eq!(mm.usage(&space).tables, 1);
    // Made usable in the middle, as runtimes do.
    let middle = mapped.range.start().get() + pages / 2;
    let done = mm.protect(&space, range(middle, 16), RW);
    assert_eq!(done.result, Ok(()));
    mm.flushed(done.flush);
    Cpu::new(&space).store(&mm, middle, 1).expect("a store");
    assert_eq!(mm.usage(&space).tables, 4);
    let flush = mm.unmap(&space, mapped.range).expect("unmapped");
    mm.flushed(flush);
    assert_eq!((mm.usage(&space).tables, mm.usage(&space).resident), (1, 0));
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn absurd_ranges_are_refused() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    let try_at = |start: u64, count: u64| {
        mm.map(&space, request(start, count, RW, MapKind::Anonymous))
            .map(|_| ())
    };
    for (start, count) in [
        (BASE, 0),
        (BASE, u64::MAX),
        (1, 1),
        (255 << 27, 1),
        ((255 << 27) - 1, 2),
    ] {
        let refused = try_at(start, count);
        assert!(
            matches!(refused, Err(MapError::BadRange { .. })),
            "{start:#x} {count:#x}"
        );
    }
    let mut anywhere = request(0, u64::MAX, RW, MapKind::Anonymous);
    anywhere.placement = Placement::Anywhere {
        hint: None,
        below: vpn(1 << 34),
    };
    assert!(matches!(
        mm.map(&space, anywhere),
        Err(MapError::NoSpace { .. })
    ));
    let section = mm.create_section(Some(SimFile(3)), 1).expect("a section");
    for offset in [5, u64::MAX - 4095, 1 << 44] {
        let view = MapKind::View {
            section: section.clone(),
            offset,
            sharing: Sharing::Private,
        };
        assert!(matches!(
            mm.map(&space, request(BASE, 1, RW, view)),
            Err(MapError::BadOffset { .. })
        ));
    }
    let taken = request(BASE, 4, RW, MapKind::Anonymous);
    map_anon(&mm, &space, BASE, 4, RW);
    let mut again = taken;
    again.placement = Placement::FixedNoReplace(vpn(BASE + 3));
    assert!(matches!(
        mm.map(&space, again),
        Err(MapError::Overlap { .. })
    ));
}

#[test]
fn one_mapping_too_many_is_refused() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    for n in 0..MAX_MAPPINGS as u64 {
        let mut wanted = request(BASE + 3 * n, 3, RW, MapKind::Anonymous);
        wanted.tag = VadTag(n as u32);
        let mapped = mm.map(&space, wanted).expect("a mapping");
        mm.flushed(mapped.flush);
    }
    let beyond = BASE + 3 * MAX_MAPPINGS as u64 + 10;
    let refused = mm.map(&space, request(beyond, 1, RW, MapKind::Anonymous));
    assert_eq!(refused.map(|_| ()), Err(MapError::TooManyMappings));
    let hole = mm.unmap(&space, range(BASE + 1, 1)).map(|_| ());
    assert_eq!(hole, Err(UnmapError::TooManyMappings));
    assert!(
        mm.protect(&space, range(BASE + 1, 1), Prot::READ)
            .result
            .is_err()
    );
    assert_eq!(
        mm.find_vad(&space, vpn(BASE + 1)).map(|vad| vad.range),
        Some(range(BASE, 3))
    );
    let moved = RemapRequest {
        old: range(BASE, 1),
        new_count: 9,
        may_move: true,
        fixed: None,
    };
    assert!(matches!(
        mm.remap(&space, moved),
        Err(RemapError::Place(MapError::TooManyMappings))
    ));
    // A whole mapping may still go.
    assert!(mm.unmap(&space, range(BASE, 3)).is_ok());
}

#[test]
fn sweeping_verbs_leave_the_supervisor_alone() {
    let mm = manager(64, 32);
    let at = va(0x7f80_0000_0000);
    mm.map_supervisor(at, 1, 2, SupervisorRights::EXEC | SupervisorRights::USER)
        .expect("mapped");
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 4, RW);
    let mut cpu = Cpu::new(&space);
    cpu.store(&mm, BASE, 1).expect("a store");
    let all = range(0, 1 << 35);
    mm.flushed(mm.discard(&space, all).flush);
    mm.flushed(mm.protect(&space, all, Prot::empty()).flush);
    let flush = mm.unmap(&space, all).expect("unmapped");
    mm.flushed(flush);
    assert!(cpu.mmu.translate(mm.store(), at, Access::Execute).is_ok());
    let denied = mm.fault(&space, at, Access::Write);
    assert!(matches!(denied, FaultOutcome::Denied(Denied::NotMapped)));
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn supervisor_mappings_use_large_leaves_and_never_replace() {
    let mm = manager(64, 32);
    let tables = mm.stats().tables.active;
    let at = va(0x7f80_0000_0000);
    // The rest of the first 2 MiB by pages would need a leaf table; one aligned leaf needs none.
    mm.map_supervisor(at, 512, 512, SupervisorRights::WRITE)
        .expect("mapped");
    assert_eq!(mm.stats().tables.active, tables + 1);
    let overlap = mm.map_supervisor(va(0x7f80_0000_1000), 1, 1, SupervisorRights::empty());
    assert!(matches!(overlap, Err(SupervisorError::Overlap { .. })));
    mm.map_supervisor(va(0x7f80_0020_0000), 1, 3, SupervisorRights::empty())
        .expect("mapped");
    let overlap = mm.map_supervisor(va(0x7f80_0020_0000), 1024, 512, SupervisorRights::empty());
    assert!(matches!(overlap, Err(SupervisorError::Overlap { .. })));
    let user_write = SupervisorRights::USER | SupervisorRights::WRITE;
    assert_eq!(
        mm.map_supervisor(at, 1, 1, user_write),
        Err(SupervisorError::UserWrite)
    );
    let outside = mm.map_supervisor(va(0x7fff_ffff_f000), 1, 2, SupervisorRights::empty());
    assert!(matches!(outside, Err(SupervisorError::OutsideSlot { .. })));
    let guests = mm.map_supervisor(va(0x7f81_0000_0000), 16, 1, SupervisorRights::empty());
    assert!(matches!(guests, Err(SupervisorError::DataZone { .. })));
    assert_eq!(mm.check(&[]), Ok(()));
}

#[test]
fn frames_stay_away_until_the_flush_is_acknowledged() {
    let mm = manager(8, 16);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 16, RW);
    (BASE..BASE + 8).for_each(|page| cpu.store(&mm, page, 1).expect("a store"));
    let discarded = mm.discard(&space, range(BASE, 8));
    assert_eq!(mm.stats().data.in_flight, 8);
    assert_eq!(cpu.store(&mm, BASE + 9, 1), Err("NoMemory".into()));
    cpu.flush(&mm, discarded.flush);
    assert_eq!(cpu.load(&mm, BASE + 9), Ok(0));
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn nothing_is_mapped_ahead_when_frames_are_short() {
    let mm = manager(320, 16);
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 400, RW);
    let mut mapped = 0;
    let mut last = 0;
    while let FaultOutcome::Resolved(done) = mm.fault(&space, vpn(BASE + mapped).va(), Access::Read)
    {
        last = done.mapped;
        mapped += u64::from(done.mapped);
        mm.flushed(done.flush);
    }
    assert_eq!((mapped, last), (320, 1));
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn fault_around_stops_at_the_mapping_and_at_what_is_there() {
    let mm = manager(320, 16);
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 6, RW);
    map_anon(&mm, &space, BASE + 6, 6, Prot::READ);
    let mut cpu = Cpu::new(&space);
    (BASE..BASE + 4).for_each(|page| cpu.store(&mm, page, 1).expect("a store"));
    assert_eq!(mm.usage(&space).resident, 6);
    assert_eq!(cpu.store(&mm, BASE + 6, 1), Err("Protection".into()));
    assert_eq!(
        cpu.touch(&mm, BASE + 6, Access::Execute),
        Err("Protection".into())
    );
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn taken_hint_falls_back_to_the_highest_place() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    let place = |hint: u64, count: u64| {
        let mut wanted = request(0, count, RW, MapKind::Anonymous);
        wanted.placement = Placement::Anywhere {
            hint: Some(vpn(hint)),
            below: vpn(BASE + 100),
        };
        mm.map(&space, wanted)
            .map(|mapped| mapped.range.start().get())
    };
    assert_eq!(place(BASE, 4), Ok(BASE));
    assert_eq!(place(BASE + 3, 4), Ok(BASE + 96));
    assert_eq!(place(BASE + 200, 4), Ok(BASE + 200));
    assert_eq!(place(1, 4), Ok(BASE + 92));
    assert_eq!(mm.check(&[space]), Ok(()));
}
