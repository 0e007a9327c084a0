//! The shared object around the code: headers, dynamic symbols with version `LINUX_2.6`, both kinds
//! of hash table, and section headers for debuggers. Linked at 0; one read-only segment.

use std::sync::OnceLock;

use object::Endianness;
use object::elf;
use object::write::elf::{
    FileHeader, ProgramHeader, SectionHeader, SectionIndex, Sym, Verdef, Writer,
};
use object::write::{Error, StringId};

use super::code::{self, TEXT_OFFSET};

const SONAME: &[u8] = b"linux-vdso.so.1";
const VERSION: &[u8] = b"LINUX_2.6";
/// Index of `VERSION`; 1 is the object itself.
const VERSION_INDEX: u16 = 2;
const BUCKETS: u32 = 4;
const DYNAMIC_ENTRIES: usize = 10;

/// The shared object, at most [`guest::abi::VDSO_CODE_PAGES`] pages.
///
/// # Panics
/// If it cannot be written, which depends on nothing but this program: our bug.
#[must_use]
pub fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let image = write().expect("the vDSO is a valid ELF file");
        assert!(
            image.len() as u64 <= guest::abi::VDSO_CODE_PAGES * 4096,
            "the vDSO is too long"
        );
        image
    })
}

/// A function as the symbol table has it.
struct Symbol {
    name: &'static str,
    binding: elf::SymbolBind,
    value: u64,
    size: u64,
}

/// All symbols, in the order the GNU hash table wants: by bucket.
fn symbols() -> Vec<Symbol> {
    // The names vdso(7) gives, and the same as weak symbols, as Linux has them.
    const GLOBAL: [&str; 5] = [
        "__vdso_clock_gettime",
        "__vdso_gettimeofday",
        "__vdso_time",
        "__vdso_getcpu",
        "__vdso_clock_getres",
    ];
    let mut all: Vec<Symbol> = code::functions()
        .zip(GLOBAL)
        .flat_map(|((weak, offset, size), global)| {
            let value = TEXT_OFFSET + offset;
            [(global, elf::STB_GLOBAL), (weak, elf::STB_WEAK)].map(|(name, binding)| Symbol {
                name,
                binding,
                value,
                size,
            })
        })
        .collect();
    all.sort_by_key(|s| elf::gnu_hash(s.name.as_bytes()) % BUCKETS);
    all
}

/// File offsets, which are the addresses too.
struct Layout {
    hash: u64,
    gnu_hash: u64,
    dynsym: u64,
    dynstr: u64,
    versym: u64,
    verdef: u64,
    dynamic: u64,
    /// End of what is loaded.
    end: u64,
}

fn write() -> Result<Vec<u8>, Error> {
    let mut buffer = Vec::new();
    let symbols = symbols();
    let text = code::bytes();
    let mut w = Writer::new(Endianness::Little, true, &mut buffer);

    let soname = w.add_dynamic_string(SONAME);
    let version = w.add_dynamic_string(VERSION);
    let names: Vec<StringId> = symbols
        .iter()
        .map(|s| w.add_dynamic_string(s.name.as_bytes()))
        .collect();
    let (layout, text_section, text_name) = reserve(&mut w, &symbols, text.len() as u64)?;

    w.write_file_header(&FileHeader {
        os_abi: elf::ELFOSABI_NONE,
        abi_version: 0,
        e_type: elf::ET_DYN,
        e_machine: elf::EM_X86_64,
        e_entry: 0,
        e_flags: elf::FileFlags(0),
    })?;
    write_program_headers(&mut w, &layout);
    write_hashes(&mut w, &symbols);
    write_symbols(&mut w, &symbols, &names, text_section);
    write_versions(&mut w, symbols.len(), soname, version);
    write_dynamic(&mut w, &layout, soname)?;
    w.pad_until(TEXT_OFFSET);
    w.write(text);
    w.write_shstrtab();
    write_section_headers(&mut w, &layout, text_name, text.len() as u64);
    Ok(buffer)
}

type TwoPhase<'a> = Writer<'a>;

/// Reserves everything in the order it is written.
fn reserve(
    w: &mut TwoPhase<'_>,
    symbols: &[Symbol],
    text: u64,
) -> Result<(Layout, SectionIndex, StringId), Error> {
    let count = symbols.len() as u32;
    w.reserve_file_header();
    w.reserve_program_headers(3);
    w.reserve_null_section_index();
    w.reserve_hash_section_index();
    w.reserve_gnu_hash_section_index();
    w.reserve_dynsym_section_index();
    w.reserve_dynstr_section_index();
    w.reserve_gnu_versym_section_index();
    w.reserve_gnu_verdef_section_index();
    w.reserve_dynamic_section_index();
    let text_name = w.add_section_name(b".text");
    let text_section = w.reserve_section_index();
    w.reserve_shstrtab_section_index();
    w.reserve_null_dynamic_symbol_index();
    for _ in symbols {
        w.reserve_dynamic_symbol_index();
    }
    let hash = w.reserve_hash(BUCKETS, count + 1);
    let gnu_hash = w.reserve_gnu_hash(1, BUCKETS, count);
    let dynsym = w.reserve_dynsym();
    let dynstr = w.reserve_dynstr()?;
    let versym = w.reserve_gnu_versym();
    let verdef = w.reserve_gnu_verdef(2, 2);
    let dynamic = w.reserve_dynamic(DYNAMIC_ENTRIES);
    w.reserve_until(TEXT_OFFSET);
    w.reserve(text, 1);
    let end = w.reserved_len();
    w.reserve_shstrtab()?;
    w.reserve_section_headers();
    let layout = Layout {
        hash,
        gnu_hash,
        dynsym,
        dynstr,
        versym,
        verdef,
        dynamic,
        end,
    };
    Ok((layout, text_section, text_name))
}

fn write_program_headers(w: &mut TwoPhase<'_>, layout: &Layout) {
    let dynamic_size = DYNAMIC_ENTRIES as u64 * 16;
    w.write_align_program_headers();
    let headers = [
        (elf::PT_LOAD, elf::PF_R | elf::PF_X, 0, layout.end, 4096),
        (elf::PT_DYNAMIC, elf::PF_R, layout.dynamic, dynamic_size, 8),
        (elf::PT_GNU_STACK, elf::PF_R, 0, 0, 16),
    ];
    for (p_type, p_flags, offset, size, p_align) in headers {
        w.write_program_header(&ProgramHeader {
            p_type,
            p_flags,
            p_offset: offset,
            p_vaddr: offset,
            p_paddr: offset,
            p_filesz: size,
            p_memsz: size,
            p_align,
        });
    }
}

fn write_hashes(w: &mut TwoPhase<'_>, symbols: &[Symbol]) {
    let count = symbols.len() as u32;
    let name = |n: u32| symbols[n as usize].name.as_bytes();
    w.write_hash(BUCKETS, count + 1, |n| {
        n.checked_sub(1).map(|n| elf::hash(name(n)))
    });
    w.write_gnu_hash(1, 6, 1, BUCKETS, count, |n| elf::gnu_hash(name(n)));
}

fn write_symbols(w: &mut TwoPhase<'_>, symbols: &[Symbol], names: &[StringId], text: SectionIndex) {
    w.write_null_dynamic_symbol();
    for (symbol, &name) in symbols.iter().zip(names) {
        let st_name = w.dynamic_string_offset(Some(name));
        w.write_dynamic_symbol(&Sym {
            section: Some(text.0),
            st_name,
            st_info: elf::SymbolInfo::new(symbol.binding, elf::STT_FUNC),
            st_other: elf::SymbolOther(0),
            st_shndx: elf::SHN_UNDEF,
            st_value: symbol.value,
            st_size: symbol.size,
        });
    }
    w.write_dynstr();
}

fn write_versions(w: &mut TwoPhase<'_>, symbols: usize, soname: StringId, version: StringId) {
    w.write_null_gnu_versym();
    for _ in 0..symbols {
        w.write_gnu_versym(elf::VersymIndex(VERSION_INDEX));
    }
    w.write_align_gnu_verdef();
    let definitions = [
        (elf::VER_FLG_BASE, 1, soname, SONAME),
        (elf::VersionFlags(0), VERSION_INDEX, version, VERSION),
    ];
    for (flags, index, id, name) in definitions {
        let offset = w.dynamic_string_offset(Some(id));
        w.write_gnu_verdef(&Verdef {
            version: elf::VER_DEF_CURRENT,
            flags,
            index: elf::VersionIndex(index),
            aux_count: 1,
            name: offset,
            hash: elf::hash(name),
        });
    }
}

fn write_dynamic(w: &mut TwoPhase<'_>, layout: &Layout, soname: StringId) -> Result<(), Error> {
    w.write_align_dynamic();
    w.write_dynamic_string(elf::DT_SONAME, soname)?;
    let strings = u64::from(w.dynstr_len());
    let entries: [(elf::DynamicTag, u64); DYNAMIC_ENTRIES - 1] = [
        (elf::DT_HASH, layout.hash),
        (elf::DT_GNU_HASH, layout.gnu_hash),
        (elf::DT_STRTAB, layout.dynstr),
        (elf::DT_SYMTAB, layout.dynsym),
        (elf::DT_STRSZ, strings),
        (elf::DT_SYMENT, 24),
        (elf::DT_VERDEF, layout.verdef),
        (elf::DT_VERSYM, layout.versym),
        (elf::DT_NULL, 0),
    ];
    entries
        .into_iter()
        .try_for_each(|(tag, value)| w.write_dynamic(tag, value))
}

fn write_section_headers(w: &mut TwoPhase<'_>, layout: &Layout, text_name: StringId, text: u64) {
    w.write_null_section_header();
    w.write_hash_section_header(layout.hash);
    w.write_gnu_hash_section_header(layout.gnu_hash);
    w.write_dynsym_section_header(layout.dynsym, 1);
    w.write_dynstr_section_header(layout.dynstr);
    w.write_gnu_versym_section_header(layout.versym);
    w.write_gnu_verdef_section_header(layout.verdef);
    w.write_dynamic_section_header(layout.dynamic);
    let sh_name = w.section_name_offset(Some(text_name));
    w.write_section_header(&SectionHeader {
        sh_name,
        sh_type: elf::SHT_PROGBITS,
        sh_flags: elf::SHF_ALLOC | elf::SHF_EXECINSTR,
        sh_addr: TEXT_OFFSET,
        sh_offset: TEXT_OFFSET,
        sh_size: text,
        sh_link: 0,
        sh_info: 0,
        sh_addralign: 64,
        sh_entsize: 0,
    });
    w.write_shstrtab_section_header();
}
