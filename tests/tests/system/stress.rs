//! Programs made to wear a system out, and servers: other people's, with threads, forks and sockets.

use tests::case::{Case, Expect, Launch};

/// Several of stress-ng's stressors at once for some seconds, each checking what it does.
fn stress(name: &str, stressors: &[&str]) -> Case {
    let mut args = vec![];
    for stressor in stressors {
        args.extend([*stressor, "1"]);
    }
    args.extend(["--timeout", "4", "--verify", "--temp-path", "/tmp"]);
    let limits = [
        "--vm-bytes",
        "16M",
        "--mmap-bytes",
        "16M",
        "--shm-bytes",
        "4M",
        "--fallocate-bytes",
        "1M",
    ];
    args.extend(limits);
    let launch = Launch::new("stress-ng", &args).options(&[
        "--root",
        "/",
        "--tmpfs",
        "/tmp",
        "--workdir",
        "/tmp",
        "--cpus",
        "2",
    ]);
    Case::new(&format!("stress/{name}"), launch, Expect::Status(0))
        .seconds(120)
        .needs(&["stress-ng"])
        .not_native("it is no expectation but a load")
}

/// A server with a background save, which forks, and clients.
const REDIS: &str = "redis-server --port 7777 --save '' > log &
until redis-cli -p 7777 ping > /dev/null 2>&1; do sleep 0.1; done
redis-cli -p 7777 set a 41; redis-cli -p 7777 incr a
redis-benchmark -p 7777 -n 300 -c 8 -q -t set,get,lpush > /dev/null; echo $?
redis-cli -p 7777 llen mylist
redis-cli -p 7777 save; test -s dump.rdb; echo $?
redis-cli -p 7777 bgsave > /dev/null; until grep -q 'Background saving terminated with success' log; do sleep 0.1; done
redis-cli -p 7777 shutdown nosave; wait; grep -c 'Redis is now ready to exit' log";

const COMPILE: &str = r#"printf '#include <stdio.h>\nint main(void) { return printf("compiled\\n") != 9; }\n' > p.c
gcc -O2 -o p p.c && ./p"#;

/// Programs whose system calls want frames when there are none, all at once. What becomes of them depends on who finds
/// some first; that the machine ends, and in time, does not.
const LITTLE: &str = "for s in memfd mmap shm-sysv; do
  stress-ng --$s 2 -t 1 --temp-path /tmp > /dev/null 2>&1
done; echo done";

pub(crate) fn cases() -> Vec<Case> {
    let in_tmp = |name: &str, line: &str, lines: &[&str]| {
        let launch = Launch::new("/bin/sh", &["-c", line]).options(&[
            "--root",
            "/",
            "--tmpfs",
            "/tmp",
            "--workdir",
            "/tmp",
        ]);
        Case::new(name, launch, Expect::Exactly(0, lines.join("\n") + "\n"))
            .seconds(120)
            .not_native("it would write into this machine's /tmp")
    };
    let little = Launch::new("/bin/sh", &["-c", LITTLE]).options(&[
        "--root",
        "/",
        "--tmpfs",
        "/tmp",
        "--cpus",
        "2",
        "--memory",
        "48M",
        "--page-file",
        "96M",
    ]);
    vec![
        Case::new(
            "stress/little_memory",
            little,
            Expect::Exactly(0, "done\n".to_owned()),
        )
        .seconds(120)
        .needs(&["stress-ng"])
        .not_native("it is no expectation but a load"),
        stress(
            "memory",
            &[
                "--vm",
                "--mmap",
                "--mremap",
                "--madvise",
                "--brk",
                "--stack",
                "--shm",
                "--memfd",
                "--msync",
            ],
        ),
        stress(
            "processes",
            &[
                "--fork",
                "--vfork",
                "--pthread",
                "--wait",
                "--zombie",
                "--kill",
                "--switch",
                "--sigq",
                "--exec",
            ],
        ),
        stress(
            "files",
            &[
                "--dentry",
                "--dir",
                "--dup",
                "--fallocate",
                "--fstat",
                "--getdent",
                "--open",
                "--rename",
                "--seek",
                "--procfs",
            ],
        ),
        stress(
            "waits",
            &[
                "--pipe",
                "--futex",
                "--sem",
                "--poll",
                "--eventfd",
                "--fifo",
                "--sock",
                "--lockf",
                "--nanosleep",
            ],
        ),
        in_tmp(
            "stress/redis",
            REDIS,
            &["OK", "42", "0", "300", "OK", "0", "1"],
        )
        .needs(&["redis-server", "redis-cli", "redis-benchmark"]),
        in_tmp("stress/gcc", COMPILE, &["compiled"]).needs(&["gcc"]),
    ]
}
