//! A snapshot's pages as the content of a section.

use std::io;
use std::sync::Arc;

use crate::locks::{Mutex, rank};
use crate::memory::{Content, FRAME, FileId, Version};
use crate::snapshot::format::StoredPage;
use crate::snapshot::read::Snapshot;

/// Told when a page cannot be had.
type Failed = Arc<dyn Fn(&io::Error) + Send + Sync>;

/// The pages of a snapshot, read-only.
pub struct ImageContent {
    snapshot: Arc<Snapshot>,
    failed: Mutex<rank::ImageFailure, Option<Failed>>,
}

impl std::fmt::Debug for ImageContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ImageContent")
            .field(&self.snapshot.path())
            .finish()
    }
}

impl ImageContent {
    /// The pages of `snapshot`.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            failed: Mutex::default(),
        }
    }

    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Has `failed` told of every read that fails: a guest whose memory is gone must not go on, and it is
    /// not the guest's fault. Whoever was told before is told no more.
    pub fn on_failure(&self, failed: Failed) {
        *self.failed.lock() = Some(failed);
    }
}

impl Content for ImageContent {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        debug_assert_eq!(offset % FRAME as u64, 0, "sections are read by the page");
        let first = StoredPage::new(offset / FRAME as u64);
        let read = self.snapshot.read_pages(first, buf);
        if let Err(error) = &read {
            let failed = self.failed.lock().clone();
            // Without the lock: it ends a machine.
            if let Some(failed) = failed {
                failed(error);
            }
        }
        read
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EBADF))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn version(&self) -> io::Result<Version> {
        Ok(Version {
            size: self.snapshot.pages() * FRAME as u64,
            ..Version::default()
        })
    }

    fn id(&self) -> FileId {
        FileId::Memory(std::ptr::from_ref(self).addr())
    }

    fn keeps(&self) -> bool {
        true
    }

    fn identity(&self) -> (u64, u64) {
        (0, 0)
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn path(&self) -> Vec<u8> {
        self.snapshot.path().as_bytes().to_vec()
    }
}
