//! Whatever a clone does to its memory: in the space that it leaves, the next one finds what the first one found.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use shadow_mm::{Access, Charge, ForkMode, Prot, RemapRequest, Sharing, VadTag};

use super::super::tests::{NoFiles, done, memory, put, range, va, write};
use super::super::{Image, ImageLoader, KeptMemory, Pages};
use super::*;
use crate::memory::AccessError;
use crate::snapshot::read::{Snapshot, Trust};
use crate::snapshot::records::{LoadMemory, SpaceRef};
use crate::snapshot::write::Writer;

type Guest = Arc<Space<VmmPlatform>>;

/// The pages that guests use: the first, and how many.
const START: u64 = 0x100;
const PAGES: u64 = 1100;
const RW: Prot = Prot::READ.union(Prot::WRITE);
/// What the template has mapped: where from [`START`] on, how many pages, and what may be done with them.
const MAPPED: [(u64, u64, Prot); 4] = [
    (0, 120, RW),
    (120, 40, Prot::READ),
    (300, 400, RW),
    (1000, 30, RW),
];

/// Where it has mapped memory that processes share, [`SHARED_PAGES`] of it each time.
const SHARED: [(u64, Sharing); 3] = [
    (160, Sharing::Shared),
    (720, Sharing::Private),
    (1030, Sharing::Shared),
];
const SHARED_PAGES: u64 = 20;

/// What a guest does.
#[derive(Clone, Copy, Debug)]
enum Op {
    Map(u64, u64, Prot, u32),
    Unmap(u64, u64),
    Protect(u64, u64, Prot),
    Discard(u64, u64),
    Remap(u64, u64, u64, Option<u64>),
    Store(u64, u64),
    StoreAll(u64, u64),
    Load(u64),
    Fork,
    /// The last child stores to a page, and what the guest then sees of it is its own.
    ChildStores(u64),
    ChildEnds,
}

fn any_prot() -> impl Strategy<Value = Prot> {
    prop_oneof![3 => Just(RW), 1 => Just(Prot::READ), 1 => Just(Prot::empty())]
}

fn any_op() -> impl Strategy<Value = Op> {
    let page = || {
        let edges = [0, 1, 119, 120, 159, 300, 411, 412, 500, 699, 1000];
        let shared = [160, 165, 179, 719, 720, 725, 739, 1029, 1030, 1035, 1049];
        let edges = prop::sample::select([edges, shared].concat());
        prop_oneof![2 => edges, 1 => 0..PAGES]
    };
    let count = || prop_oneof![3 => 1..6_u64, 1 => 1..600_u64];
    prop_oneof![
        3 => (page(), count(), any_prot(), 7..9_u32).prop_map(|(p, n, r, t)| Op::Map(p, n, r, t)),
        3 => (page(), count()).prop_map(|(p, n)| Op::Unmap(p, n)),
        3 => (page(), count(), any_prot()).prop_map(|(p, n, r)| Op::Protect(p, n, r)),
        2 => (page(), count()).prop_map(|(p, n)| Op::Discard(p, n)),
        3 => (page(), count(), count(), prop::option::of(page()))
            .prop_map(|(p, n, m, to)| Op::Remap(p, n, m, to)),
        8 => (page(), any::<u64>()).prop_map(|(p, v)| Op::Store(p, v)),
        1 => (page(), count()).prop_map(|(p, n)| Op::StoreAll(p, n)),
        3 => page().prop_map(Op::Load),
        2 => Just(Op::Fork),
        2 => page().prop_map(Op::ChildStores),
        1 => Just(Op::ChildEnds),
    ]
}

/// A part of the space that guests use.
fn part(page: u64, count: u64) -> VpnRange {
    range(START + page, count.min(PAGES - page.min(PAGES - 1)))
}

/// A guest, and the children it has.
struct Tree {
    memory: Arc<Memory>,
    guest: Guest,
    children: Vec<Guest>,
}

impl Tree {
    /// What cannot be done is not.
    fn apply(&mut self, op: Op) {
        let (memory, guest) = (&self.memory, &self.guest);
        let manager = &memory.manager;
        match op {
            Op::Map(page, count, prot, tag) => {
                let request = MapRequest {
                    placement: Placement::Fixed(part(page, count).start()),
                    count: part(page, count).count(),
                    prot,
                    kind: MapKind::Anonymous,
                    flags: shadow_mm::VadFlags::empty(),
                    tag: VadTag(tag),
                };
                memory.submit(manager.map(guest, request).expect("a mapping").flush);
            }
            Op::Unmap(page, count) => {
                let gone = manager.unmap(guest, part(page, count));
                memory.submit(gone.expect("a hole"));
            }
            Op::Protect(page, count, prot) => {
                memory.submit(manager.protect(guest, part(page, count), prot).flush);
            }
            Op::Discard(page, count) => {
                memory.submit(manager.discard(guest, part(page, count)).flush);
            }
            Op::Remap(page, count, new_count, to) => {
                let request = RemapRequest {
                    old: part(page, count),
                    new_count,
                    may_move: true,
                    fixed: to.map(|to| part(to, 1).start()),
                };
                if let Ok(moved) = manager.remap(guest, request) {
                    memory.submit(moved.flush);
                }
            }
            Op::Store(page, value) => store(memory, guest, START + page, value),
            Op::StoreAll(page, count) => part(page, count)
                .iter()
                .for_each(|page| store(memory, guest, page.get(), 77)),
            Op::Load(page) => _ = load(memory, guest, START + page),
            Op::Fork => self.children.push(memory.fork(guest).expect("a child")),
            Op::ChildStores(page) => {
                if let Some(child) = self.children.last() {
                    let before = load(memory, guest, START + page);
                    store(memory, child, START + page, 99);
                    let shares = [&**guest, child].map(|space| is_shared(memory, space, page));
                    let after = load(memory, guest, START + page);
                    assert!(after == before || shares == [true; 2]);
                }
            }
            Op::ChildEnds => {
                if let Some(child) = self.children.pop() {
                    memory.delete_space(&child);
                }
            }
        }
    }
}

/// Whether what is stored to a page is seen by others.
fn is_shared(memory: &Memory, space: &Space<VmmPlatform>, page: u64) -> bool {
    let vad = Vpn::new(START + page).and_then(|vpn| memory.manager.query(space, vpn));
    let shared = |kind| matches!(kind, MapKind::View { sharing, .. } if sharing == Sharing::Shared);
    vad.is_some_and(|vad| vad.range.start().get() <= START + page && shared(vad.kind))
}

fn store(memory: &Memory, space: &Guest, page: u64, value: u64) {
    use vm_memory::Bytes;
    let put = |pool: &crate::memory::Pool, frame| pool.frame(frame).write_obj(value, 8).unwrap();
    match memory.with_page(space, va(page), Access::Write, put) {
        Ok(()) | Err(AccessError::Denied(_)) => {}
        Err(AccessError::NoMemory) => panic!("no memory for page {page:#x}"),
    }
}

/// All bytes of a page; none of one that may not be read.
fn load(memory: &Memory, space: &Guest, page: u64) -> Option<Vec<u8>> {
    use shadow_mm::FrameStore;
    let get = |pool: &crate::memory::Pool, frame| {
        let mut bytes = vec![0; 4096];
        pool.read(frame, 0, &mut bytes);
        bytes
    };
    memory.with_page(space, va(page), Access::Read, get).ok()
}

/// What a guest can find out.
#[derive(PartialEq, Debug)]
struct Seen {
    mappings: Vec<(VpnRange, Prot, VadTag)>,
    sums: (u64, u64, u64),
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Seen {
    fn of(memory: &Memory, space: &Guest) -> Self {
        let form = Form::of(memory, space);
        let mappings = form.vads.iter().map(|vad| (vad.range, vad.prot, vad.tag));
        let mappings: Vec<_> = mappings.collect();
        let pages = mappings.iter().flat_map(|(range, ..)| range.iter());
        let pages = pages.filter_map(|page| {
            let bytes = load(memory, space, page.get())?;
            bytes
                .iter()
                .any(|byte| *byte != 0)
                .then_some((page.get(), bytes))
        });
        Self {
            sums: form.sums,
            pages: pages.collect(),
            mappings,
        }
    }
}

/// A template: every second page has something in it.
fn template() -> Arc<Image> {
    let memory = memory(2000);
    let space = memory.manager.create_space().expect("a space");
    for (at, count, prot) in MAPPED {
        let all = range(START + at, count);
        super::super::tests::map(&memory, &space, all, RW, MapKind::Anonymous);
        for page in all.iter().step_by(2) {
            put(&memory, &space, page.get(), page.get());
        }
        memory.submit(memory.manager.protect(&space, all, prot).flush);
    }
    let bytes = SHARED_PAGES * PAGE_SIZE as u64;
    let section = memory.manager.create_shared_memory(bytes, Charge::Charged);
    let section = section.expect("a section");
    for (at, sharing) in SHARED {
        let all = range(START + at, SHARED_PAGES);
        let section = section.clone();
        let kind = MapKind::View {
            section,
            offset: 0,
            sharing,
        };
        super::super::tests::map(&memory, &space, all, RW, kind);
        for page in all.iter().step_by(3) {
            put(&memory, &space, page.get(), page.get());
        }
    }
    drop(section);
    let writer = Writer::in_memory("a template").expect("memory");
    let file = write(&memory, writer, &[&space]);
    done(&memory, &[&space]);
    let snapshot = Snapshot::from_file(file, "a template".into(), Trust::Sealed, None);
    Arc::new(Image::read(&Arc::new(snapshot.expect("a snapshot"))).expect("an image"))
}

/// A machine over the template's pages.
fn machine(image: &Arc<Image>) -> (Arc<Memory>, KeptMemory) {
    let memory = memory(4000);
    memory.manager.set_fork_mode(ForkMode::Shared);
    let layer = image.snapshot().layer().expect("a mapping");
    let layer = layer.expect("a template in memory");
    let pool = memory.manager.store();
    let frames = pool.lay(layer).expect("room");
    let pages = Pages::Mapped(frames);
    let loader = ImageLoader::new(&memory, (Arc::clone(image), pages), Arc::default());
    let kept = KeptMemory::new(loader.expect("a section"));
    (memory, kept)
}

fn guest(kept: &mut KeptMemory) -> Guest {
    let guest = kept.space(SpaceRef(0), &NoFiles).expect("a space");
    kept.is_given();
    guest
}

fn go_back_and_compare(histories: &[Vec<Op>]) {
    thread_local!(static IMAGE: Arc<Image> = template());
    let image = IMAGE.with(Arc::clone);
    let (other, mut first) = machine(&image);
    let first = Seen::of(&other, &guest(&mut first));
    let (memory, mut kept) = machine(&image);
    for history in histories {
        let mut tree = Tree {
            memory: Arc::clone(&memory),
            guest: guest(&mut kept),
            children: Vec::new(),
        };
        history.iter().for_each(|op| tree.apply(*op));
        let mut left = tree.children;
        left.push(Arc::clone(&tree.guest));
        let report = kept.take_back(&left);
        assert_eq!((report.kept, report.dropped), (1, left.len() - 1));
        memory.manager.check(&[tree.guest]).expect("invariants");
        let stats = memory.manager.stats();
        assert_eq!(stats.data.active, report.pages, "frames of nobody");
        let next = guest(&mut kept);
        assert_eq!(Seen::of(&memory, &next), first);
        assert_eq!(kept.take_back(&[next]).kept, 1);
    }
}

/// A page that could be stored to for a while is charged ever after.
#[test]
fn page_that_was_writable_for_a_while_is_charged_as_it_was() {
    let history = [Op::Protect(0, 121, RW), Op::Protect(119, 2, Prot::READ)];
    go_back_and_compare(&[history.to_vec()]);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn space_is_the_templates_again_whatever_was_done_to_it(
        histories in prop::collection::vec(prop::collection::vec(any_op(), 1..40), 1..4),
    ) {
        go_back_and_compare(&histories);
    }
}
