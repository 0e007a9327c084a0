//! Which host files a program needs, found on the host: the program, its interpreter, the libraries
//! its dynamic linker would load at start, and the symbolic links on the way to them. They are what
//! the guest sees when no root directory is given.
//!
//! What a program opens by itself later (`dlopen`, locales, configuration) is not found: such a
//! program wants a root directory. A library that is missing on the host is left out; the guest's
//! dynamic linker says so. The *search order* need not be the dynamic linker's exactly, since every
//! candidate of the first directory that has any is included.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::script::{self, HEAD, MAX_DEPTH};
use crate::linux::fs::ClosureEntry;
use object_file::ObjectFile;
use search::Search;

mod links;
mod object_file;
mod search;

/// Most objects followed; a program with more wants a root directory.
const OBJECTS_MAX: usize = 4096;

/// Why a program's files could not be found.
#[derive(Debug, thiserror::Error)]
pub enum ClosureError {
    /// No such program.
    #[error("{}: command not found", name.display())]
    NotFound {
        /// As given.
        name: PathBuf,
    },
    /// A directory, or without permission to execute.
    #[error("{}: permission denied", name.display())]
    NotExecutable {
        /// As given.
        name: PathBuf,
    },
    /// The host could not read it.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// Too many objects.
    #[error("{}: needs more than {OBJECTS_MAX} files", program.display())]
    TooMany {
        /// The program.
        program: PathBuf,
    },
}

impl ClosureError {
    /// What a shell exits with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } | Self::Read { .. } | Self::TooMany { .. } => 126,
        }
    }
}

/// The environment the guest program gets, as far as it says where files are.
#[derive(Clone, Debug, Default)]
pub struct SearchEnv {
    /// `PATH`: for the program of a script that starts with `env`.
    pub path: Option<OsString>,
    /// `LD_LIBRARY_PATH`.
    pub library_path: Option<OsString>,
    /// `LD_PRELOAD`.
    pub preload: Option<OsString>,
}

/// Finds a program as a shell does: a name with a slash is a path, another is looked up in the
/// directories of `path` (`PATH`). The result is absolute.
///
/// # Errors
/// [`ClosureError::NotFound`], [`ClosureError::NotExecutable`].
pub fn find_program(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, ClosureError> {
    let given = || PathBuf::from(name);
    if name.is_empty() {
        return Err(ClosureError::NotFound { name: given() });
    }
    if name.as_bytes().contains(&b'/') {
        return match executable(Path::new(name)) {
            Some(true) => {
                absolute(Path::new(name)).ok_or_else(|| ClosureError::NotFound { name: given() })
            }
            Some(false) => Err(ClosureError::NotExecutable { name: given() }),
            None => Err(ClosureError::NotFound { name: given() }),
        };
    }
    let path = path.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
    let mut error = ClosureError::NotFound { name: given() };
    for directory in std::env::split_paths(path) {
        let candidate = if directory.as_os_str().is_empty() {
            given()
        } else {
            directory.join(name)
        };
        match executable(&candidate) {
            Some(true) => return absolute(&candidate).ok_or(error),
            Some(false) => error = ClosureError::NotExecutable { name: candidate },
            None => {}
        }
    }
    Err(error)
}

/// Whether it is a file we may execute; `None` if it is not there.
fn executable(path: &Path) -> Option<bool> {
    let metadata = std::fs::metadata(path).ok()?;
    let allowed = rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    Some(metadata.is_file() && allowed)
}

/// The path from the root, its directory free of links if it was not given from the root.
fn absolute(path: &Path) -> Option<PathBuf> {
    let plain = !path
        .components()
        .any(|c| matches!(c, std::path::Component::ParentDir));
    if path.is_absolute() && plain {
        return Some(path.to_path_buf());
    }
    let path = std::path::absolute(path).ok()?;
    let directory = std::fs::canonicalize(path.parent()?).ok()?;
    Some(directory.join(path.file_name()?))
}

/// All files `program` (absolute) needs.
///
/// # Errors
/// The program cannot be read, or needs too many files. What else is missing is left out.
pub fn closure(program: &Path, env: &SearchEnv) -> Result<Vec<ClosureEntry>, ClosureError> {
    let mut found = Closure {
        env,
        entries: BTreeMap::new(),
        objects: BTreeSet::new(),
    };
    found.add_program(program)?;
    Ok(found.entries.into_values().collect())
}

struct Closure<'a> {
    env: &'a SearchEnv,
    /// By guest path.
    entries: BTreeMap<PathBuf, ClosureEntry>,
    /// Objects whose libraries have been looked for, by real path.
    objects: BTreeSet<PathBuf>,
}

impl Closure<'_> {
    /// Adds a program, and what a script's first line names.
    fn add_program(&mut self, program: &Path) -> Result<(), ClosureError> {
        let mut current = program.to_path_buf();
        for _ in 0..=MAX_DEPTH {
            let head = read_head(&current)?;
            self.add_file(&current);
            let Ok(Some(line)) = script::parse(&head) else {
                break;
            };
            if let Some(program) = self.env_program(&line) {
                self.add_objects(&program)?;
            }
            match absolute(Path::new(OsStr::from_bytes(&line.interpreter))) {
                Some(interpreter) if interpreter.is_file() => current = interpreter,
                _ => return Ok(()),
            }
        }
        self.add_objects(&current)
    }

    /// The program that `env` would start for a script.
    fn env_program(&self, line: &script::Shebang) -> Option<PathBuf> {
        if !line.interpreter.ends_with(b"/env") {
            return None;
        }
        let words = line.argument.as_deref()?.split(|b| b.is_ascii_whitespace());
        let name = words
            .into_iter()
            .find(|w| !w.is_empty() && w[0] != b'-' && !w.contains(&b'='))?;
        find_program(OsStr::from_bytes(name), self.env.path.as_deref()).ok()
    }

    /// Adds an object and all its libraries, breadth first as the dynamic linker loads them.
    fn add_objects(&mut self, program: &Path) -> Result<(), ClosureError> {
        self.add_file(program);
        let Some(main) = ObjectFile::read(program) else {
            return Ok(());
        };
        let search = Search::new(self.env, &main);
        if let Some(interpreter) = &main.interpreter {
            self.add_interpreter(interpreter);
        }
        let mut queue = VecDeque::from([main]);
        for name in search.preloaded() {
            self.enqueue(&search, &name, &ObjectFile::default(), &mut queue);
        }
        while let Some(object) = queue.pop_front() {
            for name in &object.needed {
                self.enqueue(&search, name, &object, &mut queue);
            }
            if self.objects.len() > OBJECTS_MAX {
                return Err(ClosureError::TooMany {
                    program: program.to_path_buf(),
                });
            }
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        search: &Search,
        name: &OsStr,
        by: &ObjectFile,
        queue: &mut VecDeque<ObjectFile>,
    ) {
        let candidates = search.find(name, by);
        if candidates.is_empty() {
            tracing::debug!(library = ?name, needed_by = ?by.path, "not on this host");
        }
        for path in candidates {
            self.add_file(&path);
            let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
            if self.objects.insert(real)
                && let Some(mut object) = ObjectFile::read(&path)
            {
                object.inherit(by);
                queue.push_back(object);
            }
        }
    }

    /// Adds the dynamic linker and what it reads itself.
    fn add_interpreter(&mut self, interpreter: &Path) {
        self.add_file(interpreter);
        let musl = interpreter
            .file_name()
            .is_some_and(|name| name.as_bytes().starts_with(b"ld-musl-"));
        if musl {
            self.add_file(&search::musl_path_file(interpreter));
        } else {
            self.add_file(Path::new("/etc/ld.so.cache"));
        }
    }

    /// Adds a host file under its path, with the links on the way. Nothing if it is not a file.
    fn add_file(&mut self, path: &Path) {
        let Some(resolved) = links::resolve(path) else {
            return;
        };
        if !resolved.file.is_file() {
            return;
        }
        for (guest, target) in resolved.links {
            let link = ClosureEntry::Symlink {
                guest: bytes(&guest),
                target: bytes(&target),
            };
            self.entries.insert(guest, link);
        }
        let entry = ClosureEntry::File {
            guest: bytes(&resolved.file),
            host: resolved.file.clone(),
        };
        self.entries.insert(resolved.file, entry);
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// The first bytes of a file.
fn read_head(path: &Path) -> Result<Vec<u8>, ClosureError> {
    use std::io::Read;
    let failed = |source| ClosureError::Read {
        path: path.to_path_buf(),
        source,
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut head = Vec::with_capacity(HEAD);
    file.take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(failed)?;
    Ok(head)
}

/// A path of bytes.
fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

#[cfg(test)]
mod tests;
