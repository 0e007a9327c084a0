use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;

fn of(program: &Path) -> BTreeMap<PathBuf, ClosureEntry> {
    let all = closure(program, &SearchEnv::default()).unwrap();
    let guest = |entry: &ClosureEntry| match entry {
        ClosureEntry::File { guest, .. } | ClosureEntry::Symlink { guest, .. } => path_of(guest),
    };
    all.into_iter()
        .map(|entry| (guest(&entry), entry))
        .collect()
}

/// Follows a guest path through the entries only; the host file at its end.
fn walk(entries: &BTreeMap<PathBuf, ClosureEntry>, path: &Path) -> Option<PathBuf> {
    let mut path = path.to_path_buf();
    'again: for _ in 0..40 {
        let whole = path.clone();
        let mut at = PathBuf::from("/");
        let mut rest = whole.components();
        rest.next();
        while let Some(component) = rest.next() {
            at.push(component);
            match entries.get(&at) {
                Some(ClosureEntry::Symlink { target, .. }) => {
                    at.pop();
                    path = at.join(path_of(target)).join(rest.as_path());
                    path = links::resolve(path.parent()?)?.file.join(path.file_name()?);
                    continue 'again;
                }
                Some(ClosureEntry::File { host, .. }) => {
                    return rest.next().is_none().then(|| host.clone());
                }
                None => {}
            }
        }
        return None;
    }
    None
}

/// The files `ldd` names.
fn ldd(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().filter(|w| w.starts_with('/'));
    words.map(PathBuf::from).collect()
}

#[test]
fn ls_has_what_ldd_lists() {
    let program = Path::new("/bin/ls");
    let entries = of(program);
    let expected = ldd(program);
    assert!(!expected.is_empty());
    for file in expected
        .iter()
        .map(PathBuf::as_path)
        .chain([program, Path::new("/etc/ld.so.cache")])
    {
        let host = walk(&entries, file);
        assert_eq!(host, std::fs::canonicalize(file).ok(), "{}", file.display());
    }
    assert!(!entries.contains_key(Path::new("/etc/passwd")));
}

#[test]
fn script_has_its_interpreter_and_envs_program() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/usr/bin/env sh\necho\n").unwrap();
    let entries = of(&script);
    assert!(walk(&entries, &script).is_some());
    assert!(walk(&entries, Path::new("/usr/bin/env")).is_some());
    let shell = find_program(OsStr::new("sh"), None).unwrap();
    assert_eq!(walk(&entries, &shell), std::fs::canonicalize(&shell).ok());
}

#[test]
fn program_without_interpreter_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let program = std::fs::canonicalize(dir.path()).unwrap().join("static");
    std::fs::write(&program, crate::linux::vdso::image()).unwrap();
    assert_eq!(of(&program).into_keys().collect::<Vec<_>>(), [program]);
}

#[test]
fn link_to_program_is_kept_as_link() {
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    std::fs::write(dir.join("real"), crate::linux::vdso::image()).unwrap();
    std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
    let entries = of(&dir.join("link"));
    assert!(
        matches!(&entries[&dir.join("link")], ClosureEntry::Symlink { target, .. } if target == b"real")
    );
    assert!(matches!(
        &entries[&dir.join("real")],
        ClosureEntry::File { .. }
    ));
}

#[test]
fn cycle_of_links_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("b", dir.path().join("a")).unwrap();
    std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
    assert!(links::resolve(&dir.path().join("a")).is_none());
}

#[test]
fn program_is_found_as_a_shell_does() {
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    let file = dir.join("tool");
    std::fs::write(&file, "").unwrap();
    let path = Some(dir.as_os_str());
    let code = |name: &OsStr| find_program(name, path).map_err(|e| e.exit_code());
    assert_eq!(code(OsStr::new("absent")), Err(127));
    assert_eq!(code(OsStr::new("/no/such/file")), Err(127));
    assert_eq!(code(OsStr::new("/")), Err(126));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(code(OsStr::new("tool")), Err(126));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(code(OsStr::new("tool")), Ok(file));
}

#[test]
fn tokens_in_search_paths_are_expanded() {
    let expand = |list: &str| object_file::expand_list(list.as_bytes(), Path::new("/opt/x"));
    assert_eq!(
        expand("$ORIGIN/../lib:/a::${ORIGIN}"),
        ["/opt/x/../lib", "/a", "/opt/x"].map(PathBuf::from)
    );
    assert_eq!(
        expand("/$LIB"),
        ["/lib64", "/lib/x86_64-linux-gnu"].map(PathBuf::from)
    );
}
