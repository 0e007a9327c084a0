//! Where the dynamic linker looks for a library (ld.so(8), and musl's).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::SearchEnv;
use super::object_file::{ObjectFile, expand_list};

/// glibc's directories after all others.
const DEFAULT: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// musl's without a path file.
const MUSL_DEFAULT: [&str; 3] = ["/lib", "/usr/local/lib", "/usr/lib"];
/// Subdirectories glibc prefers on processors of these levels.
const HWCAPS: [&str; 3] = [
    "glibc-hwcaps/x86-64-v4",
    "glibc-hwcaps/x86-64-v3",
    "glibc-hwcaps/x86-64-v2",
];
/// Files and include levels of `/etc/ld.so.conf` that are read.
const CONF_DEPTH: usize = 8;

/// The directories for one program.
#[derive(Debug)]
pub(super) struct Search {
    library_path: Vec<PathBuf>,
    system: Vec<PathBuf>,
    preload: Vec<OsString>,
}

impl Search {
    /// For `main` in this environment.
    pub(super) fn new(env: &SearchEnv, main: &ObjectFile) -> Self {
        let origin = main.path.parent().unwrap_or(Path::new("/"));
        let library_path = env.library_path.as_deref().map(|list| {
            let list: Vec<u8> = list
                .as_bytes()
                .iter()
                .map(|&b| if b == b';' { b':' } else { b })
                .collect();
            expand_list(&list, origin)
        });
        let preload = env.preload.as_deref().map(|list| {
            let names = list
                .as_bytes()
                .split(|&b| b == b':' || b.is_ascii_whitespace());
            names
                .filter(|n| !n.is_empty())
                .map(|n| OsString::from_vec(n.to_vec()))
                .collect()
        });
        Self {
            library_path: library_path.unwrap_or_default(),
            system: system_directories(main.interpreter.as_deref()),
            preload: preload.unwrap_or_default(),
        }
    }

    /// What `LD_PRELOAD` names.
    pub(super) fn preloaded(&self) -> Vec<OsString> {
        self.preload.clone()
    }

    /// The files that may be meant by `name` in `by`: those of the first directory that has any.
    pub(super) fn find(&self, name: &OsStr, by: &ObjectFile) -> Vec<PathBuf> {
        if name.as_bytes().contains(&b'/') {
            let origin = by.path.parent().unwrap_or(Path::new("/"));
            return expand_list(name.as_bytes(), origin)
                .into_iter()
                .filter(|p| usable(p))
                .collect();
        }
        let rpath = if by.runpath.is_none() {
            by.rpath.as_slice()
        } else {
            &[]
        };
        let runpath = by.runpath.as_deref().unwrap_or_default();
        let lists = [rpath, &self.library_path, runpath, &self.system];
        lists
            .into_iter()
            .flatten()
            .map(|directory| in_directory(directory, name))
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    }
}

/// The library in a directory, and its variants for newer processors: the guest's dynamic linker may
/// prefer those.
fn in_directory(directory: &Path, name: &OsStr) -> Vec<PathBuf> {
    let Ok(directory) = std::path::absolute(directory) else {
        return Vec::new();
    };
    let variants = HWCAPS.iter().map(|sub| directory.join(sub).join(name));
    variants
        .chain([directory.join(name)])
        .filter(|path| usable(path))
        .collect()
}

/// Whether it is an object for this architecture; the dynamic linker goes on if not.
fn usable(path: &Path) -> bool {
    path.is_file() && ObjectFile::read(path).is_some()
}

/// The file in which musl's dynamic linker finds its directories.
pub(super) fn musl_path_file(interpreter: &Path) -> PathBuf {
    let stem = interpreter
        .file_stem()
        .map(OsStr::to_os_string)
        .unwrap_or_default();
    let arch = stem
        .as_bytes()
        .strip_suffix(b".so")
        .unwrap_or(stem.as_bytes());
    Path::new("/etc").join(OsString::from_vec([arch, b".path"].concat()))
}

fn system_directories(interpreter: Option<&Path>) -> Vec<PathBuf> {
    let musl = interpreter.filter(|path| {
        path.file_name()
            .is_some_and(|name| name.as_bytes().starts_with(b"ld-musl-"))
    });
    if let Some(interpreter) = musl {
        return match std::fs::read(musl_path_file(interpreter)) {
            Ok(text) => text
                .split(|&b| b == b':' || b == b'\n')
                .filter(|d| !d.is_empty())
                .map(super::path_of)
                .collect(),
            Err(_) => MUSL_DEFAULT.map(PathBuf::from).to_vec(),
        };
    }
    let mut directories = Vec::new();
    read_conf(Path::new("/etc/ld.so.conf"), 0, &mut directories);
    directories.extend(DEFAULT.map(PathBuf::from));
    directories
}

/// Reads `ld.so.conf(5)`-like files: a directory a line, `include PATTERN`, `#` comments.
fn read_conf(path: &Path, depth: usize, directories: &mut Vec<PathBuf>) {
    let Ok(text) = std::fs::read_to_string(path) else {
        return;
    };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("include") if depth < CONF_DEPTH => {
                let base = path.parent().unwrap_or(Path::new("/"));
                for file in words.flat_map(|pattern| matching(&base.join(pattern))) {
                    read_conf(&file, depth + 1, directories);
                }
            }
            Some(directory) if directory.starts_with('/') => directories.push(PathBuf::from(line)),
            _ => {}
        }
    }
}

/// Files that match a pattern with `*` in its last component, sorted as glob(3) does.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) = (pattern.parent(), pattern.file_name()) else {
        return Vec::new();
    };
    let name = name.as_bytes();
    let Some(star) = name.iter().position(|&b| b == b'*') else {
        return vec![pattern.to_path_buf()];
    };
    let (before, after) = (&name[..star], &name[star + 1..]);
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let entry = entry.file_name();
            let entry = entry.as_bytes();
            entry.len() >= before.len() + after.len()
                && entry.starts_with(before)
                && entry.ends_with(after)
                && !entry.starts_with(b".")
        })
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conf_includes_are_followed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(
            dir.path().join("main.conf"),
            "# x\ninclude d/*.conf\n/last # y\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("d/b.conf"), "/second\n").unwrap();
        std::fs::write(
            dir.path().join("d/a.conf"),
            "/first\ninclude ../main.conf\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("d/a.txt"), "/never\n").unwrap();
        let mut directories = Vec::new();
        read_conf(
            &dir.path().join("main.conf"),
            CONF_DEPTH - 1,
            &mut directories,
        );
        assert_eq!(
            directories,
            ["/first", "/second", "/last"].map(PathBuf::from)
        );
        // A cycle of includes ends.
        directories.clear();
        read_conf(&dir.path().join("main.conf"), 0, &mut directories);
        assert!(directories.len() > 3);
    }

    #[test]
    fn musl_path_file_is_named_after_the_linker() {
        let file = musl_path_file(Path::new("/lib/ld-musl-x86_64.so.1"));
        assert_eq!(file, Path::new("/etc/ld-musl-x86_64.path"));
    }
}
