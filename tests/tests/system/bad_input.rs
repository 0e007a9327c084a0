//! Things that are no programs, and requests that make no sense: one clear line, the documented
//! status, and nothing left behind.

use tests::case::{Case, Checked, Expect, Launch, PASSED, check};
use tests::context::Context;
use tests::elf::Elf;
use tests::process::{self, Limits};

const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;
const FAILURE: i32 = 125;

fn refused(name: &str, launch: Launch, statuses: &[i32], text: &str) -> Case {
    let expect = Expect::Refused(statuses.to_vec(), text.to_owned());
    Case::new(&format!("bad_input/{name}"), launch, expect).not_native("the VMM's own message")
}

/// A file and what must come of starting it: a refusal with this status, or running to 42.
struct File {
    name: &'static str,
    content: Vec<u8>,
    statuses: &'static [i32],
}

fn file(name: &'static str, content: Vec<u8>, statuses: &'static [i32]) -> File {
    File {
        name,
        content,
        statuses,
    }
}

const REFUSED: &[i32] = &[NOT_EXECUTABLE];

fn files() -> Vec<File> {
    let good = Elf::default;
    let mut far = good();
    far.segments[0].offset = 0x10_0000;
    let mut odd = good();
    odd.segments[0].address += 0x123;
    let mut kernel = good();
    kernel.segments[0].address = 0xffff_8000_0000_0000;
    let mut monitor = good();
    monitor.segments[0].address = 0x7f80_0000_0000;
    let mut less_memory = good();
    less_memory.segments[0].memory_size = 0x10;
    vec![
        file("empty", Vec::new(), REFUSED),
        file("text", b"this is not a program\n".to_vec(), REFUSED),
        file("zeros", vec![0; 4096], REFUSED),
        file("only_magic", b"\x7fELF".to_vec(), REFUSED),
        file("half_a_header", good().bytes()[..40].to_vec(), REFUSED),
        file(
            "without_its_segments",
            good().bytes()[..64].to_vec(),
            REFUSED,
        ),
        file(
            "cut_in_the_headers",
            good().bytes()[..100].to_vec(),
            REFUSED,
        ),
        // Linux maps what is there; the code is in what is missing.
        file(
            "cut_in_the_code",
            good().bytes()[..0x400].to_vec(),
            &[NOT_EXECUTABLE, 132, 135, 139],
        ),
        file(
            "for_arm",
            Elf {
                machine: 183,
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "for_32_bits",
            Elf {
                class: 1,
                machine: 3,
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file("big_endian", Elf { data: 2, ..good() }.bytes(), REFUSED),
        file("object_file", Elf { kind: 1, ..good() }.bytes(), REFUSED),
        file("core_dump", Elf { kind: 4, ..good() }.bytes(), REFUSED),
        file(
            "no_segments",
            Elf {
                segments: Vec::new(),
                ..good()
            }
            .bytes(),
            &[NOT_EXECUTABLE, 139],
        ),
        file(
            "65535_headers",
            Elf {
                header_count: Some(0xffff),
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "headers_of_one_byte",
            Elf {
                header_size: 1,
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "headers_beyond_the_end",
            Elf {
                header_offset: 1 << 40,
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "headers_that_wrap",
            Elf {
                header_offset: u64::MAX - 8,
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "segment_beyond_the_end",
            far.bytes(),
            &[NOT_EXECUTABLE, 135, 139],
        ),
        file(
            "segment_at_an_odd_address",
            odd.bytes(),
            &[NOT_EXECUTABLE, 139],
        ),
        file("segment_in_the_kernel", kernel.bytes(), REFUSED),
        file("segment_in_the_monitor", monitor.bytes(), REFUSED),
        file(
            "segment_smaller_than_its_file",
            less_memory.bytes(),
            REFUSED,
        ),
        file(
            "segment_of_64_tib",
            good().segment(0x1000_0000, 0, 1 << 46, 6).bytes(),
            REFUSED,
        ),
        file(
            "segment_that_wraps",
            good()
                .segment(0x1000_0000, 0x1000, u64::MAX - 0x100, 6)
                .bytes(),
            REFUSED,
        ),
        file(
            "file_size_that_wraps",
            good()
                .segment(0x1000_0000, u64::MAX - 0x100, u64::MAX - 0x100, 6)
                .bytes(),
            REFUSED,
        ),
        // Overlapping segments: the later one wins on Linux, and this one has the same content.
        file(
            "overlapping_segments",
            good().segment(0x40_0000, 0x1000, 0x1000, 5).bytes(),
            &[42, NOT_EXECUTABLE],
        ),
        file(
            "entry_nowhere",
            Elf {
                entry: 0x1234_5678,
                ..good()
            }
            .bytes(),
            &[NOT_EXECUTABLE, 139],
        ),
        file(
            "entry_in_the_kernel",
            Elf {
                entry: 0xffff_ffff_8100_0000,
                ..good()
            }
            .bytes(),
            &[NOT_EXECUTABLE, 139],
        ),
        file(
            "interpreter_missing",
            Elf {
                interpreter: Some("/no/such/ld.so".into()),
                ..good()
            }
            .bytes(),
            &[NOT_EXECUTABLE, NOT_FOUND],
        ),
        file(
            "interpreter_that_is_a_folder",
            Elf {
                interpreter: Some("/".into()),
                ..good()
            }
            .bytes(),
            REFUSED,
        ),
        file(
            "interpreter_without_a_name",
            Elf {
                interpreter: Some(String::new()),
                ..good()
            }
            .bytes(),
            &[NOT_EXECUTABLE, NOT_FOUND],
        ),
        file(
            "script_of_nothing",
            b"#!/no/such/interpreter\n".to_vec(),
            &[NOT_EXECUTABLE, NOT_FOUND],
        ),
        file("script_without_interpreter", b"#!\n".to_vec(), REFUSED),
    ]
}

/// Tries each file; all that are wrong are told at once.
fn all_files(context: &Context) -> Checked {
    let mut wrong = String::new();
    let good = context.write("good", Elf::default().bytes(), 0o755)?;
    let output = context.run(&Launch::new(&good.to_string_lossy(), &[]))?;
    check(&Expect::Status(42), &output)?;
    for File {
        name,
        content,
        statuses,
    } in files()
    {
        let path = context.write(name, content, 0o755)?;
        let output = match context.run(&Launch::new(&path.to_string_lossy(), &[])) {
            Ok(output) => output,
            Err(why) => {
                wrong += &format!("{name}: {why}\n");
                continue;
            }
        };
        let refused = matches!(output.status, 125..=127);
        if !statuses.contains(&output.status) {
            wrong += &format!(
                "{name}: status {}, want {statuses:?}: {}\n",
                output.status,
                output.err()
            );
        } else if refused && output.err().lines().count() != 1 {
            wrong += &format!("{name}: not one line:\n{}\n", output.err());
        }
    }
    if wrong.is_empty() {
        Ok(PASSED)
    } else {
        Err(wrong)
    }
}

/// A program cut at every length, and with bytes changed: whatever comes, the VMM goes on.
fn damaged(context: &Context) -> Checked {
    let whole = Elf {
        interpreter: None,
        ..Elf::default()
    }
    .bytes();
    let rounds = context.amount(120, 20);
    let mut state = 12345_u64;
    for round in 0..rounds {
        let mut bytes = whole.clone();
        for _ in 0..=round % 4 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = (state >> 33) as usize % 176; // the headers
            bytes[at] = (state >> 24) as u8;
        }
        let path = context.write("damaged", bytes, 0o755)?;
        let launch = Launch::new(&path.to_string_lossy(), &[]).options(&["--timeout", "5"]);
        context
            .run(&launch)
            .map_err(|why| format!("round {round}: {why}"))?;
    }
    Ok(PASSED)
}

fn no_permission(context: &Context) -> Checked {
    let path = context.write("program", Elf::default().bytes(), 0o644)?;
    let output = context.run(&Launch::new(&path.to_string_lossy(), &[]))?;
    check(
        &Expect::Refused(vec![NOT_EXECUTABLE], String::new()),
        &output,
    )
}

/// A machine whose memory would be a larger file than this process may have.
fn file_size_limit(context: &Context) -> Checked {
    let words = ["sh", "-c", "ulimit -f 100; exec \"$@\"", "sh"].map(str::to_owned);
    let run = [context.prefix(&[]), vec!["/bin/true".to_owned()]].concat();
    let mut command = context.command(&[&words[..], &run].concat());
    let limits = Limits {
        timeout: context.timeout,
        signal: None,
    };
    let output = process::run(&mut command, b"", &limits).map_err(|e| e.to_string())?;
    let refused = Expect::Refused(vec![FAILURE], "File too large".to_owned());
    check(&refused, &output)
}

/// A script runs through its interpreter.
fn script(context: &Context) -> Checked {
    let path = context.write("script", "#!/bin/sh -e\necho \"$1 $2\"\nexit 5\n", 0o755)?;
    let launch = Launch::new(&path.to_string_lossy(), &["a", "b c"]).options(&["--root", "/"]);
    check(
        &Expect::Exactly(5, "a b c\n".to_owned()),
        &context.run(&launch)?,
    )
}

pub(crate) fn cases() -> Vec<Case> {
    let echo = |options: &[&str]| Launch::new("/bin/true", &[]).options(options);
    let mut cases = vec![
        refused(
            "not_found",
            Launch::new("no-such-program-anywhere", &[]),
            &[NOT_FOUND],
            "no-such-program-anywhere",
        ),
        refused(
            "path_not_found",
            Launch::new("/no/such/program", &[]),
            &[NOT_FOUND],
            "/no/such/program",
        ),
        refused(
            "not_found_in_root",
            Launch::new("no-such-program", &[]).options(&["--root", "/"]),
            &[NOT_FOUND],
            "no-such-program",
        ),
        refused(
            "hidden_by_a_mount",
            Launch::new("/usr/bin/true", &[]).options(&["--tmpfs", "/usr"]),
            &[NOT_FOUND],
            "--tmpfs",
        ),
        refused(
            "a_folder",
            Launch::new("/usr", &[]),
            &[NOT_EXECUTABLE],
            "/usr",
        ),
        refused(
            "a_device",
            Launch::new("/dev/null", &[]),
            &[NOT_EXECUTABLE],
            "/dev/null",
        ),
        refused(
            "root_missing",
            echo(&["--root", "/no/such/folder"]),
            &[FAILURE],
            "/no/such/folder",
        ),
        refused(
            "root_is_a_file",
            echo(&["--root", "/etc/passwd"]),
            &[FAILURE],
            "/etc/passwd",
        ),
        refused(
            "rw_missing",
            echo(&["--rw", "/no/such/folder:/x"]),
            &[FAILURE],
            "/no/such/folder",
        ),
        refused(
            "workdir_missing",
            echo(&["--root", "/", "--workdir", "/no/such/folder"]),
            &[FAILURE],
            "/no/such/folder",
        ),
        refused(
            "too_little_memory",
            echo(&["--memory", "4K"]),
            &[FAILURE, NOT_EXECUTABLE],
            "memory",
        ),
        refused(
            "no_memory_for_it",
            echo(&["--memory", "1M"]),
            &[FAILURE, NOT_EXECUTABLE],
            "memory",
        ),
    ];
    for (name, options) in [
        ("memory_zero", ["--memory", "0"]),
        ("memory_nonsense", ["--memory", "lots"]),
        ("memory_negative", ["--memory", "-5M"]),
        ("memory_overflow", ["--memory", "99999999999999999999G"]),
        ("timeout_nonsense", ["--timeout", "soon"]),
        ("timeout_zero", ["--timeout", "0"]),
        ("env_without_a_name", ["--env", "=x"]),
        ("no_processes", ["--max-procs", "0"]),
        ("unknown_option", ["--no-such-option", "x"]),
    ] {
        // clap explains over several lines.
        let case = Case::new(
            &format!("bad_input/{name}"),
            echo(&options),
            Expect::Status(FAILURE),
        );
        cases.push(case.not_native("the VMM's own message"));
    }
    cases.extend([
        Case::function("bad_input/files", all_files).seconds(120),
        Case::function("bad_input/damaged_headers", damaged).seconds(180),
        Case::function("bad_input/no_permission", no_permission),
        Case::function("bad_input/file_size_limit", file_size_limit)
            .needs(&["sh"])
            .not_native("the VMM's own message"),
        Case::function("bad_input/script", script).needs(&["sh"]),
    ]);
    cases.into_iter().map(Case::any_paging).collect()
}
