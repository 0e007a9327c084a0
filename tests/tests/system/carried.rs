//! Programs that are in the middle of something when they are written down: threads that run, wait and sleep, and
//! a database transaction. Each goes on twice, from the same snapshot.

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;

use super::snapshot::{Guest, ONLY_VMM, expect, snapshot, vmm_with};

/// Three threads that count, one that waits for a condition, one that sleeps: all end when a line comes.
const THREADS: &str = "import sys, threading, time
stop, lock = threading.Event(), threading.Condition()
counts, said = [0] * 3, []
def count(n):
    while not stop.is_set():
        counts[n] += 1
def wait():
    with lock:
        lock.wait()
        said.append('woken')
def sleep():
    before = time.monotonic()
    time.sleep(1)
    said.append('slept' if 1 <= time.monotonic() - before < 60 else 'overslept')
all = [threading.Thread(target=count, args=(n,)) for n in range(3)]
all += [threading.Thread(target=wait), threading.Thread(target=sleep)]
for t in all:
    t.start()
print('READY', flush=True)
line = sys.stdin.readline().strip()
before = list(counts)
until = time.monotonic() + 60
moved = lambda: [a > b for a, b in zip(counts, before)]
while not min(moved()) and time.monotonic() < until:
    time.sleep(0.05)
moved = moved()
stop.set()
with lock:
    lock.notify_all()
for t in all:
    t.join()
print(line, moved, sorted(said))
";

/// Two seconds of every kind of wait with a limit, a child that sleeps, an interval timer, a signal that is pending
/// and a pipe with something in it. None may end early, or at once because time had passed meanwhile.
const WAITS: &str = "import os, select, signal, subprocess, sys, threading, time
times, ticks = {}, []
def wait(how, f):
    def timed():
        before = time.monotonic()
        f()
        times[how] = time.monotonic() - before
    return threading.Thread(target=timed)
inner, outer = os.pipe()
def epoll():
    e = select.epoll()
    e.register(inner, select.EPOLLIN)
    e.poll(2)
def poll():
    p = select.poll()
    p.register(inner, select.POLLIN)
    p.poll(2000)
def condition():
    c = threading.Condition()
    with c:
        c.wait(2)
def child():
    subprocess.run(['sleep', '2'])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGALRM])
full, empty = os.pipe()
os.write(empty, b'half')
os.kill(os.getpid(), signal.SIGUSR1)
all = [wait('sleep', lambda: time.sleep(2)), wait('select', lambda: select.select([inner], [], [], 2)),
       wait('poll', poll), wait('epoll', epoll), wait('condition', condition), wait('child', child),
       wait('signal', lambda: signal.sigtimedwait([signal.SIGUSR2], 2))]
for t in all:
    t.start()
signal.setitimer(signal.ITIMER_REAL, 2)
time.sleep(0.5)
print('READY', flush=True)
line = sys.stdin.readline().strip()
signal.sigwait([signal.SIGALRM])
for t in all:
    t.join()
wrong = {how: t for how, t in times.items() if not 1.99 <= t < 60}
print(line, len(times), wrong, [s.name for s in signal.sigpending()], os.read(full, 9).decode())
";

/// A transaction that is half-way, in a database in memory of the guest.
const DATABASE: &str = "import sys, sqlite3
db = sqlite3.connect('/mnt/test.db', isolation_level=None)
db.execute('create table t (n integer primary key, s text)')
db.execute('begin')
half = int(sys.argv[1])
rows = lambda a, b: [(n, 'row %d' % n) for n in range(a, b)]
db.executemany('insert into t values (?, ?)', rows(0, half))
print('READY', flush=True)
line = sys.stdin.readline().strip()
db.executemany('insert into t values (?, ?)', rows(half, 2 * half))
db.execute('commit')
db = sqlite3.connect('/mnt/test.db')
print(line, *db.execute('select count(*), sum(n) from t').fetchone(),
      db.execute('pragma integrity_check').fetchone()[0])
";

fn twice(context: &Context, program: &str, argument: &str, rest: &str) -> Checked {
    let file = context.write("program.py", program, 0o644)?;
    let file = file.to_string_lossy().into_owned();
    let options = ["--root", "/", "--tmpfs", "/mnt"];
    let guest = Guest::start_in(context, &options, &["python3", "-S", "-E", &file, argument])?;
    let path = snapshot(context)?;
    drop(guest);
    for line in ["one", "two"] {
        let again = vmm_with(context, &["restore", &path], format!("{line}\n").as_bytes())?;
        expect(&again, 0, &format!("{line} {rest}\n"))?;
    }
    Ok(PASSED)
}

/// Threads that run, wait and sleep go on doing so.
fn threads(context: &Context) -> Checked {
    twice(
        context,
        THREADS,
        "",
        "[True, True, True] ['slept', 'woken']",
    )
}

/// What was left of a wait is left, and what was pending is.
fn waits(context: &Context) -> Checked {
    twice(context, WAITS, "", "7 {} ['SIGUSR1'] half")
}

/// A transaction that was half-way is finished, and the database is sound.
fn database(context: &Context) -> Checked {
    let half: u64 = context.amount(3000, 600);
    let sum = half * (2 * half - 1);
    let rest = format!("{} {sum} ok", 2 * half);
    twice(context, DATABASE, &half.to_string(), &rest)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        ("carried/threads", threads as fn(&Context) -> Checked),
        ("carried/waits", waits),
        ("carried/database", database),
    ]
    .into_iter()
    .map(|(name, body)| {
        let case = Case::function(name, body);
        case.not_native(ONLY_VMM).needs(&["python3"]).seconds(180)
    })
    .collect()
}
