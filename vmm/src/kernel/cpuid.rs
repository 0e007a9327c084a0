//! The processor a kernel guest sees: a table of CPUID bits, not whatever the host has.
//!
//! For each leaf the table says which bits of what KVM supports a guest may see; a leaf that is not
//! in the table does not exist for it. So a new host processor or kernel changes nothing until
//! somebody has looked at the new bit and added it. `docs/boot.md` tells why the rest is left out.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The bits of one register.
const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

const ALL: u32 = u32::MAX;

/// Which bits of EAX, EBX, ECX and EDX of a leaf are the guest's to see.
struct Row {
    leaf: u32,
    /// None: every subleaf.
    subleaf: Option<u32>,
    masks: [u32; 4],
}

const fn row(leaf: u32, subleaf: Option<u32>, masks: [u32; 4]) -> Row {
    Row {
        leaf,
        subleaf,
        masks,
    }
}

/// x87, SSE, AVX, AVX-512, PKU: what XCR0 may hold. Not MPX, not AMX.
const XCR0: u32 = bits(&[0, 1, 2, 5, 6, 7, 9]);

const TABLE: &[Row] = &[
    // Vendor.
    row(0, None, [ALL; 4]),
    // Family, model; SSE3 to RDRAND without DTES64, MONITOR, VMX, SMX, EIST, PDCM, DCA; FPU to SSE2
    // without machine checks, processor serial number, debug store, thermal monitor.
    row(
        1,
        None,
        [
            ALL,
            0xff00, // CLFLUSH line
            bits(&[0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 25, 26, 28, 29, 30]),
            bits(&[
                0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26, 27,
            ]),
        ],
    ),
    // Caches; who shares them is set below.
    row(4, None, [0x3fff, ALL, ALL, ALL]),
    // The local APIC's timer does not stop.
    row(6, None, [bits(&[2]), 0, 0, 0]),
    // FSGSBASE to AVX-512; UMIP, PKU, RDPID...; FSRM, MD_CLEAR, speculation control.
    row(
        7,
        Some(0),
        [
            ALL,
            bits(&[
                0, 1, 3, 5, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31,
            ]),
            bits(&[1, 2, 3, 6, 8, 9, 10, 11, 12, 14, 22]),
            bits(&[4, 10, 26, 27, 29, 31]),
        ],
    ),
    row(7, Some(1), [bits(&[4, 5, 10, 11, 12]), 0, 0, 0]),
    // XSAVE; its sizes are computed below.
    row(0xd, Some(0), [XCR0, 0, 0, 0]),
    row(0xd, Some(1), [bits(&[0, 1, 2, 3]), 0, 0, 0]),
    row(0xd, Some(2), [ALL; 4]),
    row(0xd, Some(5), [ALL; 4]),
    row(0xd, Some(6), [ALL; 4]),
    row(0xd, Some(7), [ALL; 4]),
    row(0xd, Some(9), [ALL; 4]),
    // KVM: clock, I/O without delays, end of interrupt, wake-up, remote flush (needs the steal clock),
    // interprocessor interrupts, yield, a clock that is stable. No asynchronous page faults.
    row(0x4000_0000, None, [ALL; 4]),
    row(
        0x4000_0001,
        None,
        [bits(&[1, 3, 5, 6, 7, 9, 11, 13, 24]), 0, 0, 0],
    ),
    row(0x8000_0000, None, [ALL; 4]),
    // LAHF, LZCNT, SSE4A, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, 64-bit mode. Not SVM.
    row(
        0x8000_0001,
        None,
        [
            ALL,
            0,
            bits(&[0, 4, 5, 6, 7, 8]),
            bits(&[
                0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29,
            ]),
        ],
    ),
    // Name.
    row(0x8000_0002, None, [ALL; 4]),
    row(0x8000_0003, None, [ALL; 4]),
    row(0x8000_0004, None, [ALL; 4]),
    // Caches, as AMD tells them.
    row(0x8000_0005, None, [ALL; 4]),
    row(0x8000_0006, None, [ALL; 4]),
    // The time stamp counter's rate is constant.
    row(0x8000_0007, None, [0, 0, 0, bits(&[8])]),
    // Address widths; CLZERO, WBNOINVD, speculation control.
    row(
        0x8000_0008,
        None,
        [ALL, bits(&[0, 2, 9, 12, 14, 15, 17, 18, 24, 26]), 0, 0],
    ),
    // LFENCE waits, null selectors clear their base.
    row(0x8000_0021, None, [bits(&[2, 6]), 0, 0, 0]),
];

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;

/// What the table is applied for.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Processors: one package, one thread a core.
    pub cpus: u8,
    /// The local APIC's timer has a TSC deadline mode.
    pub tsc_deadline: bool,
}

impl Shape {
    /// Bits of an APIC id.
    fn id_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// The leaves that processor `id` shows, from those KVM supports.
#[must_use]
pub fn leaves(supported: &CpuId, shape: Shape, id: u8) -> Vec<kvm_cpuid_entry2> {
    let mut kept: Vec<kvm_cpuid_entry2> = supported.as_slice().iter().filter_map(masked).collect();
    for entry in &mut kept {
        fill_in(entry, shape, id);
    }
    set_xsave_size(&mut kept);
    kept.extend(topology(shape, id));
    for base in [0, 0x4000_0000, 0x8000_0000] {
        let highest = kept.iter().map(|e| e.function);
        let highest = highest.filter(|f| f & 0xf000_0000 == base).max();
        if let Some(entry) = kept.iter_mut().find(|e| e.function == base) {
            entry.eax = highest.unwrap_or(base);
        }
    }
    kept.sort_by_key(|e| (e.function, e.index));
    kept
}

fn masked(entry: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let row = TABLE.iter().find(|row| {
        row.leaf == entry.function && row.subleaf.is_none_or(|subleaf| subleaf == entry.index)
    })?;
    let mut entry = *entry;
    entry.eax &= row.masks[0];
    entry.ebx &= row.masks[1];
    entry.ecx &= row.masks[2];
    entry.edx &= row.masks[3];
    Some(entry)
}

/// What is not a matter of what the host has.
fn fill_in(entry: &mut kvm_cpuid_entry2, shape: Shape, id: u8) {
    let cpus = u32::from(shape.cpus);
    let last = (1 << shape.id_bits()) - 1;
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx |= cpus << 16 | u32::from(id) << 24;
            entry.ecx |= HYPERVISOR;
            if shape.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            if cpus > 1 {
                entry.edx |= HYPER_THREADING;
            }
        }
        (4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { last } else { 0 };
            entry.eax |= sharing << 14 | last.min(0x3f) << 26;
        }
        (6, _) => entry.eax = 1 << 2,
        // The highest subleaf.
        (7, 0) => entry.eax = entry.eax.min(1),
        (0x8000_0008, _) => entry.ecx = shape.id_bits() << 12 | (cpus - 1),
        _ => {}
    }
}

/// Leaf 0xB: threads of a core (one), cores of the package.
fn topology(shape: Shape, id: u8) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, 0, 1, THREAD),
        level(1, shape.id_bits(), u32::from(shape.cpus), CORE),
        level(2, 0, 0, 0),
    ]
}

/// Leaf 0xD, subleaf 0: the size of the area for all the state components that were kept.
fn set_xsave_size(kept: &mut [kvm_cpuid_entry2]) {
    /// The legacy area and the header.
    const LEAST: u32 = 576;
    let of_component = |e: &&kvm_cpuid_entry2| e.function == 0xd && e.index >= 2;
    let parts = kept.iter().filter(of_component);
    let end = parts.map(|e| e.ebx.saturating_add(e.eax)).max();
    let size = end.unwrap_or(LEAST).max(LEAST);
    if let Some(first) = kept.iter_mut().find(|e| e.function == 0xd && e.index == 0) {
        // EBX, the size for what XCR0 holds now, is KVM's to keep.
        first.ebx = LEAST;
        first.ecx = size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let mut list: Vec<kvm_cpuid_entry2> = Vec::new();
        for function in (0..0x24)
            .chain(0x4000_0000..0x4000_0002)
            .chain(0x8000_0000..0x8000_0022)
        {
            for index in 0..if matches!(function, 4 | 7 | 0xb | 0xd) {
                20
            } else {
                1
            } {
                let [eax, ebx, ecx, edx] = [ALL; 4];
                let flags = 0;
                list.push(kvm_cpuid_entry2 {
                    function,
                    index,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
        list.truncate(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        CpuId::from_entries(&list).unwrap()
    }

    fn seen(leaf: u32, subleaf: u32, cpus: u8, id: u8) -> Option<kvm_cpuid_entry2> {
        let shape = Shape {
            cpus,
            tsc_deadline: true,
        };
        let all = leaves(&host(), shape, id);
        all.into_iter()
            .find(|e| e.function == leaf && e.index == subleaf)
    }

    #[test]
    fn host_with_every_bit_shows_only_those_of_the_table() {
        let one = seen(1, 0, 1, 0).unwrap();
        // VMX, MONITOR; machine checks.
        assert_eq!(one.ecx & bits(&[3, 5]), 0);
        assert_eq!(one.edx & bits(&[7, 14, 18, 22, 28]), 0);
        // AMX, five-level paging; SVM.
        assert_eq!(seen(7, 0, 1, 0).unwrap().edx & bits(&[22, 24, 25]), 0);
        assert_eq!(seen(7, 0, 1, 0).unwrap().ecx & bits(&[16]), 0);
        assert_eq!(seen(0x8000_0001, 0, 1, 0).unwrap().ecx & bits(&[2, 22]), 0);
        for leaf in [2, 5, 0xa, 0x14, 0x15, 0x1d, 0x1f, 0x8000_000a, 0x8000_001d] {
            assert_eq!(seen(leaf, 0, 1, 0), None, "leaf {leaf:#x}");
        }
        assert_eq!(seen(0xd, 17, 1, 0), None);
        assert_eq!(seen(0, 0, 1, 0).unwrap().eax, 0xd);
        assert_eq!(seen(0x8000_0000, 0, 1, 0).unwrap().eax, 0x8000_0021);
    }

    #[test]
    fn every_processor_tells_its_own_id() {
        for id in 0..3 {
            let one = seen(1, 0, 3, id).unwrap();
            assert_eq!(one.ebx >> 24, u32::from(id));
            assert_eq!(one.ebx >> 16 & 0xff, 3);
            assert_ne!(one.edx & HYPER_THREADING, 0);
            let cores = seen(0xb, 1, 3, id).unwrap();
            assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, u32::from(id)));
        }
        assert_eq!(seen(0x8000_0008, 0, 3, 0).unwrap().ecx, 2 << 12 | 2);
    }
}
