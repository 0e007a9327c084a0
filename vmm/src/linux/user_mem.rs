//! The one way into guest memory from the Linux layer: [`UserMem`], page by page through the
//! memory manager's pins, so that faults are resolved, copy-on-write is broken and accessed and
//! dirty are set exactly as if the guest had done it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use shadow_mm::{Access, GuestVa};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::call::Ctx;
use super::process::AddressSpace;
use crate::memory::{AccessError, Memory};

const PAGE: usize = 4096;

/// Longest path a call takes, with its NUL (`PATH_MAX`, limits.h).
pub const PATH_MAX: usize = 4096;

/// Guest memory of one address space.
#[derive(Clone, Copy, Debug)]
pub struct UserMem<'a> {
    memory: &'a Memory,
    mm: &'a Arc<AddressSpace>,
}

impl<'a> UserMem<'a> {
    /// Access to `mm`.
    #[must_use]
    pub fn new(memory: &'a Memory, mm: &'a Arc<AddressSpace>) -> Self {
        Self { memory, mm }
    }

    /// Copies from guest memory at `va`.
    ///
    /// # Errors
    /// `EFAULT` if any byte cannot be read, `ENOMEM` if the pool is empty.
    pub fn read(&self, va: u64, into: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            let (at, offset, n) = piece(va, done, into.len())?;
            let part = &mut into[done..done + n];
            self.memory
                .with_page(&self.mm.space, at, Access::Read, |store, frame| {
                    shadow_mm::FrameStore::read(store, frame, offset, part);
                })
                .map_err(errno)?;
            done += n;
        }
        Ok(())
    }

    /// Copies into guest memory at `va`.
    ///
    /// # Errors
    /// `EFAULT` if any byte cannot be written (those before it are), `ENOMEM` if the pool is empty.
    pub fn write(&self, va: u64, from: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < from.len() {
            let (at, offset, n) = piece(va, done, from.len())?;
            let part = &from[done..done + n];
            self.memory
                .with_page(&self.mm.space, at, Access::Write, |store, frame| {
                    shadow_mm::FrameStore::write(store, frame, offset, part);
                })
                .map_err(errno)?;
            done += n;
        }
        Ok(())
    }

    /// How many bytes from `va` on, at most `len`, can be accessed: to be asked before data that
    /// cannot be put back is taken from somewhere. Touches every page of it.
    #[must_use]
    pub fn accessible(&self, va: u64, len: usize, access: Access) -> usize {
        let mut done = 0;
        while done < len {
            let Ok((at, _, n)) = piece(va, done, len) else {
                break;
            };
            if self
                .memory
                .with_page(&self.mm.space, at, access, |_, _| ())
                .is_err()
            {
                break;
            }
            done += n;
        }
        done
    }

    /// Reads a plain value.
    ///
    /// # Errors
    /// `EFAULT`, `ENOMEM`.
    pub fn read_obj<T: FromBytes + FromZeros + IntoBytes>(&self, va: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.read(va, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a plain value.
    ///
    /// # Errors
    /// `EFAULT`, `ENOMEM`.
    pub fn write_obj<T: IntoBytes + Immutable>(&self, va: u64, value: &T) -> Result<(), Errno> {
        self.write(va, value.as_bytes())
    }

    /// Changes the aligned word at `va` at once, for everybody who shares it, unless `change` leaves it.
    /// Returns what it was.
    ///
    /// # Errors
    /// `EFAULT` if it cannot be written, `EINVAL` if it is not aligned, `ENOMEM`.
    pub fn update_u32(&self, va: u64, change: impl Fn(u32) -> Option<u32>) -> Result<u32, Errno> {
        let (at, offset, _) = piece(va, 0, 4)?;
        if !va.is_multiple_of(4) {
            return Err(Errno::INVAL);
        }
        self.memory
            .with_page(&self.mm.space, at, Access::Write, |store, frame| {
                let word = store.word(frame, offset);
                word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change)
                    .unwrap_or_else(|unchanged| unchanged)
            })
            .map_err(errno)
    }

    /// Reads a NUL-terminated string of less than `max` bytes, without its NUL.
    ///
    /// # Errors
    /// `EFAULT`; `ENAMETOOLONG` if there is no NUL in the first `max` bytes.
    pub fn read_cstr(&self, va: u64, max: usize) -> Result<Vec<u8>, Errno> {
        let mut out = Vec::new();
        let mut buf = [0_u8; PAGE];
        while out.len() < max {
            let (_, _, in_page) = piece(va, out.len(), usize::MAX)?;
            let n = in_page.min(max - out.len());
            let at = va.checked_add(out.len() as u64).ok_or(Errno::FAULT)?;
            self.read(at, &mut buf[..n])?;
            if let Some(end) = buf[..n].iter().position(|&b| b == 0) {
                out.extend_from_slice(&buf[..end]);
                return Ok(out);
            }
            out.extend_from_slice(&buf[..n]);
        }
        Err(Errno::NAMETOOLONG)
    }
}

impl Ctx<'_> {
    /// The calling thread's memory.
    #[must_use]
    pub fn mem(&self) -> UserMem<'_> {
        UserMem::new(&self.k.memory, &self.t.mm)
    }

    /// Reads a path argument.
    ///
    /// # Errors
    /// `EFAULT`, `ENAMETOOLONG`.
    pub fn path(&self, va: u64) -> Result<Vec<u8>, Errno> {
        self.mem().read_cstr(va, PATH_MAX)
    }
}

/// The page, the offset in it and the bytes of the next piece of a copy of `len` bytes at `va`.
fn piece(va: u64, done: usize, len: usize) -> Result<(GuestVa, usize, usize), Errno> {
    let at = va
        .checked_add(done as u64)
        .and_then(GuestVa::new)
        .ok_or(Errno::FAULT)?;
    let offset = (at.get() % PAGE as u64) as usize;
    Ok((at, offset, (PAGE - offset).min(len - done)))
}

fn errno(error: AccessError) -> Errno {
    match error {
        AccessError::Denied(_) => Errno::FAULT,
        AccessError::NoMemory => Errno::NOMEM,
    }
}
