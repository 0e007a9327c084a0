//! A kernel guest's machine, put together: memory, kernel, board, devices, processors.
//!
//! Everything that can be refused is refused here, before the first instruction.

use std::sync::Arc;

use kvm_bindings::CpuId;

use super::config::BootConfig;
use super::console::{Console, ConsoleChoice};
use super::cpuid::{self, Shape};
use super::end::{End, Ending};
use super::image;
use super::memory::{self, Memory};
use super::output::{Output, Writer};
use super::params::{self, Params};
use super::virtio::{self, VirtioDevices};
use super::{BootError, acpi, firmware, layout, msrs, start};
use crate::devices::Devices;
use crate::devices::keyboard::{Keyboard, ScreenSize};
use crate::devices::power::{Power, PowerEvent};
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console::{Console as VirtioConsole, Port};
use crate::devices::virtio::rng::Rng;
use crate::hv::kvm::board_cpu::BoardCpu;
use crate::hv::kvm::msr_filter::Filtered;
use crate::hv::kvm::vm::{self, Vm};

/// A console, and the device it belongs to.
#[derive(Debug)]
pub struct Attached {
    /// The console.
    pub console: Console,
    /// What the guest writes there.
    pub output: Arc<Output>,
    /// What is typed there.
    pub keyboard: Arc<dyn Keyboard>,
}

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
    /// Its consoles that go somewhere.
    pub consoles: Vec<Attached>,
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
        if vm.filter_msrs(msrs::may_read, msrs::may_write)? == Filtered::No {
            tracing::warn!("this KVM filters no MSRs: the guest sees all that KVM knows");
        }
        memory::add_slots(&vm, &memory)?;
        let cpus = processors(&vm, config.cpus)?;
        start::prepare(&cpus[0], &memory, image.entry)?;

        let ending = Arc::new(Ending::default());
        let mut consoles = Vec::new();
        let mut devices = Devices::default();
        power(&ending).add_to(&mut devices)?;
        let interrupt = vm.interrupt(serial::IRQ)?;
        let serial = attach(
            &mut consoles,
            config.serial.as_ref(),
            &ending,
            |_, output| Serial::new(interrupt, output),
        )?;
        devices.add_ports(serial::COM1, serial::PORTS, serial)?;

        let others = 1 + usize::from(config.virtio_console.is_some());
        if config.disks.len() + others > virtio::MOST {
            return Err(BootError::TooManyDisks(virtio::MOST - others));
        }
        let mut virtio = VirtioDevices::new(&vm, &memory, &ending)?;
        for disk in &config.disks {
            virtio.add(&mut devices, |name| {
                Ok(Box::new(Block::open(&disk.path, disk.access, name)?))
            })?;
        }
        virtio.add(&mut devices, |_| Ok(Box::new(Rng)))?;
        if let Some(choice) = &config.virtio_console {
            let device = virtio_console(&mut consoles, choice, &ending)?;
            virtio.add(&mut devices, |_| Ok(Box::new(device)))?;
        }

        let tables = acpi::tables(config.cpus, virtio.places());
        params::write(&memory, layout::ACPI, &tables)?;
        Ok(Self {
            vm,
            memory,
            cpus,
            devices: Arc::new(devices),
            consoles,
            ending,
            virtio,
        })
    }
}

/// Opens a console, if one is chosen, and makes its device, which is told the screen's size and writes
/// to it.
fn attach<D: Keyboard + 'static>(
    consoles: &mut Vec<Attached>,
    choice: Option<&ConsoleChoice>,
    ending: &Arc<Ending>,
    make: impl FnOnce(Option<ScreenSize>, Box<dyn std::io::Write + Send>) -> Arc<D>,
) -> Result<Arc<D>, BootError> {
    let Some(choice) = choice else {
        return Ok(make(None, Box::new(std::io::sink())));
    };
    let console = Console::open(choice)?;
    let fd = super::output::copy(&console.output).map_err(BootError::Thread)?;
    let output = Output::start(fd, console.full, ending).map_err(BootError::Thread)?;
    let device = make(console.size(), Box::new(Writer(Arc::clone(&output))));
    consoles.push(Attached {
        console,
        output,
        keyboard: device.clone(),
    });
    Ok(device)
}

fn virtio_console(
    consoles: &mut Vec<Attached>,
    choice: &ConsoleChoice,
    ending: &Arc<Ending>,
) -> Result<VirtioConsole, BootError> {
    let mut writer = None;
    let port = attach(consoles, Some(choice), ending, |size, output| {
        writer = Some(output);
        Port::new(size)
    })?;
    Ok(VirtioConsole::new(&port, writer.expect("made above")))
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
        cpu.set_msrs(&msrs::AT_START)?;
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
