//! A disk (virtio 1.2, 5.2) whose sectors are a raw file's bytes.
//!
//! What a driver has been told is written is in the file, where every other process of the host sees
//! it; after a flush it is on the host's disk as well. A driver that does not know flushes gets one
//! with every write.
//!
//! Several requests are answered at once: a slow one does not hold up the others. A flush waits for all that were
//! announced before it, so that it has what they wrote; those after it do not wait.

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{Reader, Writer};

use super::disk_file::{self, SECTOR, Storage};
pub use super::disk_file::{Access, DiskError};
use super::queue::QUEUE_SIZE;
use super::{Concurrent, Earlier, Request, VirtioDevice};

const KIND: u32 = 2;
/// Bytes copied at a time.
const CHUNK: usize = 128 << 10;
/// Most bytes of one request.
const MOST: usize = 64 << 20;
/// Most sectors of one range to be discarded or zeroed, and most ranges of one request.
const MOST_SECTORS: u32 = 1 << 16;
const MOST_RANGES: u32 = 16;
/// Bytes of such a range's description.
const RANGE: usize = 16;

/// A disk. What it remembers is in its file and in its queue.
#[derive(Debug)]
pub struct Block(Arc<Disk>);

/// What all who answer its requests share.
#[derive(Debug)]
struct Disk {
    storage: Box<dyn Storage>,
    sectors: u64,
    access: Access,
    /// The driver knows no flushes: it is told that something is written when it is on the host's disk.
    write_through: AtomicBool,
    config: [u8; 60],
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// Why a request failed, as its status says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Io,
    Unsupported,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        tracing::debug!(%error, "a disk request");
        Self::Io
    }
}

impl Block {
    /// The disk in the file at `path`, locked against other machines.
    ///
    /// # Errors
    /// It cannot be opened, is not a regular file of whole sectors, or is in use.
    pub fn open(path: &Path, access: Access, id: &str) -> Result<Self, DiskError> {
        let (file, bytes) = disk_file::open(path, access)?;
        Ok(Self::new(Box::new(file), bytes / SECTOR, access, id))
    }

    /// A disk whose sectors are in memory, for fuzz targets.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn in_memory(sectors: u64, access: Access) -> Self {
        let bytes = usize::try_from(sectors * SECTOR).expect("a small disk");
        let storage = parking_lot::Mutex::new(vec![0; bytes]);
        Self::new(Box::new(storage), sectors, access, "memory")
    }

    /// A disk of `sectors` that are in `storage`.
    pub(super) fn new(storage: Box<dyn Storage>, sectors: u64, access: Access, name: &str) -> Self {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self(Arc::new(Disk {
            storage,
            sectors,
            access,
            write_through: AtomicBool::new(true),
            config: config(sectors),
            id,
        }))
    }
}

impl Disk {
    /// That `bytes` from `sector` on are whole sectors of this disk; returns where they start.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Refused> {
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Refused::Io);
        }
        match sector.checked_add(bytes / SECTOR) {
            Some(end) if end <= self.sectors => Ok(sector * SECTOR),
            _ => Err(Refused::Io),
        }
    }

    fn writable(&self) -> Result<(), Refused> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Refused::Io),
        }
    }

    fn read(&self, sector: u64, to: &mut Writer<'_>) -> Result<(), Refused> {
        let mut left = to.available_bytes();
        if left > MOST {
            return Err(Refused::Io);
        }
        let mut at = self.place(sector, left as u64)?;
        let mut buffer = vec![0; left.min(CHUNK)];
        while left > 0 {
            let part = left.min(CHUNK);
            self.storage.read_at(&mut buffer[..part], at)?;
            to.write_all(&buffer[..part])?;
            at += part as u64;
            left -= part;
        }
        Ok(())
    }

    fn write(&self, sector: u64, from: &mut Reader<'_>) -> Result<(), Refused> {
        self.writable()?;
        let mut left = from.available_bytes();
        if left > MOST {
            return Err(Refused::Io);
        }
        let mut at = self.place(sector, left as u64)?;
        let mut buffer = vec![0; left.min(CHUNK)];
        while left > 0 {
            let part = left.min(CHUNK);
            from.read_exact(&mut buffer[..part])?;
            self.storage.write_at(&buffer[..part], at)?;
            at += part as u64;
            left -= part;
        }
        self.settle()
    }

    /// With a driver that knows no flushes, everything is flushed at once.
    fn settle(&self) -> Result<(), Refused> {
        if self.write_through.load(Ordering::SeqCst) {
            self.storage.flush()?;
        }
        Ok(())
    }

    fn clear(&self, how: Clear, from: &mut Reader<'_>) -> Result<(), Refused> {
        self.writable()?;
        let bytes = from.available_bytes();
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes / RANGE > MOST_RANGES as usize {
            return Err(Refused::Io);
        }
        for _ in 0..bytes / RANGE {
            let mut raw = [0; RANGE];
            from.read_exact(&mut raw)?;
            let [
                s0,
                s1,
                s2,
                s3,
                s4,
                s5,
                s6,
                s7,
                n0,
                n1,
                n2,
                n3,
                f0,
                f1,
                f2,
                f3,
            ] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let allowed = match how {
                Clear::Discard => 0,
                Clear::Zero => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            };
            if flags & !allowed != 0 {
                return Err(Refused::Unsupported);
            }
            if count > MOST_SECTORS {
                return Err(Refused::Io);
            }
            let bytes = u64::from(count) * SECTOR;
            let at = self.place(sector, bytes)?;
            if bytes > 0 {
                self.clear_range(how, at, bytes)?;
            }
        }
        self.settle()
    }

    fn clear_range(&self, how: Clear, mut at: u64, mut bytes: u64) -> Result<(), Refused> {
        match (self.storage.punch(at, bytes), how) {
            (Ok(()), _) => return Ok(()),
            // A host file system without holes: discarding is only advice.
            (Err(error), Clear::Discard) if no_holes(&error) => return Ok(()),
            (Err(error), Clear::Zero) if no_holes(&error) => {}
            (Err(error), _) => return Err(error.into()),
        }
        let zeros = vec![0; CHUNK];
        while bytes > 0 {
            let part = bytes.min(CHUNK as u64);
            let length = usize::try_from(part).expect("a chunk");
            self.storage.write_at(&zeros[..length], at)?;
            at += part;
            bytes -= part;
        }
        Ok(())
    }

    fn execute(
        &self,
        from: &mut Reader<'_>,
        to: &mut Writer<'_>,
        earlier: &dyn Earlier,
    ) -> Result<(), Refused> {
        let mut header = [0; 16];
        from.read_exact(&mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => self.read(sector, to),
            VIRTIO_BLK_T_OUT => self.write(sector, from),
            VIRTIO_BLK_T_FLUSH => {
                earlier.wait();
                Ok(self.storage.flush()?)
            }
            VIRTIO_BLK_T_GET_ID => Ok(to.write_all(&self.id)?),
            VIRTIO_BLK_T_DISCARD => self.clear(Clear::Discard, from),
            VIRTIO_BLK_T_WRITE_ZEROES => self.clear(Clear::Zero, from),
            _ => Err(Refused::Unsupported),
        }
    }
}

fn no_holes(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

/// The two ways to make sectors empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clear {
    Discard,
    Zero,
}

/// `struct virtio_blk_config`.
fn config(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // All but the header and the status.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &1_u32.to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    put(56, &[1]); // zeroing makes holes
    config
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        common
            | match self.0.access {
                Access::ReadOnly => 1 << VIRTIO_BLK_F_RO,
                Access::ReadWrite => {
                    1 << VIRTIO_BLK_F_FLUSH
                        | 1 << VIRTIO_BLK_F_DISCARD
                        | 1 << VIRTIO_BLK_F_WRITE_ZEROES
                }
            }
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.0.config)
    }

    fn start(&mut self, features: u64) {
        let flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.0.write_through.store(!flushes, Ordering::SeqCst);
    }

    fn concurrent(&self) -> Option<Arc<dyn Concurrent>> {
        Some(self.0.clone())
    }
}

impl Concurrent for Disk {
    fn answer(&self, request: Request<'_>, earlier: &dyn Earlier) -> u32 {
        let Request { mut from, mut to } = request;
        let Some(room) = to.available_bytes().checked_sub(1) else {
            // Nowhere to say what came of it.
            return 0;
        };
        let Ok(mut status_at) = to.split_at(room) else {
            return 0;
        };
        let status = match self.execute(&mut from, &mut to, earlier) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Refused::Io) => VIRTIO_BLK_S_IOERR,
            Err(Refused::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        let written = u32::try_from(to.bytes_written()).unwrap_or(u32::MAX - 1);
        match status_at.write_all(&status.to_le_bytes()[..1]) {
            Ok(()) => written + 1,
            Err(_) => 0,
        }
    }
}
