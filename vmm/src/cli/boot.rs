//! `vmm boot`: a Linux kernel in a virtual machine.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::{STATUS_FAILURE, Size, StatsFormat, complain, say, seconds};
use crate::devices::virtio::block::Access;
use crate::kernel::config::DiskConfig;
use crate::kernel::console::ConsoleChoice;
use crate::kernel::{self, BootConfig, End, config, memory};

/// What a kernel is told when nobody says anything else, by which consoles there are.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1";
const WITH_VIRTIO: &str = "console=hvc0 panic=-1";
const WITH_BOTH: &str = "console=ttyS0 console=hvc0 panic=-1";

/// Boot a Linux kernel in a virtual machine
///
/// The kernel is a bzImage or an ELF vmlinux for x86-64, entered in 64-bit mode or, where it offers
/// that, by PVH. On a terminal every key goes to the guest; Ctrl-A x ends the machine.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "vmm boot [OPTIONS] --kernel FILE",
    after_help = "\
Exit status: 0 if the guest turned the machine off; 120 if it reset it; 121 if its kernel panicked and \
told so (pvpanic); 122 after a triple fault; 123 if KVM could not go on; 124 if --timeout ran out; 125 if \
vmm itself failed; 130 if it was ended with Ctrl-A x; 128+N if signal N ended it."
)]
pub(super) struct BootArgs {
    /// The kernel
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Its initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Its command line [default: console=ttyS0 panic=-1, or hvc0 with a virtio console]
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    cmdline: Option<OsString>,

    /// Processors of the machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(config::MAX_CPUS)))]
    cpus: u8,

    /// Memory of the machine
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,

    /// A raw file as a virtio disk, read-only if it ends in :ro (repeatable)
    #[arg(long, value_name = "FILE[:ro]")]
    disk: Vec<OsString>,

    /// A console: this terminal or pipe, a new pseudo-terminal, or a file for its output. It is the
    /// first serial port, or with virtio: before it a virtio console, hvc0, which knows the size of its
    /// terminal; once for each [default: stdio]
    #[arg(long, value_name = "[virtio:]stdio|pty|FILE")]
    console: Vec<OsString>,

    /// End the machine after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Print what was counted on standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<StatsFormat>,
}

impl BootArgs {
    fn config(&self) -> Result<BootConfig, String> {
        const PAGE: u64 = 4096;
        let (least, most) = (Size(memory::MIN), Size(memory::MAX));
        if !(least..=most).contains(&self.memory) {
            return Err(format!(
                "--memory {}: a machine has {least} to {most}",
                self.memory
            ));
        }
        let [serial, virtio_console] = consoles(&self.console)?;
        let line = match (&self.cmdline, &serial, &virtio_console) {
            (Some(line), ..) => line.as_bytes(),
            (None, _, None) => COMMAND_LINE.as_bytes(),
            (None, None, Some(_)) => WITH_VIRTIO.as_bytes(),
            (None, Some(_), Some(_)) => WITH_BOTH.as_bytes(),
        };
        Ok(BootConfig {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            command_line: line.to_vec(),
            cpus: self.cpus,
            memory: self.memory.0 & !(PAGE - 1),
            disks: self.disk.iter().map(|text| disk(text)).collect(),
            serial,
            virtio_console,
            timeout: self.timeout,
        })
    }
}

/// Where the serial port and the virtio console go.
fn consoles(texts: &[OsString]) -> Result<[Option<ConsoleChoice>; 2], String> {
    let [mut serial, mut virtio] = [None, None];
    for text in texts {
        let bytes = text.as_bytes();
        let (slot, place) = match bytes.strip_prefix(b"virtio:") {
            Some(place) => (&mut virtio, place),
            None => (&mut serial, bytes),
        };
        let choice = match place {
            b"stdio" => ConsoleChoice::Stdio,
            b"pty" => ConsoleChoice::Pty,
            _ => ConsoleChoice::File(PathBuf::from(OsStr::from_bytes(place))),
        };
        if slot.replace(choice).is_some() {
            return Err("--console: one for the serial port, and one for virtio".to_owned());
        }
    }
    if serial == Some(ConsoleChoice::Stdio) && virtio == serial {
        return Err("--console: only one can be stdio".to_owned());
    }
    if texts.is_empty() {
        serial = Some(ConsoleChoice::Stdio);
    }
    Ok([serial, virtio])
}

fn disk(text: &OsStr) -> DiskConfig {
    match text.as_bytes().strip_suffix(b":ro") {
        Some(path) => DiskConfig {
            path: PathBuf::from(OsStr::from_bytes(path)),
            access: Access::ReadOnly,
        },
        None => DiskConfig {
            path: PathBuf::from(text),
            access: Access::ReadWrite,
        },
    }
}

pub(super) fn main(args: &BootArgs) -> ExitCode {
    let config = match args.config() {
        Ok(config) => config,
        Err(message) => {
            say(&format!("vmm: {message}\n"));
            return ExitCode::from(STATUS_FAILURE);
        }
    };
    match kernel::boot(&config, |notice| say(&format!("vmm: {notice}\n"))) {
        Ok(ended) => {
            if ended.end != End::PowerOff {
                say(&format!("vmm: {}\n", ended.end));
            }
            match args.stats {
                None => {}
                Some(StatsFormat::Text) => say(&ended.report.to_string()),
                Some(StatsFormat::Json) => match serde_json::to_string(&ended.report) {
                    Ok(text) => say(&format!("{text}\n")),
                    Err(error) => complain(&error),
                },
            }
            ExitCode::from(ended.end.status())
        }
        Err(error) => {
            complain(&error);
            ExitCode::from(STATUS_FAILURE)
        }
    }
}
