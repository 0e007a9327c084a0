//! A whole guest: stopped, written, and read again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shadow_mm::{CommitLimit, SpaceUsage};

use super::format::PartKind;
use super::image::{Copied, ImageWriter, RebaseError, SaveError, Saved};
use super::read::{ReadError, Snapshot, Trust};
use super::records::{Records, Refused, save};
use super::write::{Base, WriteError, Writer, Written};
use crate::inspect::About;
use crate::linux::kernel::Kernel;
use crate::machine::hardware::MAX_MEMORY;
use crate::memory::FRAME;

/// What kind of machine a guest was in, and what it is called: for people, and to make another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineData {
    /// The VMM that wrote it.
    pub version: String,
    /// The program and its arguments.
    pub command: Vec<Vec<u8>>,
    /// Bytes of guest memory, page tables included.
    pub memory: u64,
    /// Bytes of the page file; 0 for none.
    pub page_file: u64,
    /// Programs may ask for more memory than there is.
    pub overcommit: bool,
    /// Bytes of private memory that one process may ask for.
    pub process_memory: Option<u64>,
}

impl MachineData {
    /// The machine that a guest made of this one takes. Where memory is promised to nobody, in a machine that guests share, one may
    /// have been given more than there was in the machine of its template.
    #[must_use]
    pub fn with_room_for(&self, kernel: &Kernel) -> Self {
        let mut machine = self.clone();
        let shares =
            kernel.memory.manager.commit_limit() == CommitLimit::Unlimited && !self.overcommit;
        let pages: u64 = usage(kernel).map(|usage| usage.charged).sum();
        let bytes = pages.saturating_mul(FRAME as u64);
        if shares && bytes > self.memory / 4 * 3 + self.page_file {
            // Page tables and what is kept in reserve are part of it.
            let wanted = bytes.saturating_add(bytes / 2);
            machine.memory = wanted.clamp(self.memory, MAX_MEMORY.max(self.memory));
        }
        machine
    }

    /// The guest as others see it, called `id`, in this process.
    #[must_use]
    pub fn about(&self, id: String) -> About {
        let words = self.command.iter();
        About {
            id,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: words
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
        }
    }
}

/// Why a guest was not saved. It goes on as before, and what was there before is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It holds something that could not be made again, or has ended.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Its memory.
    #[error(transparent)]
    Image(#[from] SaveError),
    /// The snapshot's file.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The records cannot be encoded.
    #[error("the guest's records cannot be encoded")]
    Encode(#[source] postcard::Error),
}

/// A guest that was saved.
#[derive(Debug)]
pub struct SavedGuest {
    /// The snapshot.
    pub written: Written,
    /// How long the guest stood still.
    pub pause: Duration,
    /// Pages that were copied in that time.
    pub copied_in_pause: u64,
}

/// Pages a snapshot may have at most, as far as that is known before.
#[must_use]
pub fn expected_pages(kernel: &Kernel) -> u64 {
    usage(kernel).map(|usage| usage.private).sum()
}

/// What a guest's address spaces use; there may be those of others in its machine.
fn usage(kernel: &Kernel) -> impl Iterator<Item = SpaceUsage> {
    let state = kernel.state();
    let all = state.procs.values().filter_map(|p| p.mm.as_ref());
    let all: BTreeMap<_, _> = all
        .map(|mm| (mm.space.id().get(), Arc::clone(&mm.space)))
        .collect();
    drop(state);
    let manager = &kernel.memory.manager;
    all.into_values().map(move |space| manager.usage(&space))
}

/// Stops a guest, and writes it down as it is then. It goes on as soon as its memory is kept
/// ([`ImageWriter`]), while that is copied and what was written is made durable. `progress` is told of the pages written.
///
/// # Errors
/// See [`SnapshotError`].
pub fn save_guest(
    kernel: &Arc<Kernel>,
    machine: &MachineData,
    writer: Writer,
    base: Option<Base>,
    progress: &mut dyn FnMut(u64),
) -> Result<SavedGuest, SnapshotError> {
    let memory = &kernel.memory;
    if memory.sections.untidy() {
        // It takes the less while the guest stands still.
        memory.sections.tidy(memory);
    }
    let from = Instant::now();
    let stopped = kernel.stop();
    let mut image = ImageWriter::new(memory, writer, base, progress);
    let records = save(kernel, &mut image)?;
    image.keep_shared()?;
    let copied_in_pause = image.pages();
    let copying = memory.begin_copy();
    stopped.resume();
    let pause = from.elapsed();
    let Saved {
        writer,
        spaces,
        copied,
    } = image.finish()?;
    // Of what is written to a disk nothing is kept until it is there.
    let copied = copied.map(|copied| (copied, copying));
    let machine = postcard::to_stdvec(machine).map_err(SnapshotError::Encode)?;
    let records = postcard::to_stdvec(&records).map_err(SnapshotError::Encode)?;
    let parts = [
        (PartKind::Machine, machine.as_slice()),
        (PartKind::Records, &records),
        (PartKind::Spaces, &spaces),
    ];
    let written = writer.finish(&parts)?;
    if let Some((copied, _until_then)) = copied
        && let Err(error) = go_on_on(&written, copied)
    {
        tracing::debug!(%error, "the guest goes on on its own pages");
    }
    Ok(SavedGuest {
        written,
        pause,
        copied_in_pause,
    })
}

/// Has a guest go on on the pages of the template to which it was copied.
fn go_on_on(template: &Written, copied: Copied<'_>) -> Result<(), GoOnError> {
    let file = template.file.try_clone()?;
    let name = "the guest's template".to_owned();
    let template = Snapshot::from_file(file, name, Trust::Sealed, None)?;
    copied.rebase(&Arc::new(template))?;
    Ok(())
}

/// Why a guest goes on on its own pages.
#[derive(Debug, thiserror::Error)]
enum GoOnError {
    /// The template's file.
    #[error(transparent)]
    File(#[from] std::io::Error),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It cannot be laid under the guest.
    #[error(transparent)]
    Rebase(#[from] RebaseError),
}

/// Why a snapshot holds no guest.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A part is none.
    #[error("{path}: damaged, or made by another version of vmm")]
    Decode {
        /// Which file.
        path: String,
        /// What does not fit.
        #[source]
        source: postcard::Error,
    },
}

/// Reads the machine and the records of a snapshot.
///
/// # Errors
/// They are damaged.
pub fn open_guest(snapshot: &Snapshot) -> Result<(MachineData, Records), OpenError> {
    let decode = |source| OpenError::Decode {
        path: snapshot.path().to_owned(),
        source,
    };
    let machine = snapshot.part(PartKind::Machine)?;
    let machine = postcard::from_bytes(&machine).map_err(decode)?;
    let records = snapshot.part(PartKind::Records)?;
    let records = postcard::from_bytes(&records).map_err(decode)?;
    Ok((machine, records))
}
