//! `vmm pool`: a template that outlives its guest, with machines that wait for clones.

use std::process::Command;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process::{self, Limits};

use super::clones_reset::{Running, start};
use super::clones_workers::{Forks, WAITS, warm};
use super::examples::ASK_POOL;
use super::snapshot::{ONLY_VMM, refused, succeed, vmm_with};

/// A pool of `warm` that is ready, of so many machines.
fn pool(context: &Context, machines: &str) -> Result<Running, String> {
    let pool = start(context, &["pool", "warm", "--machines", machines], None)?;
    wait_for(context, |pool| pool["ready"] == true)?;
    Ok(pool)
}

/// Waits until the pool says of itself what it should.
fn wait_for(context: &Context, seen: impl Fn(&serde_json::Value) -> bool) -> Result<(), String> {
    let until = Instant::now() + context.timeout / 3;
    loop {
        let listed = succeed(context, &["ps", "--json"])?;
        let listed: serde_json::Value =
            serde_json::from_slice(&listed.stdout).map_err(|e| e.to_string())?;
        let guests = listed.as_array().into_iter().flatten();
        let mut pools = guests.filter(|hello| hello["pool"].is_object());
        if pools.next().is_some_and(&seen) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("the pool: {listed}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Clones one after the other, after the guest has ended: each finds what it was given, and leaves its machine.
fn serves(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "2")?;
    guest.finish(context)?;
    refused(context, &["fork", "warm"], "no guest `warm`")?;
    for n in 1..=6 {
        let input = context.write("in", format!("line {n}\nend\n"), 0o644)?;
        let input = input.to_string_lossy();
        let fork = ["fork", "warm-pool", "--stdin", &input];
        let ended = vmm_with(context, &fork, b"")?;
        if (ended.status, ended.out()) != (0, format!("clone 1\nline {n}\n")) {
            return Err(format!(
                "{n}: {} {} {}",
                ended.status,
                ended.out(),
                ended.err()
            ));
        }
    }
    wait_for(context, |pool| {
        pool["pool"]["machines"] == 2 && pool["pool"]["copies"] == 0
    })?;
    // More than wait, at once; nothing to read.
    let ended = vmm_with(context, &["fork", "warm-pool", "-n", "5"], b"")?;
    let mut lines: Vec<_> = ended.out().lines().map(str::to_owned).collect();
    lines.sort();
    let all: Vec<_> = (1..=5).map(|n| format!("clone {n}")).collect();
    if (ended.status, &lines) != (0, &all) {
        return Err(format!("{} {lines:?} {}", ended.status, ended.err()));
    }
    // Other machines than the pool has, and one machine for all.
    for more in [
        &["--cpus", "2"][..],
        &["--isolation", "process"],
        &["--per-process", "1"],
    ] {
        let ended = vmm_with(context, &[&["fork", "warm-pool"], more].concat(), b"")?;
        if (ended.status, ended.out().as_str()) != (0, "clone 1\n") {
            return Err(format!("{more:?}: {} {}", ended.status, ended.err()));
        }
    }
    ends(context, pool)
}

/// The pool ends when it is told to, and leaves nothing.
fn ends(context: &Context, mut pool: Running) -> Checked {
    succeed(context, &["kill", "warm-pool"])?;
    let status = tests::process::wait_within(&mut pool.0, context.timeout / 3)?;
    if !status.success() {
        return Err(format!("the pool ended with {status}"));
    }
    let left = std::fs::read_dir(context.work().join("vmm")).map_err(|e| e.to_string())?;
    let left = left.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left
        .filter(|name| name != ".lock" && name != "warm")
        .collect();
    match left.is_empty() {
        true => Ok(PASSED),
        false => Err(format!("run directories are left: {left:?}")),
    }
}

/// Two forks at once; one is killed, and its clones with it; then the pool, and the other's.
fn dies(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "3")?;
    let first = Forks::of("warm-pool", context, "a", &["-n", "2"])?;
    let second = Forks::of("warm-pool", context, "b", &["-n", "3"])?;
    first.wait_for_all(2)?;
    second.wait_for_all(3)?;
    wait_for(context, |pool| pool["pool"]["copies"] == 5)?;
    drop(first);
    second.wait_for("the others go on", |listed| listed.len() == 3)?;
    wait_for(context, |pool| pool["pool"]["copies"] == 3)?;
    succeed(context, &["kill", "b-2"])?;
    wait_for(context, |pool| pool["pool"]["copies"] == 2)?;
    let over = ends(context, pool)?;
    match second.finish()? {
        (Some(125 | 137), said) if said.lines().count() <= 1 => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(over)
}

/// What a pool is not.
fn refuses(context: &Context) -> Checked {
    refused(context, &["pool", "nobody"], "no guest `nobody`")?;
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "1")?;
    let taken = ["pool", "warm", "--name", "warm-pool"];
    refused(context, &taken, "a guest with this name is running")?;
    refused(context, &["pool", "warm", "--name", "../x"], "--name ../x")?;
    refused(context, &["pool", "warm", "--machines", "101"], "101")?;
    for verb in ["inspect", "freeze", "reset"] {
        refused(context, &[verb, "warm-pool"], "this is a pool, not a guest")?;
    }
    refused(context, &["fork", "warm-pool", "--anew"], "this is a pool")?;
    refused(context, &["kill", "-s", "STOP", "warm-pool"], "ended only")?;
    guest.finish(context)?;
    ends(context, pool)
}

/// Another program than vmm has the pool run copies: each has the descriptors that came with its order, its number and its
/// settings; what is no order is answered and harms nobody.
const CLIENT: &str = r#"
import os, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
from ask_pool import Pool

def file(text):
    out = tempfile.TemporaryFile()
    out.write(text); out.flush(); out.seek(0)
    return out

def text(out):
    out.seek(0)
    return out.read().decode()

pool = Pool('warm-pool', of=7, template='mine')
print('room', pool.room)
for n in (3, 4):
    with file(b'line %d\nend\nmore\n' % n) as into, file(b'') as out:
        status = pool.run(n, into.fileno(), out.fileno(), env=['A=%d' % n])
        print(n, status, repr(text(out)))

# Two at once, whose input stays open, and a third with the number of one of them.
reads, writes = os.pipe()
outs = file(b''), file(b'')
for n, out in zip((8, 9), outs):
    pool.say({'op': 'start', 'number': n, 'name': 'mine-%d' % n, 'stdio': ['given', 'given', 'null']}, [reads, out.fileno()])
os.close(reads)
print(sorted(pool.hear()['runs'] for _ in outs))
pool.say({'op': 'start', 'number': 8, 'stdio': ['null'] * 3})
print(pool.hear())
pool.say({'op': 'start', 'number': 10, 'stdio': ['given'] * 3}, [1])
print('few', 'fewer came' in pool.hear()['failed']['why'])
pool.say({'op': 'start', 'number': 10, 'env': ['x'], 'stdio': ['null'] * 3})
print('env', 'NAME=VALUE' in pool.hear()['failed']['why'])
pool.say({'op': 'start', 'number': 10, 'name': '../x', 'stdio': ['null'] * 3})
print('name', '--name' in pool.hear()['failed']['why'])
os.close(writes)
print(sorted((end['number'], end['status']) for end in (pool.hear()['ended'] for _ in outs)))
print([text(out) for out in outs])

# What is no order.
for bad in (b'x\n', b'{"op":"start"}\n', b'[' * 100000 + b'\n', b'{"op":"serve","template":"a b"}\n',
            b'{"op":"start","number":1,"stdio":["null","null","null"]}\n'):
    wrong = Pool.__new__(Pool)
    import socket
    wrong.socket = socket.socket(socket.AF_UNIX)
    wrong.socket.connect(os.environ['XDG_RUNTIME_DIR'] + '/vmm/warm-pool/clones')
    wrong.lines = wrong.socket.makefile('rb')
    wrong.socket.sendall(bad)
    print(list(wrong.hear()), wrong.lines.readline())
pool.say({'op': 'serve'})
print(list(pool.hear()), pool.lines.readline())

# Copies end with the conversation.
reads, writes = os.pipe()
last = Pool('warm-pool')
last.say({'op': 'start', 'number': 1, 'stdio': ['given', 'null', 'null']}, [reads])
last.hear()
os.close(reads)
last.lines.close(); last.socket.close()
try:
    while True:
        os.write(writes, b'x'); time.sleep(0.01)
except BrokenPipeError:
    print('ended')
"#;

fn python(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "1")?;
    guest.finish(context)?;
    context.write("ask_pool.py", ASK_POOL, 0o644)?;
    let work = context.work().to_string_lossy().into_owned();
    let mut client = Command::new("python3");
    client
        .args(["-c", CLIENT, &work])
        .env("XDG_RUNTIME_DIR", &work);
    client.env("PYTHONDONTWRITEBYTECODE", "1");
    let limits = Limits {
        timeout: context.timeout / 2,
        signal: None,
    };
    let ended = process::run(&mut client, b"", &limits).map_err(|e| e.to_string())?;
    let wanted = "room 100\n3 0 'clone 3\\nline 3\\n'\n4 0 'clone 4\\nline 4\\n'\n[8, 9]\n\
        {'failed': {'number': 8, 'why': 'clone 8 runs'}}\nfew True\nenv True\nname True\n\
        [(8, 0), (9, 0)]\n['clone 8\\n', 'clone 9\\n']\n";
    let wanted = wanted.to_owned() + &"['error'] b''\n".repeat(6) + "ended\n";
    if (ended.status, ended.out()) != (0, wanted) {
        return Err(format!("{} {} {}", ended.status, ended.out(), ended.err()));
    }
    // The pool goes on, with its machine, which orders that could not be carried out have left as new.
    wait_for(context, |pool| {
        pool["pool"]["copies"] == 0 && pool["pool"]["machines"] == 1
    })?;
    let after = vmm_with(context, &["fork", "warm-pool"], b"")?;
    if (after.status, after.out().as_str()) != (0, "clone 1\n") {
        return Err(format!("{} {}", after.status, after.err()));
    }
    ends(context, pool)
}

pub(crate) fn cases() -> Vec<Case> {
    let python = Case::function("pool/python", python).needs(&["busybox", "python3"]);
    let python = python.not_native(ONLY_VMM).seconds(120);
    [
        ("pool/serves", serves as fn(&Context) -> Checked),
        ("pool/dies", dies),
        ("pool/refuses", refuses),
    ]
    .into_iter()
    .map(|(name, body)| Case::function(name, body).needs(&["busybox"]))
    .map(|case| case.not_native(ONLY_VMM).seconds(120))
    .chain([python])
    .collect()
}
