//! `execve` and `execveat`.

use super::PAGE;
use super::load::{Request, load};
use super::open::Program;
use super::stack::{Budget, STRING_MAX, Strings};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult};
use crate::linux::fs::{Caller, Follow};
use crate::linux::proc::image::{Image, commit_exec};
use crate::linux::proc::threads::be_alone;

const AT_FDCWD: i32 = -100;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_EMPTY_PATH: u32 = 0x1000;
const ADDR_NO_RANDOMIZE: u32 = 0x4_0000;
const RLIMIT_STACK: usize = 3;

/// The calls that start a program.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 59,
        name: "execve",
        args: &[Arg::Str, Arg::Hex, Arg::Hex],
        handler: sys_execve,
    },
    Entry {
        nr: 322,
        name: "execveat",
        args: &[Arg::Fd, Arg::Str, Arg::Hex, Arg::Hex, Arg::Hex],
        handler: sys_execveat,
    },
];

/// `execve(2)`.
fn sys_execve(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if let Some(image) = c.t.image.take() {
        return replace(c, *image);
    }
    let path = c.path(a.u64(0))?;
    let cwd = c.with_process(|p| p.cwd.clone());
    let program = Program::Path {
        cwd,
        path,
        follow: Follow::Last,
        name: None,
    };
    execute(c, program, a.u64(1), a.u64(2))
}

/// `execveat(2)`.
fn sys_execveat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if let Some(image) = c.t.image.take() {
        return replace(c, *image);
    }
    let (fd, flags) = (a.i32(0), a.u32(4));
    if flags & !(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::INVAL.into());
    }
    let path = c.path(a.u64(1))?;
    let program = at_program(c, fd, path, flags)?;
    execute(c, program, a.u64(2), a.u64(3))
}

/// What the arguments of `execveat` name.
fn at_program(c: &Ctx<'_>, fd: i32, path: Vec<u8>, flags: u32) -> Result<Program, Errno> {
    let follow = if flags & AT_SYMLINK_NOFOLLOW != 0 {
        Follow::Not
    } else {
        Follow::Last
    };
    let cwd = c.with_process(|p| p.cwd.clone());
    if path.is_empty() {
        if flags & AT_EMPTY_PATH == 0 {
            return Err(Errno::NOENT);
        }
        if fd == AT_FDCWD {
            // The working directory: a directory is not executable.
            return Err(Errno::ACCESS);
        }
        return open_program(c, fd);
    }
    if path.starts_with(b"/") || fd == AT_FDCWD {
        return Ok(Program::Path {
            cwd,
            path,
            follow,
            name: None,
        });
    }
    let directory = c.file(fd)?.file.location().ok_or(Errno::NOTDIR)?;
    let name = [format!("/dev/fd/{fd}/").as_bytes(), &path].concat();
    Ok(Program::Path {
        cwd: directory,
        path,
        follow,
        name: Some(name),
    })
}

/// The program behind a descriptor.
fn open_program(c: &Ctx<'_>, fd: i32) -> Result<Program, Errno> {
    let description = c.file(fd)?;
    let inaccessible = c.with_process(|p| p.files.fds.get(&fd).is_some_and(|fd| fd.close_on_exec));
    let name = format!("/dev/fd/{fd}").into_bytes();
    match description.file.location() {
        // Opened for something else than reading: open it again.
        Some(location) if !description.readable() => {
            let path = c.k.vfs.path_of(&location);
            let root = c.k.vfs.root();
            Ok(Program::Path {
                cwd: root,
                path,
                follow: Follow::Last,
                name: Some(name),
            })
        }
        _ => Ok(Program::Open {
            file: std::sync::Arc::clone(&description.file),
            name,
            inaccessible,
        }),
    }
}

fn execute(c: &mut Ctx<'_>, program: Program, argv: u64, envp: u64) -> SysResult {
    let (cwd, stack_limit) = c.with_process(|p| (p.cwd.clone(), p.rlimits[RLIMIT_STACK].0));
    let mut budget = Budget::new(stack_limit);
    let strings = Strings {
        argv: read_list(c, argv, &mut budget)?,
        envp: read_list(c, envp, &mut budget)?,
    };
    let randomize = c.t.personality & ADDR_NO_RANDOMIZE == 0;
    let request = Request {
        program,
        cwd: &cwd,
        stack_limit,
        randomize,
        strings,
    };
    let loaded = load(&Caller::of(c), request).map_err(|error| {
        tracing::debug!(pid = c.t.pid, "execve: {error}");
        Stop::Errno(error.errno())
    })?;
    replace(c, loaded.into_image())
}

/// Puts a loaded program in the place of the old one, once the other threads have ended. Made again, the
/// call comes straight here.
fn replace(c: &mut Ctx<'_>, image: Image) -> SysResult {
    if let Err(stop) = be_alone(c) {
        if matches!(stop, Stop::Block(_)) {
            c.t.image = Some(Box::new(image));
        }
        return Err(stop);
    }
    commit_exec(c, image);
    Err(Stop::Replaced)
}

/// Reads a null-terminated list of strings; a null list is empty, as Linux has it.
fn read_list(c: &Ctx<'_>, list: u64, budget: &mut Budget) -> Result<Vec<Vec<u8>>, Errno> {
    let mut strings = Vec::new();
    if list == 0 {
        return Ok(strings);
    }
    let mut at = list;
    loop {
        // To the end of the page, since the next one may not be there.
        let words = ((PAGE - at % PAGE) / 8).max(1) as usize;
        let mut bytes = vec![0; words * 8];
        c.mem().read(at, &mut bytes)?;
        for word in bytes.as_chunks::<8>().0 {
            let pointer = u64::from_le_bytes(*word);
            if pointer == 0 {
                return Ok(strings);
            }
            let string = c
                .mem()
                .read_cstr(pointer, STRING_MAX)
                .map_err(|errno| match errno {
                    Errno::NAMETOOLONG => Errno::TOOBIG,
                    errno => errno,
                })?;
            budget.take(string.len())?;
            strings.push(string);
        }
        at = at.checked_add(bytes.len() as u64).ok_or(Errno::FAULT)?;
    }
}
