//! Where things are in a kernel guest's physical memory.
//!
//! ```text
//! 0            0x500..  GDT, PVH start info, zero page, first page tables, command line
//! 0x9_fc00     end of conventional memory; nothing from here to 1 MiB is for programs
//! 0xe_0000     ACPI tables; in the last 16 bytes below 1 MiB, the reset vector
//! 0x10_0000    RAM: the kernel, the initrd at the end
//! 0xc000_0000  (or the end of RAM, if lower) hole: devices, interrupt controllers
//! 0x1_0000_0000 the rest of RAM
//! ```

/// The first GDT, of four entries.
pub const GDT: u64 = 0x500;
/// PVH: `struct hvm_start_info`.
pub const PVH_INFO: u64 = 0x6000;
/// PVH: the list of modules, of one entry.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// The zero page (`struct boot_params`), a page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The first stack's end.
pub const STACK_TOP: u64 = 0x8ff0;
/// The first page tables: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of a command line, its final zero included.
pub const COMMAND_LINE_BYTES: usize = 0x1_0000;
/// End of conventional memory.
pub const LOW_END: u64 = 0x9_fc00;
/// The ACPI tables, the RSDP first, where a kernel also looks by itself.
pub const ACPI: u64 = 0xe_0000;
/// Their end.
pub const ACPI_END: u64 = 0xf_0000;
/// F000:FFF0, where a processor starts after a reset.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The first address of a kernel.
pub const HIGH_START: u64 = 0x10_0000;
/// Where RAM below 4 GiB ends at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The first virtio device's registers.
pub const VIRTIO: u64 = 0xd000_0000;
/// Distance to the next one's.
pub const VIRTIO_STEP: u64 = 0x1000;
/// The first virtio device's interrupt.
pub const VIRTIO_IRQ: u32 = 5;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Its inputs.
pub const IO_APIC_INPUTS: u32 = 24;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// What a range of the memory map is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest's to use.
    Ram,
    /// Not to be used.
    Reserved,
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// What it is for.
    pub kind: Kind,
}

/// RAM of a machine with `memory` bytes: below the hole and above it.
#[must_use]
pub fn ram(memory: u64) -> Vec<(u64, u64)> {
    let mut parts = vec![(0, memory.min(HOLE_START))];
    if memory > HOLE_START {
        parts.push((HOLE_END, memory - HOLE_START));
    }
    parts
}

/// The memory map of a machine with `memory` bytes, which are more than 1 MiB.
#[must_use]
pub fn memory_map(memory: u64) -> Vec<Range> {
    let range = |start, end, kind| Range {
        start,
        bytes: end - start,
        kind,
    };
    let mut map = vec![
        range(0, LOW_END, Kind::Ram),
        range(LOW_END, 0xa_0000, Kind::Reserved),
        range(ACPI, HIGH_START, Kind::Reserved),
    ];
    for (start, bytes) in ram(memory) {
        map.push(range(start.max(HIGH_START), start + bytes, Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_has_a_hole_below_four_gib_and_no_overlaps() {
        for memory in [8 << 20, 3 << 30, (3 << 30) + 4096, 16 << 30] {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{map:x?}");
            }
            let ram: u64 = map
                .iter()
                .filter(|r| r.kind == Kind::Ram)
                .map(|r| r.bytes)
                .sum();
            assert_eq!(ram, memory - (HIGH_START - LOW_END));
            assert!(
                map.iter()
                    .all(|r| r.start + r.bytes <= HOLE_START || r.start >= HOLE_END)
            );
        }
    }
}
