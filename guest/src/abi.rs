//! The layout shared by the monitor, the guest and the VMM: addresses, ports, selectors.
//!
//! Everything of the VMM's in an address space is under one top-level entry, slot 255: the upper
//! half is not usable on a software KVM that lends the guest only part of it.

/// First address a guest may not map: top-level slot 255, the supervisor's.
pub const USER_END: u64 = 0x7f80_0000_0000;

/// The monitor's code: [`crate::monitor::image`]. Supervisor, executable, read-only.
pub const MONITOR_CODE_VA: u64 = USER_END;
/// The interrupt descriptor table. Supervisor, read-only.
pub const IDT_VA: u64 = MONITOR_CODE_VA + 0x1000;
/// The global descriptor table (one page, all virtual CPUs' TSS descriptors in it). Supervisor.
pub const GDT_VA: u64 = MONITOR_CODE_VA + 0x2000;
/// The page LSTAR points to. Supervisor where SYSCALL enters ring 0; where it stays in ring 3, a
/// user page.
pub const SYSCALL_STUB_VA: u64 = MONITOR_CODE_VA + 0x10_0000;
/// The vDSO's ELF image: user, read-only, executable; [`VDSO_CODE_PAGES`] pages.
pub const VDSO_CODE_VA: u64 = MONITOR_CODE_VA + 0x20_0000;
/// Pages of the vDSO's image.
pub const VDSO_CODE_PAGES: u64 = 4;
/// The vDSO's data page: user, read-only.
pub const VDSO_DATA_VA: u64 = MONITOR_CODE_VA + 0x21_0000;
/// The pool of what the VMM and the monitor share: its page N is at `POOL_VA + N * 4096`, in frame
/// [`frame::POOL`] + N, if it is mapped at all. Supervisor, writable. The virtual CPUs' areas are in it.
pub const POOL_VA: u64 = MONITOR_CODE_VA + 0x100_0000;
/// The table zone, mapped in one piece for the monitor's touches: the table with guest-physical
/// address A is at `TABLES_VA + A`. Supervisor, writable.
pub const TABLES_VA: u64 = MONITOR_CODE_VA + 0x10_0000_0000;

/// Pages of one virtual CPU's area: stack, which begins with what is to be touched, and TSS with I/O bitmap and an XSAVE area
/// behind it. A stack that is too deep leaves the area.
pub const CPU_AREA_PAGES: u64 = 2;
/// Virtual CPUs there is room for.
pub const MAX_CPUS: u64 = 128;

/// Offset of the end of the stack in a virtual CPU's area (it grows down from here).
pub const AREA_STACK_TOP: u64 = 0x1000;
/// Offset of the TSS.
pub const AREA_TSS: u64 = 0x1000;
/// Offset of the XSAVE area that the monitor loads (aligned as XRSTOR wants it: Intel SDM volume 1, section 13.8).
pub const AREA_XSAVE: u64 = 0x1400;
/// Bytes there are for it: x87, SSE, AVX and AVX-512 in the standard format take 2,688.
pub const AREA_XSAVE_BYTES: u64 = CPU_AREA_PAGES * 4096 - AREA_XSAVE;
/// Added to an address that is to be touched: the whole table's shadow is to be dropped, not one entry's.
pub const TOUCH_TABLE: u64 = 1;

/// Frames of the monitor zone, by guest-physical frame number (frame 0 stays unused).
pub mod frame {
    /// Monitor code.
    pub const MONITOR_CODE: u64 = 1;
    /// IDT.
    pub const IDT: u64 = 2;
    /// GDT.
    pub const GDT: u64 = 3;
    /// SYSCALL stub.
    pub const SYSCALL_STUB: u64 = 4;
    /// vDSO data page.
    pub const VDSO_DATA: u64 = 5;
    /// First frame of the vDSO's image.
    pub const VDSO_CODE: u64 = 8;
    /// First frame of the pool.
    pub const POOL: u64 = 16;
    /// Frames in the monitor zone: 2 MiB, so that the table zone after it is aligned to large pages.
    pub const ZONE: u64 = 512;
}

/// Port a system call exits through; the only one the TSS ever opens to ring 3, and only on hosts
/// where SYSCALL stays there.
pub const PORT_SYSCALL: u16 = 0x10;
/// Port an exception's entry stub exits through. RIP tells the vector.
pub const PORT_EXCEPTION: u16 = 0x11;
/// Port of a monitor routine that has finished and returns to the VMM.
pub const PORT_DONE: u16 = 0x12;

/// Selectors, with the values Linux has, since a signal frame shows them.
pub mod selector {
    /// Ring-0 code.
    pub const KERNEL_CS: u16 = 0x10;
    /// Ring-0 data.
    pub const KERNEL_DS: u16 = 0x18;
    /// Ring-3 data and stack.
    pub const USER_DS: u16 = 0x2b;
    /// Ring-3 64-bit code.
    pub const USER_CS: u16 = 0x33;
    /// TSS of virtual CPU 0; 16 bytes each.
    pub const TSS: u16 = 0x40;
}

/// Pages of the pool.
pub const POOL_PAGES: u64 = frame::ZONE - frame::POOL;

/// The address of a page of the pool.
#[must_use]
pub const fn pool_page(page: u64) -> u64 {
    POOL_VA + page * 4096
}

const _: () = assert!(MAX_CPUS * CPU_AREA_PAGES <= POOL_PAGES);
const _: () = assert!(AREA_XSAVE.is_multiple_of(64) && AREA_XSAVE_BYTES >= 2688);
