//! One section for each file of the host that is mapped: what makes a mapping and a descriptor of the same file
//! agree. A file in memory is a section itself (`stored.rs`), and not known here.
//!
//! * **Mapping** a file, in whatever way, finds its section here or makes it: the text of a library is
//!   in memory once.
//! * **`write`** goes to the file first and then into the pages the section has; **`read`** takes from
//!   the file, and from the section's pages where they may be newer: once the file has been mapped
//!   shared and writable, until all of it was written back.
//! * **Truncation** takes pages out of every mapping before the file becomes shorter.
//! * **Writing back**: what was stored through shared mappings reaches the file by `msync`, `fsync`,
//!   when the last mapping has gone, once a second meanwhile (see `writeback.rs`), and when the machine
//!   ends.
//! * A section nobody maps is kept, since the next program will want the same library, as long as it
//!   has nothing to be written and frames are not short; at most [`KEPT`] of them, because each holds
//!   a file open.
//!
//! **The host's writers.** A page that is in memory is not read again while it is mapped: a guest that
//! has a file mapped does not see what a host process writes to it. `read` does, unless the file is
//! also mapped shared and writable. When a file is mapped anew and its size or times have changed, pages
//! that nobody has mapped are forgotten, and the section takes the new size. A host process that
//! truncates a mapped file leaves the pages in memory until then; pages not in memory give `SIGBUS`.
//!
//! **Who looks.** Writing back holds the files it looks at without the lock, and so keeps their sections. Whoever lets go of
//! what a guest had mapped waits until nobody looks any more: then the sections are gone, and not a moment later.
//!
//! **Locks.** `files` is held for a look only. A file's `io` lock orders whole writes against writing
//! back, as Linux' inode lock does; it is held across the file I/O it orders, and nothing but the memory
//! manager's locks is taken inside.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use shadow_mm::{FrameStore, Pin, Section, SectionAt, SectionPage, WriteBack, WriteFailed};

use super::Memory;
use super::content::{Backing, FileId, Version};
use super::flushes::concerns;
use super::looks::{Look, Looks};
use super::pool::FRAME;
use crate::locks::{Mutex, rank};

/// Most sections kept that nobody maps.
const KEPT: usize = 256;

/// What a mapping will do to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Read it, and copy what is stored to.
    Read,
    /// Store to it.
    Write,
}

/// A file with a section.
#[derive(Debug)]
pub struct MappedFile {
    section: Section<Backing>,
    /// Whether a page may be newer than the file: it is or was mapped shared and writable.
    stored_to: AtomicBool,
    io: Mutex<rank::FileIo, Io>,
}

#[derive(Debug)]
struct Io {
    /// Open for writing; none while nobody mapped it so.
    writer: Option<Backing>,
    version: Version,
}

/// The files that have a section.
#[derive(Debug, Default)]
pub struct Sections {
    files: Mutex<rank::MappedFiles, HashMap<FileId, Arc<MappedFile>>>,
    /// Whether there are any, to skip the lock.
    any: AtomicBool,
    /// Who holds files without the lock, and may not be a guest's thread.
    looks: Looks,
}

/// The files, held by somebody who looks at them.
struct Looked<'a> {
    files: Vec<Arc<MappedFile>>,
    /// Dropped after them.
    _look: Look<'a>,
}

impl Sections {
    /// The section of a file, to be mapped.
    ///
    /// # Errors
    /// The host's; `ENOMEM`.
    pub fn open(
        &self,
        memory: &Memory,
        backing: &Backing,
        intent: Intent,
    ) -> io::Result<Section<Backing>> {
        if let Some(section) = backing.0.storage() {
            return Ok(section.labelled(backing.clone()));
        }
        let version = backing.0.version()?;
        let (file, section) = {
            let mut files = self.files.lock();
            let file = match files.get(&backing.0.id()) {
                Some(file) => Arc::clone(file),
                None => {
                    let file = Arc::new(MappedFile::new(memory, backing, version)?);
                    files.insert(backing.0.id(), Arc::clone(&file));
                    self.any.store(true, Ordering::Release);
                    file
                }
            };
            if intent == Intent::Write {
                file.stored_to.store(true, Ordering::Release);
            }
            // With this handle out nobody takes the section for one that is not mapped.
            let section = file.section.clone();
            (file, section)
        };
        file.renew(memory, backing, version, intent);
        Ok(section)
    }

    /// The section of a file, if it has one.
    #[must_use]
    pub fn find(&self, id: FileId) -> Option<Arc<MappedFile>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.files.lock().get(&id).cloned()
    }

    /// The file of a section that is mapped.
    #[must_use]
    pub fn of(&self, section: &Section<Backing>) -> Option<Arc<MappedFile>> {
        let file = self.find(section.backing()?.0.id())?;
        (file.section == *section).then_some(file)
    }

    /// Holds the files, which [`Self::release`] and [`Self::close`] wait for.
    fn look(&self) -> Looked<'_> {
        let look = self.looks.begin();
        Looked {
            files: self.files.lock().values().cloned().collect(),
            _look: look,
        }
    }

    /// Writes back what was stored to mapped files, and lets go of sections nobody maps and that are not
    /// worth keeping. Says whether any file may be stored to from now on.
    pub fn tidy(&self, memory: &Memory) -> bool {
        let all = self.look();
        let stored_to = all.files.iter().filter(|file| file.is_stored_to());
        for file in stored_to {
            // Said when it fails; the pages stay, and it is tried again.
            let _ = file.write_back(memory, 0..u64::MAX);
        }
        let mut files = self.files.lock();
        let mut kept = 0;
        let mut gone = Vec::new();
        files.retain(|_, file| {
            let keeps = file.settle(memory) && kept < KEPT;
            kept += usize::from(keeps && !file.is_mapped());
            if !keeps {
                gone.push(Arc::clone(file));
            }
            keeps
        });
        let stored_to = files.values().any(|file| file.is_stored_to());
        drop(files);
        // Descriptors are closed without the lock.
        drop(gone);
        stored_to
    }

    /// Whether there is something to be written, or to let go once it is not mapped any more.
    #[must_use]
    pub fn untidy(&self) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let files = self.files.lock();
        files.len() > KEPT || files.values().any(|f| f.is_stored_to() || !f.keeps())
    }

    /// Writes back what was stored to mapped files, and lets go of the sections nobody maps: those who did are gone.
    pub fn release(&self, memory: &Memory) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        self.tidy(memory);
        let mut gone = Vec::new();
        self.files.lock().retain(|_, file| {
            let keeps = file.is_mapped();
            if !keeps {
                gone.push(Arc::clone(file));
            }
            keeps
        });
        // Descriptors are closed without the lock.
        drop(gone);
        self.looks.wait();
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.files.lock().len() as u64
    }

    /// Lets go of everything, for the end of the machine: nothing is mapped any more.
    pub fn close(&self, memory: &Memory) {
        self.tidy(memory);
        drop(std::mem::take(&mut *self.files.lock()));
        self.looks.wait();
    }
}

impl MappedFile {
    fn new(memory: &Memory, backing: &Backing, version: Version) -> io::Result<Self> {
        let section = memory
            .manager
            .create_section(Some(backing.clone()), version.size)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self {
            section,
            stored_to: AtomicBool::new(false),
            io: Mutex::new(Io {
                writer: None,
                version,
            }),
        })
    }

    fn is_stored_to(&self) -> bool {
        self.stored_to.load(Ordering::Acquire)
    }

    /// Whether a store through a mapping is known of and not written to the file.
    #[must_use]
    pub fn is_modified(&self, memory: &Memory) -> bool {
        memory.manager.section_modified(&self.section)
    }

    /// Whether anybody has a handle of the section but this record.
    fn is_mapped(&self) -> bool {
        self.section.handles() > 1
    }

    /// Whether the section is worth keeping when nobody maps it.
    fn keeps(&self) -> bool {
        self.section.backing().is_some_and(|b| b.0.keeps())
    }

    /// With all files locked: whether the section is still of use.
    fn settle(&self, memory: &Memory) -> bool {
        if self.is_mapped() || memory.manager.section_modified(&self.section) {
            return true;
        }
        // All was written, and nobody can store any more.
        self.stored_to.store(false, Ordering::Release);
        self.keeps() && memory.manager.section_resident(&self.section) > 0
    }

    /// Takes note of what the file has become since it was mapped last.
    fn renew(&self, memory: &Memory, backing: &Backing, version: Version, intent: Intent) {
        let mut io = self.io.lock();
        if intent == Intent::Write && io.writer.is_none() {
            io.writer = Some(backing.clone());
        }
        if io.version != version {
            io.version = version;
            memory.manager.section_forget(&self.section);
            self.set_size(memory, version.size);
        }
    }

    fn set_size(&self, memory: &Memory, size: u64) {
        if memory.manager.section_size(&self.section) != size {
            // A file's section is not charged, so that it may grow.
            let resized = memory.manager.resize_section(&self.section, size);
            debug_assert!(resized.is_ok(), "{resized:?}");
            for flush in resized.into_iter().flatten() {
                memory.submit(flush);
            }
        }
    }

    /// The file open for writing, if it was mapped so.
    #[must_use]
    pub fn writer(&self) -> Option<Backing> {
        self.io.lock().writer.clone()
    }

    /// Writes pages of a range, in bytes, that were stored to through mappings to the file. No lock may be held: who
    /// stores to them is stopped for a moment, so that what is stored from then on is seen the next time.
    ///
    /// # Errors
    /// The first error; the pages it is about stay modified.
    pub fn write_back(&self, memory: &Memory, range: Range<u64>) -> io::Result<()> {
        for flush in memory.manager.collect_dirty(&self.section) {
            if flush.is_empty() {
                memory.submit(flush);
                continue;
            }
            let whose = concerns(&flush);
            memory.submit(flush);
            memory.flushes.quiesce_for(whose);
        }
        let mut io = self.io.lock();
        let mut from = range.start;
        let mut result = Ok(());
        while let Some(ticket) = memory.manager.write_back(&self.section, from..range.end) {
            from = ticket.offset() + (ticket.frames().len() * FRAME) as u64;
            let written = write(memory, io.writer.as_ref(), &ticket);
            let told = written.as_ref().map(|&()| ()).map_err(|_| WriteFailed);
            memory.manager.complete_write_back(ticket, told);
            if let Err(error) = written {
                tracing::warn!(%error, file = %self.name(), "what was stored to a mapped file could not be written to it");
                result = result.and(Err(error));
            }
        }
        self.refresh_version(&mut io);
        result
    }

    /// Makes what was written to the file durable.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        self.section.backing().map_or(Ok(()), |b| b.0.sync())
    }

    /// Our own writes are no news.
    fn refresh_version(&self, io: &mut Io) {
        if let Some(Ok(version)) = self.section.backing().map(|b| b.0.version()) {
            io.version = version;
        }
    }

    /// Writes to the file with `put`, which says where the bytes went, and stores them where mappings
    /// show them.
    ///
    /// # Errors
    /// `put`'s.
    pub fn write<E>(
        &self,
        memory: &Memory,
        bytes: &[u8],
        put: impl FnOnce() -> Result<(u64, usize), E>,
    ) -> Result<usize, E> {
        let mut io = self.io.lock();
        let (at, n) = put()?;
        let end = at + n as u64;
        if end > memory.manager.section_size(&self.section) {
            self.set_size(memory, end);
        }
        self.each_resident(memory, at..end, |store, pin, offset, part| {
            store.write(pin.pfn(), offset, &bytes[part]);
        });
        self.refresh_version(&mut io);
        Ok(n)
    }

    /// Reads from the file with `get`, and what mappings may have newer from them.
    ///
    /// # Errors
    /// `get`'s.
    pub fn read<E>(
        &self,
        memory: &Memory,
        at: u64,
        buf: &mut [u8],
        get: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        if !self.is_stored_to() {
            return get(buf);
        }
        let _io = self.io.lock();
        let n = get(buf)?;
        self.each_resident(memory, at..at + n as u64, |store, pin, offset, part| {
            store.read(pin.pfn(), offset, &mut buf[part]);
        });
        Ok(n)
    }

    /// Changes the file's length with `set`.
    ///
    /// # Errors
    /// `set`'s.
    pub fn truncate<E>(
        &self,
        memory: &Memory,
        length: u64,
        set: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut io = self.io.lock();
        let old = memory.manager.section_size(&self.section);
        // Pages go before the file has nothing to fill them with, and come after it has.
        if length < old {
            self.set_size(memory, length);
        }
        let done = set();
        match &done {
            Ok(()) => self.set_size(memory, length),
            Err(_) => self.set_size(memory, old),
        }
        self.refresh_version(&mut io);
        done
    }

    /// Changes the file's layout from `at` on with `change`: holes, ranges taken out or put in.
    ///
    /// # Errors
    /// `change`'s, or what writing back said before it.
    pub fn reshape<E: From<io::Error>>(
        &self,
        memory: &Memory,
        at: u64,
        change: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        self.write_back(memory, 0..u64::MAX)?;
        let mut io = self.io.lock();
        change()?;
        self.refresh_version(&mut io);
        self.set_size(memory, io.version.size);
        let mut failed = None;
        if let Some(backing) = self.section.backing() {
            let end = io.version.size;
            let mut page = [0; FRAME];
            self.each_resident(
                memory,
                at / FRAME as u64 * FRAME as u64..end,
                |store, pin, offset, part| {
                    let from = at / FRAME as u64 * FRAME as u64 + part.start as u64;
                    let bytes = &mut page[..part.len()];
                    bytes.fill(0);
                    match backing.0.read_at(from, bytes) {
                        Ok(_) => store.write(pin.pfn(), offset, bytes),
                        Err(error) => failed = Some(error),
                    }
                },
            );
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Calls `visit` for each page of a range of bytes that is in memory, pinned: with the offset in
    /// the page, and which bytes of the range it holds.
    fn each_resident(
        &self,
        memory: &Memory,
        range: Range<u64>,
        mut visit: impl FnMut(&super::Pool, &Pin, usize, Range<usize>),
    ) {
        let mut at = range.start;
        while at < range.end {
            let Some(page) = SectionPage::new(at / FRAME as u64) else {
                return;
            };
            let offset = (at % FRAME as u64) as usize;
            let n = (range.end - at).min((FRAME - offset) as u64) as usize;
            let start = (at - range.start) as usize;
            loop {
                match memory.manager.section_page(&self.section, page) {
                    // A file's pages never go to the page file.
                    SectionAt::Absent | SectionAt::PagedOut => break,
                    SectionAt::Resident(pin) => {
                        visit(memory.manager.store(), &pin, offset, start..start + n);
                        memory.manager.unpin(pin);
                        break;
                    }
                    SectionAt::Reading(pending) => {
                        // Whether it failed is for who reads it.
                        let _ = memory.wait(&pending);
                    }
                }
            }
            at += n as u64;
        }
    }

    fn name(&self) -> String {
        let path = self.section.backing().map(|b| b.0.path());
        String::from_utf8_lossy(&path.unwrap_or_default()).into_owned()
    }
}

/// Performs one write through a bounce buffer.
fn write(memory: &Memory, writer: Option<&Backing>, ticket: &WriteBack<Backing>) -> io::Result<()> {
    let writer = writer.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
    let mut buffer = vec![0; ticket.length()];
    for (frame, bytes) in ticket.frames().iter().zip(buffer.chunks_mut(FRAME)) {
        memory.manager.store().read(*frame, 0, bytes);
    }
    writer.0.write_at(ticket.offset(), &buffer)
}

#[cfg(test)]
mod tests;
