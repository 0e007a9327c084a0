//! The bytes of an in-memory file: its length, and a section that has its pages.
//!
//! The length's lock is held for a whole write, truncation or reservation, so that they come one after the other,
//! and appended pieces lie one after the other; it is not held while bytes are read. Mappings show whole
//! pages: what is stored there beyond the end is zeroed before the file grows over it.

use std::sync::Arc;

use rustix::io::Errno;
use shadow_mm::{PfnRange, SectionPage, Sharing};

use super::seals::Seals;
use crate::linux::fs::budget::Budget;
use crate::linux::mm::TAG_SHARED;
use crate::locks::{Mutex, rank};
use crate::memory::{Backing, Memory, Stored, Unread};
use crate::snapshot::records::{LoadBytes, Page, SparseBytes};
use shadow_mm::Section;

const PAGE: u64 = 4096;
/// One past the last byte that can be written.
const END: u64 = SectionPage::COUNT * PAGE;

/// A file's bytes.
#[derive(Debug)]
pub(super) struct Data {
    memory: Arc<Memory>,
    stored: Stored,
    state: Mutex<rank::MemPages, State>,
}

#[derive(Debug)]
struct State {
    size: u64,
    seals: Seals,
}

impl Data {
    /// None yet. `budget` limits the pages.
    pub(super) fn new(
        memory: &Arc<Memory>,
        budget: &Arc<Budget>,
        seals: Seals,
    ) -> Result<Self, Errno> {
        Ok(Self {
            memory: Arc::clone(memory),
            stored: Stored::new(memory, Arc::clone(budget) as _)?,
            state: Mutex::new(State { size: 0, seals }),
        })
    }

    pub(super) fn seals(&self) -> Seals {
        self.state.lock().seals
    }

    /// Adds seals.
    ///
    /// # Errors
    /// `EPERM`; `EBUSY` for [`Seals::WRITE`] as long as somebody may store through a mapping.
    pub(super) fn seal(&self, more: Seals) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if state.seals.contains(Seals::SEAL) {
            return Err(Errno::PERM);
        }
        // Who maps it at this moment looks at the seals again when it is mapped.
        if (more - state.seals).contains(Seals::WRITE) && self.is_mapped_writable() {
            return Err(Errno::BUSY);
        }
        state.seals |= more;
        Ok(())
    }

    /// The same, of a file that is made again.
    pub(super) fn restore_seals(&self, seals: Seals) {
        self.state.lock().seals = seals;
    }

    /// Whether somebody has a shared mapping and may make it writable.
    fn is_mapped_writable(&self) -> bool {
        let writable = |vad: &shadow_mm::VadInfo<Backing>| {
            vad.sharing() == Sharing::Shared && vad.tag != TAG_SHARED
        };
        let manager = &self.memory.manager;
        manager.any_view(self.stored.section(), writable)
    }

    /// What mappings of it are views of.
    pub(super) fn section(&self) -> &shadow_mm::Section<Backing> {
        self.stored.section()
    }

    /// Length in bytes, and pages that it has.
    pub(super) fn size(&self) -> (u64, u64) {
        (self.state.lock().size, self.stored.extent())
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let size = self.state.lock().size;
        let left = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        self.stored.read(offset, &mut buf[..left])?;
        Ok(left)
    }

    /// Writes at `offset`, or at the end if there is none; gives the bytes written, fewer than
    /// asked if there is no room for more.
    pub(super) fn write(&self, offset: Option<u64>, buf: &[u8]) -> Result<usize, Errno> {
        if buf.is_empty() {
            return Ok(0);
        }
        let mut state = self.state.lock();
        let State { size, seals } = &mut *state;
        let offset = offset.unwrap_or(*size);
        if offset >= END {
            return Err(Errno::FBIG);
        }
        seals.allow_write()?;
        let last = if seals.contains(Seals::GROW) {
            *size
        } else {
            END
        };
        if offset >= last {
            return Err(Errno::PERM);
        }
        let buf = &buf[..buf.len().min((last - offset) as usize)];
        let end = offset + buf.len() as u64;
        if offset > *size {
            self.clear_tail(*size)?;
        }
        if end > self.stored.end() {
            self.stored.resize(end);
        }
        let written = self.stored.write(offset, buf);
        if let Ok(done) = written {
            *size = (*size).max(offset + done as u64);
        }
        if written != Ok(buf.len()) {
            self.stored.resize(*size);
        }
        Ok(written?)
    }

    pub(super) fn truncate(&self, length: u64) -> Result<(), Errno> {
        if length > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        let mut state = self.state.lock();
        state.seals.allow_size(state.size, length)?;
        self.clear_tail(length.min(state.size))?;
        self.stored.resize(length);
        state.size = length;
        Ok(())
    }

    /// Reserves `length` bytes at `offset`, and makes the file reach them if `grow`; else only what lies
    /// before the end is reserved.
    pub(super) fn reserve(&self, offset: u64, length: u64, grow: bool) -> Result<(), Errno> {
        let end = offset.checked_add(length).filter(|&end| end <= END);
        let end = end.ok_or(Errno::FBIG)?;
        let mut state = self.state.lock();
        let State { size, seals } = &mut *state;
        seals.allow_size(*size, end.max(*size))?;
        if grow && end > *size {
            self.clear_tail(*size)?;
            self.stored.resize(end);
        }
        let reserved = self.stored.reserve(offset / PAGE..end.div_ceil(PAGE));
        if grow && reserved.is_ok() {
            *size = (*size).max(end);
        } else {
            self.stored.resize(*size);
        }
        Ok(reserved?)
    }

    /// Zeroes `length` bytes at `offset`, giving whole pages back.
    pub(super) fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let end = offset.checked_add(length).ok_or(Errno::INVAL)?;
        let state = self.state.lock();
        state.seals.allow_write()?;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first > last {
            return Ok(self.stored.clear(offset..end)?);
        }
        self.stored.clear(offset..first * PAGE)?;
        self.stored.clear(last * PAGE..end)?;
        self.stored.punch(first..last);
        Ok(())
    }

    /// Zeroes what the page with the byte before `end` has from there on.
    fn clear_tail(&self, end: u64) -> Result<(), Errno> {
        Ok(self.stored.clear(end..end.next_multiple_of(PAGE))?)
    }
}

impl LoadBytes for Data {
    fn section(&self) -> &shadow_mm::Section<Backing> {
        self.section()
    }
}

impl SparseBytes for Data {
    fn length(&self) -> u64 {
        self.state.lock().size
    }

    fn section(&self) -> &Section<Backing> {
        self.stored.section()
    }

    fn pages(&self) -> Vec<u64> {
        self.stored.pages()
    }

    fn frozen(&self) -> Vec<(u64, PfnRange)> {
        self.stored.frozen()
    }

    fn unread(&self) -> Option<Unread> {
        self.stored.unread()
    }

    fn read(&self, page: u64, into: &mut Page) -> std::io::Result<()> {
        Ok(self.stored.read(page * PAGE, into)?)
    }
}

#[cfg(test)]
mod tests {
    use shadow_mm::{
        Access, CommitLimit, FrameStore, GuestVa, MapKind, MapRequest, Placement, Prot, Sharing,
        Space, VadFlags, VadTag,
    };

    use super::*;
    use crate::linux::testing::memory;
    use crate::memory::{AccessError, VmmPlatform};

    const VIEW: u64 = 0x10_0000;

    fn data(memory: &Arc<Memory>, budget: u64) -> (Data, Arc<Budget>) {
        let all = Budget::new(1 << 20, None);
        let budget = Budget::new(budget, Some(all));
        (Data::new(memory, &budget, Seals::empty()).unwrap(), budget)
    }

    fn view(memory: &Memory, data: &Data, sharing: Sharing) -> Arc<Space<VmmPlatform>> {
        let space = memory.manager.create_space().unwrap();
        let request = MapRequest {
            placement: Placement::Fixed(GuestVa::new(VIEW).unwrap().vpn()),
            count: 16,
            prot: Prot::READ | Prot::WRITE,
            kind: MapKind::View {
                section: data.section().clone(),
                offset: 0,
                sharing,
            },
            flags: VadFlags::empty(),
            tag: VadTag::default(),
        };
        memory.submit(memory.manager.map(&space, request).unwrap().flush);
        space
    }

    fn store(
        memory: &Memory,
        space: &Arc<Space<VmmPlatform>>,
        at: u64,
        byte: u8,
    ) -> Result<(), AccessError> {
        let va = GuestVa::new(VIEW + at).unwrap();
        memory.with_page(space, va, Access::Write, |pool, frame| {
            pool.write(frame, (at % PAGE) as usize, &[byte]);
        })
    }

    fn load(memory: &Memory, space: &Arc<Space<VmmPlatform>>, at: u64) -> Result<u8, AccessError> {
        let va = GuestVa::new(VIEW + at).unwrap();
        memory.with_page(space, va, Access::Read, |pool, frame| {
            let mut byte = [0];
            pool.read(frame, (at % PAGE) as usize, &mut byte);
            byte[0]
        })
    }

    fn read<const N: usize>(data: &Data, offset: u64) -> (usize, [u8; N]) {
        let mut buf = [1; N];
        let n = data.read(offset, &mut buf).unwrap();
        (n, buf)
    }

    #[test]
    fn sparse_write_reads_zeros_before_it() {
        let memory = memory();
        let (data, budget) = data(&memory, 1 << 20);
        data.write(Some(10_000), b"abc").unwrap();
        let (n, buf) = read::<16>(&data, 9_990);
        assert_eq!(n, 13);
        assert_eq!(&buf[..13], b"\0\0\0\0\0\0\0\0\0\0abc");
        assert_eq!(data.size(), (10_003, 1));
        assert_eq!(memory.manager.stats().commit_charged, 1);
        drop(data);
        memory.manager.check(&[]).unwrap();
        assert_eq!(budget.usage().1, 0);
        assert_eq!(memory.manager.stats().commit_charged, 0);
    }

    #[test]
    fn write_beyond_the_budget_is_short_then_fails() {
        let memory = memory();
        let (data, _) = data(&memory, 2 * PAGE);
        assert_eq!(data.write(Some(0), &[7; 10_000]), Ok(8192));
        assert_eq!(data.size(), (8192, 2));
        assert_eq!(data.write(None, b"x"), Err(Errno::NOSPC));
        assert_eq!(data.size(), (8192, 2));
        assert_eq!(data.write(Some(END), b"x"), Err(Errno::FBIG));
        assert_eq!(data.write(Some(9000), b""), Ok(0));
        assert_eq!(data.size(), (8192, 2));
    }

    #[test]
    fn write_beyond_what_memory_can_promise_is_short_then_fails() {
        let memory = memory();
        memory.manager.set_commit_limit(CommitLimit::Pages(3));
        let (data, budget) = data(&memory, 1 << 20);
        assert_eq!(data.write(Some(0), &[7; 20_000]), Ok(3 * 4096));
        assert_eq!(data.write(None, b"x"), Err(Errno::NOSPC));
        assert_eq!(budget.usage().1, 3 * PAGE);
        // What is given back can be promised again.
        data.truncate(PAGE).unwrap();
        assert_eq!(data.write(None, &[8; 8192]), Ok(8192));
    }

    #[test]
    fn truncate_then_grow_reads_zeros() {
        let memory = memory();
        let (data, budget) = data(&memory, 1 << 20);
        data.write(Some(0), &[7; 5000]).unwrap();
        data.truncate(10).unwrap();
        data.truncate(20).unwrap();
        let (n, buf) = read::<20>(&data, 0);
        assert_eq!((n, buf[9], buf[10], buf[19]), (20, 7, 0, 0));
        assert_eq!((data.size(), budget.usage().1), ((20, 1), PAGE));
    }

    #[test]
    fn punched_hole_reads_zeros_and_gives_pages_back() {
        let memory = memory();
        let (data, budget) = data(&memory, 1 << 20);
        data.write(Some(0), &[7; 16384]).unwrap();
        data.punch(100, 9000).unwrap();
        let (_, buf) = read::<16384>(&data, 0);
        assert!(buf[..100].iter().all(|&b| b == 7) && buf[9100..].iter().all(|&b| b == 7));
        assert!(buf[100..9100].iter().all(|&b| b == 0));
        assert_eq!(data.size(), (16384, 3));
        data.punch(9200, 10).unwrap();
        let (_, buf) = read::<12>(&data, 9199);
        assert_eq!(buf, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        data.punch(0, u64::from(u32::MAX) * PAGE).unwrap();
        assert_eq!((data.size(), budget.usage().1), ((16384, 0), 0));
    }

    #[test]
    fn mapping_and_descriptor_agree() {
        let memory = memory();
        let (data, _) = data(&memory, 1 << 20);
        data.write(Some(0), &[7; 5000]).unwrap();
        let shared = view(&memory, &data, Sharing::Shared);
        let private = view(&memory, &data, Sharing::Private);
        assert_eq!(load(&memory, &shared, 4999), Ok(7));
        assert_eq!(load(&memory, &private, 0), Ok(7));
        store(&memory, &shared, 1, 8).unwrap();
        assert_eq!(read::<3>(&data, 0).1, [7, 8, 7]);
        data.write(Some(2), &[9]).unwrap();
        assert_eq!(load(&memory, &shared, 2), Ok(9));
        assert_eq!(load(&memory, &private, 2), Ok(9));
        store(&memory, &private, 3, 5).unwrap();
        assert_eq!(read::<2>(&data, 2).1, [9, 7]);
        assert!(load(&memory, &shared, 8192).is_err());
        memory.manager.check(&[shared, private]).unwrap();
    }

    #[test]
    fn store_beyond_the_end_is_not_seen_when_the_file_grows() {
        let memory = memory();
        let (data, _) = data(&memory, 1 << 20);
        data.write(Some(0), b"abc").unwrap();
        let shared = view(&memory, &data, Sharing::Shared);
        store(&memory, &shared, 100, 8).unwrap();
        data.write(Some(5000), b"d").unwrap();
        assert_eq!(read::<1>(&data, 100).1, [0]);
        data.truncate(3).unwrap();
        store(&memory, &shared, 100, 8).unwrap();
        data.truncate(200).unwrap();
        assert_eq!(read::<1>(&data, 100).1, [0]);
        assert!(load(&memory, &shared, 5000).is_err());
        memory.manager.check(&[shared]).unwrap();
    }

    #[test]
    fn hole_under_a_mapping_reads_zeros_there_and_keeps_private_copies() {
        let memory = memory();
        let (data, budget) = data(&memory, 1 << 20);
        data.write(Some(0), &[7; 16384]).unwrap();
        let shared = view(&memory, &data, Sharing::Shared);
        let private = view(&memory, &data, Sharing::Private);
        for page in 0..4 {
            assert_eq!(load(&memory, &shared, page * PAGE), Ok(7));
        }
        store(&memory, &private, PAGE, 5).unwrap();
        data.punch(PAGE, 2 * PAGE).unwrap();
        assert_eq!(load(&memory, &shared, PAGE), Ok(0));
        assert_eq!(load(&memory, &shared, 3 * PAGE), Ok(7));
        assert_eq!(load(&memory, &private, PAGE), Ok(5));
        assert_eq!(budget.usage().1, data.size().1 * PAGE);
        memory.manager.check(&[shared, private]).unwrap();
    }

    #[test]
    fn store_to_a_mapping_without_room_is_refused() {
        let memory = memory();
        let (data, _) = data(&memory, 2 * PAGE);
        data.truncate(4 * PAGE).unwrap();
        let shared = view(&memory, &data, Sharing::Shared);
        store(&memory, &shared, 0, 1).unwrap();
        store(&memory, &shared, 3 * PAGE, 1).unwrap();
        let denied = AccessError::Denied(shadow_mm::Denied::NoSpace);
        assert_eq!(store(&memory, &shared, PAGE, 1), Err(denied));
        assert_eq!(data.size(), (4 * PAGE, 2));
        memory.manager.check(&[shared]).unwrap();
    }

    #[test]
    fn sealed_file_stays_as_it_is() {
        let memory = memory();
        let (data, _) = data(&memory, 1 << 20);
        data.write(Some(0), &[7; 5000]).unwrap();
        data.seal(Seals::GROW).unwrap();
        assert_eq!(data.write(Some(4990), &[8; 100]), Ok(10));
        assert_eq!(data.write(None, b"x"), Err(Errno::PERM));
        assert_eq!(data.truncate(5001), Err(Errno::PERM));
        assert_eq!(data.reserve(0, 5001, false), Err(Errno::PERM));
        data.truncate(4999).unwrap();
        data.seal(Seals::SHRINK).unwrap();
        assert_eq!(data.truncate(1), Err(Errno::PERM));
        let shared = view(&memory, &data, Sharing::Shared);
        assert_eq!(data.seal(Seals::WRITE), Err(Errno::BUSY));
        data.seal(Seals::FUTURE_WRITE).unwrap();
        store(&memory, &shared, 0, 9).unwrap();
        assert_eq!(data.write(Some(0), b"x"), Err(Errno::PERM));
        assert_eq!(data.punch(0, 10), Err(Errno::PERM));
        memory.delete_space(&shared);
        let _private = view(&memory, &data, Sharing::Private);
        data.seal(Seals::WRITE | Seals::SEAL).unwrap();
        assert_eq!(data.seal(Seals::EXEC), Err(Errno::PERM));
        assert_eq!(read::<1>(&data, 0), (1, [9]));
    }

    #[test]
    fn reserved_pages_are_there_when_all_else_is_taken() {
        let memory = memory();
        let (data, budget) = data(&memory, 4 * PAGE);
        data.reserve(0, 3 * PAGE, true).unwrap();
        assert_eq!(data.size(), (3 * PAGE, 3));
        assert_eq!(read::<1>(&data, PAGE), (1, [0]));
        let other = Data::new(&memory, &budget, Seals::SEAL).unwrap();
        assert_eq!(other.write(None, &[1; 8192]), Ok(4096));
        assert_eq!(data.write(Some(0), &[1; 12288]), Ok(12288));
        assert_eq!(data.reserve(PAGE, 3 * PAGE, true), Err(Errno::NOSPC));
        assert_eq!(data.size(), (3 * PAGE, 3));
        assert_eq!(data.reserve(0, u64::MAX, true), Err(Errno::FBIG));
        data.reserve(0, 9 * PAGE, false).unwrap();
        assert_eq!(data.size(), (3 * PAGE, 3));
        memory.manager.check(&[]).unwrap();
    }
}
