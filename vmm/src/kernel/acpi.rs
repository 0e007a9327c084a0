//! The ACPI tables: how a stock kernel finds its processors, its devices and its way off.
//!
//! The platform is "hardware-reduced" (ACPI 6.5, 4.1): no fixed registers, no legacy hardware to
//! probe for. Devices that no bus enumerates are in the DSDT, the virtio ones as `LNRO0005`.

use acpi_tables::aml::{
    AmlString, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, PackageBuilder, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout;
use crate::devices::{power, serial};

const OEM: [u8; 6] = *b"VMM   ";
const OEM_TABLE: [u8; 8] = *b"VMMBOOT ";
const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags: no VGA, no MSI, no PCIe ASPM, no CMOS clock; and, by not setting
/// bits 0 and 1, no legacy devices and no keyboard controller.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;

/// A virtio device's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioPlace {
    /// Its registers.
    pub base: u32,
    /// Their length.
    pub bytes: u32,
    /// Its interrupt.
    pub gsi: u32,
}

/// All tables, as they are to lie at [`layout::ACPI`]; the RSDP is the first.
///
/// # Panics
/// If they do not fit: there are at most 255 processors and 19 virtio devices, and that fits.
#[must_use]
pub fn tables(cpus: u8, virtio: &[VirtioPlace]) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len()];
    let mut place = |table: &[u8]| {
        all.resize(all.len().next_multiple_of(16), 0);
        let at = layout::ACPI + all.len() as u64;
        all.extend_from_slice(table);
        at
    };
    let dsdt = place(&dsdt(virtio));
    let fadt = place(&bytes(&fadt(dsdt)));
    let madt = place(&bytes(&madt(cpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt));
    all[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM, xsdt)));
    assert!(all.len() as u64 <= layout::ACPI_END - layout::ACPI);
    all
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    struct Sink(Vec<u8>);
    impl AmlSink for Sink {
        fn byte(&mut self, byte: u8) {
            self.0.push(byte);
        }
    }
    let mut sink = Sink(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

fn port(address: u16) -> GAS {
    let width = AccessSize::ByteAccess;
    GAS::new(AddressSpace::SystemIo, 8, 0, width, u64::from(address))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed-feature buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_CONTROL + 1);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(virtio: &[VirtioPlace]) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&bytes(&com1_and_panic()));
    for (index, place) in virtio.iter().enumerate() {
        table.append_slice(&virtio_device(index, *place));
    }
    let mut off = PackageBuilder::new();
    for value in [power::SLEEP_TYPE_OFF, 0, 0, 0] {
        off.add_element(&value);
    }
    table.append_slice(&bytes(&Name::new(Path::new("_S5_"), &off)));
    table.as_slice().to_vec()
}

/// A scope's bytes, as an object that can be written again.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn com1_and_panic() -> Raw {
    let count = serial::PORTS.to_le_bytes()[0];
    let com1 = bytes(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, serial::IRQ),
                    &IO::new(serial::COM1, serial::COM1, 1, count),
                ]),
            ),
        ],
    ));
    let panic = bytes(&Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &AmlString::from("QEMU0001".to_owned())),
            &Name::new(Path::new("_STA"), &0xf_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(power::PANIC, power::PANIC, 1, 1)]),
            ),
        ],
    ));
    let both = Raw([com1, panic].concat());
    Raw(bytes(&Scope::new(Path::new("_SB_"), vec![&both])))
}

fn virtio_device(index: usize, place: VirtioPlace) -> Vec<u8> {
    let number = u8::try_from(index).expect("few devices");
    let device = bytes(&Device::new(
        Path::new(&format!("VR{number:02X}")),
        vec![
            &Name::new(Path::new("_HID"), &AmlString::from("LNRO0005".to_owned())),
            &Name::new(Path::new("_UID"), &number),
            // DMA is coherent.
            &Name::new(Path::new("_CCA"), &acpi_tables::aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, place.base, place.bytes),
                    &Interrupt::new(true, true, false, false, place.gsi),
                ]),
            ),
        ],
    ));
    let raw = Raw(device);
    bytes(&Scope::new(Path::new("_SB_"), vec![&raw]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
        bytes[offset..offset + N].try_into().unwrap()
    }

    /// The table at a guest-physical address.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - layout::ACPI).unwrap();
        let length = u32::from_le_bytes(at(all, start + 4)) as usize;
        &all[start..start + length]
    }

    #[test]
    fn every_table_is_found_and_its_checksum_is_right() {
        let place = VirtioPlace {
            base: 0xd000_0000,
            bytes: 0x1000,
            gsi: 5,
        };
        let all = tables(255, &[place; 19]);
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let xsdt = table(&all, u64::from_le_bytes(at(&all, 24)));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(&all, u64::from_le_bytes(at(xsdt, 36)));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table(&all, u64::from_le_bytes(at(xsdt, 44)));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + 255 * 8 + 12);
        let dsdt = table(&all, u64::from_le_bytes(at(fadt, 140)));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let found = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
        assert_eq!(found, 19);
    }
}
