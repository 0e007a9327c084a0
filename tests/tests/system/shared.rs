//! Files and memory that processes share through mappings.

use tests::case::{Case, Checked, Expect, Launch, PASSED, check};
use tests::context::Context;

/// What a program stored through a shared mapping is in the host's file, whether it asked for that or
/// just ended.
fn stores_arrive(context: &Context) -> Checked {
    let launch = Launch::new("{programs}/shared_map", &["{work}"]).options(&[
        "--rw",
        "{work}",
        "--workdir",
        "{work}",
    ]);
    let output = context.run(&launch)?;
    check(&Expect::Tap, &output)?;
    let left = std::fs::read(context.work().join("left")).map_err(|e| e.to_string())?;
    for (page, text) in [
        (1, "stored through a mapping"),
        (2, "and never synchronised"),
    ] {
        let bytes = left.get(page * 4096..).unwrap_or_default();
        if !bytes.starts_with(text.as_bytes()) {
            return Err(format!("page {page} of the file has not {text:?}"));
        }
    }
    Ok(PASSED)
}

/// Why a case is not run natively.
const TMPFS: &str = "it fills a tmpfs";

const MEMORY: &str = "import mmap, os, sys, multiprocessing as mp\n\
    from multiprocessing import shared_memory\n\
    m = mmap.mmap(-1, 8192)\n\
    if os.fork() == 0:\n    m[0:5] = b'child'; os._exit(0)\n\
    os.wait(); print(m[0:5])\n\
    s = shared_memory.SharedMemory(create=True, size=10000)\n\
    def fill(name):\n    t = shared_memory.SharedMemory(name); t.buf[9000] = 77; t.close()\n\
    ctx = mp.get_context('fork')\n\
    p = ctx.Process(target=fill, args=(s.name,)); p.start(); p.join(); print(p.exitcode, s.buf[9000])\n\
    s.close(); s.unlink()\n\
    v = ctx.Value('i', 0)\n\
    def count():\n    for _ in range(int(sys.argv[1])):\n        with v.get_lock(): v.value += 1\n\
    for _ in range(3):\n    p = ctx.Process(target=count); p.start(); p.join()\n\
    print(v.value)\n";

/// Semaphores with names behind a pool, a queue, a lock, an event and a barrier, and a worker that is killed.
const POOL: &str = "import multiprocessing as mp, os, signal, sys, time\n\
    ROUNDS = int(sys.argv[1])\n\
    ctx = mp.get_context('fork')\n\
    def square(n): return n * n\n\
    with ctx.Pool(4) as pool:\n\
    \x20   print(sum(pool.map(square, range(2 * ROUNDS + 100))), pool.apply(square, (12,)), sorted(pool.imap_unordered(square, range(20), 3)))\n\
    lock, tally, q, go = ctx.Lock(), ctx.RawValue('i', 0), ctx.Queue(), ctx.Event()\n\
    gate = ctx.Barrier(3)\n\
    def work(n):\n\
    \x20   go.wait()\n\
    \x20   for _ in range(ROUNDS):\n\
    \x20       with lock: tally.value += 1\n\
    \x20   gate.wait(); q.put((n, 'done'))\n\
    ps = [ctx.Process(target=work, args=(n,)) for n in range(3)]\n\
    [p.start() for p in ps]; go.set()\n\
    print(sorted(q.get() for _ in ps)); [p.join() for p in ps]; print(tally.value)\n\
    few = ctx.BoundedSemaphore(2)\n\
    def hold(): few.acquire(); time.sleep(100)\n\
    p = ctx.Process(target=hold); p.start()\n\
    while few.get_value() == 2: time.sleep(0.01)\n\
    os.kill(p.pid, signal.SIGKILL); p.join(); print(p.exitcode, few.acquire(), few.acquire(timeout=0.1))\n";

const FILES: &str = "import mmap, os\n\
    with open('vmm-test-map', 'w+b') as f:\n\
    \x20   f.write(bytes(20000)); f.flush()\n\
    \x20   m = mmap.mmap(f.fileno(), 0)\n\
    \x20   m[100:104] = b'data'; f.seek(100); print(f.read(4))\n\
    \x20   f.seek(15000); f.write(b'written'); f.flush(); print(m[15000:15007], m.find(b'written'))\n\
    \x20   m.resize(30000); m[29999] = 65; m.flush(); print(os.fstat(f.fileno()).st_size, len(m))\n\
    \x20   c = mmap.mmap(f.fileno(), 4096, access=mmap.ACCESS_COPY); c[100] = 90; print(m[100:104], c[100:104])\n\
    \x20   r = mmap.mmap(f.fileno(), 4096, access=mmap.ACCESS_READ)\n\
    \x20   try: r[0] = 1\n\
    \x20   except TypeError as e: print(e)\n\
    print(open('vmm-test-map', 'rb').read()[29999:])\n";

/// A writer and readers of one database in WAL mode, whose index is a file they map.
const WAL: &str = "import os, sqlite3, sys\n\
    COUNT = int(sys.argv[1])\n\
    if os.path.exists('vmm-test-wal.db'): os.remove('vmm-test-wal.db')\n\
    db = sqlite3.connect('vmm-test-wal.db', isolation_level=None, timeout=60)\n\
    print(db.execute('pragma journal_mode=wal').fetchone())\n\
    db.execute('create table t(n integer primary key, who integer)')\n\
    print(os.path.exists('vmm-test-wal.db-shm'))\n\
    db.close()\n\
    for who in range(3):\n\
    \x20   if os.fork() == 0:\n\
    \x20       db = sqlite3.connect('vmm-test-wal.db', isolation_level=None, timeout=60)\n\
    \x20       for n in range(COUNT):\n\
    \x20           db.execute('begin immediate'); db.execute('insert into t(who) values (?)', (who,)); db.execute('commit')\n\
    \x20           seen = db.execute('select count(*) from t where who = ?', (who,)).fetchone()[0]\n\
    \x20           if seen != n + 1: print('lost', who, n, seen)\n\
    \x20       db.close(); os._exit(0)\n\
    for _ in range(3): print(os.wait()[1])\n\
    db = sqlite3.connect('vmm-test-wal.db')\n\
    print(db.execute('select who, count(*) from t group by who').fetchall(), db.execute('pragma integrity_check').fetchone())\n";

/// Two writers of one database in WAL mode on a tmpfs, both larger than memory, that read all of it back.
const LARGE_WAL: &str = "import hashlib, os, sqlite3, sys\n\
    ROWS, SIZE = int(sys.argv[1]), 4000\n\
    def connect():\n\
    \x20   db = sqlite3.connect('vmm-test-big.db', isolation_level=None, timeout=100)\n\
    \x20   db.execute('pragma cache_size=200'); db.execute('pragma mmap_size=67108864')\n\
    \x20   return db\n\
    def blob(who, n): return hashlib.shake_128(b'%d %d' % (who, n)).digest(SIZE)\n\
    db = connect()\n\
    print(db.execute('pragma journal_mode=wal').fetchone())\n\
    db.execute('create table t(who integer, n integer, b blob, primary key (who, n))')\n\
    db.close()\n\
    for who in range(2):\n\
    \x20   if os.fork() == 0:\n\
    \x20       db = connect()\n\
    \x20       for n in range(0, ROWS, 50):\n\
    \x20           db.execute('begin immediate')\n\
    \x20           db.executemany('insert into t values (?, ?, ?)', [(who, m, blob(who, m)) for m in range(n, n + 50)])\n\
    \x20           db.execute('commit')\n\
    \x20           other = db.execute('select n, b from t where who = ? order by random() limit 5', (1 - who,)).fetchall()\n\
    \x20           for m, b in other:\n\
    \x20               if b != blob(1 - who, m): print('wrong', who, m)\n\
    \x20       for m in range(ROWS - 1, -1, -1):\n\
    \x20           if db.execute('select b from t where who = ? and n = ?', (who, m)).fetchone()[0] != blob(who, m): print('wrong', who, m)\n\
    \x20       db.close(); os._exit(0)\n\
    for _ in range(2): print(os.wait()[1])\n\
    db = connect()\n\
    counted = db.execute('select count(*), sum(length(b)) from t').fetchone()\n\
    print(counted == (2 * ROWS, 2 * ROWS * SIZE), db.execute('pragma integrity_check').fetchone())\n";

fn large_wal() -> Case {
    let script = |rows| ["-c", LARGE_WAL, rows];
    let launch = Launch::new("python3", &script("3000"))
        .in_rig(&script("800"))
        .options(&[
            "--root",
            "/",
            "--tmpfs",
            "/t",
            "--workdir",
            "/t",
            "--cpus",
            "2",
        ])
        .options(&["--memory", "20M", "--page-file", "256M"]);
    let printed = "('wal',)\n0\n0\nTrue ('ok',)\n".to_owned();
    Case::new(
        "shared/sqlite_in_little_memory",
        launch,
        Expect::Exactly(0, printed),
    )
    .needs(&["python3"])
    .seconds(240)
    .not_native(TMPFS)
}

/// With an argument, another one where all is emulated.
fn python(name: &str, script: &str, argument: &str, in_rig: &str) -> Case {
    let launch = Launch::new("python3", &["-S", "-E", "-c", script, argument])
        .in_rig(&["-S", "-E", "-c", script, in_rig])
        .options(&["--root", "/", "--rw", "{work}", "--workdir", "{work}"]);
    Case::new(&format!("shared/{name}"), launch, Expect::LikeNative)
        .needs(&["python3"])
        .seconds(180)
}

pub(crate) fn cases() -> Vec<Case> {
    let on_disk = Launch::new("{programs}/shared_map", &["{work}"]).options(&[
        "--rw",
        "{work}",
        "--workdir",
        "{work}",
    ]);
    let in_memory =
        Launch::new("{programs}/shared_map", &["/var/tmp"]).options(&["--tmpfs", "/var/tmp"]);
    let locks = |args, in_rig| {
        Launch::new("{programs}/shared_locks", args)
            .in_rig(in_rig)
            .options(&["--rw", "{work}", "--workdir", "{work}", "--cpus", "2"])
    };
    let locks = locks(&["{work}", "2000"], &["{work}", "200"]);
    let thrash = |memory| {
        let folder = ["--rw", "{work}", "--workdir", "{work}"];
        [&folder[..], &["--memory", memory, "--page-file", "256M"]].concat()
    };
    let thrash = Launch::new("{programs}/shared_thrash", &["{work}", "4", "49152", "3"])
        .in_rig(&["{work}", "3", "8192", "2"])
        .options(&thrash("16M"))
        .options_in_rig(&thrash("8M"));
    let on_tmpfs = |program: &str, args: &[&str]| {
        let all: Vec<&str> = [&["/t"], args].concat();
        Launch::new(&format!("{{programs}}/{program}"), &all).options(&["--tmpfs", "/t"])
    };
    let paged = ["--memory", "16M", "--page-file", "256M"];
    let little = ["--tmpfs", "/t", "--memory", "8M", "--page-file", "256M"];
    let thrash_in_memory = on_tmpfs("shared_thrash", &["3", "24576", "2"])
        .in_rig(&["/t", "3", "8192", "2"])
        .options(&paged)
        .options_in_rig(&little);
    let large = on_tmpfs("memory_files", &["40"])
        .in_rig(&["/t", "20"])
        .options(&paged)
        .options_in_rig(&little);
    let unpaged = on_tmpfs("memory_files", &["4"]).options(&["--memory", "32M"]);
    vec![
        Case::new("shared/thrash_in_memory", thrash_in_memory, Expect::Tap)
            .seconds(240)
            .not_native(TMPFS),
        Case::new(
            "shared/memory_files",
            on_tmpfs("memory_files", &[]),
            Expect::Tap,
        )
        .not_native(TMPFS),
        Case::new("shared/memory_files_large", large, Expect::Tap)
            .seconds(240)
            .not_native(TMPFS),
        Case::new("shared/memory_files_unpaged", unpaged, Expect::Tap)
            .seconds(120)
            .not_native(TMPFS),
        Case::new("shared/thrash", thrash, Expect::Tap).seconds(240),
        Case::new("shared/locks", locks, Expect::Tap).seconds(180),
        python("python_pool", POOL, "200", "20"),
        Case::new("shared/map_on_disk", on_disk, Expect::Tap),
        Case::new("shared/map_in_memory", in_memory, Expect::Tap),
        Case::function("shared/stores_arrive", stores_arrive),
        python("python_mmap", FILES, "", ""),
        python("python_multiprocessing", MEMORY, "50", "10"),
        python("sqlite_wal", WAL, "30", "10"),
        large_wal(),
    ]
}
