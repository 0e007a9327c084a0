//! The seam between the records and the memory image.
//!
//! Saving starts with the records: they hand over each address space and the bytes of each file in memory, and keep the numbers they get. The image names the *content* of a file
//! that is mapped (what [`crate::memory::Backing`] is the handle of) by asking back, and the records keep
//! what it takes to open it again. Restoring goes the same way: the records ask for spaces, and open the contents that are
//! asked back for.
//!
//! What the records promise when they call [`SaveMemory`]: the guest is stopped, and nothing that was stored to
//! a mapped file is only in memory ([`crate::memory::Sections::tidy`] has run): the pages of a
//! section with a content need not be kept, they can be read from it again. Private copies and sections
//! without a content are the image's own matter.

use std::fmt::Debug;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use shadow_mm::{PfnRange, Section};

use crate::memory::{Backing, Space, Unread, VmmPlatform};

/// Bytes of a page of a file in memory.
pub const PAGE_BYTES: usize = 4096;

/// A page of a file in memory.
pub type Page = [u8; PAGE_BYTES];

/// Why memory could not be saved or loaded; the image's own errors are behind it.
pub type MemoryError = Box<dyn std::error::Error + Send + Sync>;

macro_rules! references {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        $(
            $(#[$doc])*
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
            )]
            pub struct $name(pub u32);
        )*
    };
}

references! {
    /// An address space of the memory image.
    SpaceRef,
    /// The bytes of a file in memory, in the memory image.
    BytesRef,
    /// The content of a mapped file, in the records.
    ContentRef,
}

/// A file in memory, sparse.
pub trait SparseBytes: Debug {
    /// Its length in bytes.
    fn length(&self) -> u64;

    /// The section that has them.
    fn section(&self) -> &Section<Backing>;

    /// The pages that hold anything, in rising order, but for those that can be had later.
    fn pages(&self) -> Vec<u64>;

    /// Pages that are a layer's, with its frames, which do not change: they need not be read before the guest goes on.
    fn frozen(&self) -> Vec<(u64, PfnRange)>;

    /// Pages that the snapshot has which the guest was made of, and nobody has asked for: they need not be read before the guest
    /// goes on either. To be asked for before [`Self::pages`]: what somebody asks for meanwhile is among both then.
    fn unread(&self) -> Option<Unread>;

    /// One of them; zeroes if it holds nothing.
    ///
    /// # Errors
    /// It is in the page file, and does not come back.
    fn read(&self, page: u64, into: &mut Page) -> std::io::Result<()>;
}

/// A file in memory that is made again, and has nothing yet.
pub trait LoadBytes {
    /// The section that has its bytes.
    fn section(&self) -> &Section<Backing>;
}

/// Keeps memory for the records.
pub trait SaveMemory {
    /// An address space; each is given once.
    ///
    /// # Errors
    /// It cannot be kept.
    fn space(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        contents: &mut dyn SaveContents,
    ) -> Result<SpaceRef, MemoryError>;

    /// The bytes of a file in memory.
    ///
    /// # Errors
    /// They cannot be kept.
    fn bytes(&mut self, bytes: &dyn SparseBytes) -> Result<BytesRef, MemoryError>;
}

/// Names the contents of mapped files while memory is saved.
pub trait SaveContents {
    /// The number of a content, the same every time it is asked for.
    ///
    /// # Errors
    /// The file could not be opened again: it has no name any more, or another file has it.
    fn content(&mut self, backing: &Backing) -> Result<ContentRef, MemoryError>;
}

/// Gives the records their memory back.
pub trait LoadMemory {
    /// An address space, made anew; each is asked for once.
    ///
    /// # Errors
    /// The image has none with that number, it is damaged, or there is no room.
    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<Arc<Space<VmmPlatform>>, MemoryError>;

    /// The bytes of a file in memory, which go to a new one; returns the length, which the new one may not have yet.
    ///
    /// # Errors
    /// As [`LoadMemory::space`], and what `into` says.
    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError>;
}

/// Opens the contents of mapped files while memory is loaded, those that are asked for.
pub trait LoadContents {
    /// The content with that number, opened anew for this guest. A section on it is to be made by
    /// [`crate::memory::Sections::open`], so that descriptors of the file agree with it.
    ///
    /// # Errors
    /// There is none with that number.
    fn content(&self, at: ContentRef) -> Result<Backing, MemoryError>;
}
