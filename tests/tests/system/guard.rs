//! `vmm run --guard-alloc`.

use tests::case::{Case, Checked, Expect, Launch, PASSED};
use tests::context::Context;

const ONLY_VMM: &str = "Linux has no such pages";

/// A byte behind the length of a mapping is told when the process ends, and changes nothing else.
fn damage_is_told(context: &Context) -> Checked {
    let launch = Launch::new("{programs}/guard", &["damage"]).options(&["--guard-alloc"]);
    let output = context.run(&launch)?;
    let err = output.err();
    let lines: Vec<_> = err.lines().filter(|l| l.contains("guard-alloc:")).collect();
    match lines[..] {
        [line] if output.status == 0 && line.contains("5000 bytes mapped at 0x") => Ok(PASSED),
        _ => Err(format!("status {}: {err}", output.status)),
    }
}

/// What faulted is told in words.
fn faults_are_explained(context: &Context) -> Checked {
    let launch = Launch::new("{programs}/guard", &[]).options(&["--guard-alloc"]);
    let output = context.run(&launch)?;
    let err = output.err();
    let words = [
        "0 bytes behind the end of the 12288 bytes mapped at",
        "1 bytes before the 12288 bytes mapped at",
        "that were unmapped",
    ];
    match words.iter().find(|words| !err.contains(**words)) {
        None => Ok(PASSED),
        Some(words) => Err(format!("not told: {words}\n{err}")),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let guarded = |launch: Launch| launch.options(&["--guard-alloc"]);
    let faults = guarded(Launch::new("{programs}/guard", &[]));
    let same = |name: &str, launch| {
        Case::new(
            &format!("guard/{name}"),
            guarded(launch),
            Expect::LikeNative,
        )
    };
    vec![
        Case::new("guard/faults", faults, Expect::Tap).not_native(ONLY_VMM),
        Case::function("guard/damage_is_told", damage_is_told).not_native(ONLY_VMM),
        Case::function("guard/faults_are_explained", faults_are_explained).not_native(ONLY_VMM),
        same(
            "shell",
            Launch::shell("for i in 1 2 3; do seq 1 2000 | sort -rn | tail -$i | sha256sum; done"),
        ),
        same(
            "python",
            Launch::shell(
                "python3 -c 'x=[bytearray(i*997) for i in range(300)]; print(sum(map(len,x)))'",
            ),
        )
        .needs(&["python3"]),
        same("mappings", Launch::new("{programs}/fork_tree", &["40"])),
    ]
}
