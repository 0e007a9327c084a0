//! Spaces that come to lie on the layer to which they were copied.

use super::common::{
    BASE, Cpu, Guest, LAYER, Mm, RW, layer, manager, map_anon, over_layer, range, request, vpn,
};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, ForkMode, FrameStore, ImageRun, MapKind, PageInfo, Pfn, PfnRange, PinOutcome,
    RebaseError, Rebased, SavedPage, Section, SectionPage, Sharing,
};

type Image = Vec<ImageRun<SimFile>>;

/// Leaf tables that the tests look at.
const SPAN: u64 = 512;

fn sharing(data: u32, tables: u32) -> Mm {
    let mm = manager(data, tables);
    mm.set_fork_mode(ForkMode::Shared);
    mm
}

/// A section over some frames of the layer.
fn section(mm: &Mm, (first, count): (u32, u32), file: u32) -> Section<SimFile> {
    let start = Pfn::new(layer(mm).start.get() + first);
    let made = mm.create_frozen_section(SimFile(file), PfnRange { start, count });
    made.expect("a section")
}

/// Copies what a kept space has for itself to the pages of a section of a layer, from the frame `first` of the layer on.
fn copied(mm: &Mm, kept: &Guest, (section, first): (&Section<SimFile>, u32)) -> Image {
    let mut image = Image::new();
    let visit = |page: shadow_mm::Vpn, content| {
        let frame = match content {
            SavedPage::Frame(_, frame) | SavedPage::View(_, frame) => frame,
            other => panic!("{page}: {other:?}"),
        };
        let at = image.len() as u32;
        let to = Pfn::new(layer(mm).start.get() + first + at);
        mm.store().copy(frame, to);
        image.push(ImageRun {
            range: range(page.get(), 1),
            section: section.clone(),
            first: SectionPage::new(at.into()).expect("a page"),
        });
    };
    let next = mm.saved_pages(kept, range(BASE, 2 * SPAN), usize::MAX, visit);
    assert_eq!(next, None);
    image
}

fn keep(mm: &Mm, cpu: &mut Cpu) -> Guest {
    let kept = mm.keep(&cpu.space).expect("it is kept");
    cpu.flush(mm, kept.flush);
    kept.child
}

/// A space whose first page has a 7, and what is kept of it.
fn kept_with_a_page(mm: &Mm) -> (Guest, Cpu, Guest) {
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(mm, &space, BASE, 4, RW);
    cpu.store(mm, BASE, 7).expect("a store");
    let kept = keep(mm, &mut cpu);
    (space, cpu, kept)
}

/// Rebases what one leaf table translates; gives back the pages that lie on the image.
fn rebase(mm: &Mm, cpu: &mut Cpu, kept: &Guest, (page, image): (u64, &Image)) -> u64 {
    let done = mm.rebase(&cpu.space, kept, vpn(page), image);
    let Rebased { flush, pages } = done.expect("it is rebased");
    assert_eq!(flush.is_empty(), pages == 0);
    cpu.flush(mm, flush);
    pages
}

fn frozen(mm: &Mm, space: &Guest) -> u64 {
    let mut frozen = 0;
    mm.resident_pages(space, range(BASE, 2 * SPAN), |_, page: PageInfo| {
        frozen += u64::from(page.frozen);
    });
    frozen
}

#[test]
fn what_was_left_alone_is_in_memory_once() {
    let mm = sharing(200, 64);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 2 * SPAN, RW);
    for page in [0, 1, 2, 5, SPAN, SPAN + 7] {
        cpu.store(&mm, BASE + page, 10 + page as u8)
            .expect("a store");
    }
    let kept = keep(&mm, &mut cpu);
    let layer = section(&mm, (0, LAYER), 1);
    let image = copied(&mm, &kept, (&layer, 0));
    cpu.store(&mm, BASE + SPAN + 7, 99).expect("a store");
    let mut behind = Cpu::new(&space);
    assert_eq!(behind.load(&mm, BASE + 5), Ok(15), "has a translation");
    let done = mm.rebase(&space, &kept, vpn(BASE + 3), &image);
    let Rebased { flush, pages } = done.expect("it is rebased");
    assert_eq!(pages, 4);
    behind.drop_stale(&flush);
    cpu.flush(&mm, flush);
    assert_eq!(
        rebase(&mm, &mut cpu, &kept, (BASE + SPAN, &image)),
        0,
        "something was stored to there"
    );
    mm.check(&[space.clone(), kept.clone()]).expect("in order");
    mm.flushed(mm.delete_space(&kept));
    assert_eq!(mm.stats().data.active, 2, "pages that are not the layer's");
    assert_eq!(frozen(&mm, &space), 4);
    let bytes = [
        (0, 10),
        (1, 11),
        (2, 12),
        (3, 0),
        (5, 15),
        (SPAN, 10),
        (SPAN + 7, 99),
    ];
    for (page, byte) in bytes {
        assert_eq!(cpu.load(&mm, BASE + page), Ok(byte), "page {page}");
        assert_eq!(behind.load(&mm, BASE + page), Ok(byte), "page {page}");
    }
    cpu.store(&mm, BASE + 5, 77).expect("a store");
    assert_eq!(
        (cpu.load(&mm, BASE + 5), mm.stats().pages_rebased),
        (Ok(77), 4)
    );
    let mut byte = [0];
    mm.store().read(
        Pfn::new(super::common::layer(&mm).start.get() + 3),
        0,
        &mut byte,
    );
    assert_eq!(byte, [15], "the layer");
    mm.check(std::slice::from_ref(&space)).expect("in order");
    mm.flushed(mm.delete_space(&space));
    assert_eq!((mm.stats().data.active, mm.stats().commit_charged), (0, 0));
}

/// What the space has taken away since does not come back out of the image.
#[test]
fn what_went_stays_away() {
    for whole in [false, true] {
        let mm = sharing(200, 64);
        let space = mm.create_space().expect("a space");
        let mut cpu = Cpu::new(&space);
        map_anon(&mm, &space, BASE, SPAN, RW);
        for page in 0..4 {
            cpu.store(&mm, BASE + page, 10).expect("a store");
        }
        let kept = keep(&mm, &mut cpu);
        let layer = section(&mm, (0, LAYER), 1);
        let image = copied(&mm, &kept, (&layer, 0));
        let gone = if whole { (BASE, SPAN) } else { (BASE + 1, 1) };
        let unmapped = mm.unmap(&space, range(gone.0, gone.1)).expect("unmapped");
        cpu.flush(&mm, unmapped);
        assert_eq!(rebase(&mm, &mut cpu, &kept, (BASE, &image)), 0);
        map_anon(&mm, &space, gone.0, gone.1, RW);
        assert_eq!(rebase(&mm, &mut cpu, &kept, (BASE, &image)), 0);
        assert_eq!(cpu.load(&mm, BASE + 1), Ok(0));
        assert_eq!(cpu.load(&mm, BASE), Ok(if whole { 0 } else { 10 }));
        mm.flushed(mm.delete_space(&kept));
        mm.check(&[space]).expect("in order");
    }
}

/// A fork from before and one from after: each space changes its own pages only, and they can be rebased themselves.
#[test]
fn forks_keep_what_they_have() {
    let mm = sharing(200, 64);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 8, RW);
    for page in 0..8 {
        cpu.store(&mm, BASE + page, 10 + page as u8)
            .expect("a store");
    }
    let fork = |cpu: &mut Cpu| {
        let forked = mm.fork(&space).expect("a fork");
        cpu.flush(&mm, forked.flush);
        Cpu::new(&forked.child)
    };
    let mut before = fork(&mut cpu);
    let (kept, kept_before) = (keep(&mm, &mut cpu), keep(&mm, &mut before));
    let mut after = fork(&mut cpu);
    let layer = section(&mm, (0, LAYER), 1);
    let image = copied(&mm, &kept, (&layer, 0));
    assert_eq!(rebase(&mm, &mut cpu, &kept, (BASE, &image)), 8);
    cpu.store(&mm, BASE, 50).expect("a store");
    assert_eq!(rebase(&mm, &mut before, &kept_before, (BASE, &image)), 8);
    before.store(&mm, BASE + 1, 60).expect("a store");
    after.store(&mm, BASE + 2, 70).expect("a store");
    let all = [&cpu, &before, &after].map(|cpu| cpu.space.clone());
    let with_kept: Vec<_> = all.iter().chain([&kept, &kept_before]).cloned().collect();
    mm.check(&with_kept).expect("in order");
    for kept in [&kept, &kept_before] {
        mm.flushed(mm.delete_space(kept));
    }
    for (cpu, (changed, byte)) in
        [&mut cpu, &mut before, &mut after]
            .into_iter()
            .zip([(0, 50), (1, 60), (2, 70)])
    {
        for page in 0..8 {
            let expected = if page == changed {
                byte
            } else {
                10 + page as u8
            };
            assert_eq!(cpu.load(&mm, BASE + page), Ok(expected), "page {page}");
        }
    }
    assert_eq!(
        mm.stats().data.active,
        2 + 8,
        "the fork from after has its own"
    );
    mm.check(&all).expect("in order");
    for space in &all {
        mm.flushed(mm.delete_space(space));
    }
    assert_eq!((mm.stats().data.active, mm.stats().commit_charged), (0, 0));
}

/// What lay on a layer already, a clone's pages, lies on the new one.
#[test]
fn image_takes_the_place_of_another() {
    let mm = sharing(200, 64);
    mm.set_fork_mode(ForkMode::Shared);
    let (space, old) = over_layer(&mm);
    let mut cpu = Cpu::new(&space);
    assert_eq!(cpu.load(&mm, BASE), Ok(1));
    cpu.store(&mm, BASE + 3, 99).expect("a store");
    let kept = keep(&mm, &mut cpu);
    // The layer's pages 8 to 13 are those of the old one's too: nobody looks at these here.
    let new = section(&mm, (8, 6), 2);
    let to = |page: u32| Pfn::new(layer(&mm).start.get() + 8 + page);
    for (page, byte) in [(0, 1), (1, 2), (2, 3), (3, 99)] {
        mm.store().write(to(page), 0, &[byte]);
    }
    let image = vec![ImageRun {
        range: range(BASE, 4),
        section: new.clone(),
        first: SectionPage::new(0).expect("a page"),
    }];
    assert_eq!(rebase(&mm, &mut cpu, &kept, (BASE, &image)), 4);
    mm.flushed(mm.delete_space(&kept));
    assert_eq!(mm.stats().data.active, 0);
    for (page, byte) in [(0, 1), (1, 2), (2, 3), (3, 99), (4, 5), (7, 8)] {
        assert_eq!(cpu.load(&mm, BASE + page), Ok(byte), "page {page}");
    }
    let runs = mm.image_runs(&space);
    let runs: Vec<_> = runs
        .iter()
        .map(|run| (run.section == new, run.range))
        .collect();
    assert_eq!(runs, [(true, range(BASE, 4)), (false, range(BASE + 4, 10))]);
    mm.check(&[space]).expect("in order");
    drop(old);
}

/// Pages of a file that is mapped privately lie on the image too; shared memory never does.
#[test]
fn views_of_files_lie_on_it_and_shared_ones_do_not() {
    let mm = sharing(200, 64);
    let file = mm
        .create_section(Some(SimFile(9)), 8 * 4096)
        .expect("a section");
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    let view = |sharing| MapKind::View {
        section: file.clone(),
        offset: 0,
        sharing,
    };
    let mapped = mm.map(&space, request(BASE, 4, RW, view(Sharing::Private)));
    cpu.flush(&mm, mapped.expect("a view").flush);
    cpu.store(&mm, BASE, 5).expect("a store");
    assert_eq!(cpu.load(&mm, BASE + 1), Ok(0));
    let kept = keep(&mm, &mut cpu);
    let layer = section(&mm, (0, LAYER), 1);
    let image = copied(&mm, &kept, (&layer, 0));
    let views = mm.stats().section_pages;
    assert_eq!(
        rebase(&mm, &mut cpu, &kept, (BASE, &image)),
        image.len() as u64
    );
    mm.flushed(mm.delete_space(&kept));
    assert_eq!(
        (frozen(&mm, &space), mm.stats().section_pages),
        (image.len() as u64, views)
    );
    assert_eq!(
        (cpu.load(&mm, BASE), cpu.load(&mm, BASE + 1)),
        (Ok(5), Ok(0))
    );

    let other = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&other);
    map_anon(&mm, &other, BASE, 8, RW);
    cpu.store(&mm, BASE, 1).expect("a store");
    let kept = keep(&mm, &mut cpu);
    let mapped = mm.map(&other, request(BASE + 4, 4, RW, view(Sharing::Shared)));
    cpu.flush(&mm, mapped.expect("a view").flush);
    let run = |page| ImageRun {
        range: range(BASE + page, 1),
        section: layer.clone(),
        first: SectionPage::new(0).expect("a page"),
    };
    assert_eq!(
        rebase(&mm, &mut cpu, &kept, (BASE, &vec![run(0), run(5)])),
        0
    );
    mm.flushed(mm.delete_space(&kept));
    mm.check(&[space, other]).expect("in order");
}

/// Somebody looks at a page through a pin: the frame is there until he is done, and has what it had.
#[test]
fn pinned_page_lies_on_it_and_the_pin_sees_what_it_saw() {
    let mm = sharing(200, 64);
    let (space, mut cpu, kept) = kept_with_a_page(&mm);
    let PinOutcome::Pinned(pin, flush) = mm.pin(&space, vpn(BASE), Access::Read) else {
        panic!("no pin");
    };
    cpu.flush(&mm, flush);
    let layer = section(&mm, (0, LAYER), 1);
    let image = copied(&mm, &kept, (&layer, 0));
    assert_eq!(rebase(&mm, &mut cpu, &kept, (BASE, &image)), 1);
    mm.flushed(mm.delete_space(&kept));
    cpu.store(&mm, BASE, 8).expect("a store");
    let mut byte = [0];
    mm.store().read(pin.pfn(), 0, &mut byte);
    assert_eq!(byte, [7]);
    mm.unpin(pin);
    mm.check(std::slice::from_ref(&space)).expect("in order");
    mm.flushed(mm.delete_space(&space));
    assert_eq!(mm.stats().data.active, 0);
}

#[test]
fn space_that_is_gone_is_not_rebased() {
    let mm = sharing(200, 64);
    let (space, _, kept) = kept_with_a_page(&mm);
    let layer = section(&mm, (0, LAYER), 1);
    let image = copied(&mm, &kept, (&layer, 0));
    mm.flushed(mm.delete_space(&space));
    let gone = mm.rebase(&space, &kept, vpn(BASE), &image);
    assert_eq!(gone.err(), Some(RebaseError::SpaceDeleted));
    mm.flushed(mm.delete_space(&kept));
    mm.check(&[]).expect("in order");
}
