//! The bytes of a file in memory: a section over zeroes that has them all.
//!
//! What a descriptor reads and writes and what a mapping shows are the same frames, or the same slots of the page
//! file. Pages are charged to the guest's memory when the file comes to have them, and asked of an
//! [`Allowance`] (the file system's size). Nothing is kept of a page that was never written.
//!
//! It knows whole pages only; where the file ends within the last is the owner's business
//! (`linux/fs/memfs/data.rs`), and so is the order of writes. Reads and writes may wait for the page file and
//! for frames.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use shadow_mm::{
    Allowance, Extent, FaultOutcome, FrameStore, NoFrame, NoSpace, Pfn, PfnRange, Section,
    SectionAt, SectionIn, SectionPage, SectionStore,
};

use super::{Backing, FRAME, Memory};

const PAGE: u64 = FRAME as u64;
/// Pages of a layer that are copied at once, at most, for a write to all of them.
const AHEAD: usize = 16;
/// How often a page that goes again before it can be used is looked for.
const TRIES: usize = 64;

/// Why bytes of a file in memory could not be had or kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// The file may not have more pages (`ENOSPC`).
    #[error("no room for another page of a file in memory")]
    NoSpace,
    /// No frame is left (`ENOMEM`).
    #[error("no frame for a page of a file in memory")]
    NoMemory,
    /// The page file, or the snapshot that it is in (`EIO`).
    #[error("a page of a file in memory cannot be read")]
    Io,
}

impl From<StoredError> for rustix::io::Errno {
    fn from(error: StoredError) -> Self {
        match error {
            StoredError::NoSpace => Self::NOSPC,
            StoredError::NoMemory => Self::NOMEM,
            StoredError::Io => Self::IO,
        }
    }
}

impl From<StoredError> for io::Error {
    fn from(error: StoredError) -> Self {
        rustix::io::Errno::from(error).into()
    }
}

/// The bytes.
#[derive(Debug)]
pub struct Stored {
    memory: Arc<Memory>,
    section: Section<Backing>,
}

/// Pages of a section that are pages of another one, over a snapshot.
pub type Unread = (Section<Backing>, Vec<Extent>);

/// A page in memory, or what there is instead.
enum Found {
    There(shadow_mm::Pin),
    Zeroes,
}

impl Stored {
    /// None yet.
    ///
    /// # Errors
    /// No memory for the record.
    pub fn new(memory: &Arc<Memory>, allowance: Arc<dyn Allowance>) -> Result<Self, StoredError> {
        let section = memory.manager.create_file_section(allowance);
        Ok(Self {
            memory: Arc::clone(memory),
            section: section.map_err(|_| StoredError::NoMemory)?,
        })
    }

    /// What mappings are views of.
    #[must_use]
    pub fn section(&self) -> &Section<Backing> {
        &self.section
    }

    /// Pages it has or was promised.
    #[must_use]
    pub fn extent(&self) -> u64 {
        self.memory.manager.section_extent(&self.section)
    }

    /// The pages that were ever written or mapped, rising, but for those of a layer, and those that nobody has read out of a
    /// snapshot.
    #[must_use]
    pub fn pages(&self) -> Vec<u64> {
        let pages = self.memory.manager.section_pages(&self.section);
        pages.into_iter().map(SectionPage::get).collect()
    }

    /// The pages that are a layer's, with its frames: those that nobody has stored to. The frames are as they are as long as
    /// the machine is there.
    #[must_use]
    pub fn frozen(&self) -> Vec<(u64, PfnRange)> {
        self.memory.manager.section_frozen(&self.section)
    }

    /// The pages that nobody has read out of a snapshot, and the section over that.
    #[must_use]
    pub fn unread(&self) -> Option<Unread> {
        self.memory.manager.section_unread(&self.section)
    }

    /// Where it ends: a multiple of the page size.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.memory.manager.section_size(&self.section)
    }

    /// Sets where it ends, rounded up to whole pages. What lies beyond goes, out of mappings too.
    pub fn resize(&self, bytes: u64) {
        let resized = self.memory.resize_section(&self.section, bytes);
        debug_assert!(resized.is_ok(), "what is charged by the page may grow");
    }

    /// Gives pages back; they read as zeroes from then on.
    pub fn punch(&self, pages: Range<u64>) {
        self.memory.punch_section(&self.section, pages);
    }

    /// Promises pages, so that storing to them needs no room.
    ///
    /// # Errors
    /// [`StoredError::NoSpace`]; nothing is promised then.
    pub fn reserve(&self, pages: Range<u64>) -> Result<(), StoredError> {
        let reserved = self.memory.manager.reserve_section(&self.section, pages);
        reserved.map_err(|NoSpace| StoredError::NoSpace)
    }

    /// Reads; what was never written is zeroes.
    ///
    /// # Errors
    /// See [`StoredError`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoredError> {
        let mut done = 0;
        while done < buf.len() {
            let (page, start, n) = piece(offset + done as u64, buf.len() - done);
            let part = &mut buf[done..done + n];
            match self.find(page)? {
                Found::Zeroes => part.fill(0),
                Found::There(pin) => {
                    self.memory.manager.store().read(pin.pfn(), start, part);
                    self.memory.manager.unpin(pin);
                }
            }
            done += n;
        }
        Ok(())
    }

    /// Writes up to the end at most; gives back how many bytes, fewer than asked if there was no room for more.
    ///
    /// # Errors
    /// See [`StoredError`]; nothing was written then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<usize, StoredError> {
        let mut done = 0;
        while done < bytes.len() {
            let (page, start, n) = piece(offset + done as u64, bytes.len() - done);
            let left = (bytes.len() - done).div_ceil(FRAME).min(AHEAD);
            let stored = self.store((page, left), |pool, pfn| {
                pool.write(pfn, start, &bytes[done..done + n]);
            });
            match stored {
                Ok(()) => done += n,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Zeroes bytes of one page, if it has the page.
    ///
    /// # Errors
    /// See [`StoredError`].
    pub fn clear(&self, bytes: Range<u64>) -> Result<(), StoredError> {
        static ZEROES: [u8; FRAME] = [0; FRAME];
        if bytes.is_empty() {
            return Ok(());
        }
        let (page, start, n) = piece(bytes.start, FRAME);
        let n = n.min((bytes.end - bytes.start) as usize);
        match self.find(page)? {
            Found::Zeroes => {}
            Found::There(pin) => {
                let mut has = [0; FRAME];
                self.memory
                    .manager
                    .store()
                    .read(pin.pfn(), start, &mut has[..n]);
                self.memory.manager.unpin(pin);
                // Who looks for nothing else takes no frame for what is a layer's.
                if has[..n] != ZEROES[..n] {
                    self.store((page, 1), |pool, pfn| pool.write(pfn, start, &ZEROES[..n]))?;
                }
            }
        }
        Ok(())
    }

    fn find(&self, page: u64) -> Result<Found, StoredError> {
        let manager = &self.memory.manager;
        let Some(page) = SectionPage::new(page) else {
            return Ok(Found::Zeroes);
        };
        for _ in 0..TRIES {
            let seen = self.memory.reads.seen();
            match manager.section_page(&self.section, page) {
                SectionAt::Resident(pin) => return Ok(Found::There(pin)),
                SectionAt::Absent => return Ok(Found::Zeroes),
                SectionAt::PagedOut => {
                    let how = manager.section_page_in(&self.section, page);
                    self.bring(how, seen)?;
                }
                // Of files only.
                SectionAt::Reading(pending) => {
                    self.memory.wait(&pending).map_err(|_| StoredError::Io)?;
                }
            }
        }
        Err(StoredError::NoMemory)
    }

    /// Stores to a page with `with`; as many pages in all as the pair says are going to be stored to.
    fn store(
        &self,
        (page, ahead): (u64, usize),
        with: impl FnOnce(&super::Pool, Pfn),
    ) -> Result<(), StoredError> {
        let manager = &self.memory.manager;
        let page = SectionPage::new(page).ok_or(StoredError::NoSpace)?;
        self.memory.watch_level();
        for _ in 0..TRIES {
            let seen = self.memory.reads.seen();
            match manager.section_page_to_store(&self.section, page) {
                SectionStore::There(pin) => {
                    with(manager.store(), pin.pfn());
                    manager.unpin_stored(pin);
                    return Ok(());
                }
                SectionStore::In(how) => self.bring(how, seen)?,
                SectionStore::Frozen(thaw) => match self.memory.thaw(&thaw.ahead(ahead)) {
                    Ok(()) => {}
                    Err(NoFrame) if self.memory.make_room() => {}
                    Err(NoFrame) => return Err(StoredError::NoMemory),
                },
                SectionStore::NoSpace => return Err(StoredError::NoSpace),
                SectionStore::BeyondEnd => {
                    debug_assert!(false, "page {page:?} lies beyond the end");
                    return Err(StoredError::NoSpace);
                }
            }
        }
        // Frames are so short that pages are taken as fast as they come.
        Err(StoredError::NoMemory)
    }

    /// Does what it takes to have a page in memory, or waits for it.
    fn bring(&self, how: SectionIn<super::VmmPlatform>, seen: u64) -> Result<(), StoredError> {
        match how {
            SectionIn::PageIn(ticket) => match self.memory.page_in(ticket) {
                FaultOutcome::Denied(_) => return Err(StoredError::Io),
                other => self.memory.settle(other),
            },
            SectionIn::Read(ticket) => match self.memory.fill(ticket) {
                FaultOutcome::Denied(_) => return Err(StoredError::Io),
                other => self.memory.settle(other),
            },
            SectionIn::Collided => self.memory.reads.wait(seen),
            SectionIn::NoMemory if self.memory.make_room() => {}
            SectionIn::NoMemory => return Err(StoredError::NoMemory),
            SectionIn::Again => {}
        }
        Ok(())
    }
}

/// The page, the offset in it, and the bytes of the next piece of `len` bytes at `offset`.
fn piece(offset: u64, len: usize) -> (u64, usize, usize) {
    let start = (offset % PAGE) as usize;
    (offset / PAGE, start, len.min(FRAME - start))
}
