//! Which program a machine starts, and what it can see: resolved on the host before anything runs.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::io::Errno;

use super::RunError;
use crate::config::{Mount, RunConfig};
use crate::linux::exec::closure::{self, ClosureError, SearchEnv};
use crate::linux::exec::stack::Strings;
use crate::linux::exec::{self, ExecError, Loaded, Program, Request};
use crate::linux::file::Location;
use crate::linux::fs::{Caller, Follow, MountKind, MountSpec};
use crate::linux::kernel::Kernel;
use crate::linux::proc::limits;

/// Where programs are looked for unless `--env PATH=` says otherwise.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is known of the program before the machine exists.
#[derive(Debug)]
pub struct Found {
    /// Its path in the guest, if the host found it; else it is looked for in the guest.
    pub path: Option<Vec<u8>>,
    /// The file tree.
    pub mounts: Vec<MountSpec>,
}

/// A name as a message shows it.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn env_var<'a>(config: &'a RunConfig, name: &[u8]) -> Option<&'a [u8]> {
    config
        .env
        .iter()
        .rev()
        .find(|(n, _)| n == name)
        .map(|(_, value)| value.as_slice())
}

/// The environment: a few variables every program expects, then those asked for.
fn environment(config: &RunConfig, terminal: bool) -> Vec<Vec<u8>> {
    let mut pairs: Vec<(&[u8], Vec<u8>)> = vec![(b"PATH", PATH.to_vec()), (b"HOME", b"/".to_vec())];
    let term = std::env::var_os("TERM").filter(|_| terminal);
    if let Some(term) = term {
        pairs.push((b"TERM", term.into_vec()));
    }
    for (name, value) in &config.env {
        pairs.retain(|(n, _)| n != name);
        pairs.push((name, value.clone()));
    }
    pairs
        .into_iter()
        .map(|(name, value)| [name, b"=", &value].concat())
        .collect()
}

/// Finds the program and lays out the file tree.
///
/// # Errors
/// Without `--root`: the program is not there, or not executable.
pub fn find(config: &RunConfig) -> Result<Found, RunError> {
    let mut mounts = Vec::new();
    let mut path = None;
    let root = if let Some(root) = &config.root {
        MountKind::Host {
            root: root.clone(),
            writable: false,
        }
    } else {
        let os = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        // The host's PATH says where the host's programs are; the guest has its own.
        let search = env_var(config, b"PATH")
            .map(os)
            .or_else(|| std::env::var_os("PATH"));
        let found = closure::find_program(OsStr::from_bytes(&config.program), search.as_deref())
            .map_err(|e| refused(config, e))?;
        let env = SearchEnv {
            path: Some(search.unwrap_or_else(|| os(PATH))),
            library_path: env_var(config, b"LD_LIBRARY_PATH").map(os),
            preload: env_var(config, b"LD_PRELOAD").map(os),
        };
        let files = closure::closure(&found, &env).map_err(|e| refused(config, e))?;
        path = Some(found.into_os_string().into_vec());
        MountKind::Closure(files)
    };
    mounts.push(MountSpec {
        at: b"/".to_vec(),
        kind: root,
    });
    for (at, kind) in [
        ("/proc", MountKind::Proc),
        ("/sys", MountKind::Sys),
        ("/dev", MountKind::Dev),
    ] {
        mounts.push(MountSpec {
            at: at.into(),
            kind,
        });
    }
    mounts.push(MountSpec {
        at: b"/dev/shm".to_vec(),
        kind: tmpfs(config),
    });
    for mount in &config.mounts {
        mounts.push(match mount {
            Mount::ReadWrite { host, guest } => MountSpec {
                at: guest.clone(),
                kind: MountKind::Host {
                    root: host.clone(),
                    writable: true,
                },
            },
            Mount::Tmpfs { guest } => MountSpec {
                at: guest.clone(),
                kind: tmpfs(config),
            },
        });
    }
    Ok(Found { path, mounts })
}

/// An in-memory file system may take half of what memory and page file hold; on Linux it is half the memory.
fn tmpfs(config: &RunConfig) -> MountKind {
    let page_file = config.page_file.as_ref().map_or(0, |file| file.bytes);
    MountKind::Mem {
        size: config.memory.saturating_add(page_file) / 2,
        mode: 0o1777,
    }
}

fn refused(config: &RunConfig, error: ClosureError) -> RunError {
    let name = shown(&config.program);
    match error {
        ClosureError::NotFound { .. } => RunError::NotFound { name },
        other => RunError::NotExecutable {
            name,
            source: Box::new(other),
        },
    }
}

/// Loads the program into an address space of the machine.
///
/// # Errors
/// It is not there, or cannot be executed.
pub fn load(
    kernel: &Kernel,
    caller: &Caller<'_>,
    config: &RunConfig,
    path: Option<Vec<u8>>,
    cwd: &Location,
) -> Result<Loaded, RunError> {
    let name = shown(&config.program);
    let hidden = path.as_ref().map(|path| RunError::Hidden {
        name: name.clone(),
        path: shown(path),
    });
    let candidates = match path {
        Some(path) => vec![path],
        None if config.program.contains(&b'/') => vec![config.program.clone()],
        None => env_var(config, b"PATH")
            .unwrap_or(PATH)
            .split(|&b| b == b':')
            .map(|dir| [dir, b"/", &config.program].concat())
            .collect(),
    };
    let mut denied = None;
    for candidate in candidates {
        let as_given = shown(&candidate);
        match load_one(kernel, caller, config, candidate, cwd) {
            Ok(loaded) => return Ok(loaded),
            // Of this path, not of the interpreter that a script there names.
            Err(ExecError::Open {
                errno: Errno::NOENT | Errno::NOTDIR,
                path,
            }) if path == as_given => {}
            Err(
                error @ ExecError::Open {
                    errno: Errno::ACCESS,
                    ..
                },
            ) => denied = Some(error),
            Err(error) => {
                return Err(RunError::NotExecutable {
                    name,
                    source: Box::new(error),
                });
            }
        }
    }
    match denied {
        Some(error) => Err(RunError::NotExecutable {
            name,
            source: Box::new(error),
        }),
        None => Err(hidden.unwrap_or(RunError::NotFound { name })),
    }
}

fn load_one(
    kernel: &Kernel,
    caller: &Caller<'_>,
    config: &RunConfig,
    path: Vec<u8>,
    cwd: &Location,
) -> Result<Loaded, ExecError> {
    let argv = std::iter::once(&config.program)
        .chain(&config.args)
        .cloned()
        .collect();
    let strings = Strings {
        argv,
        envp: environment(config, kernel.tty.is_some()),
    };
    let program = Program::Path {
        cwd: cwd.clone(),
        path,
        follow: Follow::Last,
        name: None,
    };
    let stack_limit = limits::defaults()[limits::STACK].0;
    exec::load(
        caller,
        Request {
            program,
            cwd,
            stack_limit,
            randomize: true,
            strings,
        },
    )
}
