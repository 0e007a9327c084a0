//! Guests of a template that are made in the machine of one that has ended: they are what others are. Skipped, aloud, without
//! a usable `/dev/kvm` or python3.

use std::path::Path;
use std::time::Duration;

use super::super::restored::{Choice, Revived, wanted};
use super::super::{After, HostSide, Machine, ProcessSignals, RunError, machine_data};
use super::*;
use crate::config::RunConfig;
use crate::linux::kernel::Kernel;
use crate::linux::stdio::Given;
use crate::machine::testing::{self, wait_for};
use crate::snapshot::guest::{MachineData, open_guest, save_guest};
use crate::snapshot::image::dump::{Dump, Pages};
use crate::snapshot::read::{Snapshot, Trust};
use crate::snapshot::records::Identity;
use crate::snapshot::write::Writer;

const MEMORY: u64 = 192 << 20;
/// How long a guest may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a program does before it is frozen, besides what all do, and once it goes on.
#[derive(Clone, Copy)]
struct Program {
    before: &'static str,
    changes: &'static str,
}

fn script(Program { before, changes }: Program) -> String {
    format!(
        "import os, sys, time, mmap, signal, threading, ctypes, socket, resource\n\
        big = bytearray(b'template' * 300000)\n\
        area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n\
        area[:5] = b'first'\n\
        open('/tmp/file', 'w').write('warm' * 5000); kept = open('/tmp/file', 'r+')\n\
        source = open('/mnt/source', 'rb')\n\
        mapped = mmap.mmap(source.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)\n\
        mapped[4096:4101] = b'first'\n\
        r, w = os.pipe(); os.write(w, b'in the pipe')\n\
        a, b = socket.socketpair(); a.send(b'in the socket')\n\
        libc = ctypes.CDLL(None)\n\
        signal.signal(signal.SIGUSR1, lambda *_: None)\n\
        wipe = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); wipe.madvise(18); wipe[:5] = b'first'\n\
        {before}\n\
        open('/mnt/ready', 'w').close()\n\
        while not os.path.exists('/mnt/go'): time.sleep(0.01)\n\
        {changes}\n\
        open('/mnt/done', 'w').close()\n\
        time.sleep(1000)\n",
    )
}

fn config(program: Program, host: &Path) -> RunConfig {
    let script = script(program);
    RunConfig {
        workdir: b"/tmp".to_vec(),
        max_procs: 64,
        ..testing::config(&["python3", "-c", &script], host, MEMORY)
    }
}

fn open_both(path: &str) -> std::io::Result<std::fs::File> {
    std::fs::File::options().read(true).write(true).open(path)
}

fn host_side() -> HostSide {
    let null = || {
        let null = open_both("/dev/null").expect("a device");
        Some(null.into())
    };
    HostSide {
        stdio: Given([null(), null(), null()]),
        signals: ProcessSignals::LeftAlone,
    }
}

/// A template.
struct Frozen {
    image: Arc<Image>,
    records: Records,
    data: MachineData,
}

impl Frozen {
    fn write(kernel: &Arc<Kernel>, data: MachineData, writer: Writer) -> Self {
        let saved = save_guest(kernel, &data, writer, None, &mut |_| ()).expect("a guest");
        let (file, name) = (saved.written.file, "the guest".to_owned());
        let snapshot = Snapshot::from_file(file, name, Trust::Sealed, None);
        let snapshot = Arc::new(snapshot.expect("a snapshot"));
        let (_, records) = open_guest(&snapshot).expect("records");
        let image = Arc::new(Image::read(&snapshot).expect("an image"));
        Self {
            image,
            records,
            data,
        }
    }

    /// Runs the program until it is ready, and freezes it.
    fn of(program: Program, host: &Path) -> Option<Self> {
        if open_both("/dev/kvm").is_err() || !Path::new("/usr/bin/python3").exists() {
            println!("skipped: /dev/kvm is not usable, or there is no python3");
            return None;
        }
        std::fs::write(host.join("source"), vec![b's'; 50_000]).expect("a file");
        let config = config(program, host);
        let machine = Machine::build(&config, host_side()).expect("a machine");
        let kernel = machine.kernel();
        let runs = std::thread::spawn(move || machine.run(Some(Duration::from_secs(100))));
        wait_for(&host.join("ready"), PATIENCE);
        let writer = Writer::in_memory("a guest").expect("memory");
        let frozen = Self::write(&kernel, machine_data(&config), writer);
        kernel.sched.end();
        runs.join().expect("no panic").expect("an end");
        Some(frozen)
    }

    fn bare(&self) -> Bare {
        let wanted = wanted(&Choice::default(), &self.data, 2);
        Bare::new(&wanted).expect("a machine")
    }

    fn revive(&self, bare: Bare) -> Revived {
        let identity = Identity::default();
        let made = Revived::new(bare, &self.image, &self.records, identity, host_side());
        made.map_err(|unmade| unmade.why).expect("a guest")
    }

    /// Why a guest cannot be made, and its machine, which is as new.
    fn refused(&self, bare: Bare, records: &Records, host: HostSide) -> (String, Bare) {
        let identity = Identity::default();
        let made = Revived::new(bare, &self.image, records, identity, host);
        let unmade = made.err().expect("a refusal");
        let left = unmade.left.expect("a machine for another guest");
        (unmade.why.to_string(), left)
    }

    /// A guest as it would go on.
    fn seen(&self, guest: &Revived) -> (String, Dump) {
        // As to a disk: which pages of files are mapped just now is not to be compared.
        let dir = tempfile::tempdir().expect("a directory");
        let writer = Writer::create(&dir.path().join("seen"), None).expect("a file");
        let again = Self::write(&guest.machine.kernel(), self.data.clone(), writer);
        (format!("{:#?}", again.records), again.image.dump())
    }
}

/// Lets a guest change what it can, and ends it in the middle of that.
fn run_and_end(guest: Revived, host: &Path) -> Bare {
    run_until(guest, host, |kernel| kernel.sched.end())
}

/// Lets a guest change what it can, until it has been ended.
fn run_until(guest: Revived, host: &Path, ended: fn(&Kernel)) -> Bare {
    let kernel = guest.machine.kernel();
    let runs =
        std::thread::spawn(move || guest.run_again(None, After::Keep, |_| Err(RunError::NoCpu)));
    std::fs::write(host.join("go"), b"").expect("a file");
    wait_for(&host.join("done"), PATIENCE);
    ended(&kernel);
    let (_, bare) = runs.join().expect("no panic").expect("an end");
    for name in ["go", "done"] {
        std::fs::remove_file(host.join(name)).expect("a file");
    }
    bare.expect("a machine that can have another guest")
}

/// Pages that are not the same, each with the bytes that are not.
fn different(one: &Pages, other: &Pages) -> Vec<(u64, std::ops::Range<usize>)> {
    let zeroes = vec![0; 4096];
    let mut found = Vec::new();
    for page in one.keys().chain(other.keys()) {
        let [a, b] = [one, other].map(|pages| pages.get(page).unwrap_or(&zeroes));
        let mut bytes = (0..4096).filter(|&at| a[at] != b[at]);
        if let Some(first) = bytes.next() {
            found.push((*page, first..bytes.next_back().unwrap_or(first) + 1));
        }
    }
    found.dedup();
    found
}

fn compare((a, one): &(String, Dump), (b, other): &(String, Dump), what: &str) {
    // Time goes on.
    let time = |line: &str| line.trim_start().starts_with("monotonic: ");
    let lines = |text: &str| {
        let lines = text.lines().filter(|line| !time(line));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let (a, b) = (lines(a), lines(b));
    let differ = a.iter().zip(&b).filter(|(a, b)| a != b).take(20);
    let differ: Vec<_> = differ.collect();
    assert!(
        a.len() == b.len() && differ.is_empty(),
        "{what}: {differ:#?}"
    );
    assert_eq!(one.sections, other.sections, "{what}");
    assert_eq!(one.bytes, other.bytes, "{what}");
    assert_eq!(one.spaces.len(), other.spaces.len());
    for (one, other) in one.spaces.iter().zip(&other.spaces) {
        assert_eq!((&one.0, one.1), (&other.0, other.1), "{what}");
        // The random bytes for the C library, and nothing else.
        let differ = different(&one.2, &other.2);
        let random = |(_, bytes): &(u64, std::ops::Range<usize>)| bytes.len() <= 16;
        assert!(
            differ.len() <= 1 && differ.iter().all(random),
            "{what}: {differ:x?}"
        );
    }
}

/// What was there from the guest before: spaces, and pages that these had stored to.
struct Stayed {
    spaces: usize,
    pages: u64,
}

/// Has guests of a program change what they do, one after the other, in one machine: each is what the first was. Gives what
/// stayed at the end.
fn again_and_again(before: &'static str, changes: &'static str) -> Option<Stayed> {
    again_and_again_until(before, changes, |kernel| kernel.sched.end())
}

fn again_and_again_until(
    before: &'static str,
    changes: &'static str,
    ended: fn(&Kernel),
) -> Option<Stayed> {
    let host = tempfile::tempdir().expect("a directory");
    let frozen = Frozen::of(Program { before, changes }, host.path())?;
    let mut guest = frozen.revive(frozen.bare());
    let first = frozen.seen(&guest);
    let mut stayed = None;
    for round in 0..3 {
        let bare = run_until(guest, host.path(), ended);
        let left = bare.kept.as_ref().expect("something");
        stayed = Some(Stayed {
            spaces: left.memory.spaces().count(),
            pages: left.memory.pages(),
        });
        guest = frozen.revive(bare);
        compare(&first, &frozen.seen(&guest), &format!("round {round}"));
    }
    stayed
}

/// What leaves the mappings as they are.
const STORES: &str = "big[100:1000000] = bytes(999900); area[4096:4101] = b'again'; area[:5] = b'other'
mapped[0:5] = b'again'; mapped[4096:4101] = b'other'; wipe[:5] = wipe[5:10] = b'other'
kept.write('cold'); kept.flush(); os.truncate('/tmp/file', 7)
os.mkdir('/tmp/new'); os.rename('/tmp/file', '/tmp/new/x'); os.mkfifo('/tmp/fifo')
os.read(r, 3); os.write(w, b'more'); b.recv(100); a.send(b'else'); os.close(source.fileno()); os.dup2(r, 77)
signal.signal(signal.SIGUSR2, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
os.kill(os.getpid(), signal.SIGHUP); signal.setitimer(signal.ITIMER_REAL, 1000)
os.chdir('/'); os.umask(0o7); os.nice(3); resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
libc.prctl(15, b'renamed')";

#[test]
fn guest_that_stores_is_the_template_again_in_its_old_space() {
    // So that the interpreter has room for what comes.
    let before = "heap = [bytes(n % 500) for n in range(40000)]; heap = heap[::40]";
    if let Some(kept) = again_and_again(before, STORES) {
        assert_eq!(kept.spaces, 1);
        assert!(kept.pages > 64, "{} pages", kept.pages);
    }
}

/// What changes the mappings, and starts threads and processes that do not end.
const MAPPINGS: &str = "more = mmap.mmap(-1, 1 << 20); more[:] = bytes([7]) * len(more)
mapped.close(); area.resize(2 << 20); libc.sbrk(65536); libc.syscall(9, 0x10000000, 8192, 3, 0x32, -1, 0)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
child = os.fork()
if child == 0:
    big[:] = bytes(len(big)); time.sleep(1000)
if os.fork() == 0: os.execvp('sleep', ['sleep', '1000'])
if os.fork() == 0: os._exit(3)
time.sleep(0.2)";

#[test]
fn guest_with_other_mappings_is_the_template_again_in_its_old_space() {
    if let Some(kept) = again_and_again("", MAPPINGS) {
        assert_eq!(kept.spaces, 1);
    }
}

/// Stores by threads and a child, in the middle of which the guest ends, and what else can become of pages that were stored to.
const PAGES: &str = "at = ctypes.addressof(ctypes.c_char.from_buffer(area))
page = lambda n: ctypes.c_void_p(at + n * 4096)
for n in range(0, 256, 3): area[n * 4096] = 7
def store(byte):
    while True:
        for n in range(60): area[(byte * 64 + n) * 4096 + 8] = byte
for byte in 1, 2, 3: threading.Thread(target=store, args=(byte,), daemon=True).start()
libc.mprotect(page(0), 8192, 1); libc.mprotect(page(0), 8192, 3)
libc.mprotect(page(9), 4096, 1); libc.mprotect(page(12), 4096, 0)
libc.munmap(page(18), 8192); area[30 * 4096] = 9; libc.madvise(page(30), 4096, 4)
libc.mmap(page(36), 8192, 3, 0x32, -1, 0); area[36 * 4096] = 5
if os.fork() == 0:
    while True: area[0] = 1; area[39 * 4096] = 2
area[0] = 3; area[39 * 4096] = 4
time.sleep(0.1)";

#[test]
fn guest_that_ends_in_the_middle_of_stores_is_the_template_again() {
    if let Some(kept) = again_and_again("", PAGES) {
        assert_eq!(kept.spaces, 1);
        assert!(kept.pages > 64, "{} pages", kept.pages);
    }
}

#[test]
fn guest_that_dropped_pages_is_the_template_again() {
    let changes = "area.madvise(mmap.MADV_DONTNEED); assert area[:5] == bytes(5)";
    if let Some(kept) = again_and_again("", changes) {
        assert_eq!(kept.spaces, 1);
    }
}

/// Its mapping is of the file that its descriptor is of, each time.
#[test]
fn guest_that_maps_a_file_in_memory_is_the_template_again() {
    let before =
        "shm = os.open('/tmp/shared', os.O_RDWR | os.O_CREAT); os.truncate('/tmp/shared', 65536)
shared = mmap.mmap(shm, 65536); shared[:4] = shared[8192:8196] = b'warm'
private = mmap.mmap(shm, 65536, flags=mmap.MAP_PRIVATE)";
    let changes = "assert shared[:4] == os.pread(shm, 4, 0) == private[:4] == b'warm'
shared[:4] = b'cold'; os.pwrite(shm, b'cold', 8192)
assert os.pread(shm, 4, 0) == shared[8192:8196] == private[8192:8196] == b'cold'
os.truncate('/tmp/shared', 4096); os.truncate('/tmp/shared', 8192); assert shared[4096:8192] == bytes(4096)
private[:4] = b'mine'; os.unlink('/tmp/shared')";
    if let Some(kept) = again_and_again(before, changes) {
        assert_eq!(kept.spaces, 1);
    }
}

#[test]
fn guest_that_executed_another_program_is_the_template_again() {
    let changes = "os.execvp('sh', ['sh', '-c', ': >/mnt/done; sleep 1000'])";
    if let Some(kept) = again_and_again("", changes) {
        assert_eq!(kept.spaces, 0);
    }
}

/// As most clones do that have answered.
#[test]
fn guest_that_ends_by_itself_is_the_template_again_in_its_old_space() {
    let changes = "big[100:1000000] = bytes(999900); open('/mnt/done', 'w').close(); os._exit(3)";
    let ended = |kernel: &Kernel| {
        kernel.sched.wait_for_end();
        assert_eq!(kernel.state().main_status, Some(3 << 8));
    };
    if let Some(kept) = again_and_again_until("", changes, ended) {
        assert_eq!(kept.spaces, 1);
        assert!(kept.pages > 64, "{} pages", kept.pages);
    }
}

/// Another process, and a thread.
const TWO: &str = "child = os.fork()
if child == 0:
    while True: time.sleep(0.01); big[:3] = b'abc'
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()";

#[test]
fn processes_that_go_on_keep_their_spaces() {
    if let Some(kept) = again_and_again(TWO, "time.sleep(0.1)") {
        assert_eq!(kept.spaces, 2);
    }
}

#[test]
fn process_that_is_gone_gets_a_new_space_and_the_other_keeps_its_own() {
    let changes = "os.kill(child, signal.SIGKILL); os.waitpid(child, 0)";
    if let Some(kept) = again_and_again(TWO, changes) {
        assert_eq!(kept.spaces, 1);
    }
}

#[test]
fn shared_memory_is_the_templates_again() {
    let before = "shared = mmap.mmap(-1, 65536); shared[:5] = b'first'; of = open('/tmp/mapped', 'w+b'); of.write(bytes(9000)); of.flush()
both = mmap.mmap(of.fileno(), 0); both[4096:4101] = b'first'";
    let changes =
        "shared[:5] = b'other'; shared[8192] = 3; both[:5] = b'other'; both[4096:4101] = b'other'";
    if let Some(kept) = again_and_again(before, changes) {
        assert_eq!(kept.spaces, 1);
    }
}

/// Two processes share memory with each other, and with nobody else; they map it elsewhere, and something else in its place.
#[test]
fn processes_that_share_memory_are_the_templates_again_in_their_old_spaces() {
    let before = "shared = mmap.mmap(-1, 1 << 20); shared[:5] = shared[4096:4101] = b'first'
at = ctypes.addressof(ctypes.c_char.from_buffer(shared)); page = lambda n: ctypes.c_void_p(at + n * 4096)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
child = os.fork()
if child == 0:
    while shared[:5] != b'other': time.sleep(0.01)
    libc.munmap(page(7), 4096); libc.mprotect(page(9), 4096, 1); shared[8192:8197] = b'child'
    while True: time.sleep(0.01)";
    let changes = "assert shared[:5] == shared[4096:4101] == b'first' and shared[8192:8197] == bytes(5)
shared[4096:4101] = b'again'; shared[:5] = b'other'
while shared[8192:8197] != b'child': time.sleep(0.01)
elsewhere = libc.mremap(page(1), 4096, 4096, 1 | 2, ctypes.c_void_p(0x20000000)); assert elsewhere == 0x20000000
assert ctypes.string_at(elsewhere, 5) == b'again'
assert libc.mmap(page(3), 8192, 3, 0x32, -1, 0) == at + 3 * 4096; shared[3 * 4096] = 7
if os.fork() == 0:
    shared[5 * 4096] = 8; time.sleep(1000)
while shared[5 * 4096] != 8: time.sleep(0.01)";
    if let Some(kept) = again_and_again(before, changes) {
        assert_eq!(kept.spaces, 2);
    }
}

/// A file of the host that has changed cannot be mapped again, whether or not it still is. The machine is as new for a guest
/// that can be made.
#[test]
fn changed_file_of_the_host_is_refused() {
    let host = tempfile::tempdir().expect("a directory");
    let changes = "time.sleep(0.1)";
    let Some(frozen) = Frozen::of(
        Program {
            before: "",
            changes,
        },
        host.path(),
    ) else {
        return;
    };
    let bare = run_and_end(frozen.revive(frozen.bare()), host.path());
    let source = host.path().join("source");
    let before = (std::fs::read(&source), std::fs::metadata(&source));
    let (bytes, time) = (before.0.unwrap(), before.1.unwrap().modified().unwrap());
    std::fs::write(&source, "other").expect("a file");
    let (refused, bare) = frozen.refused(bare, &frozen.records, host_side());
    assert!(refused.contains("/mnt/source"), "{refused}");
    std::fs::write(&source, bytes).expect("a file");
    open_both(source.to_str().unwrap())
        .and_then(|file| file.set_modified(time))
        .expect("a time");
    run_and_end(frozen.revive(bare), host.path());
}

/// It is refused before it has its spaces, or after that. One stays of the guest before, and one is new.
#[test]
fn guest_that_cannot_be_made_leaves_its_machine_as_new() {
    let host = tempfile::tempdir().expect("a directory");
    let changes = "os.kill(child, signal.SIGKILL); os.waitpid(child, 0); area[:5] = b'other'";
    let before = TWO;
    let Some(frozen) = Frozen::of(Program { before, changes }, host.path()) else {
        return;
    };
    let mut guest = frozen.revive(frozen.bare());
    let first = frozen.seen(&guest);
    let nothing = || HostSide {
        stdio: Given([None, None, None]),
        signals: ProcessSignals::LeftAlone,
    };
    let other = frozen.records.of_another_vdso();
    let refusals = [
        (&other, host_side(), "another vDSO"),
        (&frozen.records, nothing(), "descriptor"),
    ];
    for (records, given, why) in refusals {
        let bare = run_and_end(guest, host.path());
        let (refused, bare) = frozen.refused(bare, records, given);
        assert!(refused.contains(why), "{refused}");
        guest = frozen.revive(bare);
        compare(&first, &frozen.seen(&guest), why);
    }
    run_and_end(guest, host.path());
}

/// The machine of a guest of one template is as new for one of another.
#[test]
fn guest_of_another_template_gets_nothing_of_it() {
    let hosts = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let changes = "area[:5] = b'other'";
    let [one, other] = hosts.each_ref().map(|host| {
        Frozen::of(
            Program {
                before: "",
                changes,
            },
            host.path(),
        )
    });
    let (Some(one), Some(other)) = (one, other) else {
        return;
    };
    let first = other.seen(&other.revive(other.bare()));
    let bare = run_and_end(one.revive(one.bare()), hosts[0].path());
    let guest = other.revive(bare);
    compare(&first, &other.seen(&guest), "another template");
    run_and_end(guest, hosts[1].path());
}
