use object::elf::{ET_REL, PT_NULL};
use object::endian::{U16, U32, U64};
use object::pod::bytes_of;

use super::*;

/// A header to be laid into an image.
#[derive(Clone, Copy)]
pub(in crate::linux::exec) struct Ph {
    pub(in crate::linux::exec) kind: object::elf::ProgramType,
    pub(in crate::linux::exec) flags: object::elf::ProgramFlags,
    pub(in crate::linux::exec) offset: u64,
    pub(in crate::linux::exec) va: u64,
    pub(in crate::linux::exec) filesz: u64,
    pub(in crate::linux::exec) memsz: u64,
    pub(in crate::linux::exec) align: u64,
}

pub(in crate::linux::exec) const TEXT: Ph = Ph {
    kind: PT_LOAD,
    flags: object::elf::ProgramFlags(PF_R.0 | PF_X.0),
    offset: 0,
    va: 0x40_0000,
    filesz: 0x1000,
    memsz: 0x1000,
    align: 0x1000,
};
pub(in crate::linux::exec) const DATA: Ph = Ph {
    kind: PT_LOAD,
    flags: object::elf::ProgramFlags(PF_R.0 | PF_W.0),
    offset: 0x1e00,
    va: 0x40_2e00,
    filesz: 0x300,
    memsz: 0x2345,
    align: 0x1000,
};

pub(in crate::linux::exec) fn header() -> FileHeader64<LE> {
    let mut header = FileHeader64::<LE>::parse(super::super::super::vdso::image())
        .copied()
        .unwrap();
    header.e_type = U16::new(LE, ET_EXEC);
    header.e_entry = U64::new(LE, 0x40_0100);
    header.e_phoff = U64::new(LE, 64);
    header
}

/// An image of 0x3000 bytes with these headers.
pub(in crate::linux::exec) fn image(mut header: FileHeader64<LE>, phdrs: &[Ph]) -> Vec<u8> {
    header.e_phnum = U16::new(LE, phdrs.len() as u16);
    let mut image = bytes_of(&header).to_vec();
    for ph in phdrs {
        image.extend_from_slice(bytes_of(&ProgramHeader64::<LE> {
            p_type: U32::new(LE, ph.kind),
            p_flags: U32::new(LE, ph.flags),
            p_offset: U64::new(LE, ph.offset),
            p_vaddr: U64::new(LE, ph.va),
            p_paddr: U64::new(LE, 0),
            p_filesz: U64::new(LE, ph.filesz),
            p_memsz: U64::new(LE, ph.memsz),
            p_align: U64::new(LE, ph.align),
        }));
    }
    image.resize(0x3000, 0);
    image
}

fn parsed(phdrs: &[Ph]) -> Result<Elf, ElfError> {
    parse(&image(header(), phdrs)[..])
}

fn fault(ph: Ph) -> SegmentFault {
    match parsed(&[TEXT, ph]) {
        Err(ElfError::Segment { index: 1, fault }) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn static_program_has_its_ranges() {
    let elf = parsed(&[TEXT, DATA]).unwrap();
    assert!(!elf.relocatable);
    assert_eq!(elf.phdr, 0x40_0040);
    assert_eq!(elf.end, 0x40_5145);
    assert_eq!(elf.interpreter, None);
    let text = &elf.segments[0];
    assert_eq!(
        (text.start, text.file_pages, text.zero_pages),
        (0x40_0000, 1, 0)
    );
    assert_eq!(text.zero_from, None);
    assert_eq!(text.prot, Prot::READ | Prot::EXEC);
    let data = &elf.segments[1];
    assert_eq!(
        (data.start, data.offset, data.file_pages),
        (0x40_2000, 0x1000, 2)
    );
    assert_eq!((data.zero_from, data.zero_pages), (Some(0x40_3100), 2));
    assert_eq!(elf.start(), 0x40_0000);
    assert_eq!(elf.span_pages(), 6);
}

#[test]
fn bss_alone_has_no_file_pages() {
    let bss = Ph {
        offset: 0x777,
        va: 0x50_0010,
        filesz: 0,
        memsz: 0x1000,
        ..DATA
    };
    let elf = parsed(&[TEXT, bss]).unwrap();
    let bss = &elf.segments[1];
    assert_eq!(
        (bss.start, bss.file_pages, bss.zero_pages, bss.zero_from),
        (0x50_0000, 0, 2, None)
    );
}

#[test]
fn empty_segment_is_skipped() {
    let empty = Ph {
        filesz: 0,
        memsz: 0,
        va: u64::MAX,
        ..DATA
    };
    assert_eq!(parsed(&[TEXT, empty]).unwrap().segments.len(), 1);
}

#[test]
fn interpreter_path_is_read_without_nul() {
    let mut bytes = image(
        header(),
        &[
            TEXT,
            Ph {
                kind: PT_INTERP,
                offset: 0x2000,
                filesz: 8,
                ..DATA
            },
        ],
    );
    bytes[0x2000..0x2008].copy_from_slice(b"/ld.so\0\0");
    assert_eq!(parse(&bytes[..]).unwrap().interpreter.unwrap(), b"/ld.so");
    bytes[0x2007] = b'x';
    assert_eq!(parse(&bytes[..]), Err(ElfError::InterpreterPath));
}

#[test]
fn interpreter_of_bad_length_is_refused() {
    for filesz in [0, 1, 4097, u64::MAX] {
        let interp = Ph {
            kind: PT_INTERP,
            offset: 0x2000,
            filesz,
            ..DATA
        };
        assert_eq!(
            parsed(&[TEXT, interp]),
            Err(ElfError::InterpreterPath),
            "{filesz}"
        );
    }
    let beyond = Ph {
        kind: PT_INTERP,
        offset: u64::MAX - 3,
        filesz: 8,
        ..DATA
    };
    assert_eq!(parsed(&[TEXT, beyond]), Err(ElfError::Truncated));
}

#[test]
fn more_file_than_memory_is_refused() {
    assert!(matches!(
        fault(Ph {
            memsz: 0x200,
            ..DATA
        }),
        SegmentFault::FileLarger { .. }
    ));
}

#[test]
fn addresses_outside_user_space_are_refused() {
    for va in [
        USER_END,
        USER_END - 0x1000 + 0xe00,
        u64::MAX - 0x1ff,
        0x8000_0000_0000_0e00,
    ] {
        assert!(
            matches!(fault(Ph { va, ..DATA }), SegmentFault::TooHigh { .. }),
            "{va:#x}"
        );
    }
    for memsz in [u64::MAX, USER_END, u64::MAX - 0x40_2e00] {
        assert!(
            matches!(fault(Ph { memsz, ..DATA }), SegmentFault::TooHigh { .. }),
            "{memsz:#x}"
        );
    }
    let low = Ph { va: 0xfe00, ..DATA };
    assert_eq!(fault(low), SegmentFault::TooLow { va: 0xf000 });
    assert_eq!(parsed(&[TEXT, low]).unwrap_err().errno(), Errno::PERM);
}

#[test]
fn file_bytes_outside_file_are_refused() {
    for offset in [0x2e00, u64::MAX - 0x1ff, 1 << 63] {
        let ph = Ph {
            offset,
            va: 0x40_0000 + offset % PAGE,
            ..DATA
        };
        assert!(
            matches!(fault(ph), SegmentFault::PastFile { .. }),
            "{offset:#x}"
        );
    }
}

#[test]
fn different_position_in_page_is_refused() {
    assert!(matches!(
        fault(Ph {
            va: 0x40_2e10,
            ..DATA
        }),
        SegmentFault::Alignment { .. }
    ));
}

#[test]
fn entry_outside_segments_is_refused() {
    for entry in [0, 0x3f_ffff, 0x40_1000, u64::MAX] {
        let mut header = header();
        header.e_entry = U64::new(LE, entry);
        assert_eq!(
            parse(&image(header, &[TEXT])[..]),
            Err(ElfError::EntryOutside { entry })
        );
    }
}

#[test]
fn nothing_to_load_is_refused() {
    assert_eq!(
        parsed(&[Ph {
            kind: PT_NULL,
            ..TEXT
        }]),
        Err(ElfError::NoSegments)
    );
}

#[test]
fn absurd_header_table_is_refused() {
    assert_eq!(parsed(&[]), Err(ElfError::HeaderTable));
    let with = |change: fn(&mut FileHeader64<LE>)| {
        let mut bytes = image(header(), &[TEXT]);
        let mut header = header();
        header.e_phnum = U16::new(LE, 1);
        change(&mut header);
        bytes[..64].copy_from_slice(bytes_of(&header));
        parse(&bytes[..])
    };
    assert_eq!(
        with(|h| h.e_phentsize = U16::new(LE, 55)),
        Err(ElfError::HeaderTable)
    );
    assert_eq!(
        with(|h| h.e_phnum = U16::new(LE, 0xffff)),
        Err(ElfError::HeaderTable)
    );
    assert_eq!(
        with(|h| h.e_phoff = U64::new(LE, 0x2fff)),
        Err(ElfError::Truncated)
    );
    assert_eq!(
        with(|h| h.e_phoff = U64::new(LE, u64::MAX)),
        Err(ElfError::Truncated)
    );
    assert_eq!(
        with(|h| h.e_machine = U16::new(LE, object::elf::EM_AARCH64)),
        Err(ElfError::OtherMachine)
    );
    assert_eq!(
        with(|h| h.e_type = U16::new(LE, ET_REL)),
        Err(ElfError::NotProgram)
    );
    assert_eq!(
        with(|h| h.e_ident.class = object::elf::ELFCLASS32),
        Err(ElfError::OtherMachine)
    );
}

#[test]
fn every_truncation_is_refused_or_parsed() {
    let bytes = image(header(), &[TEXT, DATA]);
    for length in 0..0x400 {
        assert!(parse(&bytes[..length]).is_err(), "{length}");
    }
    assert_eq!(parse(&bytes[..0]), Err(ElfError::NotElf));
    assert_eq!(parse(&bytes[..100]), Err(ElfError::Truncated));
}

#[test]
fn random_headers_never_escape_the_user_space() {
    // A fixed generator (Marsaglia's xorshift64): the same headers every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let good = image(header(), &[TEXT, DATA]);
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..1 + next() % 4 {
            let at = (next() % (64 + 2 * 56)) as usize;
            bytes[at] = match next() % 3 {
                0 => 0xff,
                1 => bytes[at] ^ (1 << (next() % 8)),
                _ => next() as u8,
            };
        }
        let Ok(elf) = parse(&bytes[..]) else { continue };
        accepted += 1;
        for s in &elf.segments {
            assert!(s.end() <= USER_END && s.start % PAGE == 0 && s.offset % PAGE == 0);
            assert!(s.offset + s.file_pages * PAGE <= page_up(bytes.len() as u64));
            if let Some(zero) = s.zero_from {
                assert!(zero > s.start && zero < s.start + s.file_pages * PAGE);
            }
        }
        assert!(elf.end <= USER_END);
    }
    assert!(accepted > 1000, "{accepted}");
}

#[test]
fn host_program_parses() {
    let bytes = std::fs::read("/proc/self/exe").unwrap();
    let elf = parse(&bytes[..]).unwrap();
    assert!(elf.relocatable);
    assert!(
        elf.interpreter
            .is_some_and(|path| path.starts_with(b"/lib"))
    );
    assert!(!elf.executable_stack);
}
