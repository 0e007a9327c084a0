use shadow_mm::Access;

use super::*;
use crate::linux::process::MmLayout;
use crate::linux::testing::{DATA, Machine};
use crate::linux::thread::Thread;

const MMAP: u64 = 9;
const MPROTECT: u64 = 10;
const MUNMAP: u64 = 11;
const BRK: u64 = 12;
const MREMAP: u64 = 25;
const MSYNC: u64 = 26;
const MINCORE: u64 = 27;
const MADVISE: u64 = 28;
const MLOCK: u64 = 149;
const MLOCKALL: u64 = 151;

const RW: u64 = 3;
const ANON: u64 = 0x22;
const FIXED: u64 = 0x10;
const NOREPLACE: u64 = 0x10_0000;
const TOP: u64 = 0x7000_0000_0000;
const HEAP: u64 = 0x5000_0000;

struct Guest {
    m: Machine,
    t: Box<Thread>,
}

impl Guest {
    fn new() -> Self {
        let m = Machine::new();
        let t = m.first();
        *t.mm.layout.lock() = MmLayout {
            brk_start: HEAP,
            brk: HEAP,
            mmap_top: TOP,
            ..MmLayout::default()
        };
        Self { m, t }
    }

    fn call(&mut self, nr: u64, args: &[u64]) -> Result<u64, Errno> {
        let value = self.m.result(&mut self.t, nr, args);
        if (-4095..0).contains(&value) {
            Err(Errno::from_raw_os_error(-value as i32))
        } else {
            Ok(value as u64)
        }
    }

    fn anonymous(&mut self, pages: u64) -> u64 {
        self.call(MMAP, &[0, pages * PAGE, RW, ANON, u64::MAX, 0])
            .unwrap()
    }

    fn put(&self, at: u64, value: u64) {
        self.m.mem(&self.t).write_obj(at, &value).unwrap();
    }

    fn get(&self, at: u64) -> Result<u64, Errno> {
        self.m.mem(&self.t).read_obj(at)
    }
}

#[test]
fn mmap_arguments_are_refused_as_linux_does() {
    let mut g = Guest::new();
    let mut mmap =
        |addr, len, flags, fd: u64, offset| g.call(MMAP, &[addr, len, RW, flags, fd, offset]);
    assert_eq!(mmap(0, 0, ANON, 0, 0), Err(Errno::INVAL));
    assert_eq!(mmap(0, 4096, ANON, 0, 1), Err(Errno::INVAL));
    assert_eq!(mmap(0, u64::MAX, ANON, 0, 0), Err(Errno::NOMEM));
    assert_eq!(mmap(0, USER_END + 1, ANON, 0, 0), Err(Errno::NOMEM));
    assert_eq!(
        mmap(0, 4096, ANON, 0, u64::MAX - 0xfff),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(mmap(0, 4096, 0x2, 77, 0), Err(Errno::BADF));
    assert_eq!(mmap(0, 4096, 0x20, 0, 0), Err(Errno::INVAL));
    assert_eq!(mmap(0x1000, 4096, ANON | FIXED, 0, 0), Err(Errno::PERM));
    assert_eq!(mmap(0x2_0001, 4096, ANON | FIXED, 0, 0), Err(Errno::INVAL));
    assert_eq!(mmap(USER_END, 4096, ANON | FIXED, 0, 0), Err(Errno::NOMEM));
    assert_eq!(mmap(DATA, 4096, ANON | NOREPLACE, 0, 0), Err(Errno::EXIST));
}

#[test]
fn anonymous_mapping_is_below_the_others_and_usable() {
    let mut g = Guest::new();
    let at = g.anonymous(3);
    assert_eq!(at, TOP - 3 * PAGE);
    g.put(at + 8, 42);
    assert_eq!(g.get(at + 8), Ok(42));
    assert_eq!(g.anonymous(1), at - PAGE);
    assert_eq!(g.call(MUNMAP, &[at, 3 * PAGE]), Ok(0));
    assert_eq!(g.get(at + 8), Err(Errno::FAULT));
}

#[test]
fn hint_is_taken_if_free() {
    let mut g = Guest::new();
    let args = |addr| [addr, PAGE, RW, ANON, 0, 0];
    assert_eq!(g.call(MMAP, &args(0x6000_0123)), Ok(0x6000_1000));
    assert_eq!(g.call(MMAP, &args(0x6000_1000)), Ok(TOP - PAGE));
    assert_eq!(g.call(MMAP, &args(USER_END)), Ok(TOP - 2 * PAGE));
}

#[test]
fn low_mapping_is_below_two_gigabytes() {
    let mut g = Guest::new();
    let at = g.call(MMAP, &[0, PAGE, RW, ANON | 0x40, 0, 0]).unwrap();
    assert!(at + PAGE <= 1 << 31);
}

#[test]
fn unmapping_a_hole_is_fine_but_not_an_odd_range() {
    let mut g = Guest::new();
    assert_eq!(g.call(MUNMAP, &[0x6000_0000, 10 * PAGE]), Ok(0));
    assert_eq!(g.call(MUNMAP, &[0x6000_0001, PAGE]), Err(Errno::INVAL));
    assert_eq!(g.call(MUNMAP, &[0x6000_0000, 0]), Err(Errno::INVAL));
    assert_eq!(g.call(MUNMAP, &[0x6000_0000, u64::MAX]), Err(Errno::INVAL));
    assert_eq!(g.call(MUNMAP, &[USER_END, PAGE]), Err(Errno::INVAL));
}

#[test]
fn protection_is_taken_and_given() {
    let mut g = Guest::new();
    let at = g.anonymous(2);
    g.put(at, 1);
    assert_eq!(g.call(MPROTECT, &[at, PAGE, 1]), Ok(0));
    assert_eq!(g.m.mem(&g.t).accessible(at, 1, Access::Write), 0);
    assert_eq!(g.call(MPROTECT, &[at, PAGE, RW]), Ok(0));
    g.put(at, 2);
    assert_eq!(g.call(MPROTECT, &[at, 0, 1]), Ok(0));
    assert_eq!(g.call(MPROTECT, &[at + 1, PAGE, 1]), Err(Errno::INVAL));
    assert_eq!(g.call(MPROTECT, &[at, PAGE, 0x10]), Err(Errno::INVAL));
    assert_eq!(g.call(MPROTECT, &[at, 3 * PAGE, 1]), Err(Errno::NOMEM));
    assert_eq!(g.call(MPROTECT, &[at, u64::MAX, 1]), Err(Errno::NOMEM));
    assert_eq!(
        g.call(MPROTECT, &[at, PAGE, 0x0300_0001]),
        Err(Errno::INVAL)
    );
    assert_eq!(
        g.call(MPROTECT, &[at, PAGE, 0x0100_0001]),
        Err(Errno::INVAL)
    );
}

#[test]
fn growing_range_is_protected_from_its_start() {
    let mut g = Guest::new();
    let at = g
        .call(MMAP, &[0, 4 * PAGE, RW, ANON | 0x100, 0, 0])
        .unwrap();
    assert_eq!(g.call(MPROTECT, &[at + 2 * PAGE, PAGE, 0x0100_0001]), Ok(0));
    assert_eq!(g.m.mem(&g.t).accessible(at, 1, Access::Write), 0);
    assert_eq!(g.m.mem(&g.t).accessible(at + 3 * PAGE, 1, Access::Write), 1);
}

#[test]
fn shared_memory_is_one_memory_after_duplication() {
    let mut g = Guest::new();
    let at = g.call(MMAP, &[0, 2 * PAGE, RW, 0x21, 0, 0]).unwrap();
    g.put(at + PAGE, 5);
    let again = g.call(MREMAP, &[at + PAGE, 0, PAGE, 1, 0]).unwrap();
    assert_eq!(g.get(again), Ok(5));
    g.put(again, 6);
    assert_eq!(g.get(at + PAGE), Ok(6));
    let private = g.call(MMAP, &[0, PAGE, RW, ANON, 0, 0]).unwrap();
    assert_eq!(g.call(MREMAP, &[private, 0, PAGE, 1, 0]), Err(Errno::INVAL));
}

#[test]
fn break_moves_and_stops_at_what_is_mapped() {
    let mut g = Guest::new();
    assert_eq!(g.call(BRK, &[0]), Ok(HEAP));
    assert_eq!(g.call(BRK, &[HEAP + 100]), Ok(HEAP + 100));
    g.put(HEAP + 8, 7);
    assert_eq!(g.call(BRK, &[HEAP + 3 * PAGE]), Ok(HEAP + 3 * PAGE));
    assert_eq!(g.get(HEAP + 8), Ok(7));
    let wall = HEAP + 8 * PAGE;
    g.call(MMAP, &[wall, PAGE, RW, ANON | FIXED, 0, 0]).unwrap();
    assert_eq!(g.call(BRK, &[wall + 1]), Ok(HEAP + 3 * PAGE));
    assert_eq!(g.call(BRK, &[HEAP - 1]), Ok(HEAP + 3 * PAGE));
    assert_eq!(g.call(BRK, &[u64::MAX]), Ok(HEAP + 3 * PAGE));
    assert_eq!(g.call(BRK, &[HEAP]), Ok(HEAP));
    assert_eq!(g.get(HEAP + 8), Err(Errno::FAULT));
    g.m.with(&mut g.t, |c| {
        c.with_process(|p| p.rlimits[RLIMIT_DATA].0 = PAGE);
    });
    assert_eq!(g.call(BRK, &[HEAP + PAGE + 1]), Ok(HEAP));
}

#[test]
fn remap_rules_are_linux_s() {
    let mut g = Guest::new();
    let at = g.anonymous(4);
    let mut remap =
        |old, old_len, new_len, flags, new| g.call(MREMAP, &[old, old_len, new_len, flags, new]);
    assert_eq!(remap(at, PAGE, PAGE, 8, 0), Err(Errno::INVAL));
    assert_eq!(remap(at, PAGE, PAGE, 2, 0x6000_0000), Err(Errno::INVAL));
    assert_eq!(remap(at + 1, PAGE, PAGE, 1, 0), Err(Errno::INVAL));
    assert_eq!(remap(at, PAGE, 0, 1, 0), Err(Errno::INVAL));
    assert_eq!(remap(at, 0, PAGE, 1, 0), Err(Errno::INVAL));
    assert_eq!(remap(0x6000_0000, PAGE, PAGE, 1, 0), Err(Errno::FAULT));
    assert_eq!(remap(at, 8 * PAGE, 9 * PAGE, 1, 0), Err(Errno::FAULT));
    assert_eq!(remap(at, PAGE, PAGE, 3, at + 1), Err(Errno::INVAL));
    assert_eq!(
        remap(at, 2 * PAGE, 2 * PAGE, 3, at + PAGE),
        Err(Errno::INVAL)
    );
    assert_eq!(remap(at, PAGE, PAGE, 3, 0x1000), Err(Errno::PERM));
    assert_eq!(remap(at, PAGE, 2 * PAGE, 5, 0), Err(Errno::INVAL));
    // The neighbour is in the way.
    assert_eq!(remap(at, PAGE, 2 * PAGE, 0, 0), Err(Errno::NOMEM));
    assert_eq!(remap(at, u64::MAX, PAGE, 1, 0), Err(Errno::INVAL));
}

#[test]
fn remapped_pages_keep_their_content() {
    let mut g = Guest::new();
    let at = g.anonymous(4);
    g.put(at, 11);
    // Above it is nothing: in place after shrinking, elsewhere with a wall behind it.
    assert_eq!(g.call(MREMAP, &[at, 4 * PAGE, 2 * PAGE, 0, 0]), Ok(at));
    assert_eq!(g.get(at + 2 * PAGE), Err(Errno::FAULT));
    assert_eq!(g.call(MREMAP, &[at, 2 * PAGE, 4 * PAGE, 0, 0]), Ok(at));
    g.call(MMAP, &[at + 4 * PAGE, PAGE, RW, ANON | FIXED, 0, 0])
        .unwrap();
    assert_eq!(
        g.call(MREMAP, &[at, 4 * PAGE, 5 * PAGE, 0, 0]),
        Err(Errno::NOMEM)
    );
    let moved = g.call(MREMAP, &[at, 4 * PAGE, 5 * PAGE, 1, 0]).unwrap();
    assert!(moved + 5 * PAGE <= TOP);
    assert_eq!(g.get(moved), Ok(11));
    assert_eq!(g.get(at), Err(Errno::FAULT));
    let fixed = 0x6000_0000;
    assert_eq!(
        g.call(MREMAP, &[moved, 5 * PAGE, 2 * PAGE, 3, fixed]),
        Ok(fixed)
    );
    assert_eq!(g.get(fixed), Ok(11));
    assert_eq!(g.get(moved), Err(Errno::FAULT));
}

#[test]
fn remap_that_keeps_the_old_range_empties_it() {
    let mut g = Guest::new();
    let at = g.anonymous(2);
    g.put(at, 5);
    let moved = g.call(MREMAP, &[at, 2 * PAGE, 2 * PAGE, 5, 0]).unwrap();
    assert_ne!(moved, at);
    assert_eq!(g.get(moved), Ok(5));
    assert_eq!(g.get(at), Ok(0));
}

#[test]
fn advice_drops_content_and_knows_its_numbers() {
    let mut g = Guest::new();
    let at = g.anonymous(2);
    g.put(at, 5);
    for harmless in [
        0, 1, 2, 3, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
    ] {
        assert_eq!(
            g.call(MADVISE, &[at, 2 * PAGE, harmless]),
            Ok(0),
            "{harmless}"
        );
        assert_eq!(g.get(at), Ok(5), "{harmless}");
    }
    assert_eq!(g.call(MADVISE, &[at, PAGE, 4]), Ok(0));
    assert_eq!(g.get(at), Ok(0));
    assert_eq!(g.call(MADVISE, &[at, PAGE, 77]), Err(Errno::INVAL));
    assert_eq!(g.call(MADVISE, &[at + 1, PAGE, 4]), Err(Errno::INVAL));
    assert_eq!(g.call(MADVISE, &[at, u64::MAX, 4]), Err(Errno::INVAL));
    assert_eq!(g.call(MADVISE, &[at, 0, 4]), Ok(0));
    g.put(at + PAGE, 6);
    // The mapped part is advised all the same.
    assert_eq!(g.call(MADVISE, &[at, 3 * PAGE, 4]), Err(Errno::NOMEM));
    assert_eq!(g.get(at + PAGE), Ok(0));
}

#[test]
fn residency_is_reported_page_by_page() {
    let mut g = Guest::new();
    let at = g.anonymous(3);
    g.put(at + PAGE, 1);
    assert_eq!(g.call(MINCORE, &[at, 3 * PAGE, DATA]), Ok(0));
    let mut vec = [9; 4];
    g.m.mem(&g.t).read(DATA, &mut vec).unwrap();
    assert_eq!(vec[..3], [0, 1, 0]);
    assert_eq!(g.call(MINCORE, &[at, 4 * PAGE, DATA]), Err(Errno::NOMEM));
    assert_eq!(g.call(MINCORE, &[at + 1, PAGE, DATA]), Err(Errno::INVAL));
    assert_eq!(g.call(MINCORE, &[at, PAGE, 0x6000_0000]), Err(Errno::FAULT));
    assert_eq!(g.call(MSYNC, &[at, 3 * PAGE, 4]), Ok(0));
    assert_eq!(g.call(MSYNC, &[at, 4 * PAGE, 4]), Err(Errno::NOMEM));
    assert_eq!(g.call(MSYNC, &[at, PAGE, 5]), Err(Errno::INVAL));
}

#[test]
fn limits_are_kept() {
    let mut g = Guest::new();
    let at = g.anonymous(4);
    g.m.with(&mut g.t, |c| {
        c.with_process(|p| {
            p.cred.uid = [1000; 3];
            p.rlimits[RLIMIT_MEMLOCK].0 = 2 * PAGE;
            p.rlimits[RLIMIT_AS].0 = 100 * PAGE;
        });
    });
    assert_eq!(g.call(MLOCK, &[at + 100, PAGE]), Ok(0));
    assert_eq!(g.call(MLOCK, &[at, 3 * PAGE]), Err(Errno::NOMEM));
    assert_eq!(g.call(MLOCKALL, &[1]), Err(Errno::NOMEM));
    assert_eq!(g.call(MLOCKALL, &[2]), Ok(0));
    assert_eq!(g.call(MLOCKALL, &[4]), Err(Errno::INVAL));
    // 64 pages of the test program, 4 here.
    assert_eq!(
        g.call(MMAP, &[0, 33 * PAGE, RW, ANON, 0, 0]),
        Err(Errno::NOMEM)
    );
    assert!(g.call(MMAP, &[0, 32 * PAGE, RW, ANON, 0, 0]).is_ok());
    assert_eq!(g.call(BRK, &[HEAP + PAGE]), Ok(HEAP));
    // What is replaced does not count.
    assert_eq!(
        g.call(MMAP, &[at, 4 * PAGE, RW, ANON | FIXED, 0, 0]),
        Ok(at)
    );
}
