//! The command line as a process: what it does when nobody reads what it says.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};

fn vmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(args).stdin(Stdio::null());
    command
}

fn full() -> Stdio {
    let full = OpenOptions::new().write(true).open("/dev/full");
    full.expect("Linux has it").into()
}

#[test]
fn status_is_the_same_when_standard_error_is_full() {
    for (args, code) in [
        (&["run", "/no/such/program"][..], 127),
        (&["run", "--memory", "x", "/bin/true"], 125),
        (&["run", "--env", "x", "/bin/true"], 125),
    ] {
        let status = vmm(args).stderr(full()).status().expect("vmm starts");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

#[test]
fn doctor_does_not_mind_that_nobody_reads() {
    for args in [&["doctor"][..], &["doctor", "--json"]] {
        let mut command = vmm(args);
        let status = command.stdout(full()).stderr(Stdio::null()).status();
        // 125 where guests cannot run; a panic would be 101.
        let code = status.expect("vmm starts").code();
        assert!(matches!(code, Some(0 | 125)), "{args:?}: {code:?}");
    }
}

#[test]
fn mistake_on_the_command_line_is_one_line() {
    for args in [
        &["run"][..],
        &["run", "--bogus", "/bin/true"],
        &["run", "--timeout", "0", "/bin/true"],
        &["run", "--cpus", "0", "/bin/true"],
    ] {
        let output = vmm(args).output().expect("vmm starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{args:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.starts_with("vmm: ") && said.contains("--help"),
            "{said}"
        );
    }
}
