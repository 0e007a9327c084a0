//! Opening a program: by path or descriptor, through `#!` lines, and its ELF interpreter.

use std::sync::Arc;

use rustix::io::Errno;

use super::elf::{self, Elf, ReadAt};
use super::error::{ElfError, ExecError, show};
use super::map::Mappable;
use super::script::{self, HEAD, MAX_DEPTH};
use super::stack::Strings;
use crate::linux::file::{File, Location};
use crate::linux::fs::{Caller, Follow, S_IFMT, S_IFREG};
use crate::linux::kernel::Kernel;

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

/// An opened program.
pub(super) struct Opened {
    pub(super) file: Arc<dyn File>,
    pub(super) location: Option<Location>,
    /// For messages and `AT_EXECFN`.
    pub(super) name: Vec<u8>,
}

/// Last component of the name the program was started by, cut to 15 bytes.
pub(super) fn comm(program: &Opened) -> Vec<u8> {
    let name = match &program.location {
        Some(location) if program.name.starts_with(b"/dev/fd/") => &location.path,
        _ => &program.name,
    };
    let base = name.rsplit(|&b| b == b'/').next().unwrap_or_default();
    base[..base.len().min(15)].to_vec()
}

/// Opens what may be executed.
pub(super) fn open_program(caller: &Caller<'_>, program: Program) -> Result<Opened, ExecError> {
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
pub(super) fn follow_scripts(
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

/// Opens the dynamic linker a program asks for.
pub(super) fn open_interpreter(
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
pub(super) enum Unusable {
    Elf(ElfError),
    NotMappable(Errno),
}

impl Unusable {
    pub(super) fn of_program(self, name: &str) -> ExecError {
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

/// A program file with its headers read.
pub(super) fn mappable(k: &Kernel, file: &Arc<dyn File>) -> Result<Mappable, Unusable> {
    let section = file
        .mapping(k)
        .and_then(|backing| crate::linux::mm::section(k, &backing, crate::memory::Intent::Read))
        .map_err(Unusable::NotMappable)?;
    // A file in memory ends within the last page of its section.
    let length = file.stat(k).map_err(Unusable::NotMappable)?.size;
    let elf = elf::parse(&Positional {
        k,
        file: &**file,
        length,
    })
    .map_err(Unusable::Elf)?;
    Ok(Mappable { elf, section })
}
