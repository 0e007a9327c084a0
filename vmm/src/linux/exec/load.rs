//! Loading a program into a new address space: opening it, following `#!` lines, and the order in
//! which things are mapped.

use std::sync::Arc;

use rustix::io::Errno;

use super::elf::{self, Elf, PHENT, ReadAt};
use super::error::{ElfError, ExecError, show};
use super::map::{Builder, Mappable, Places, Randomness};
use super::script::{self, HEAD, MAX_DEPTH};
use super::stack::{self, InitialStack, Strings, at};
use super::{MachineInfo, PAGE};
use crate::linux::file::{File, Location};
use crate::linux::fs::{Caller, Follow, S_IFMT, S_IFREG};
use crate::linux::kernel::Kernel;
use crate::linux::proc::image::Image as ProcessImage;
use crate::linux::process::{AddressSpace, Credentials, MmLayout};
use crate::linux::thread::Regs;

/// RFLAGS at entry: interrupts enabled, and the bit that is always set.
const INITIAL_RFLAGS: u64 = 0x202;

/// Clock ticks a second, as `sysconf(_SC_CLK_TCK)` tells.
const CLKTCK: u64 = 100;

/// What to load.
#[derive(Clone, Debug)]
pub enum Program {
    /// By path.
    Path {
        /// Where a relative path starts.
        cwd: Location,
        /// The path.
        path: Vec<u8>,
        /// Whether a symbolic link at its end is followed; `ELOOP` if not.
        follow: Follow,
        /// The name the program and a script's interpreter get, if not the path.
        name: Option<Vec<u8>>,
    },
    /// An open file (`fexecve(3)`).
    Open {
        /// The file.
        file: Arc<dyn File>,
        /// `/dev/fd/N`.
        name: Vec<u8>,
        /// The name will mean nothing to the new program: no script can be run by it.
        inaccessible: bool,
    },
}

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

/// An opened program.
struct Opened {
    file: Arc<dyn File>,
    location: Option<Location>,
    /// For messages and `AT_EXECFN`.
    name: Vec<u8>,
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

/// Last component of the name the program was started by, cut to 15 bytes.
fn comm(program: &Opened) -> Vec<u8> {
    let name = match &program.location {
        Some(location) if program.name.starts_with(b"/dev/fd/") => &location.path,
        _ => &program.name,
    };
    let base = name.rsplit(|&b| b == b'/').next().unwrap_or_default();
    base[..base.len().min(15)].to_vec()
}

fn open_program(caller: &Caller<'_>, program: Program) -> Result<Opened, ExecError> {
    match program {
        Program::Open { file, name, .. } => {
            check_executable(caller, &file).map_err(|errno| ExecError::Open {
                path: show(&name),
                errno,
            })?;
            let location = file.location();
            Ok(Opened {
                file,
                location,
                name,
            })
        }
        Program::Path {
            cwd,
            path,
            follow,
            name,
        } => {
            let failed = |errno| ExecError::Open {
                path: show(&path),
                errno,
            };
            if path.is_empty() {
                return Err(failed(Errno::NOENT));
            }
            let (file, location, _) = caller
                .k
                .vfs
                .open_exec(caller, &cwd, &path, follow)
                .map_err(failed)?;
            Ok(Opened {
                file,
                location: Some(location),
                name: name.unwrap_or(path),
            })
        }
    }
}

/// An open file that is regular and whose permission bits let the caller execute it.
fn check_executable(caller: &Caller<'_>, file: &Arc<dyn File>) -> Result<(), Errno> {
    let stat = file.stat(caller.k)?;
    if stat.mode & S_IFMT == S_IFREG && caller.permitted(&stat, 1) {
        Ok(())
    } else {
        Err(Errno::ACCESS)
    }
}

/// Replaces a script by its interpreter until there is none, changing the arguments.
fn follow_scripts(
    caller: &Caller<'_>,
    cwd: &Location,
    mut opened: Opened,
    inaccessible: bool,
    strings: &mut Strings,
) -> Result<Opened, ExecError> {
    for _ in 0..=MAX_DEPTH {
        let head = head(caller.k, &opened)?;
        let path = || show(&opened.name);
        let line = script::parse(&head).map_err(|_| ExecError::ScriptLine { path: path() })?;
        let Some(line) = line else { return Ok(opened) };
        if inaccessible {
            return Err(ExecError::ScriptInaccessible { path: path() });
        }
        let before = [
            Some(line.interpreter.clone()),
            line.argument,
            Some(opened.name),
        ];
        strings.argv.splice(..1, before.into_iter().flatten());
        let program = Program::Path {
            cwd: cwd.clone(),
            path: line.interpreter,
            follow: Follow::Last,
            name: None,
        };
        opened = open_program(caller, program)?;
    }
    Err(ExecError::TooManyLevels {
        path: show(&opened.name),
    })
}

/// The first bytes of a file.
fn head(k: &Kernel, opened: &Opened) -> Result<Vec<u8>, ExecError> {
    let mut head = vec![0; HEAD];
    let mut done = 0;
    while done < HEAD {
        match opened.file.read(k, done as u64, &mut head[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(errno) => {
                return Err(ExecError::Open {
                    path: show(&opened.name),
                    errno,
                });
            }
        }
    }
    head.truncate(done);
    Ok(head)
}

fn open_interpreter(
    caller: &Caller<'_>,
    cwd: &Location,
    program: &str,
    elf: &Elf,
) -> Result<Option<Mappable>, ExecError> {
    let Some(path) = elf.interpreter.clone() else {
        return Ok(None);
    };
    let shown = show(&path);
    let named = Program::Path {
        cwd: cwd.clone(),
        path,
        follow: Follow::Last,
        name: None,
    };
    let opened = open_program(caller, named).map_err(|e| ExecError::Interpreter {
        program: program.to_owned(),
        path: shown.clone(),
        errno: e.errno(),
    })?;
    mappable(caller.k, &opened.file)
        .map(Some)
        .map_err(|fault| fault.of_interpreter(program, &shown))
}

/// Why a file is no program.
enum Unusable {
    Elf(ElfError),
    NotMappable(Errno),
}

impl Unusable {
    fn of_program(self, name: &str) -> ExecError {
        let path = name.to_owned();
        match self {
            Self::Elf(fault) => ExecError::Elf { path, fault },
            Self::NotMappable(errno) => ExecError::NotMappable { path, errno },
        }
    }

    fn of_interpreter(self, program: &str, path: &str) -> ExecError {
        let (program, path) = (program.to_owned(), path.to_owned());
        match self {
            Self::Elf(fault) => ExecError::InterpreterElf {
                program,
                path,
                fault,
            },
            Self::NotMappable(errno) => ExecError::Interpreter {
                program,
                path,
                errno,
            },
        }
    }
}

/// A guest's file, read by position.
struct Positional<'a> {
    k: &'a Kernel,
    file: &'a dyn File,
    length: u64,
}

impl ReadAt for Positional<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.file.read(self.k, offset, buf)
    }

    fn length(&self) -> u64 {
        self.length
    }
}

fn mappable(k: &Kernel, file: &Arc<dyn File>) -> Result<Mappable, Unusable> {
    let (backing, length) = file.mapping(k).map_err(Unusable::NotMappable)?;
    let elf = elf::parse(&Positional {
        k,
        file: &**file,
        length,
    })
    .map_err(Unusable::Elf)?;
    Ok(Mappable {
        elf,
        backing,
        length,
    })
}

/// All that goes into a new space.
struct Image {
    main: Mappable,
    interpreter: Option<Mappable>,
    strings: Strings,
    execfn: Vec<u8>,
    /// For messages.
    name: String,
    stack_limit: u64,
}

impl Image {
    /// Makes the space; on failure it is gone again.
    fn build(
        &self,
        caller: &Caller<'_>,
        random: Randomness,
    ) -> Result<(Arc<AddressSpace>, u64, u64), ExecError> {
        let k = caller.k;
        let space = k
            .memory
            .manager
            .create_space()
            .map_err(|_| ExecError::NoMemory {
                path: self.name.clone(),
            })?;
        // Dropping it deletes the space.
        let mm = AddressSpace::new(&k.memory, space, MmLayout::default());
        let path = || self.name.clone();
        match self.fill(caller, &mm, random) {
            Ok((rip, rsp)) => Ok((mm, rip, rsp)),
            Err(Errno::NOMEM) => Err(ExecError::NoMemory { path: path() }),
            Err(Errno::TOOBIG) => Err(ExecError::TooLong),
            Err(errno) => Err(ExecError::Map {
                path: path(),
                errno,
            }),
        }
    }

    fn fill(
        &self,
        caller: &Caller<'_>,
        mm: &Arc<AddressSpace>,
        random: Randomness,
    ) -> Result<(u64, u64), Errno> {
        let builder = Builder {
            memory: &caller.k.memory,
            mm,
            places: Places::new(self.stack_limit, random),
        };
        let bias = builder.program(&self.main, random.program)?;
        let entry = self.main.elf.entry.wrapping_add(bias);
        let (base, rip) = match &self.interpreter {
            Some(interpreter) => {
                let at = builder.interpreter(interpreter)?;
                let base = if interpreter.elf.relocatable {
                    interpreter.elf.start().wrapping_add(at)
                } else {
                    0
                };
                (base, interpreter.elf.entry.wrapping_add(at))
            }
            None => (0, entry),
        };
        let aux = self.auxv(caller.k.info, &caller.cred, bias, base);
        let content = self.stack(builder.places.stack_top, &aux);
        let rsp = content.sp;
        builder.stack(&content, self.main.elf.executable_stack)?;
        builder.layout(content, self.main.elf.end.wrapping_add(bias), random.heap);
        Ok((rip, rsp))
    }

    fn stack(&self, top: u64, aux: &[(u64, u64)]) -> InitialStack {
        stack::build(top, &self.strings, &self.execfn, random_bytes(), aux)
    }

    /// The auxiliary vector but for what points into the stack.
    fn auxv(&self, info: MachineInfo, cred: &Credentials, bias: u64, base: u64) -> Vec<(u64, u64)> {
        let elf = &self.main.elf;
        let secure = cred.uid[0] != cred.uid[1] || cred.gid[0] != cred.gid[1];
        let phdr = if elf.phdr == 0 {
            0
        } else {
            elf.phdr.wrapping_add(bias)
        };
        let vdso = info.vdso.map(|va| (at::SYSINFO_EHDR, va));
        vdso.into_iter()
            .chain([
                (at::MINSIGSTKSZ, info.minsigstksz),
                (at::HWCAP, info.hwcap),
                (at::PAGESZ, PAGE),
                (at::CLKTCK, CLKTCK),
                (at::PHDR, phdr),
                (at::PHENT, PHENT),
                (at::PHNUM, elf.phnum),
                (at::BASE, base),
                (at::FLAGS, 0),
                (at::ENTRY, elf.entry.wrapping_add(bias)),
                (at::UID, u64::from(cred.uid[0])),
                (at::EUID, u64::from(cred.uid[1])),
                (at::GID, u64::from(cred.gid[0])),
                (at::EGID, u64::from(cred.gid[1])),
                (at::SECURE, u64::from(secure)),
                (at::HWCAP2, info.hwcap2),
            ])
            .collect()
    }
}

/// Sixteen bytes from the host's generator. If it has none (it blocks only before the host's first
/// seconds are over), the clock and the process id, which only weakens the guest's stack protector.
fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    if got != Ok(bytes.len()) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        bytes[..8].copy_from_slice(&now.tv_nsec.to_le_bytes());
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    }
    bytes
}

fn randomness() -> Randomness {
    let words = [random_bytes(), random_bytes()].concat();
    let word =
        |n: usize| u64::from_le_bytes(words[n * 8..n * 8 + 8].try_into().unwrap_or_default());
    Randomness {
        stack: word(0),
        mappings: word(1),
        program: word(2),
        heap: word(3),
    }
}
