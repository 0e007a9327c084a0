//! The page file: where pages go that find no room in the pool.
//!
//! It has no name, is never larger than asked for, uses the disk only for pages that were written, and
//! goes with the VMM. Which page is where in it is the memory manager's business; its content means
//! nothing without the manager's tables.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use super::FRAME;

/// Why there is no page file.
#[derive(Debug, thiserror::Error)]
#[error("no page file can be made in {}", dir.display())]
pub struct PageFileError {
    /// The directory it was to be in.
    dir: PathBuf,
    /// The host's reason.
    #[source]
    source: io::Error,
}

/// A file without a name.
#[derive(Debug)]
pub struct PageFile {
    file: File,
    bytes: u64,
    /// A failed transfer was reported.
    reported: AtomicBool,
}

impl PageFile {
    /// A page file of `bytes` bytes, rounded down to pages, in `dir`.
    ///
    /// # Errors
    /// The host refuses.
    pub fn create(dir: &Path, bytes: u64) -> Result<Self, PageFileError> {
        let bytes = bytes / FRAME as u64 * FRAME as u64;
        let made = unnamed(dir).and_then(|file| file.set_len(bytes).map(|()| file));
        match made {
            Ok(file) => Ok(Self {
                file,
                bytes,
                reported: AtomicBool::new(false),
            }),
            Err(source) => Err(PageFileError {
                dir: dir.to_owned(),
                source,
            }),
        }
    }

    /// A device on which every write fails.
    #[cfg(test)]
    pub(super) fn full_device(pages: u64) -> Self {
        let file = File::options().read(true).write(true).open("/dev/full");
        Self {
            file: file.expect("the host has /dev/full"),
            bytes: pages * FRAME as u64,
            reported: AtomicBool::new(false),
        }
    }

    /// Pages it holds.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / FRAME as u64
    }

    /// Reads at `offset`; fewer bytes than asked only at the end of the file.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Writes all of `bytes` at `offset`, which never makes the file larger.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.file.write_all_at(bytes, offset)
    }

    /// Says that a transfer failed, once.
    pub(super) fn report(&self, what: &str, error: &io::Error) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the page file cannot be {what}; further errors are only counted");
        }
    }
}

/// A file in `dir` that no name leads to.
fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(dir, flags | OFlags::TMPFILE, mode) {
        Ok(fd) => return Ok(fd.into()),
        // A file system that cannot do it at once.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let path = dir.join(format!("vmm-page-file-{}", std::process::id()));
    let fd = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
    std::fs::remove_file(&path)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_file_has_no_name_and_does_not_grow() {
        let dir = tempfile::tempdir().unwrap();
        let file = PageFile::create(dir.path(), 3 * FRAME as u64 + 5).unwrap();
        assert_eq!(file.pages(), 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        file.write(FRAME as u64, &[7; FRAME]).unwrap();
        assert!(file.write(3 * FRAME as u64, &[7]).is_err());
        let mut back = [0; 2 * FRAME];
        assert_eq!(file.read(FRAME as u64, &mut back).unwrap(), 2 * FRAME);
        assert_eq!((back[0], back[FRAME - 1], back[FRAME]), (7, 7, 0));
    }

    #[test]
    fn directory_that_is_not_there_is_named() {
        let error = PageFile::create(Path::new("/nowhere/at/all"), 4096).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
