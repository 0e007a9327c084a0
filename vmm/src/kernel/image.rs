//! A kernel's file: what it is, whether it fits, and getting it into guest memory.
//!
//! `linux-loader` does the loading. What it does not check is checked here first, so that a file that
//! is cut off or made up gives a clear error: the length the header promises, the machine an ELF file
//! is for, where its segments go, and the memory a kernel unpacks itself into.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::BootError;
use super::layout;
use super::memory::Memory;
use crate::cli::Size;

/// Where and how a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, with the zero page's address in RSI (the 64-bit boot protocol).
    Linux64(u64),
    /// In 32-bit mode without paging, with the start info's address in EBX (PVH).
    Pvh(u64),
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Where it starts.
    pub entry: Entry,
    /// End of the memory it needs before it knows the memory map.
    pub end: u64,
    /// The last address an initrd may have.
    pub initrd_limit: u64,
    /// Most bytes of a command line.
    pub command_line: usize,
    /// A bzImage's own header.
    pub header: Option<setup_header>,
}

/// First boot protocol with the flag that says whether it is a 64-bit kernel.
const PROTOCOL_2_12: u16 = 0x020c;
const SECTOR: u64 = 512;
/// What the zero page has room for, whatever the kernel says.
const INITRD_BELOW: u64 = 0xffff_ffff;

/// Opens a regular file, and tells its length.
///
/// # Errors
/// It cannot be opened, or is something else.
pub fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let failed = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    // A FIFO must not keep us waiting.
    let flags =
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let fd =
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(|e| failed(e.into()))?;
    let file = File::from(fd);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile {
            what,
            path: path.to_owned(),
        });
    }
    Ok((file, metadata.len()))
}

/// A kernel's file while it is looked at.
struct Candidate<'a> {
    path: &'a Path,
    file: File,
    bytes: u64,
    memory_bytes: u64,
}

/// Loads the kernel at `path` into `memory`, which has `memory_bytes` in all.
///
/// # Errors
/// It cannot be read, is no kernel for this machine, is cut off, or does not fit.
pub fn load(path: &Path, memory: &Memory, memory_bytes: u64) -> Result<Image, BootError> {
    let (file, bytes) = open("kernel", path)?;
    let candidate = Candidate {
        path,
        file,
        bytes,
        memory_bytes,
    };
    let mut start = [0; 0x206];
    let read = candidate.read_up_to(&mut start, 0)?;
    if start.starts_with(b"\x7fELF") {
        return candidate.load_elf(memory);
    }
    if read == start.len() && &start[0x202..0x206] == b"HdrS" {
        return candidate.load_bzimage(memory);
    }
    Err(candidate.wrong(if bytes == 0 {
        "the file is empty"
    } else if start.starts_with(&[0x1f, 0x8b]) {
        "compressed with gzip; give a bzImage or an ELF vmlinux"
    } else {
        "neither a bzImage nor an ELF vmlinux for x86-64"
    }))
}

impl Candidate<'_> {
    fn wrong(&self, why: impl Into<String>) -> BootError {
        BootError::Format {
            path: self.path.to_owned(),
            why: why.into(),
        }
    }

    fn read_up_to(&self, into: &mut [u8], at: u64) -> Result<usize, BootError> {
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(BootError::File {
                        what: "kernel",
                        path: self.path.to_owned(),
                        source,
                    });
                }
            }
        }
        Ok(done)
    }

    fn low_end(&self) -> u64 {
        self.memory_bytes.min(layout::HOLE_START)
    }

    /// That the kernel has `needs` bytes of file.
    fn complete(&self, needs: u64) -> Result<(), BootError> {
        if self.bytes >= needs {
            return Ok(());
        }
        Err(BootError::Truncated {
            path: self.path.to_owned(),
            has: self.bytes,
            needs,
        })
    }

    /// That memory goes up to `needs`.
    fn fits(&self, needs: u64) -> Result<(), BootError> {
        if needs <= self.low_end() {
            return Ok(());
        }
        Err(BootError::KernelTooLarge {
            path: self.path.to_owned(),
            needs: Size(needs),
            has: Size(self.low_end()),
            memory: Size(self.memory_bytes),
        })
    }

    fn loader(&self, error: &linux_loader::loader::Error) -> BootError {
        let text = error.to_string();
        self.wrong(text.replace("Kernel Loader: ", ""))
    }

    fn load_bzimage(mut self, memory: &Memory) -> Result<Image, BootError> {
        let mut raw = [0; 0x268 - 0x1f1];
        let read = self.read_up_to(&mut raw, 0x1f1)?;
        self.complete(0x1f1 + raw.len() as u64)?;
        debug_assert_eq!(read, raw.len());
        let u32_at = |at: usize| {
            let bytes: [u8; 4] = raw[at - 0x1f1..][..4].try_into().expect("four bytes");
            u64::from(u32::from_le_bytes(bytes))
        };
        let setup = match raw[0] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        self.complete((setup + 1) * SECTOR + u32_at(0x1f4) * 16)?;
        let load = layout::HIGH_START;
        // The file's part alone, before it is read.
        self.fits(load + self.bytes.saturating_sub((setup + 1) * SECTOR))?;
        let loaded = BzImage::load(&**memory, Some(GuestAddress(load)), &mut self.file, None)
            .map_err(|e| self.loader(&e))?;
        let header = loaded.setup_header.ok_or_else(|| self.wrong("no header"))?;
        let (version, flags) = (header.version, header.xloadflags);
        if version < PROTOCOL_2_12 {
            return Err(self.wrong(format!(
                "boot protocol {}.{:02}; 2.12 (Linux 3.8) is the first that can be booted in 64-bit mode",
                version >> 8,
                version & 0xff
            )));
        }
        if flags & XLF_KERNEL_64 == 0 {
            return Err(self.wrong("not a 64-bit kernel"));
        }
        let (prefers, unpacked) = (header.pref_address, header.init_size);
        let end = prefers
            .saturating_add(u64::from(unpacked))
            .max(loaded.kernel_end);
        self.fits(end)?;
        let most = header.cmdline_size as usize;
        Ok(Image {
            entry: Entry::Linux64(load + 0x200),
            end,
            initrd_limit: u64::from(header.initrd_addr_max).min(INITRD_BELOW),
            command_line: most.min(layout::COMMAND_LINE_BYTES - 1),
            header: Some(header),
        })
    }

    fn load_elf(mut self, memory: &Memory) -> Result<Image, BootError> {
        let end = self.check_elf()?;
        let loaded =
            Elf::load(&**memory, None, &mut self.file, None).map_err(|e| self.loader(&e))?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(at) => Entry::Pvh(at.0),
            PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
                Entry::Linux64(loaded.kernel_load.0)
            }
        };
        let (Entry::Pvh(at) | Entry::Linux64(at)) = entry;
        if !(layout::HIGH_START..end).contains(&at) {
            return Err(self.wrong(format!("its entry {at:#x} is not in it")));
        }
        Ok(Image {
            entry,
            end,
            initrd_limit: INITRD_BELOW,
            command_line: layout::COMMAND_LINE_BYTES - 1,
            header: None,
        })
    }

    /// Checks the headers of an ELF file; returns where its last segment ends in memory.
    fn check_elf(&self) -> Result<u64, BootError> {
        const HEADER: usize = 64;
        const SEGMENT: usize = 56;
        const LOAD: u32 = 1;
        let mut header = [0; HEADER];
        self.complete(HEADER as u64)?;
        self.read_up_to(&mut header, 0)?;
        let (class, order) = (header[4], header[5]);
        let machine = u16::from_le_bytes([header[18], header[19]]);
        if (class, order, machine) != (2, 1, 62) {
            return Err(self.wrong("an ELF file, but not for x86-64"));
        }
        let u64_at = |raw: &[u8], at: usize| -> u64 {
            u64::from_le_bytes(raw[at..at + 8].try_into().expect("eight bytes"))
        };
        let count = usize::from(u16::from_le_bytes([header[56], header[57]]));
        let offset = u64_at(&header, 32);
        let length = (count * SEGMENT) as u64;
        self.complete(offset.saturating_add(length))?;
        let mut raw = vec![0; count * SEGMENT];
        self.read_up_to(&mut raw, offset)?;
        let mut end = 0;
        for segment in raw.chunks_exact(SEGMENT) {
            let [offset, physical, in_file, in_memory] =
                [8, 24, 32, 40].map(|at| u64_at(segment, at));
            let kind = u32::from_le_bytes(segment[..4].try_into().expect("four bytes"));
            self.complete(offset.saturating_add(in_file))?;
            if kind != LOAD || in_memory == 0 {
                continue;
            }
            if in_file > in_memory {
                return Err(self.wrong("a segment is longer in the file than in memory"));
            }
            if physical < layout::HIGH_START {
                return Err(self.wrong(format!(
                    "wants to be at {physical:#x}; the first MiB is the boot protocol's"
                )));
            }
            let segment_end = physical.saturating_add(in_memory);
            self.fits(segment_end)?;
            end = end.max(segment_end);
        }
        if end == 0 {
            return Err(self.wrong("an ELF file without anything to load"));
        }
        Ok(end)
    }
}

/// Where an initrd was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
}

/// Puts the initrd at `path` as high as the kernel allows.
///
/// # Errors
/// It cannot be read, or does not fit beside the kernel.
pub fn load_initrd(
    path: &Path,
    image: &Image,
    memory: &Memory,
    memory_bytes: u64,
) -> Result<Initrd, BootError> {
    const PAGE: u64 = 4096;
    let (mut file, bytes) = open("initrd", path)?;
    let low_end = memory_bytes.min(layout::HOLE_START);
    let top = low_end.min(image.initrd_limit.saturating_add(1)) & !(PAGE - 1);
    let start = top.saturating_sub(bytes) & !(PAGE - 1);
    let first = image.end.next_multiple_of(PAGE);
    if bytes > top || start < first {
        return Err(BootError::InitrdTooLarge {
            path: path.to_owned(),
            bytes: Size(bytes),
            room: Size(top.saturating_sub(first)),
            memory: Size(memory_bytes),
        });
    }
    let length = usize::try_from(bytes).expect("64-bit host");
    read_into(&mut file, memory, start, length).map_err(|source| BootError::File {
        what: "initrd",
        path: path.to_owned(),
        source,
    })?;
    Ok(Initrd { start, bytes })
}

fn read_into(
    file: &mut impl ReadVolatile,
    memory: &Memory,
    start: u64,
    length: usize,
) -> std::io::Result<()> {
    memory
        .read_exact_volatile_from(GuestAddress(start), file, length)
        .map_err(|e| match e {
            vm_memory::GuestMemoryError::IOError(e) => e,
            other => std::io::Error::other(other.to_string()),
        })
}
