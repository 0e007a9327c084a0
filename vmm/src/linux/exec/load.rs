//! Loading a program into a new address space.

use std::sync::Arc;

use super::error::{ExecError, show};
use super::image::{Image, randomness};
use super::map::Randomness;
use super::open::{Program, comm, follow_scripts, mappable, open_interpreter, open_program};
use super::stack::Strings;
use crate::linux::file::Location;
use crate::linux::fs::Caller;
use crate::linux::proc::image::Image as ProcessImage;
use crate::linux::process::AddressSpace;
use crate::linux::thread::Regs;

/// RFLAGS at entry: interrupts enabled, and the bit that is always set.
const INITIAL_RFLAGS: u64 = 0x202;

/// A program with everything it is given.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// What to load.
    pub program: Program,
    /// Working directory: where an interpreter with a relative path is looked for.
    pub cwd: &'a Location,
    /// Soft `RLIMIT_STACK`.
    pub stack_limit: u64,
    /// Whether places are random (`ADDR_NO_RANDOMIZE` not set).
    pub randomize: bool,
    /// Arguments and environment.
    pub strings: Strings,
}

/// A loaded program, not yet run by anybody.
#[derive(Debug)]
pub struct Loaded {
    /// Its memory.
    pub mm: Arc<AddressSpace>,
    /// First instruction.
    pub rip: u64,
    /// Initial stack pointer.
    pub rsp: u64,
    /// Where the ELF file is; for a script, its interpreter. `None` if it has no name.
    pub exe: Option<Location>,
    /// Name for `comm`: at most 15 bytes.
    pub comm: Vec<u8>,
}

impl Loaded {
    /// As [`commit_exec`](crate::linux::proc::image::commit_exec) takes it, with the registers a
    /// program starts with.
    #[must_use]
    pub fn into_image(self) -> ProcessImage {
        let Self {
            mm,
            rip,
            rsp,
            exe,
            comm,
        } = self;
        let exe = exe.unwrap_or_else(|| Location {
            mount: 0,
            path: Vec::new(),
        });
        let regs = Regs {
            rip,
            rsp,
            rflags: INITIAL_RFLAGS,
            ..Regs::default()
        };
        ProcessImage {
            mm,
            exe,
            comm,
            regs,
        }
    }
}

/// Loads a program for `caller`.
///
/// # Errors
/// See [`ExecError`]; nothing is left behind.
pub fn load(caller: &Caller<'_>, request: Request<'_>) -> Result<Loaded, ExecError> {
    let Request {
        program,
        cwd,
        stack_limit,
        randomize,
        mut strings,
    } = request;
    let inaccessible = matches!(
        program,
        Program::Open {
            inaccessible: true,
            ..
        }
    );
    let first = open_program(caller, program)?;
    if strings.argv.is_empty() {
        strings.argv.push(Vec::new());
    }
    let execfn = first.name.clone();
    let comm = comm(&first);
    let opened = follow_scripts(caller, cwd, first, inaccessible, &mut strings)?;
    strings.check(stack_limit).map_err(|_| ExecError::TooLong)?;

    let name = show(&opened.name);
    let main = mappable(caller.k, &opened.file).map_err(|fault| fault.of_program(&name))?;
    let interpreter = open_interpreter(caller, cwd, &name, &main.elf)?;
    let image = Image {
        main,
        interpreter,
        strings,
        execfn,
        name,
        stack_limit,
    };
    let random = if randomize {
        randomness()
    } else {
        Randomness::default()
    };
    let (mm, rip, rsp) = image.build(caller, random)?;
    Ok(Loaded {
        mm,
        rip,
        rsp,
        exe: opened.location,
        comm,
    })
}
