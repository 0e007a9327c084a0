//! Reading a program's ELF headers: what is to be mapped where. Pure: it reads through
//! [`ReadAt`], maps nothing, and believes no field before it has checked it.
//!
//! Only ELF64, little endian, x86-64, `ET_EXEC` or `ET_DYN` (System V gABI, chapter 4 and 5).

use object::LittleEndian as LE;
use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_R, PF_W, PF_X, PT_GNU_STACK, PT_INTERP, PT_LOAD,
    ProgramHeader64,
};
use object::read::elf::{FileHeader, ProgramHeader};
use shadow_mm::Prot;

use super::error::{ElfError, SegmentFault};
use super::{MIN_VA, PAGE, USER_END, page_down, page_up};
use crate::linux::Errno;
use crate::linux::user_mem::PATH_MAX;

/// Bytes of a program header.
pub const PHENT: u64 = size_of::<ProgramHeader64<LE>>() as u64;

/// Most bytes of program headers Linux reads (`load_elf_phdrs`).
const PHDRS_MAX: u64 = 65536;

/// A file that is read by position.
pub trait ReadAt {
    /// Reads at `offset`; fewer bytes than asked only at the end.
    ///
    /// # Errors
    /// The file's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno>;

    /// Bytes in the file.
    fn length(&self) -> u64;
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn length(&self) -> u64 {
        self.len() as u64
    }
}

/// Fills `buf` from `offset`.
pub(super) fn read_exact(
    file: &(impl ReadAt + ?Sized),
    offset: u64,
    buf: &mut [u8],
) -> Result<(), ElfError> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset.checked_add(done as u64).ok_or(ElfError::Truncated)?;
        match file.read_at(at, &mut buf[done..]).map_err(ElfError::Read)? {
            0 => return Err(ElfError::Truncated),
            n => done += n,
        }
    }
    Ok(())
}

/// A `PT_LOAD` segment as page ranges, at link-time addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First page of the segment.
    pub start: u64,
    /// Pages mapped from the file, from `start` on.
    pub file_pages: u64,
    /// File offset of `start`, page aligned.
    pub offset: u64,
    /// First byte after the file's, zeroed up to the end of its page. `None` when the segment has
    /// no memory beyond its file bytes, or they end at a page.
    pub zero_from: Option<u64>,
    /// Anonymous pages after the file's.
    pub zero_pages: u64,
    /// Protection of the file's pages.
    pub prot: Prot,
}

impl Segment {
    /// First address after the segment's pages.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + (self.file_pages + self.zero_pages) * PAGE
    }

    /// Protection of the anonymous pages: always writable, as `vm_brk_flags` makes them.
    #[must_use]
    pub fn zero_prot(&self) -> Prot {
        Prot::READ | Prot::WRITE | (self.prot & Prot::EXEC)
    }
}

/// What an ELF file asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// `ET_DYN`: it can be anywhere; `ET_EXEC` is at its addresses.
    pub relocatable: bool,
    /// Entry point, link-time.
    pub entry: u64,
    /// Where the program headers are once mapped, link-time; 0 if no segment holds them.
    pub phdr: u64,
    /// Number of program headers.
    pub phnum: u64,
    /// Path in `PT_INTERP`, without its NUL.
    pub interpreter: Option<Vec<u8>>,
    /// In the order of the headers, at least one.
    pub segments: Vec<Segment>,
    /// Highest `p_vaddr + p_memsz`.
    pub end: u64,
    /// `PT_GNU_STACK` asks for an executable stack.
    pub executable_stack: bool,
    /// Largest `p_align` of the segments that is a power of two, at least a page.
    pub align: u64,
}

impl Elf {
    /// First page of all segments.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.segments.iter().map(|s| s.start).min().unwrap_or(0)
    }

    /// Pages from the first segment's start to the last's end.
    #[must_use]
    pub fn span_pages(&self) -> u64 {
        let end = self.segments.iter().map(Segment::end).max().unwrap_or(0);
        (end - self.start()) / PAGE
    }
}

/// Reads the headers of `file`.
///
/// # Errors
/// See [`ElfError`].
pub fn parse(file: &(impl ReadAt + ?Sized)) -> Result<Elf, ElfError> {
    let mut head = [0_u8; size_of::<FileHeader64<LE>>()];
    read_exact(file, 0, &mut head).map_err(|e| match e {
        ElfError::Truncated => ElfError::NotElf,
        other => other,
    })?;
    let header = file_header(&head)?;
    let (table, phoff) = program_headers(file, header)?;
    let phdrs = object::pod::slice_from_all_bytes::<ProgramHeader64<LE>>(&table)
        .map_err(|()| ElfError::HeaderTable)?;
    let relocatable = header.e_type(LE) == ET_DYN;
    let mut elf = Elf {
        relocatable,
        entry: header.e_entry(LE),
        phdr: 0,
        phnum: phdrs.len() as u64,
        interpreter: None,
        segments: Vec::new(),
        end: 0,
        executable_stack: false,
        align: PAGE,
    };
    for (index, ph) in phdrs.iter().enumerate() {
        match ph.p_type(LE) {
            PT_INTERP if elf.interpreter.is_none() => {
                elf.interpreter = Some(interpreter(file, ph)?);
            }
            PT_GNU_STACK => elf.executable_stack = ph.p_flags(LE).contains(PF_X),
            PT_LOAD => {
                let fault = |fault| ElfError::Segment { index, fault };
                elf.add(ph, file.length(), phoff).map_err(fault)?;
            }
            _ => {}
        }
    }
    elf.check_whole(phdrs)?;
    Ok(elf)
}

impl Elf {
    /// Adds a `PT_LOAD` header.
    fn add(
        &mut self,
        ph: &ProgramHeader64<LE>,
        length: u64,
        phoff: u64,
    ) -> Result<(), SegmentFault> {
        let Some(segment) = segment(ph, length)? else {
            return Ok(());
        };
        if !self.relocatable && segment.start < MIN_VA {
            return Err(SegmentFault::TooLow { va: segment.start });
        }
        let (va, offset) = (ph.p_vaddr(LE), ph.p_offset(LE));
        if self.phdr == 0 && phoff >= offset && phoff - offset < ph.p_filesz(LE) {
            self.phdr = va + (phoff - offset);
        }
        self.end = self.end.max(va + ph.p_memsz(LE));
        let align = ph.p_align(LE);
        if align.is_power_of_two() {
            self.align = self.align.max(align);
        }
        self.segments.push(segment);
        Ok(())
    }

    fn check_whole(&self, phdrs: &[ProgramHeader64<LE>]) -> Result<(), ElfError> {
        if self.segments.is_empty() {
            return Err(ElfError::NoSegments);
        }
        let inside = phdrs
            .iter()
            .filter(|ph| ph.p_type(LE) == PT_LOAD)
            .any(|ph| {
                self.entry
                    .checked_sub(ph.p_vaddr(LE))
                    .is_some_and(|at| at < ph.p_memsz(LE))
            });
        if inside {
            Ok(())
        } else {
            Err(ElfError::EntryOutside { entry: self.entry })
        }
    }
}

/// The file header, if it is one of a program for this machine.
fn file_header(head: &[u8]) -> Result<&FileHeader64<LE>, ElfError> {
    if !head.starts_with(&object::elf::ELFMAG) {
        return Err(ElfError::NotElf);
    }
    let header = FileHeader64::<LE>::parse(head).map_err(|_| ElfError::OtherMachine)?;
    if !header.is_little_endian() || header.e_machine(LE) != EM_X86_64 {
        return Err(ElfError::OtherMachine);
    }
    match header.e_type(LE) {
        ET_EXEC | ET_DYN => Ok(header),
        _ => Err(ElfError::NotProgram),
    }
}

/// The bytes of the program headers, and their file offset.
fn program_headers(
    file: &(impl ReadAt + ?Sized),
    header: &FileHeader64<LE>,
) -> Result<(Vec<u8>, u64), ElfError> {
    let bytes = u64::from(header.e_phnum(LE)) * PHENT;
    if u64::from(header.e_phentsize(LE)) != PHENT || bytes == 0 || bytes > PHDRS_MAX {
        return Err(ElfError::HeaderTable);
    }
    let mut table = vec![0; bytes as usize];
    let phoff = header.e_phoff(LE);
    read_exact(file, phoff, &mut table)?;
    Ok((table, phoff))
}

/// The path in a `PT_INTERP` header.
fn interpreter(
    file: &(impl ReadAt + ?Sized),
    ph: &ProgramHeader64<LE>,
) -> Result<Vec<u8>, ElfError> {
    let size = ph.p_filesz(LE);
    if !(2..=PATH_MAX as u64).contains(&size) {
        return Err(ElfError::InterpreterPath);
    }
    let mut path = vec![0; size as usize];
    read_exact(file, ph.p_offset(LE), &mut path)?;
    if path.last() != Some(&0) {
        return Err(ElfError::InterpreterPath);
    }
    let end = path.iter().position(|&b| b == 0).unwrap_or(path.len());
    path.truncate(end);
    if path.is_empty() {
        Err(ElfError::InterpreterPath)
    } else {
        Ok(path)
    }
}

/// A `PT_LOAD` header as page ranges; `None` if it holds nothing.
fn segment(ph: &ProgramHeader64<LE>, length: u64) -> Result<Option<Segment>, SegmentFault> {
    let (va, offset) = (ph.p_vaddr(LE), ph.p_offset(LE));
    let (filesz, memsz) = (ph.p_filesz(LE), ph.p_memsz(LE));
    if filesz > memsz {
        return Err(SegmentFault::FileLarger { filesz, memsz });
    }
    if memsz == 0 {
        return Ok(None);
    }
    if va.checked_add(memsz).is_none_or(|end| end > USER_END) {
        return Err(SegmentFault::TooHigh { va, memsz });
    }
    let in_page = va % PAGE;
    let start = va - in_page;
    let end = page_up(va + memsz);
    let mut segment = Segment {
        start,
        file_pages: 0,
        offset: 0,
        zero_from: None,
        zero_pages: 0,
        prot: prot(ph),
    };
    if filesz > 0 {
        if offset.checked_add(filesz).is_none_or(|end| end > length) {
            return Err(SegmentFault::PastFile {
                offset,
                filesz,
                length,
            });
        }
        if offset % PAGE != in_page {
            return Err(SegmentFault::Alignment { va, offset });
        }
        let file_end = va + filesz;
        segment.offset = page_down(offset);
        segment.file_pages = (page_up(file_end) - start) / PAGE;
        segment.zero_from = (memsz > filesz && !file_end.is_multiple_of(PAGE)).then_some(file_end);
    }
    segment.zero_pages = (end - start) / PAGE - segment.file_pages;
    Ok(Some(segment))
}

fn prot(ph: &ProgramHeader64<LE>) -> Prot {
    let flags = ph.p_flags(LE);
    [(PF_R, Prot::READ), (PF_W, Prot::WRITE), (PF_X, Prot::EXEC)]
        .into_iter()
        .filter(|&(flag, _)| flags.contains(flag))
        .fold(Prot::empty(), |all, (_, right)| all | right)
}

#[cfg(test)]
#[path = "elf_tests.rs"]
pub(super) mod tests;
