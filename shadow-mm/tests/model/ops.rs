//! The operations, and how they are made up.

use proptest::prelude::*;
use shadow_mm::{Prot, Sharing, TrimMode, VadAdvice};

/// Which live space: taken modulo how many there are.
pub(crate) type Which = u8;
/// A page of the playground.
pub(crate) type Page = u8;

/// Pages of the playground; half lie across a leaf table's edge, half across a root entry's.
pub(crate) const PAGES: u8 = 48;

/// Sections there are.
pub(crate) const SECTIONS: usize = 4;
/// The one that is shared memory.
pub(crate) const SHARED: usize = 2;
/// The one that is the bytes of a file in memory.
pub(crate) const BYTES: usize = 3;
/// The section that images are made of; it never changes.
pub(crate) const IMAGE: usize = SECTIONS;
/// The section of a layer, which images are made of too.
pub(crate) const FROZEN: usize = SECTIONS + 1;

#[derive(Clone, Copy, Debug)]
pub(crate) struct MapOp {
    pub(crate) page: Page,
    pub(crate) count: u64,
    pub(crate) prot: Prot,
    /// A view: the section's number, its first page, and who sees the stores.
    pub(crate) view: Option<(usize, u64, Sharing)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Map(Which, MapOp),
    MapAnywhere(Which, MapOp),
    Unmap(Which, Page, u64),
    Protect(Which, Page, u64, Prot),
    Discard(Which, Page, u64),
    /// Puts pages of an image under a range: its section, and the first of them.
    Attach(Which, Page, u64, (usize, u64)),
    /// Gives up what a space has for itself, but for so many pages.
    Reset(Which, (u64, u64)),
    /// Has pages of a section be a layer's or an image's.
    Lay(usize, usize),
    /// Looks where all of a space's content is.
    Save(Which),
    /// Keeps a space as it is.
    Keep(Which),
    /// Keeps a section as it is.
    KeepSection(usize),
    /// Looks whether what is kept is as it was.
    LookAtKept(u8),
    DropKept(u8),
    /// Copies a kept space to a layer, on which what it was made of lies from then on.
    Rebase(u8),
    Advise(Which, Page, u64, VadAdvice),
    Remap {
        which: Which,
        page: Page,
        count: u64,
        new_count: u64,
        may_move: bool,
        to: Option<Page>,
    },
    Write(Which, Page, u8, u8),
    /// Stores to so many pages at even distances, one after the other.
    WriteApart(Which, Page, (i8, u8), u8),
    Read(Which, Page),
    Execute(Which, Page),
    Fork(Which),
    Exit(Which),
    /// So many pages may be charged to it, or any number.
    Quota(Which, Option<u64>),
    Pin(Which, Page, bool),
    /// Stores through a write pin, compares through a read pin, gives it back.
    Unpin(u8, u8),
    /// Leaves the read of a fault undone.
    StartRead(Which, Page),
    FinishRead(u8, ReadEnd),
    /// A section ends here, in bytes.
    Resize(usize, u64),
    WriteBack(usize, WriteEnd),
    /// Stores to a page of a section over zeroes without a view: which byte, and what.
    StoreBytes(usize, u64, (u8, u8)),
    LoadBytes(usize, u64),
    /// Makes a hole.
    Punch(usize, u64, u64),
    /// Promises pages.
    Reserve(usize, u64, u64),
    /// Forgets what the file has too.
    Forget(usize),
    /// Drops the handle of a section, and makes another.
    NewSection(usize),
    Acknowledge,
    /// How many pages at most, and which.
    Trim(Which, u8, TrimMode),
    /// Begins a write to the page file; what is written is what the pages contain now.
    StartWrite,
    FinishWrite(u8, bool),
    /// Leaves the read of a page-file fault undone.
    StartPageIn(Which, Page),
    FinishPageIn(u8, ReadEnd),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum WriteEnd {
    Whole,
    Failed,
    Dropped,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReadEnd {
    Whole,
    Short,
    Failed,
    Dropped,
}

pub(crate) fn any_op() -> impl Strategy<Value = Op> {
    let which = || 0u8..4;
    let count = || prop_oneof![12 => 1u64..14, 1 => Just(1u64 << 33)];
    prop_oneof![
        6 => (which(), any_map()).prop_map(|(w, m)| Op::Map(w, m)),
        2 => (which(), any_map()).prop_map(|(w, m)| Op::MapAnywhere(w, m)),
        3 => (which(), page(), count()).prop_map(|(w, p, n)| Op::Unmap(w, p, n)),
        4 => (which(), page(), count(), any_prot()).prop_map(|(w, p, n, r)| Op::Protect(w, p, n, r)),
        2 => (which(), page(), count()).prop_map(|(w, p, n)| Op::Discard(w, p, n)),
        6 => (which(), page(), 1u64..9, image()).prop_map(|(w, p, n, f)| Op::Attach(w, p, n, f)),
        3 => (zeroes(), below()).prop_map(|(s, f)| Op::Lay(s, f)),
        2 => which().prop_map(Op::Save),
        3 => which().prop_map(Op::Keep),
        3 => zeroes().prop_map(Op::KeepSection),
        3 => any::<u8>().prop_map(Op::LookAtKept),
        1 => any::<u8>().prop_map(Op::DropKept),
        2 => any::<u8>().prop_map(Op::Rebase),
        2 => (which(), 0u64..6, 0u64..6).prop_map(|(w, m, u)| Op::Reset(w, (m, u))),
        2 => (which(), page(), count(), any_advice()).prop_map(|(w, p, n, a)| Op::Advise(w, p, n, a)),
        3 => any_remap(),
        16 => (which(), page(), 0u8..3, any::<u8>()).prop_map(|(w, p, s, b)| Op::Write(w, p, s, b)),
        3 => (which(), page(), (-5i8..6, 3u8..8), any::<u8>())
            .prop_map(|(w, p, apart, b)| Op::WriteApart(w, p, apart, b)),
        8 => (which(), page()).prop_map(|(w, p)| Op::Read(w, p)),
        1 => (which(), page()).prop_map(|(w, p)| Op::Execute(w, p)),
        5 => which().prop_map(Op::Fork),
        2 => which().prop_map(Op::Exit),
        1 => (which(), prop_oneof![1 => Just(None), 2 => (0u64..30).prop_map(Some)])
            .prop_map(|(w, q)| Op::Quota(w, q)),
        3 => (which(), page(), any::<bool>()).prop_map(|(w, p, s)| Op::Pin(w, p, s)),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(n, b)| Op::Unpin(n, b)),
        2 => (which(), page()).prop_map(|(w, p)| Op::StartRead(w, p)),
        2 => (any::<u8>(), any_end()).prop_map(|(n, e)| Op::FinishRead(n, e)),
        3 => (section(), 0u64..14 * 4096).prop_map(|(s, n)| Op::Resize(s, n)),
        3 => (section(), any_write_end()).prop_map(|(s, e)| Op::WriteBack(s, e)),
        4 => (zeroes(), 0u64..14, (0u8..3, any::<u8>())).prop_map(|(s, p, b)| Op::StoreBytes(s, p, b)),
        2 => (zeroes(), 0u64..14).prop_map(|(s, p)| Op::LoadBytes(s, p)),
        2 => (zeroes(), 0u64..14, 1u64..8).prop_map(|(s, p, n)| Op::Punch(s, p, n)),
        1 => (Just(BYTES), 0u64..14, 1u64..8).prop_map(|(s, p, n)| Op::Reserve(s, p, n)),
        2 => section().prop_map(Op::Forget),
        1 => section().prop_map(Op::NewSection),
        6 => Just(Op::Acknowledge),
        6 => (which(), 1u8..20, any_trim()).prop_map(|(w, n, m)| Op::Trim(w, n, m)),
        5 => Just(Op::StartWrite),
        5 => (any::<u8>(), prop_oneof![4 => Just(true), 1 => Just(false)])
            .prop_map(|(n, ok)| Op::FinishWrite(n, ok)),
        3 => (which(), page()).prop_map(|(w, p)| Op::StartPageIn(w, p)),
        3 => (any::<u8>(), any_end()).prop_map(|(n, e)| Op::FinishPageIn(n, e)),
    ]
}

fn any_trim() -> impl Strategy<Value = TrimMode> {
    prop_oneof![
        1 => Just(TrimMode::AgeOnly),
        1 => Just(TrimMode::Old),
        1 => Just(TrimMode::Unused),
        4 => Just(TrimMode::Any),
    ]
}

/// The pages that so many stores at a distance come to, as far as there are any.
pub(crate) fn pages_apart(first: Page, (by, count): (i8, u8)) -> impl Iterator<Item = Page> {
    (0..i16::from(count))
        .filter_map(move |n| Page::try_from(i16::from(first) + n * i16::from(by)).ok())
        .filter(|page| *page < PAGES)
}

/// Mostly a few pages around a leaf table's edge, so that histories meet on one page.
fn page() -> impl Strategy<Value = Page> {
    prop_oneof![1 => 0..PAGES, 2 => 10u8..14]
}

fn any_prot() -> impl Strategy<Value = Prot> {
    prop_oneof![
        5 => Just(Prot::READ | Prot::WRITE),
        1 => (0u8..8).prop_map(Prot::from_bits_truncate),
    ]
}

fn any_map() -> impl Strategy<Value = MapOp> {
    let sharing = prop_oneof![Just(Sharing::Private), Just(Sharing::Shared)];
    let view = prop_oneof![
        2 => Just(None),
        2 => (section(), 0u64..4, sharing).prop_map(Some),
    ];
    (page(), 1u64..14, any_prot(), view).prop_map(|(page, count, prot, view)| MapOp {
        page,
        count,
        prot,
        view,
    })
}

fn zeroes() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(SHARED), 2 => Just(BYTES)]
}

/// An image's section, and a page of it.
fn image() -> impl Strategy<Value = (usize, u64)> {
    (below(), 0u64..6)
}

pub(crate) fn below() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(IMAGE), 3 => Just(FROZEN)]
}

fn section() -> impl Strategy<Value = usize> {
    0..SECTIONS
}

fn any_write_end() -> impl Strategy<Value = WriteEnd> {
    prop_oneof![
        3 => Just(WriteEnd::Whole),
        1 => Just(WriteEnd::Failed),
        1 => Just(WriteEnd::Dropped),
    ]
}

fn any_advice() -> impl Strategy<Value = VadAdvice> {
    prop_oneof![
        Just(VadAdvice::DontFork),
        Just(VadAdvice::DoFork),
        Just(VadAdvice::WipeOnFork),
        Just(VadAdvice::KeepOnFork),
    ]
}

fn any_end() -> impl Strategy<Value = ReadEnd> {
    prop_oneof![
        3 => Just(ReadEnd::Whole),
        1 => Just(ReadEnd::Short),
        1 => Just(ReadEnd::Failed),
        1 => Just(ReadEnd::Dropped),
    ]
}

fn any_remap() -> impl Strategy<Value = Op> {
    let to = prop_oneof![1 => Just(None), 1 => page().prop_map(Some)];
    (0u8..4, page(), 1u64..8, 1u64..14, any::<bool>(), to).prop_map(
        |(which, page, count, new_count, may_move, to)| Op::Remap {
            which,
            page,
            count,
            new_count,
            may_move,
            to,
        },
    )
}
