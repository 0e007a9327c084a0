//! Programs that other people wrote, doing what they are for.

use tests::case::{Body, Case, Checked, Expect, Launch, PASSED};
use tests::context::Context;

fn alone(name: &str, program: &'static str, args: &[&str]) -> Case {
    let launch = Launch::new(program, args);
    Case::new(&format!("real/{name}"), launch, Expect::LikeNative).needs(&[program])
}

fn rooted(name: &str, program: &'static str, args: &[&str]) -> Case {
    let mut case = alone(name, program, args);
    if let Body::Launch(launch, _) = &mut case.body {
        launch
            .options
            .extend(["--root", "/", "--workdir", "{work}"].map(str::to_owned));
    }
    case
}

/// `tar` and `gzip` in a pipeline over a tree of a thousand files; fewer where all is emulated.
fn archive(context: &Context) -> Checked {
    let count = context.amount(1000, 200);
    for i in 0..count {
        let name = format!("tree/{}/{}/file-{i}", i % 10, i % 7);
        context.write(&name, format!("{i}\n").repeat(i % 50), 0o644)?;
    }
    let line = "tar c tree | gzip | gunzip | tar t | sort";
    let launch = Launch::shell(line);
    let (guest, host) = (context.run(&launch)?, context.native(&launch)?);
    let files = guest.out().lines().filter(|l| !l.ends_with('/')).count();
    if (guest.status, files) != (0, count) || guest.stdout != host.stdout {
        return Err(format!(
            "status {}, {files} files; {}",
            guest.status,
            guest.err()
        ));
    }
    // And back again, onto a memory file system: the same contents.
    let line = "tar c tree | (cd /run && tar x) && cd /run && find tree -type f | sort | xargs cat | sha256sum";
    let launch = Launch::shell(line).options(&["--tmpfs", "/run"]);
    let guest = context.run(&launch)?;
    let native = Launch::shell("find tree -type f | sort | xargs cat | sha256sum");
    let host = context.native(&native)?;
    if guest.stdout == host.stdout && guest.status == 0 {
        return Ok(PASSED);
    }
    Err(format!(
        "status {}: {} instead of {}; {}",
        guest.status,
        guest.out(),
        host.out(),
        guest.err()
    ))
}

pub(crate) fn cases() -> Vec<Case> {
    let lua = "local t = {} for i = 1, 50000 do t[i] = i * i % 1009 end table.sort(t) \
        local s = 0 for i, v in ipairs(t) do s = s + i * v end print(s, #t, collectgarbage('count') > 0) \
        print(io.popen and io.popen('echo from a shell'):read('a') or '')";
    let python = "import os, sys, subprocess, json, hashlib, tempfile\n\
        print(json.dumps({'sum': sum(range(100000))}))\n\
        r, w = os.pipe()\n\
        if os.fork() == 0:\n    os.write(w, b'child'); os._exit(3)\n\
        print(os.read(r, 9), os.waitstatus_to_exitcode(os.wait()[1]))\n\
        print(subprocess.run(['tr', 'a-z', 'A-Z'], input=b'text', capture_output=True).stdout)\n\
        print(subprocess.call('exit 4', shell=True), hashlib.sha256(b'x' * 1000000).hexdigest()[:9])\n\
        try: subprocess.run(['/nonexistent'])\n\
        except FileNotFoundError as e: print('not found', e.errno)\n\
        sys.exit(9)\n";
    let threads = "import sys, threading, queue, time, subprocess, hashlib\n\
        todo, done = queue.Queue(), []\n\
        def work():\n    while (n := todo.get()) is not None: done.append(hashlib.sha256(b'x' * n * 100).digest()[0])\n\
        crew = [threading.Thread(target=work) for _ in range(12)]\n\
        [t.start() for t in crew]; [todo.put(n) for n in range(int(sys.argv[1]))]; [todo.put(None) for _ in crew]; [t.join() for t in crew]\n\
        print(sum(done), len(done), threading.active_count())\n\
        gate, ready = threading.Barrier(5), threading.Event()\n\
        ends = []\n\
        def run(n):\n    gate.wait(); ready.wait(); ends.append(subprocess.call(['sh', '-c', 'exit %d' % n]))\n\
        crew = [threading.Thread(target=run, args=(n,)) for n in range(4)]\n\
        [t.start() for t in crew]; gate.wait(); ready.set(); [t.join() for t in crew]\n\
        print(sorted(ends), threading.Event().wait(0.01))\n";
    let sql = "create table t(a integer primary key, b text);\n\
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 5000)\n\
        insert into t select i, 'row ' || i from n;\n\
        select count(*), sum(a), max(b) from t where b like '%7%';\n";
    let awk = "BEGIN { for (i = 0; i < 20000; i++) a[i % 97] += i; for (k in a) s += a[k] * k; print s; \
        \"echo piped\" | getline x; print x; print strftime(\"%Y\", 0) }";
    vec![
        alone(
            "lua_alone",
            "lua5.4",
            &["-e", "print(2 ^ 53, string.rep('ab', 3))"],
        ),
        rooted("lua", "lua5.4", &["-e", lua]),
        rooted("python", "python3", &["-S", "-E", "-c", python]).seconds(120),
        rooted("python_threads", "python3", &["-S", "-E", "-c", threads, "400"])
            .in_rig(&["-S", "-E", "-c", threads, "80"])
            .seconds(120),
        rooted(
            "sort_in_parallel",
            "sh",
            &["-c", "seq 1 60000 | awk '{ print $1 * 7919 % 60013 }' | sort -n --parallel=4 -S 16M | sha256sum"],
        )
        .needs(&["sort", "gawk"]),
        rooted(
            "xz_with_threads",
            "sh",
            &["-c", "seq 1 60000 | xz -T4 --block-size=64KiB | xz -dc -T2 | sha256sum"],
        )
        .needs(&["xz"]),
        rooted(
            "python_with_site",
            "python3",
            &["-c", "import site, re; print(re.sub('a', 'b', 'banana'))"],
        )
        .seconds(120),
        alone("sqlite_alone", "sqlite3", &[":memory:", "select 6 * 7"]),
        Case::new(
            "real/sqlite",
            Launch::new("sqlite3", &[":memory:"]).stdin(sql),
            Expect::LikeNative,
        )
        .needs(&["sqlite3"]),
        Case::new(
            "real/sqlite_on_a_file",
            Launch::new("sqlite3", &["/tmp/base.db"])
                .options(&["--tmpfs", "/tmp"])
                .stdin(sql),
            Expect::Status(0),
        )
        .needs(&["sqlite3"])
        .not_native("it would write into this machine's /tmp"),
        rooted("gawk", "gawk", &[awk]),
        rooted(
            "mawk",
            "mawk",
            &["BEGIN { while (i++ < 1000) s += i; print s }"],
        ),
        rooted("sed", "sed", &["-n", "1,3p;$=", "/etc/services"]).on_existing("/etc/services"),
        rooted(
            "find",
            "find",
            &[
                "/usr/bin",
                "-maxdepth",
                "1",
                "-name",
                "[a-c]*",
                "-newermt",
                "1990-01-01",
                "-printf",
                "%s\\n",
            ],
        ),
        rooted("ls", "ls", &["-la", "/usr"]),
        rooted(
            "stat",
            "stat",
            &["-c", "%s %a %U %F", "/bin/ls", "/", "/dev/null"],
        ),
        rooted(
            "dd",
            "dd",
            &["if=/dev/zero", "bs=64k", "count=64", "status=none"],
        ),
        rooted(
            "bash",
            "bash",
            &[
                "-c",
                "a=(1 2 3); for i in ${a[@]}; do echo $((i * i)); done | sort; diff <(echo x) <(echo y); echo $?",
            ],
        ),
        rooted("timeout", "timeout", &["0.3", "sleep", "20"]),
        rooted("env", "sh", &["-c", "env | sort"]),
        rooted("nproc", "sh", &["-c", "[ $(nproc) -ge 1 ] && uname -s -m"]),
        Case::function("real/tar_and_gzip_over_1000_files", archive).seconds(180),
        Case::new(
            "real/gzip",
            Launch::new("gzip", &["-c9n"]).stdin(b"the same line again\n".repeat(20_000)),
            Expect::LikeNative,
        )
        .needs(&["gzip"]),
    ]
}

trait OnExisting {
    fn on_existing(self, file: &str) -> Self;
}

impl OnExisting for Case {
    /// Takes another file where there is no such one.
    fn on_existing(mut self, file: &str) -> Self {
        if let (false, Body::Launch(launch, _)) =
            (std::path::Path::new(file).exists(), &mut self.body)
        {
            for arg in launch.args.iter_mut().filter(|a| *a == file) {
                "/etc/passwd".clone_into(arg);
            }
        }
        self
    }
}
