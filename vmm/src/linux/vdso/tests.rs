#![expect(
    unsafe_code,
    reason = "runs the guest's code natively: maps it, and calls into it"
)]

use std::collections::BTreeMap;
use std::ffi::CString;

use object::LittleEndian as LE;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Object, ObjectSymbol};
use zerocopy::IntoBytes;

use super::{ClockParams, CpuSource, VdsoData, data, image};

const NAMES: [&str; 10] = [
    "__vdso_clock_gettime",
    "__vdso_gettimeofday",
    "__vdso_time",
    "__vdso_getcpu",
    "__vdso_clock_getres",
    "clock_gettime",
    "gettimeofday",
    "time",
    "getcpu",
    "clock_getres",
];

/// What a loader sees: dynamic entries by tag, read from the segment.
fn dynamic() -> BTreeMap<i64, u64> {
    let header = FileHeader64::<LE>::parse(image()).unwrap();
    let segments = header.program_headers(LE, image()).unwrap();
    let entries = segments
        .iter()
        .find_map(|ph| ph.dynamic(LE, image()).unwrap())
        .unwrap();
    entries
        .iter()
        .map(|d| (d.d_tag.get(LE).0, d.d_val.get(LE)))
        .collect()
}

fn half(at: u64) -> u32 {
    u32::from_le_bytes(image()[at as usize..][..4].try_into().unwrap())
}

fn word(at: u64) -> u64 {
    u64::from_le_bytes(image()[at as usize..][..8].try_into().unwrap())
}

fn string(at: u64) -> &'static str {
    let rest = &image()[at as usize..];
    std::str::from_utf8(&rest[..rest.iter().position(|&b| b == 0).unwrap()]).unwrap()
}

/// Name and value of a symbol of the dynamic table.
fn symbol(index: u32) -> (&'static str, u64) {
    let d = dynamic();
    let at = d[&elf::DT_SYMTAB.0] + u64::from(index) * 24;
    (
        string(d[&elf::DT_STRTAB.0] + u64::from(half(at))),
        word(at + 8),
    )
}

/// As a loader with the System V table only does it.
fn by_hash(name: &str) -> Option<u64> {
    let table = dynamic()[&elf::DT_HASH.0];
    let buckets = half(table);
    let bucket = elf::hash(name.as_bytes()) % buckets;
    let mut index = half(table + 8 + u64::from(bucket) * 4);
    while index != 0 {
        let (found, value) = symbol(index);
        if found == name {
            return Some(value);
        }
        index = half(table + 8 + u64::from(buckets + index) * 4);
    }
    None
}

/// As glibc does it with the GNU table.
fn by_gnu_hash(name: &str) -> Option<u64> {
    let table = dynamic()[&elf::DT_GNU_HASH.0];
    let [buckets, base, bloom, shift] = [0, 4, 8, 12].map(|at| half(table + at));
    let hash = elf::gnu_hash(name.as_bytes());
    let filter = word(table + 16 + u64::from((hash / 64) % bloom) * 8);
    if filter >> (hash % 64) & filter >> ((hash >> shift) % 64) & 1 == 0 {
        return None;
    }
    let bucket_at = table + 16 + u64::from(bloom) * 8;
    let chain_at = bucket_at + u64::from(buckets) * 4;
    let mut index = half(bucket_at + u64::from(hash % buckets) * 4);
    while index != 0 {
        let link = half(chain_at + u64::from(index - base) * 4);
        let (found, value) = symbol(index);
        if (link ^ hash) < 2 && found == name {
            return Some(value);
        }
        if link & 1 != 0 {
            break;
        }
        index += 1;
    }
    None
}

#[test]
fn image_is_a_shared_object_of_one_segment() {
    let file = object::File::parse(image()).unwrap();
    assert_eq!(file.kind(), object::ObjectKind::Dynamic);
    assert_eq!(
        file.dynamic_symbols().filter(|s| s.is_definition()).count(),
        NAMES.len()
    );
    let header = FileHeader64::<LE>::parse(image()).unwrap();
    let segments = header.program_headers(LE, image()).unwrap();
    let loads: Vec<_> = segments
        .iter()
        .filter(|ph| ph.p_type(LE) == elf::PT_LOAD)
        .collect();
    assert_eq!(loads.len(), 1);
    assert_eq!(loads[0].p_flags(LE), elf::PF_R | elf::PF_X);
    assert!(image().len() as u64 <= guest::abi::VDSO_CODE_PAGES * 4096);
}

#[test]
fn both_hash_tables_find_every_name() {
    for name in NAMES {
        let value = by_hash(name).unwrap_or_else(|| panic!("{name} by DT_HASH"));
        assert_eq!(by_gnu_hash(name), Some(value), "{name} by DT_GNU_HASH");
        // endbr64
        assert_eq!(half(value), 0xfa1e_0ff3, "{name}");
    }
    assert_eq!(by_hash("__vdso_clock_settime"), None);
    assert_eq!(by_gnu_hash("__vdso_clock_settime"), None);
}

#[test]
fn every_symbol_has_version_linux_2_6() {
    let d = dynamic();
    let mut at = d[&elf::DT_VERDEF.0];
    let mut versions = Vec::new();
    loop {
        let [index, count] = [4, 6].map(|field| half(at + field) as u16);
        assert_eq!(count, 1);
        let [hash, aux, next] = [8, 12, 16].map(|field| half(at + field));
        let name = string(d[&elf::DT_STRTAB.0] + u64::from(half(at + u64::from(aux))));
        versions.push((index, name, hash));
        if next == 0 {
            break;
        }
        at += u64::from(next);
    }
    assert_eq!(versions[0].1, "linux-vdso.so.1");
    assert_eq!(versions[1], (2, "LINUX_2.6", 61_765_110));
    for n in 1..=NAMES.len() as u64 {
        assert_eq!(half(d[&elf::DT_VERSYM.0] + n * 2) as u16, 2);
    }
}

#[test]
fn host_s_dynamic_linker_finds_every_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image()).unwrap();
    let path = CString::new(file.path().to_str().unwrap()).unwrap();
    // SAFETY: a path with its NUL; the object has no code that runs when it is loaded.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null());
    for name in NAMES {
        let c_name = CString::new(name).unwrap();
        // SAFETY: the handle is open, both strings have their NUL.
        let found = unsafe { libc::dlvsym(handle, c_name.as_ptr(), c"LINUX_2.6".as_ptr()) };
        assert!(!found.is_null(), "{name}");
        assert_eq!(found.addr() as u64 % 4096, by_hash(name).unwrap() % 4096);
    }
    // SAFETY: the handle of above, used no more.
    unsafe { libc::dlclose(handle) };
}

/// The image and its data page, mapped here at their distance.
struct Native(*mut u8);

const SPAN: usize = (guest::abi::VDSO_DATA_VA - guest::abi::VDSO_CODE_VA) as usize + 4096;

impl Native {
    fn new(data: &VdsoData) -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping; no existing memory is touched.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), SPAN, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base.cast::<u8>();
        // SAFETY: the image is shorter than the mapping, which is ours, writable, and elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(image().as_ptr(), base, image().len()) };
        // SAFETY: the mapping is SPAN bytes.
        let page = unsafe { base.add(SPAN - 4096) };
        let bytes = data.as_bytes();
        // SAFETY: the data page is inside the mapping, and longer than the bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), page, bytes.len()) };
        // SAFETY: our own pages, nobody writes to them from here on.
        let done = unsafe { libc::mprotect(base.cast(), SPAN, libc::PROT_READ | libc::PROT_EXEC) };
        assert_eq!(done, 0);
        Self(base)
    }

    fn address(&self, name: &str) -> *const u8 {
        // SAFETY: a symbol's value is an offset into the image.
        unsafe { self.0.add(by_hash(name).unwrap() as usize) }
    }

    fn clock_gettime(&self, clock: i32) -> (i32, u64) {
        type F = unsafe extern "C" fn(i32, *mut [i64; 2]) -> i32;
        // SAFETY: the address of a function with this signature.
        let f =
            unsafe { std::mem::transmute::<*const u8, F>(self.address("__vdso_clock_gettime")) };
        let mut ts = [-1; 2];
        // SAFETY: `ts` has the layout of a timespec.
        let result = unsafe { f(clock, &raw mut ts) };
        (result, (ts[0] * 1_000_000_000 + ts[1]) as u64)
    }

    fn gettimeofday(&self) -> (i32, u64) {
        type F = unsafe extern "C" fn(*mut [i64; 2], *mut [i32; 2]) -> i32;
        // SAFETY: the address of a function with this signature.
        let f = unsafe { std::mem::transmute::<*const u8, F>(self.address("__vdso_gettimeofday")) };
        let (mut tv, mut tz) = ([-1; 2], [-1; 2]);
        // SAFETY: the layouts of a timeval and a timezone.
        let result = unsafe { f(&raw mut tv, &raw mut tz) };
        assert_eq!(tz, [0, 0]);
        (result, (tv[0] * 1_000_000 + tv[1]) as u64)
    }

    fn time(&self) -> i64 {
        type F = unsafe extern "C" fn(*mut i64) -> i64;
        // SAFETY: the address of a function with this signature.
        let f = unsafe { std::mem::transmute::<*const u8, F>(self.address("__vdso_time")) };
        let mut t = -1;
        // SAFETY: `t` is a time_t.
        let result = unsafe { f(&raw mut t) };
        assert_eq!(result, t);
        result
    }

    fn getcpu(&self) -> (i32, u32, u32) {
        type F = unsafe extern "C" fn(*mut u32, *mut u32, usize) -> i32;
        // SAFETY: the address of a function with this signature.
        let f = unsafe { std::mem::transmute::<*const u8, F>(self.address("__vdso_getcpu")) };
        let (mut cpu, mut node) = (99, 99);
        // SAFETY: two unsigned ints.
        let result = unsafe { f(&raw mut cpu, &raw mut node, 0) };
        (result, cpu, node)
    }

    fn clock_getres(&self, clock: i32) -> (i32, [i64; 2]) {
        type F = unsafe extern "C" fn(i32, *mut [i64; 2]) -> i32;
        // SAFETY: the address of a function with this signature.
        let f = unsafe { std::mem::transmute::<*const u8, F>(self.address("__vdso_clock_getres")) };
        let mut ts = [-1; 2];
        // SAFETY: `ts` has the layout of a timespec.
        let result = unsafe { f(clock, &raw mut ts) };
        (result, ts)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, no pointer into it is used any more.
        unsafe { libc::munmap(self.0.cast(), SPAN) };
    }
}

fn tsc() -> u64 {
    // SAFETY: reads a counter every x86-64 has.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn host(clock: rustix::time::ClockId) -> u64 {
    let t = rustix::time::clock_gettime(clock);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Frequency of the counter, measured against the host's clock.
fn hertz() -> u64 {
    let (t0, n0) = (tsc(), host(rustix::time::ClockId::Monotonic));
    std::thread::sleep(std::time::Duration::from_millis(50));
    let (t1, n1) = (tsc(), host(rustix::time::ClockId::Monotonic));
    (u128::from(t1 - t0) * 1_000_000_000 / u128::from(n1 - n0)) as u64
}

fn calibrated() -> VdsoData {
    let hertz = hertz();
    let mono = host(rustix::time::ClockId::Monotonic);
    let base = tsc();
    let real = host(rustix::time::ClockId::Realtime)
        .wrapping_sub(mono)
        .cast_signed();
    let clock = ClockParams::new(hertz, base, mono, real).unwrap();
    // Through the writer, so that its offsets are tested too.
    let mut page = [0_u64; 512];
    data::publish(&page.as_mut_bytes().into(), Some(&clock), CpuSource::Zero);
    zerocopy::FromBytes::read_from_prefix(page.as_bytes())
        .map(|(data, _)| data)
        .unwrap()
}

#[test]
fn native_clocks_agree_with_host() {
    let data = calibrated();
    assert_eq!(data.seq, 2);
    let vdso = Native::new(&data);
    for (id, clock) in [
        (0, rustix::time::ClockId::Realtime),
        (1, rustix::time::ClockId::Monotonic),
    ] {
        let (result, ns) = vdso.clock_gettime(id);
        assert_eq!(result, 0);
        assert!(
            ns.abs_diff(host(clock)) < 5_000_000,
            "clock {id}: {ns} and {}",
            host(clock)
        );
    }
    let real = host(rustix::time::ClockId::Realtime);
    assert!(vdso.gettimeofday().1.abs_diff(real / 1000) < 5_000);
    assert!((real / 1_000_000_000).abs_diff(vdso.time() as u64) <= 1);
    assert_eq!(vdso.getcpu(), (0, 0, 0));
    assert_eq!(vdso.clock_getres(1), (0, [0, 1]));
}

#[test]
fn native_clock_never_goes_back() {
    let vdso = Native::new(&calibrated());
    let mut last = 0;
    for _ in 0..10_000 {
        let now = vdso.clock_gettime(1).1;
        assert!(now >= last);
        last = now;
    }
}

#[test]
fn arithmetic_is_the_same_as_here() {
    // A counter that counts its own ticks: the code's result bounds the counter's.
    let vdso = Native::new(&VdsoData {
        mult: 1 << 32,
        shift: 32,
        ..VdsoData::default()
    });
    let clock = ClockParams {
        mult: 1 << 32,
        shift: 32,
        tsc_base: 0,
        mono_base_ns: 0,
        real_offset_ns: 0,
    };
    let before = clock.monotonic(tsc());
    let now = vdso.clock_gettime(1).1;
    let after = clock.monotonic(tsc());
    assert!((before..=after).contains(&now));
}

#[test]
fn counter_before_base_gives_base() {
    let data = VdsoData {
        mult: 1 << 32,
        shift: 32,
        tsc_base: u64::MAX,
        mono_base_ns: 77,
        ..VdsoData::default()
    };
    assert_eq!(Native::new(&data).clock_gettime(1), (0, 77));
}

#[test]
fn mode_without_counter_makes_the_call() {
    let vdso = Native::new(&VdsoData {
        mode: 1,
        getcpu_mode: CpuSource::Call as u32,
        ..VdsoData::default()
    });
    let ns = vdso.clock_gettime(1).1;
    assert!(ns.abs_diff(host(rustix::time::ClockId::Monotonic)) < 5_000_000);
    assert!(
        vdso.gettimeofday()
            .1
            .abs_diff(host(rustix::time::ClockId::Realtime) / 1000)
            < 5_000
    );
    assert!(
        (host(rustix::time::ClockId::Realtime) / 1_000_000_000).abs_diff(vdso.time() as u64) <= 1
    );
    assert_eq!(vdso.getcpu().0, 0);
    assert_eq!(vdso.clock_getres(0).0, 0);
}

#[test]
fn other_clock_makes_the_call() {
    let vdso = Native::new(&calibrated());
    let boot = vdso.clock_gettime(7);
    assert_eq!(boot.0, 0);
    assert!(boot.1.abs_diff(host(rustix::time::ClockId::Boottime)) < 5_000_000);
    assert_eq!(vdso.clock_gettime(1000).0, -22);
}
