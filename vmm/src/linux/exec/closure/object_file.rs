//! What the dynamic linker reads in an object of the host: interpreter, needed libraries, search
//! paths. Read through `object`'s cache, never whole.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use object::LittleEndian as LE;
use object::elf::{
    DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_STRSZ, DT_STRTAB, Dyn64, EM_X86_64, FileHeader64,
    PT_LOAD, ProgramHeader64,
};
use object::read::elf::{FileHeader, ProgramHeader};
use object::read::{ReadCache, StringTable};

use super::path_of;

/// Most entries of a dynamic section that are looked at.
const ENTRIES_MAX: usize = 65536;

/// An object of the host.
#[derive(Clone, Debug, Default)]
pub(super) struct ObjectFile {
    /// Where it was found.
    pub(super) path: PathBuf,
    /// `PT_INTERP`.
    pub(super) interpreter: Option<PathBuf>,
    /// `DT_NEEDED`, in order.
    pub(super) needed: Vec<OsString>,
    /// `DT_RPATH` of this object and of those that made it be loaded, nearest first.
    pub(super) rpath: Vec<PathBuf>,
    /// `DT_RUNPATH`.
    pub(super) runpath: Option<Vec<PathBuf>>,
}

type Cache = ReadCache<std::fs::File>;

impl ObjectFile {
    /// Reads an object for this architecture; `None` if it is something else.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let cache = ReadCache::new(std::fs::File::open(path).ok()?);
        let header = FileHeader64::<LE>::parse(&cache).ok()?;
        if !header.is_little_endian() || header.e_machine(LE) != EM_X86_64 {
            return None;
        }
        let segments = header.program_headers(LE, &cache).ok()?;
        let mut object = Self {
            path: path.to_path_buf(),
            ..Self::default()
        };
        for segment in segments {
            if let Ok(Some(interpreter)) = segment.interpreter(LE, &cache) {
                object.interpreter = Some(path_of(interpreter));
            }
            if let Ok(Some(entries)) = segment.dynamic(LE, &cache) {
                // An object with a bad dynamic section is included for what it is.
                let _incomplete: Option<()> = object.read_dynamic(&cache, segments, entries);
            }
        }
        Some(object)
    }

    fn read_dynamic(
        &mut self,
        cache: &Cache,
        segments: &[ProgramHeader64<LE>],
        entries: &[Dyn64<LE>],
    ) -> Option<()> {
        let entries = entries
            .iter()
            .take(ENTRIES_MAX)
            .take_while(|e| e.d_tag.get(LE) != DT_NULL);
        let entries: Vec<_> = entries
            .map(|e| (e.d_tag.get(LE), e.d_val.get(LE)))
            .collect();
        let value = |tag| {
            entries
                .iter()
                .find(|&&(t, _)| t == tag)
                .map(|&(_, value)| value)
        };
        let start = file_offset(segments, value(DT_STRTAB)?)?;
        let strings = StringTable::new(cache, start, start.checked_add(value(DT_STRSZ)?)?);
        let origin = self.origin();
        for (tag, value) in entries {
            let text = || {
                u32::try_from(value)
                    .ok()
                    .and_then(|at| strings.get(at).ok())
            };
            match tag {
                DT_NEEDED => self
                    .needed
                    .extend(text().map(|name| OsString::from_vec(name.to_vec()))),
                DT_RPATH => self.rpath = expand_list(text()?, &origin),
                DT_RUNPATH => self.runpath = Some(expand_list(text()?, &origin)),
                _ => {}
            }
        }
        Some(())
    }

    /// The directory `$ORIGIN` stands for.
    fn origin(&self) -> PathBuf {
        let real = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        real.parent().map(Path::to_path_buf).unwrap_or_default()
    }

    /// `DT_RPATH` holds for what an object's libraries need, too.
    pub(super) fn inherit(&mut self, by: &Self) {
        if self.runpath.is_none() {
            self.rpath.extend(by.rpath.iter().cloned());
        }
    }
}

/// Where an address of the object is in its file.
fn file_offset(segments: &[ProgramHeader64<LE>], va: u64) -> Option<u64> {
    segments
        .iter()
        .filter(|ph| ph.p_type(LE) == PT_LOAD)
        .find_map(|ph| {
            let at = va
                .checked_sub(ph.p_vaddr(LE))
                .filter(|&at| at < ph.p_filesz(LE))?;
            ph.p_offset(LE).checked_add(at)
        })
}

/// A colon-separated list of directories with ld.so(8)'s tokens expanded.
pub(super) fn expand_list(list: &[u8], origin: &Path) -> Vec<PathBuf> {
    let directories = list.split(|&b| b == b':').filter(|d| !d.is_empty());
    directories
        .flat_map(|directory| expand(directory, origin))
        .collect()
}

/// `$ORIGIN`, `$PLATFORM` and `$LIB`; the last stands for either of two directories.
pub(super) fn expand(directory: &[u8], origin: &Path) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let text = replace(directory, "ORIGIN", origin.as_os_str().as_bytes());
    let text = replace(&text, "PLATFORM", b"x86_64");
    let each = ["lib64", "lib/x86_64-linux-gnu"]
        .map(|lib| path_of(&replace(&text, "LIB", lib.as_bytes())));
    let [first, second] = each;
    if first == second {
        vec![first]
    } else {
        vec![first, second]
    }
}

fn replace(text: &[u8], token: &str, with: &[u8]) -> Vec<u8> {
    let braced = format!("${{{token}}}");
    let plain = format!("${token}");
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(&byte) = rest.first() {
        let token = [braced.as_bytes(), plain.as_bytes()]
            .into_iter()
            .find(|t| rest.starts_with(t));
        match token {
            Some(token) => {
                out.extend_from_slice(with);
                rest = &rest[token.len()..];
            }
            None => {
                out.push(byte);
                rest = &rest[1..];
            }
        }
    }
    out
}
