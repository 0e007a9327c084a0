//! Whether a snapshot's file is as it was finished, without reading it.
//!
//! The header says which inode the file has and when it was modified last ([`Seal`]). That time is set on the file when all
//! is written, so it holds as long as nobody writes to it. A file whose seal holds needs no look at all of its pages before
//! a guest is made of it, and opening a large one takes no longer than a small one. Any other file is looked at: one that
//! was written to, cut or lengthened, a copy (even one that kept the time: it has another inode), one on a file system
//! that does not keep nanoseconds.
//!
//! What this is not: a proof. A disk that loses bits keeps the time, and whoever may write to the file may set its time. Such
//! a page is found when it is read, like any other.

use std::fs::{File, FileTimes, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use super::format::Seal;

/// The seal that a file has once [`set`] was called and as long as nobody writes to it.
///
/// # Errors
/// The host does not say which inode it is.
pub(super) fn now(file: &File) -> io::Result<Seal> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let modified_ns = since
        .ok()
        .and_then(|since| since.as_nanos().try_into().ok());
    Ok(Seal {
        inode: file.metadata()?.ino(),
        // A host before 1970: the seal is of a moment that never comes.
        modified_ns: modified_ns.unwrap_or(1),
    })
}

/// Gives the file the time of its seal. Everything else must have been written.
///
/// # Errors
/// The host's. A file system that keeps the time less exactly is no error: the seal does not hold there.
pub(super) fn set(file: &File, seal: Seal) -> io::Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(seal.modified_ns);
    file.set_times(FileTimes::new().set_modified(time))
}

/// Whether nobody has written to the file since.
pub(super) fn holds(found: &Metadata, seal: Option<Seal>) -> bool {
    let nanoseconds = u64::try_from(found.mtime_nsec()).ok();
    let seconds = u64::try_from(found.mtime()).ok();
    let time = seconds.and_then(|s| s.checked_mul(1_000_000_000)?.checked_add(nanoseconds?));
    seal.is_some_and(|seal| found.ino() == seal.inode && time == Some(seal.modified_ns))
}
