//! The contents of mapped files as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::{Damaged, Refused, RestoreError};
use super::load::Loader;
use super::save::Saver;
use super::tables::InodeIx;
use crate::linux::fs::saved::SavedHostFile;
use crate::linux::fs::{host, memfs};
use crate::memory::{Backing, Content};

/// What a mapping shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SavedContent {
    /// A file of the host.
    Host(SavedHostFile),
    /// A file in memory, and its guest path.
    Memory(InodeIx, Vec<u8>),
}

impl SavedContent {
    pub(super) fn of(content: Arc<dyn Content>, s: &mut Saver<'_>) -> Result<Self, Refused> {
        let any = content.as_any();
        if let Some((inode, path)) = memfs::saved::saved_content(&any, s) {
            return Ok(Self::Memory(inode, path));
        }
        host::saved_content(&any, s).expect("there are two kinds")
    }

    /// Whether what was opened for it has not changed since.
    pub(super) fn is_still(&self, opened: &Backing) -> bool {
        match self {
            Self::Host(file) => file.is_still(opened),
            Self::Memory(..) => false,
        }
    }

    pub(super) fn load(&self, l: &Loader<'_>) -> Result<Backing, RestoreError> {
        match self {
            Self::Host(file) => file.load_content(l.k),
            Self::Memory(inode, path) => {
                let inode = l.inode(*inode)?;
                Ok::<_, Damaged>(memfs::saved::load_backing(inode, path)?)
                    .map_err(RestoreError::from)
            }
        }
    }
}
