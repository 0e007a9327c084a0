use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use object::LittleEndian as LE;
use object::elf::{ET_DYN, PT_INTERP};
use object::endian::{U16, U64};
use shadow_mm::{Access, GuestVa};

use super::closure::{SearchEnv, closure};
use super::elf::tests::{DATA, Ph, TEXT, header, image};
use super::load::{Loaded, Request, load};
use super::stack::{Strings, at};
use super::*;
use crate::linux::file::Location;
use crate::linux::fs::{Caller, Follow, MountKind, MountSpec};
use crate::linux::mm::TAG_STACK;
use crate::linux::testing::Machine;
use crate::linux::user_mem::UserMem;

/// A machine whose root is a directory of the host.
struct Guest {
    m: Machine,
    dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kind = MountKind::Host {
            root: dir.path().to_path_buf(),
            writable: false,
        };
        let m = Machine::with_mounts(vec![MountSpec {
            at: b"/".to_vec(),
            kind,
        }]);
        Self { m, dir }
    }

    fn put(&self, name: &str, content: &[u8], mode: u32) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn load(&self, path: &str) -> Result<Loaded, ExecError> {
        run(&self.m, path, strings(&["first"]))
    }

    fn errno(&self, path: &str) -> Errno {
        self.load(path).unwrap_err().errno()
    }
}

fn strings(argv: &[&str]) -> Strings {
    let argv = argv.iter().map(|s| s.as_bytes().to_vec()).collect();
    Strings {
        argv,
        envp: vec![b"A=1".to_vec()],
    }
}

fn run(m: &Machine, path: &str, strings: Strings) -> Result<Loaded, ExecError> {
    let root = Location {
        mount: 0,
        path: Vec::new(),
    };
    let program = Program::Path {
        cwd: root.clone(),
        path: path.as_bytes().to_vec(),
        follow: Follow::Last,
        name: None,
    };
    let request = Request {
        program,
        cwd: &root,
        stack_limit: 8 << 20,
        randomize: true,
        strings,
    };
    load(&Caller::machine(&m.k), request)
}

fn static_program() -> Vec<u8> {
    let mut bytes = image(header(), &[TEXT, DATA]);
    bytes[0x1e00..0x3000].fill(0xaa);
    bytes
}

/// The arguments on the stack, and the auxiliary vector.
fn decode(m: &Machine, loaded: &Loaded) -> (Vec<Vec<u8>>, Vec<(u64, u64)>) {
    let mem = UserMem::new(&m.k.memory, &loaded.mm);
    let word = |at| mem.read_obj::<u64>(at).unwrap();
    let mut at = loaded.rsp + 8;
    let mut lists = [Vec::new(), Vec::new()];
    for list in &mut lists {
        while word(at) != 0 {
            list.push(mem.read_cstr(word(at), 4096).unwrap());
            at += 8;
        }
        at += 8;
    }
    assert_eq!(word(loaded.rsp), lists[0].len() as u64);
    assert_eq!(lists[1], [b"A=1".to_vec()]);
    let mut auxv = Vec::new();
    while word(at) != 0 {
        auxv.push((word(at), word(at + 8)));
        at += 16;
    }
    let [argv, _] = lists;
    (argv, auxv)
}

fn aux(auxv: &[(u64, u64)], key: u64) -> u64 {
    auxv.iter().find(|&&(k, _)| k == key).unwrap().1
}

#[test]
fn static_program_is_mapped_and_its_bss_is_zero() {
    let g = Guest::new();
    g.put("prog", &static_program(), 0o755);
    let loaded = g.load("/prog").unwrap();
    assert_eq!(loaded.rip, 0x40_0100);
    assert_eq!(loaded.comm, b"prog");
    assert_eq!(g.m.k.vfs.path_of(loaded.exe.as_ref().unwrap()), b"/prog");
    let mem = UserMem::new(&g.m.k.memory, &loaded.mm);
    let byte = |at| mem.read_obj::<u8>(at).unwrap();
    assert_eq!(byte(0x40_0000), 0x7f);
    assert_eq!(byte(0x40_2e00), 0xaa);
    assert_eq!(byte(0x40_30ff), 0xaa);
    assert_eq!(byte(0x40_3100), 0);
    assert_eq!(byte(0x40_5fff), 0);
    assert_eq!(mem.accessible(0x40_6000, 1, Access::Read), 0);
    assert_eq!(mem.accessible(0x40_0000, 1, Access::Write), 0);
    assert_eq!(mem.accessible(0x40_2000, 1, Access::Execute), 0);
    let layout = loaded.mm.layout.lock();
    assert!(layout.brk_start >= 0x40_6000 && layout.brk_start.is_multiple_of(PAGE));
    assert!(layout.mmap_top < layout.stack.0 && layout.stack.1 <= USER_END);
}

#[test]
fn stack_tells_what_was_loaded() {
    let g = Guest::new();
    g.put("prog", &static_program(), 0o755);
    let loaded = run(&g.m, "/prog", strings(&["a", "", "c c"])).unwrap();
    let (argv, auxv) = decode(&g.m, &loaded);
    assert_eq!(argv, [b"a".to_vec(), Vec::new(), b"c c".to_vec()]);
    assert_eq!(aux(&auxv, at::ENTRY), 0x40_0100);
    assert_eq!(aux(&auxv, at::PHDR), 0x40_0040);
    assert_eq!(aux(&auxv, at::PHNUM), 2);
    assert_eq!(aux(&auxv, at::BASE), 0);
    let stack = loaded.mm.layout.lock().stack;
    assert_eq!(loaded.rsp % 16, 0);
    assert!(stack.0 < loaded.rsp && loaded.rsp < stack.1);
    let vpn = GuestVa::new(loaded.rsp).unwrap().vpn();
    let vad = g.m.k.memory.manager.query(&loaded.mm.space, vpn).unwrap();
    assert_eq!(vad.tag, TAG_STACK);
    assert_eq!(vad.range.count() * PAGE, 8 << 20);
    let mem = UserMem::new(&g.m.k.memory, &loaded.mm);
    assert_eq!(mem.accessible(loaded.rsp, 8, Access::Execute), 0);
}

#[test]
fn no_arguments_become_one_empty_one() {
    let g = Guest::new();
    g.put("prog", &static_program(), 0o755);
    let loaded = run(&g.m, "/prog", strings(&[])).unwrap();
    assert_eq!(decode(&g.m, &loaded).0, [Vec::<u8>::new()]);
}

#[test]
fn host_s_dynamic_program_gets_its_interpreter() {
    let program = Path::new("/bin/ls");
    let files = closure(program, &SearchEnv::default()).unwrap();
    let mount = MountSpec {
        at: b"/".to_vec(),
        kind: MountKind::Closure(files),
    };
    let m = Machine::with_mounts(vec![mount]);
    let loaded = run(&m, "/bin/ls", strings(&["ls"])).unwrap();
    let (_, auxv) = decode(&m, &loaded);
    let base = aux(&auxv, at::BASE);
    let bytes = std::fs::read("/lib64/ld-linux-x86-64.so.2").unwrap();
    let linker = elf::parse(&bytes[..]).unwrap();
    assert_eq!(loaded.rip, base + linker.entry);
    let mem = UserMem::new(&m.k.memory, &loaded.mm);
    let mut head = [0; 4096];
    mem.read(base, &mut head).unwrap();
    assert_eq!(head[..], bytes[..4096]);
    let entry = aux(&auxv, at::ENTRY);
    assert!((0x5555_5555_4000..0x5700_0000_0000).contains(&entry));
    assert_eq!(mem.accessible(entry, 1, Access::Execute), 1);
    assert_eq!(
        mem.read_obj::<u32>(aux(&auxv, at::PHDR)).unwrap(),
        6,
        "PT_PHDR first"
    );
}

#[test]
fn what_cannot_be_executed_has_its_errno() {
    let g = Guest::new();
    g.put("plain", &static_program(), 0o644);
    g.put("text", b"hello", 0o755);
    g.put("empty", b"", 0o755);
    g.put("bad", b"#!\n", 0o755);
    std::fs::create_dir(g.dir.path().join("dir")).unwrap();
    assert_eq!(g.errno("/absent"), Errno::NOENT);
    assert_eq!(g.errno(""), Errno::NOENT);
    assert_eq!(g.errno("/plain"), Errno::ACCESS);
    assert_eq!(g.errno("/dir"), Errno::ACCESS);
    assert_eq!(g.errno("/text"), Errno::NOEXEC);
    assert_eq!(g.errno("/text/x"), Errno::NOTDIR);
    assert_eq!(g.errno("/empty"), Errno::NOEXEC);
    assert_eq!(g.errno("/bad"), Errno::NOEXEC);
}

#[test]
fn script_is_run_by_its_interpreter() {
    let g = Guest::new();
    g.put("prog", &static_program(), 0o755);
    g.put("one", b"#!/prog -x y \n", 0o755);
    g.put("two", b"#! /one\n", 0o755);
    let loaded = run(&g.m, "two", strings(&["ignored", "last"])).unwrap();
    let (argv, auxv) = decode(&g.m, &loaded);
    assert_eq!(
        argv,
        ["/prog", "-x y", "/one", "two", "last"].map(|s| s.as_bytes().to_vec())
    );
    let mem = UserMem::new(&g.m.k.memory, &loaded.mm);
    assert_eq!(mem.read_cstr(aux(&auxv, at::EXECFN), 64).unwrap(), b"two");
    assert_eq!(loaded.comm, b"two");
    assert_eq!(g.m.k.vfs.path_of(loaded.exe.as_ref().unwrap()), b"/prog");
}

#[test]
fn script_that_runs_itself_ends() {
    let g = Guest::new();
    g.put("self", b"#!/self\n", 0o755);
    g.put("lost", b"#!/absent\n", 0o755);
    assert_eq!(g.errno("/self"), Errno::LOOP);
    assert_eq!(g.errno("/lost"), Errno::NOENT);
}

#[test]
fn bad_interpreters_have_their_errno() {
    let g = Guest::new();
    let with = |path: &[u8]| {
        let interp = Ph {
            kind: PT_INTERP,
            offset: 0x2800,
            filesz: 16,
            ..DATA
        };
        let mut bytes = image(header(), &[TEXT, interp]);
        bytes[0x2800..0x2800 + path.len()].copy_from_slice(path);
        bytes
    };
    g.put("text", b"hello", 0o755);
    g.put("plain", &static_program(), 0o644);
    g.put("lost", &with(b"/absent"), 0o755);
    g.put("odd", &with(b"/text"), 0o755);
    g.put("closed", &with(b"/plain"), 0o755);
    assert_eq!(g.errno("/lost"), Errno::NOENT);
    assert_eq!(g.errno("/odd"), Errno::LIBBAD);
    assert_eq!(g.errno("/closed"), Errno::ACCESS);
}

#[test]
fn failed_load_leaves_nothing() {
    let g = Guest::new();
    // Relocatable, and too large for any place.
    let huge = Ph {
        va: 0,
        filesz: 0,
        memsz: USER_END,
        ..DATA
    };
    let mut head = header();
    head.e_type = U16::new(LE, ET_DYN);
    head.e_entry = U64::new(LE, 16);
    g.put("huge", &image(head, &[huge]), 0o755);
    g.put("prog", &static_program(), 0o755);
    let manager = &g.m.k.memory.manager;
    let before = (manager.stats().tables.active, manager.stats().data.active);
    assert_eq!(g.errno("/huge"), Errno::NOMEM);
    let many = strings(&["a".repeat(100_000).as_str(); 30]);
    assert_eq!(run(&g.m, "/prog", many).unwrap_err().errno(), Errno::TOOBIG);
    drop(g.load("/prog").unwrap());
    assert_eq!(
        (manager.stats().tables.active, manager.stats().data.active),
        before
    );
}

#[test]
fn errors_are_one_line() {
    let g = Guest::new();
    g.put("text", b"hello", 0o755);
    let line = |path| g.load(path).unwrap_err().to_string();
    assert_eq!(line("/text"), "/text: not an ELF file");
    assert!(line("/a\nb").starts_with("/a\\nb: "));
}
