//! What a kernel is told at its start: memory map, command line, initrd, where the ACPI tables are.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::image::{Entry, Image, Initrd};
use super::layout::{self, Kind};
use super::memory::Memory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "A boot loader without a number of its own".
const LOADER: u8 = 0xff;

/// Everything the kernel is told.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// The loaded kernel.
    pub image: &'a Image,
    /// Its initrd.
    pub initrd: Option<Initrd>,
    /// Its command line.
    pub command_line: &'a [u8],
    /// RAM in bytes.
    pub memory_bytes: u64,
}

/// Writes `bytes` at `at`.
///
/// # Errors
/// That is not memory.
pub fn write(memory: &Memory, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Write { at, source })
}

impl Params<'_> {
    /// Writes it where the kernel will look.
    ///
    /// # Errors
    /// The command line is too long, or there is no memory where it should be.
    pub fn write(&self, memory: &Memory) -> Result<(), BootError> {
        let line = self.command_line;
        if line.len() > self.image.command_line {
            return Err(BootError::CommandLine {
                has: line.len(),
                most: self.image.command_line,
            });
        }
        write(memory, layout::COMMAND_LINE, &[line, b"\0"].concat())?;
        match self.image.entry {
            Entry::Linux64(_) => self.write_zero_page(memory),
            Entry::Pvh(_) => self.write_start_info(memory),
        }
    }

    fn write_zero_page(&self, memory: &Memory) -> Result<(), BootError> {
        let mut page = boot_params {
            hdr: self.image.header.unwrap_or(setup_header {
                boot_flag: 0xaa55,
                header: 0x5372_6448,
                version: 0x020f,
                kernel_alignment: 0x100_0000,
                ..Default::default()
            }),
            acpi_rsdp_addr: layout::ACPI,
            ..Default::default()
        };
        page.hdr.type_of_loader = LOADER;
        page.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
        page.hdr.cmdline_size = u32::try_from(self.command_line.len()).expect("checked");
        if let Some(initrd) = self.initrd {
            page.hdr.ramdisk_image = low(initrd.start);
            page.hdr.ramdisk_size = low(initrd.bytes);
        }
        let map = layout::memory_map(self.memory_bytes);
        for (entry, range) in page.e820_table.iter_mut().zip(&map) {
            *entry = boot_e820_entry {
                addr: range.start,
                size: range.bytes,
                r#type: match range.kind {
                    Kind::Ram => E820_RAM,
                    Kind::Reserved => E820_RESERVED,
                },
            };
        }
        page.e820_entries = u8::try_from(map.len()).expect("few ranges");
        let params = BootParams::new(&page, GuestAddress(layout::ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, &**memory)
            .map_err(|_| self.no_room(layout::ZERO_PAGE))
    }

    fn write_start_info(&self, memory: &Memory) -> Result<(), BootError> {
        let map: Vec<_> = layout::memory_map(self.memory_bytes)
            .iter()
            .map(|range| hvm_memmap_table_entry {
                addr: range.start,
                size: range.bytes,
                type_: match range.kind {
                    Kind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
                    Kind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
                },
                reserved: 0,
            })
            .collect();
        let modules: Vec<_> = self
            .initrd
            .iter()
            .map(|initrd| hvm_modlist_entry {
                paddr: initrd.start,
                size: initrd.bytes,
                ..Default::default()
            })
            .collect();
        let info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            cmdline_paddr: layout::COMMAND_LINE,
            rsdp_paddr: layout::ACPI,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: u32::try_from(map.len()).expect("few ranges"),
            nr_modules: u32::try_from(modules.len()).expect("one at most"),
            modlist_paddr: if modules.is_empty() {
                0
            } else {
                layout::PVH_MODULES
            },
            ..Default::default()
        };
        let mut params = BootParams::new(&info, GuestAddress(layout::PVH_INFO));
        params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
        if !modules.is_empty() {
            params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
        }
        PvhBootConfigurator::write_bootparams(&params, &**memory)
            .map_err(|_| self.no_room(layout::PVH_INFO))
    }

    fn no_room(&self, at: u64) -> BootError {
        BootError::Write {
            at,
            source: vm_memory::GuestMemoryError::InvalidGuestAddress(GuestAddress(at)),
        }
    }
}

/// An address or length below 4 GiB, where all of this is.
fn low(value: u64) -> u32 {
    u32::try_from(value).expect("below 4 GiB")
}
