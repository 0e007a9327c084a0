//! Shell pipelines of real programs, compared with what the host prints.

use tests::case::{Case, Expect, Launch};

fn like_native(name: &str, line: &str) -> Case {
    Case::new(
        &format!("shell/{name}"),
        Launch::shell(line),
        Expect::LikeNative,
    )
}

fn busybox(name: &str, line: &str) -> Case {
    let launch = Launch::new("busybox", &["sh", "-c", line]);
    Case::new(&format!("busybox/{name}"), launch, Expect::LikeNative).needs(&["busybox"])
}

/// A FIFO: whoever comes first waits, both sides at once does not, and the last to go ends the file.
const FIFO: &str = r#"cd $(mktemp -d /var/tmp/vmm-test-fifo.XXXXXX) && mkfifo f && test -p f && echo made
(sleep 0.2; echo through > f) & cat f; wait
cat f > got & echo writer first > f; wait; cat got
exec 3<>f; echo both >&3; read line <&3; echo $line; exec 3>&-
(for i in 1 2 3; do echo $i; done > f) & while read n; do echo got $n; done < f
timeout 1 cat f; echo $?
rm f got; rmdir $(pwd)"#;

/// So many processes, one after the other.
fn many(processes: u32) -> String {
    format!(
        "for i in $(seq 1 {processes}); do /bin/echo $i; done | awk '{{s+=$1}} END {{print s}}'"
    )
}

pub(crate) fn cases() -> Vec<Case> {
    let fifo = Launch::shell(FIFO).options(&["--tmpfs", "/var/tmp"]);
    let read = Launch::shell("while read a b; do echo \"$b $a\"; done; cat; echo end")
        .stdin("one two\nthree four\n");
    let binary: Vec<u8> = (0..200_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    vec![
        like_native(
            "background_pipelines",
            "(for i in 1 2 3; do echo $i | sed s/^/n/ & done; wait) | sort; exit 7",
        ),
        like_native("status_of_exit", "exit 7"),
        like_native("init_sleeps", "cut -d' ' -f3 /proc/1/stat"),
        like_native(
            "status_of_a_signal",
            "sh -c 'kill -TERM $$'; echo $?; kill -KILL $$",
        ),
        like_native(
            "command_substitution",
            "x=$(echo $(echo a; echo b) | tr a-z A-Z); echo \"<$x>\"",
        ),
        like_native(
            "subshells",
            "(cd /usr; pwd; (exit 3); echo $?); pwd | sed s/.*vmm-test.*/work/",
        ),
        like_native("here_document", "cat <<X | wc -l\na\nb\nc\nX"),
        like_native(
            "sort_many",
            "seq 1 20000 | sort -r | uniq | tail -n 3 | paste -s -d +",
        ),
        like_native("many_processes", &many(100)).in_rig(&["-c", &many(20)]),
        like_native(
            "long_pipeline",
            "seq 1 1000 | cat | cat | cat | cat | cat | cat | grep 7 | wc -l",
        ),
        like_native(
            "sigpipe",
            "yes | head -n 3; yes 2>/dev/null | head -c 100000 | wc -c",
        ),
        like_native(
            "traps",
            "trap 'echo caught' USR1; kill -USR1 $$; trap 'echo bye' EXIT; echo here",
        ),
        like_native(
            "wait_for_background",
            "sleep 0.2 & p=$!; (exit 5) & wait $!; echo $?; wait $p; echo $?",
        ),
        like_native(
            "redirections",
            "{ echo out; echo err >&2; } 2>&1 >/dev/null | cat; echo x 3>&1 >&3",
        ),
        like_native(
            "not_found",
            "no-such-program-anywhere; echo $?; /etc/passwd; echo $?",
        ),
        like_native(
            "find_and_xargs",
            "find /usr/bin -name 'z*' -type f | sort | xargs -n 2 basename -a",
        ),
        Case::new("shell/fifo", fifo, Expect::LikeNative),
        Case::new("shell/reads_its_input", read, Expect::LikeNative),
        Case::new(
            "shell/cat_keeps_every_byte",
            Launch::shell("cat | cat").stdin(binary),
            Expect::LikeNative,
        ),
        Case::new(
            "shell/checksum",
            Launch::shell("sha256sum | cut -c 1-20").stdin(vec![7; 1 << 20]),
            Expect::LikeNative,
        ),
        busybox(
            "sort_and_tee",
            "seq 1 100000 | sort -rn | tail -1 | tee /dev/stderr",
        )
        .seconds(120),
        busybox(
            "applets",
            "echo a b c | awk '{print $2}'; expr 6 '*' 7; printf '%x\\n' 255; basename /a/b/c",
        ),
        busybox(
            "fork_in_a_loop",
            "i=0; while [ $i -lt 200 ]; do (exit $((i % 5))) || n=$((n + 1)); i=$((i + 1)); done; echo $n",
        ),
    ]
}
