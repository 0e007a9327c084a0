//! A kernel guest's machine, put together: memory, kernel, board, devices, processors.
//!
//! Everything that can be refused is refused here, before the first instruction.

use std::sync::Arc;

use kvm_bindings::CpuId;

use super::config::BootConfig;
use super::console::Console;
use super::cpuid::{self, Shape};
use super::end::{End, Ending};
use super::image;
use super::memory::{self, Memory};
use super::output::{Output, Writer};
use super::params::{self, Params};
use super::virtio::VirtioDevices;
use super::{BootError, layout, start};
use super::{acpi, firmware};
use crate::devices::Devices;
use crate::devices::power::{Power, PowerEvent};
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::rng::Rng;
use crate::hv::kvm::board_cpu::BoardCpu;
use crate::hv::kvm::vm::{self, Vm};

/// MSRs every processor starts with, besides what KVM gives after a reset.
const MSRS: [(u32, u64); 2] = [
    // IA32_MTRR_DEF_TYPE: on, write-back, no ranges.
    (0x2ff, 1 << 11 | 6),
    // IA32_MISC_ENABLE: fast strings.
    (0x1a0, 1),
];

/// A machine that is ready to run.
#[derive(Debug)]
pub struct Machine {
    /// The virtual machine.
    pub vm: Arc<Vm>,
    /// Its memory.
    pub memory: Memory,
    /// Its processors; the first starts, the others wait for it.
    pub cpus: Vec<BoardCpu>,
    /// Its devices.
    pub devices: Arc<Devices>,
    /// The serial port.
    pub serial: Arc<Serial>,
    /// The console.
    pub console: Console,
    /// What the guest writes there.
    pub output: Arc<Output>,
    /// Where its end is told.
    pub ending: Arc<Ending>,
    /// Its virtio devices.
    pub virtio: VirtioDevices,
}

impl Machine {
    /// Puts it together.
    ///
    /// # Errors
    /// A file is missing or wrong, something does not fit, or KVM refused.
    pub fn new(config: &BootConfig) -> Result<Self, BootError> {
        let memory = memory::create(config.memory)?;
        let image = image::load(&config.kernel, &memory, config.memory)?;
        let initrd = match &config.initrd {
            None => None,
            Some(path) => Some(image::load_initrd(path, &image, &memory, config.memory)?),
        };
        let params = Params {
            image: &image,
            initrd,
            command_line: &config.command_line,
            memory_bytes: config.memory,
        };
        params.write(&memory)?;
        firmware::write_reset_vector(&memory)?;

        let vm = Arc::new(Vm::new(&vm::open()?)?);
        if usize::from(config.cpus) > vm.max_cpus() {
            return Err(BootError::Cpus {
                asked: config.cpus,
                most: vm.max_cpus(),
            });
        }
        vm.create_board()?;
        memory::add_slots(&vm, &memory)?;
        let cpus = processors(&vm, config.cpus)?;
        start::prepare(&cpus[0], &memory, image.entry)?;

        let ending = Arc::new(Ending::default());
        let console = Console::open(&config.console)?;
        let fd = super::output::copy(&console.output).map_err(BootError::Thread)?;
        let output = Output::start(fd, console.full, &ending).map_err(BootError::Thread)?;
        let mut devices = Devices::default();
        power(&ending).add_to(&mut devices)?;
        let writer = Box::new(Writer(Arc::clone(&output)));
        let serial = Serial::new(vm.interrupt(serial::IRQ)?, writer);
        devices.add_ports(serial::COM1, serial::PORTS, serial.clone())?;

        let mut virtio = VirtioDevices::new(&vm, &memory, &ending)?;
        for disk in &config.disks {
            virtio.add(&mut devices, |name| {
                Ok(Box::new(Block::open(&disk.path, disk.access, name)?))
            })?;
        }
        virtio.add(&mut devices, |_| Ok(Box::new(Rng)))?;

        let tables = acpi::tables(config.cpus, virtio.places());
        params::write(&memory, layout::ACPI, &tables)?;
        Ok(Self {
            vm,
            memory,
            cpus,
            devices: Arc::new(devices),
            serial,
            console,
            output,
            ending,
            virtio,
        })
    }
}

fn processors(vm: &Arc<Vm>, count: u8) -> Result<Vec<BoardCpu>, BootError> {
    let shape = Shape {
        cpus: count,
        tsc_deadline: vm.has_tsc_deadline(),
    };
    let mut cpus = Vec::new();
    for id in 0..count {
        let leaves = cpuid::leaves(vm.supported_cpuid(), shape, id);
        let leaves = CpuId::from_entries(&leaves).expect("no more leaves than KVM has");
        let cpu = BoardCpu::new(vm, id, &leaves)?;
        cpu.set_msrs(&MSRS)?;
        cpus.push(cpu);
    }
    Ok(cpus)
}

fn power(ending: &Arc<Ending>) -> Power {
    let ending = Arc::clone(ending);
    Power::new(move |event| {
        ending.tell(match event {
            PowerEvent::Off => End::PowerOff,
            PowerEvent::Reset => End::Reset,
            PowerEvent::Panicked => End::Panic,
        });
    })
}
