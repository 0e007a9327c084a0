//! The bytes of an in-memory file: pages, where there was never anything written there is none.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;

use crate::linux::fs::budget::Budget;
use crate::locks::{Mutex, rank};
use crate::snapshot::records::{Page, SparseBytes};

const PAGE: u64 = 4096;
/// What a page costs: its bytes and its place in the map.
const COST: u64 = PAGE + 64;

/// A file's bytes.
#[derive(Debug)]
pub(super) struct Data {
    budget: Arc<Budget>,
    pages: Mutex<rank::MemPages, Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    size: u64,
    held: BTreeMap<u64, Box<[u8]>>,
}

impl Data {
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            pages: Mutex::default(),
        }
    }

    /// Length in bytes, and pages that are held.
    pub(super) fn size(&self) -> (u64, u64) {
        let pages = self.pages.lock();
        (pages.size, pages.held.len() as u64)
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let pages = self.pages.lock();
        let left = pages.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < left {
            let (page, start, n) = piece(offset + done as u64, left - done);
            let part = &mut buf[done..done + n];
            match pages.held.get(&page) {
                Some(held) => part.copy_from_slice(&held[start..start + n]),
                None => part.fill(0),
            }
            done += n;
        }
        left
    }

    /// Writes at `offset`, or at the end if there is none; gives the bytes written, fewer than
    /// asked if the budget ends.
    pub(super) fn write(&self, offset: Option<u64>, buf: &[u8]) -> Result<usize, Errno> {
        let mut pages = self.pages.lock();
        let offset = offset.unwrap_or(pages.size);
        if offset
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(Errno::FBIG);
        }
        let mut done = 0;
        while done < buf.len() {
            let (page, start, n) = piece(offset + done as u64, buf.len() - done);
            let held = match pages.hold(page, &self.budget) {
                Ok(held) => held,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            };
            held[start..start + n].copy_from_slice(&buf[done..done + n]);
            done += n;
        }
        if done > 0 {
            pages.size = pages.size.max(offset + done as u64);
        }
        Ok(done)
    }

    pub(super) fn truncate(&self, length: u64) -> Result<(), Errno> {
        if length > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        let mut pages = self.pages.lock();
        if length < pages.size {
            pages.drop_from(length.div_ceil(PAGE), u64::MAX, &self.budget);
            let start = (length % PAGE) as usize;
            if start != 0
                && let Some(last) = pages.held.get_mut(&(length / PAGE))
            {
                last[start..].fill(0);
            }
        }
        pages.size = length;
        Ok(())
    }

    /// Reserves `length` bytes at `offset`, and makes the file reach them if `grow`.
    pub(super) fn reserve(&self, offset: u64, length: u64, grow: bool) -> Result<(), Errno> {
        let end = offset
            .checked_add(length)
            .filter(|&end| end <= i64::MAX as u64)
            .ok_or(Errno::FBIG)?;
        let mut pages = self.pages.lock();
        // The budget bounds the loop: every new page takes from it.
        for page in offset / PAGE..end.div_ceil(PAGE) {
            pages.hold(page, &self.budget)?;
        }
        if grow {
            pages.size = pages.size.max(end);
        }
        Ok(())
    }

    /// Zeroes `length` bytes at `offset`, giving whole pages back.
    pub(super) fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let end = offset.checked_add(length).ok_or(Errno::INVAL)?;
        let mut pages = self.pages.lock();
        pages.drop_from(offset.div_ceil(PAGE), end / PAGE, &self.budget);
        for edge in [offset / PAGE, end / PAGE] {
            let Some(held) = pages.held.get_mut(&edge) else {
                continue;
            };
            let from = offset.saturating_sub(edge * PAGE).min(PAGE) as usize;
            let to = end.saturating_sub(edge * PAGE).min(PAGE) as usize;
            if from < to {
                held[from..to].fill(0);
            }
        }
        Ok(())
    }
}

impl SparseBytes for Data {
    fn length(&self) -> u64 {
        self.pages.lock().size
    }

    fn pages(&self) -> Vec<u64> {
        self.pages.lock().held.keys().copied().collect()
    }

    fn read(&self, page: u64, into: &mut Page) {
        match self.pages.lock().held.get(&page) {
            Some(held) => into.copy_from_slice(held),
            None => into.fill(0),
        }
    }
}

impl Pages {
    fn hold(&mut self, page: u64, budget: &Budget) -> Result<&mut [u8], Errno> {
        use std::collections::btree_map::Entry;
        match self.held.entry(page) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                budget.take(COST)?;
                Ok(entry.insert(vec![0; PAGE as usize].into_boxed_slice()))
            }
        }
    }

    /// Drops the pages `from..to`.
    fn drop_from(&mut self, from: u64, to: u64, budget: &Budget) {
        if from >= to {
            return;
        }
        let gone: Vec<u64> = self.held.range(from..to).map(|(&page, _)| page).collect();
        for page in &gone {
            self.held.remove(page);
        }
        budget.give(gone.len() as u64 * COST);
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        self.budget
            .give(self.pages.get_mut().held.len() as u64 * COST);
    }
}

/// The page, the offset in it, and the bytes of the next piece of `len` bytes at `offset`.
fn piece(offset: u64, len: usize) -> (u64, usize, usize) {
    let start = (offset % PAGE) as usize;
    (offset / PAGE, start, len.min(PAGE as usize - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_write_reads_zeros_before_it() {
        let budget = Budget::new(1 << 20, None);
        let data = Data::new(&budget);
        data.write(Some(10_000), b"abc").unwrap();
        let mut buf = [1; 16];
        assert_eq!(data.read(9_990, &mut buf), 13);
        assert_eq!(&buf[..13], b"\0\0\0\0\0\0\0\0\0\0abc");
        assert_eq!(data.size(), (10_003, 1));
        drop(data);
        assert_eq!(budget.usage().1, 0);
    }

    #[test]
    fn write_beyond_the_budget_is_short_then_fails() {
        let data = Data::new(&Budget::new(2 * COST, None));
        assert_eq!(data.write(Some(0), &[7; 10_000]), Ok(8192));
        assert_eq!(data.write(None, b"x"), Err(Errno::NOSPC));
    }

    #[test]
    fn truncate_then_grow_reads_zeros() {
        let data = Data::new(&Budget::new(1 << 20, None));
        data.write(Some(0), &[7; 5000]).unwrap();
        data.truncate(10).unwrap();
        data.truncate(20).unwrap();
        let mut buf = [1; 20];
        assert_eq!(data.read(0, &mut buf), 20);
        assert_eq!((buf[9], buf[10], buf[19]), (7, 0, 0));
    }

    #[test]
    fn punched_hole_reads_zeros_and_gives_pages_back() {
        let data = Data::new(&Budget::new(1 << 20, None));
        data.write(Some(0), &[7; 16384]).unwrap();
        data.punch(100, 9000).unwrap();
        let mut buf = [1; 16384];
        data.read(0, &mut buf);
        assert!(buf[..100].iter().all(|&b| b == 7) && buf[9100..].iter().all(|&b| b == 7));
        assert!(buf[100..9100].iter().all(|&b| b == 0));
        assert_eq!(data.size(), (16384, 3));
    }
}
