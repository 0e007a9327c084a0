//! Programs that misbehave, by accident or on purpose: each ends as on Linux, and the VMM goes on,
//! with every frame back.

use tests::case::{Case, Checked, Expect, Launch, PASSED};
use tests::context::Context;

const IN_THE_VMM_ONLY: &str = "it may break the machine it runs on";

fn dies_of(act: &str, signal: i32) -> Case {
    let launch = Launch::new("{programs}/misbehave", &[act]);
    Case::new(
        &format!("attacks/{act}"),
        launch,
        Expect::Status(128 + signal),
    )
}

/// The bomb that everybody knows, of a limited depth, so that it ends by itself wherever it runs. What
/// is left of it depends on who gets the last process; that the machine ends, in time and with all
/// its memory back, does not.
fn shell_bomb(context: &Context) -> Checked {
    let line =
        "b() { [ $1 = 0 ] || { b $(($1 - 1)) | b $(($1 - 1)) & } }; b 6; sleep 2; echo survived";
    let launch = Launch::shell(line).options(&["--max-procs", "50", "--timeout", "20"]);
    let output = context.run(&launch)?;
    match output.status {
        0 | 2 | 124 => Ok(PASSED),
        other => Err(format!("status {other}: {}", output.err())),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let (ill, trap, abort, fpe, segv) = (4, 5, 6, 8, 11);
    let bomb = |args: &[&str], most: &str| {
        Launch::new("{programs}/forkbomb", args).options(&["--max-procs", most])
    };
    let mut cases: Vec<Case> = [
        ("wild_jump", segv),
        ("jump_null", segv),
        ("jump_kernel", segv),
        ("stack_overflow", segv),
        ("divide", fpe),
        ("ud2", ill),
        ("hlt", segv),
        ("cli", segv),
        ("in_al", segv),
        ("out_dx", segv),
        ("wrmsr", segv),
        ("mov_cr3", segv),
        ("int3", trap),
        ("int_13", segv),
        ("trap_flag", trap),
        ("read_noncanonical", segv),
        ("write_kernel", segv),
        ("write_text", segv),
        ("abort", abort),
    ]
    .into_iter()
    .map(|(act, signal)| dies_of(act, signal))
    .collect();
    cases.extend([
        Case::new(
            "attacks/forge",
            Launch::new("{programs}/forge", &[]),
            Expect::Tap,
        )
        .seconds(120),
        Case::new(
            "attacks/random_code",
            Launch::new("{programs}/random_code", &["1", "10000"]).in_rig(&["1", "600"]),
            Expect::Tap,
        )
        .seconds(120),
        Case::new(
            "attacks/random_code_spicy",
            Launch::new("{programs}/random_code", &["2", "3000", "spicy"])
                .in_rig(&["2", "300", "spicy"]),
            Expect::Tap,
        )
        .seconds(60)
        .not_native(IN_THE_VMM_ONLY),
        Case::new(
            "attacks/syscall_fuzz",
            Launch::new("{programs}/syscall_fuzz", &["3", "1500"]).in_rig(&["3", "150"]),
            Expect::Tap,
        )
        .seconds(120)
        .not_native(IN_THE_VMM_ONLY),
        Case::new("attacks/forkbomb", bomb(&["40"], "40"), Expect::Tap)
            .not_native("needs --max-procs"),
        Case::new(
            "attacks/forkbomb_wild",
            bomb(&["--wild"], "60"),
            Expect::Tap,
        )
        .seconds(120)
        .not_native("needs --max-procs"),
        Case::function("attacks/forkbomb_of_a_shell", shell_bomb).seconds(120),
    ]);
    cases
}
