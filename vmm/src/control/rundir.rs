//! Run directories: `$XDG_RUNTIME_DIR/vmm/ID` or `/tmp/vmm-UID/ID`, for the owner only.
//!
//! Each holds the socket and a lock file. The VMM keeps the lock as long as it lives, so whoever can
//! take it knows that the directory is stale, and removes it. Making and removing directories is
//! serialised by a lock in the folder that has them all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// The socket's name in a run directory.
pub const SOCKET: &str = "socket";
/// The name there of a pool's socket for those who want clones.
pub const CLONES: &str = "clones";
/// The lock's name there.
const LOCK: &str = "lock";
/// The lock of the folder.
const FOLDER_LOCK: &str = ".lock";
/// Longest name of a guest.
const NAME_MAX: usize = 64;
/// Longest path of a socket (`sockaddr_un`), with its NUL.
const SOCKET_PATH_MAX: usize = 108;

/// Why there is no run directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The name cannot be one.
    #[error(
        "--name {0}: a name has 1 to {NAME_MAX} letters, digits, `.`, `-` or `_`, begins with none of `.-`, and is not only digits and `.`"
    )]
    BadName(String),
    /// It is taken.
    #[error("--name {0}: a guest with this name is running (vmm inspect lists them)")]
    Taken(String),
    /// The folder is somebody else's, or others may look into it.
    #[error("{0}: not a directory that only you may use; remove it or set XDG_RUNTIME_DIR")]
    Unsafe(PathBuf),
    /// The path is too long for a socket.
    #[error("{0}: the path is too long for a socket; set XDG_RUNTIME_DIR to a shorter one")]
    TooLong(PathBuf),
    /// The host refused.
    #[error("{path}")]
    Host {
        /// What was being done it to.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

fn host(path: &Path) -> impl FnOnce(io::Error) -> RunDirError + '_ {
    |source| RunDirError::Host {
        path: path.to_owned(),
        source,
    }
}

/// Checks a name a person gave.
///
/// # Errors
/// It cannot be one.
pub fn check_name(name: &str) -> Result<(), RunDirError> {
    let good = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let number = name.chars().all(|c| c.is_ascii_digit() || c == '.');
    let length = (1..=NAME_MAX).contains(&name.len());
    if length && !number && name.chars().all(good) && !name.starts_with(['.', '-']) {
        Ok(())
    } else {
        Err(RunDirError::BadName(name.to_owned()))
    }
}

/// The folder that has the run directories; it need not exist.
#[must_use]
pub fn folder() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime.filter(|dir| dir.is_absolute() && dir.is_dir()) {
        Some(dir) => dir.join("vmm"),
        None => format!("/tmp/vmm-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// What a guest is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called<'a> {
    /// As a person said.
    Name(&'a str),
    /// By the number of its VMM's process.
    Process,
    /// By that and its own: one of the clones in this process.
    Clone(u32),
}

impl<'a> From<Option<&'a str>> for Called<'a> {
    fn from(name: Option<&'a str>) -> Self {
        name.map_or(Self::Process, Self::Name)
    }
}

impl Called<'_> {
    fn id(self) -> Result<String, RunDirError> {
        let process = std::process::id();
        match self {
            Self::Name(name) => check_name(name).map(|()| name.to_owned()),
            Self::Process => Ok(process.to_string()),
            Self::Clone(number) => Ok(format!("{process}.{number}")),
        }
    }
}

/// A running guest's directory, removed when this is dropped.
#[derive(Debug)]
pub struct RunDir {
    folder: PathBuf,
    path: PathBuf,
    id: String,
    /// Locked for as long as the guest runs.
    _lock: File,
}

impl RunDir {
    /// Makes one in `folder`, which is made if need be.
    ///
    /// # Errors
    /// The name is bad or taken, or the host refuses.
    pub fn create<'a>(folder: &Path, called: impl Into<Called<'a>>) -> Result<Self, RunDirError> {
        // A process with many guests need not look again for each.
        static SWEPT: Once = Once::new();
        let id = called.into().id()?;
        let path = folder.join(&id);
        if path.join(SOCKET).as_os_str().len() >= SOCKET_PATH_MAX {
            return Err(RunDirError::TooLong(path));
        }
        make_private(folder)?;
        let _serialised = lock_folder(folder)?;
        SWEPT.call_once(|| remove_stale(folder));
        let make = || DirBuilder::new().mode(0o700).create(&path);
        let made = make().or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                remove_stale(folder);
                make()
            }
            _ => Err(error),
        });
        match made {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RunDirError::Taken(id));
            }
            Err(error) => return Err(host(&path)(error)),
        }
        let lock = open_lock(&path.join(LOCK)).map_err(host(&path))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| host(&path)(e.into()))?;
        Ok(Self {
            folder: folder.to_owned(),
            path,
            id,
            _lock: lock,
        })
    }

    /// The guest's name, or its VMM's number.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name it was given, if it was given one: others have a number.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        let id = self.id.as_str();
        check_name(id).is_ok().then_some(id)
    }

    /// Where its socket goes.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Where a pool's socket for clones goes.
    #[must_use]
    pub fn clones(&self) -> PathBuf {
        self.path.join(CLONES)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _serialised = lock_folder(&self.folder);
        remove(&self.path);
    }
}

/// The guests that run, by id.
///
/// # Errors
/// The folder is not safe or cannot be read. That there is none is no error.
pub fn list(folder: &Path) -> Result<Vec<String>, RunDirError> {
    if !is_there(folder)? {
        return Ok(Vec::new());
    }
    let _serialised = lock_folder(folder)?;
    remove_stale(folder);
    let mut ids: Vec<_> = directories(folder)
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    ids.sort();
    Ok(ids)
}

/// Whether the folder is there. Nobody but its owner can have put anything into it: whoever answers there is his.
///
/// # Errors
/// It is not safe or cannot be looked at.
pub(super) fn is_there(folder: &Path) -> Result<bool, RunDirError> {
    match fs::symlink_metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(host(folder)(error)),
        Ok(_) => check_private(folder).map(|()| true),
    }
}

fn directories(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// Removes the directories of VMMs that are gone. What cannot be removed stays.
fn remove_stale(folder: &Path) {
    for path in directories(folder) {
        let stale = match File::open(path.join(LOCK)) {
            Ok(lock) => !matches!(
                rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive),
                Err(Errno::WOULDBLOCK)
            ),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if stale {
            remove(&path);
        }
    }
}

/// Removes what a VMM makes in its directory, and the directory.
fn remove(path: &Path) {
    for name in [SOCKET, CLONES, LOCK] {
        let _ = fs::remove_file(path.join(name));
    }
    if let Err(error) = fs::remove_dir(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(%error, path = %path.display(), "a run directory stays");
    }
}

fn make_private(folder: &Path) -> Result<(), RunDirError> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(host(folder)(error)),
    }
    check_private(folder)
}

fn check_private(folder: &Path) -> Result<(), RunDirError> {
    let found = fs::symlink_metadata(folder).map_err(host(folder))?;
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if found.is_dir() && ours && found.mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(RunDirError::Unsafe(folder.to_owned()))
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
}

/// Waits for the folder's lock, which nobody holds for long.
fn lock_folder(folder: &Path) -> Result<File, RunDirError> {
    let path = folder.join(FOLDER_LOCK);
    let lock = open_lock(&path).map_err(host(&path))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| host(&path)(error.into()))?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn name_is_one_guests_at_a_time() {
        let tmp = tempfile::tempdir().unwrap();
        let folder = tmp.path().join("vmm");
        let first = RunDir::create(&folder, Called::Name("warm")).unwrap();
        assert!(matches!(
            RunDir::create(&folder, Called::Name("warm")),
            Err(RunDirError::Taken(_))
        ));
        assert_eq!(list(&folder).unwrap(), ["warm"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join("warm"))), (0o700, 0o700));
        drop(first);
        assert_eq!(list(&folder).unwrap(), [""; 0]);
        RunDir::create(&folder, Called::Name("warm")).unwrap();
    }

    #[test]
    fn directory_whose_vmm_is_gone_is_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let folder = tmp.path().join("vmm");
        let dir = RunDir::create(&folder, Called::Name("old")).unwrap();
        // As if the VMM had been killed: the lock is gone, the files are not.
        let path = dir.path.clone();
        fs::write(dir.socket(), "").unwrap();
        let RunDir { _lock: lock, .. } = &dir;
        rustix::fs::flock(lock, FlockOperation::Unlock).unwrap();
        assert_eq!(list(&folder).unwrap(), [""; 0]);
        assert!(!path.exists());
    }

    #[test]
    fn folder_others_may_use_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let folder = tmp.path().join("vmm");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        for result in [
            RunDir::create(&folder, Called::Process).map(drop),
            list(&folder).map(drop),
        ] {
            assert!(matches!(result, Err(RunDirError::Unsafe(_))), "{result:?}");
        }
        let link = tmp.path().join("link");
        std::os::unix::fs::symlink(tmp.path(), &link).unwrap();
        assert!(RunDir::create(&link, Called::Process).is_err());
    }

    #[test]
    fn names_that_are_paths_or_numbers_are_refused() {
        for name in [
            "",
            "12",
            "12.3",
            ".x",
            "-x",
            "a/b",
            "..",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["a", "warm-1", "x.y_z", "1a"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }
}
