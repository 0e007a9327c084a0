//! Many guests of one image in one memory.
//!
//! The image is loaded once, into spaces in which nothing ever runs: the *seeds*. A guest's spaces are forks of them, and
//! cost what a fork costs: a root each, and what they change. That is the same as loading the image anew as long as
//! nothing in it is shared between forks but not between guests: shared memory, files in memory that are mapped,
//! mappings that a fork does not inherit. If there is any of that, every guest's spaces are loaded anew; the pages
//! they have read are there once all the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::load::{ImageLoader, Loaded};
use crate::memory::{Memory, Space, VmmPlatform};
use crate::snapshot::records::{
    BytesRef, ContentRef, LoadBytes, LoadContents, LoadMemory, MemoryError, SpaceRef,
};

/// The seeds of an image.
pub struct Seeds {
    memory: Arc<Memory>,
    image: ImageLoader,
    /// None if they cannot be forked.
    spaces: BTreeMap<SpaceRef, Arc<Space<VmmPlatform>>>,
}

/// Gives one guest its memory.
pub enum SeedLoader<'a> {
    /// By forks.
    Forks(&'a Seeds),
    /// Anew.
    Loads(ImageLoader),
}

impl Seeds {
    /// The spaces that were `loaded` into `memory`, and `image` to load more. `is_hosts` says which contents of mapped files
    /// are files of the host.
    pub fn new(
        memory: &Arc<Memory>,
        image: ImageLoader,
        loaded: &Loaded,
        is_hosts: impl Fn(ContentRef) -> bool,
    ) -> Self {
        let spaces = loaded.take_spaces();
        let spaces = match image.can_be_forked(is_hosts) {
            true => spaces.into_iter().collect(),
            false => BTreeMap::new(),
        };
        Self {
            memory: Arc::clone(memory),
            image,
            spaces,
        }
    }

    /// For one more guest.
    #[must_use]
    pub fn loader(&self) -> SeedLoader<'_> {
        match self.spaces.is_empty() {
            true => SeedLoader::Loads(self.image.again()),
            false => SeedLoader::Forks(self),
        }
    }

    /// Whether guests are forks.
    #[must_use]
    pub fn are_forked(&self) -> bool {
        !self.spaces.is_empty()
    }
}

impl LoadMemory for SeedLoader<'_> {
    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<Arc<Space<VmmPlatform>>, MemoryError> {
        match self {
            Self::Forks(seeds) => {
                let seed = seeds.spaces.get(&at).ok_or("no such address space")?;
                Ok(seeds.memory.fork(seed)?)
            }
            Self::Loads(image) => image.space(at, contents),
        }
    }

    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError> {
        match self {
            Self::Forks(seeds) => seeds.image.load_bytes(at, into),
            Self::Loads(image) => image.bytes(at, into),
        }
    }
}
