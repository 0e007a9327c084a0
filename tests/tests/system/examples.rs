//! The scripts of `examples/` do what they say.

use std::process::Command;

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process::{self, Limits, Output};

use super::snapshot::ONLY_VMM;

pub(crate) const ASK_POOL: &str = include_str!("../../../examples/ask_pool.py");

const FILES: [(&str, &str); 4] = [
    ("evaluate", include_str!("../../../examples/evaluate")),
    ("evaluate.py", include_str!("../../../examples/evaluate.py")),
    ("fuzz", include_str!("../../../examples/fuzz")),
    ("fuzz.lua", include_str!("../../../examples/fuzz.lua")),
];

/// Runs an example, with run directories of the case's own and time enough for a slow machine.
fn run(context: &Context, name: &str, args: &[&str], input: &str) -> Result<Output, String> {
    for (name, text) in FILES {
        context.write(&format!("examples/{name}"), text, 0o755)?;
    }
    let limits = Limits {
        timeout: context.timeout,
        signal: None,
    };
    let mut command = Command::new(context.work().join("examples").join(name));
    command
        .args(args)
        .env("VMM", &context.setup.vmm)
        .env("XDG_RUNTIME_DIR", context.work())
        .env("TMPDIR", context.work())
        .env("TIMEOUT", "100");
    process::run(&mut command, input.as_bytes(), &limits).map_err(|e| e.to_string())
}

/// Lines that would spoil the interpreter for each other, if there were only one.
fn evaluate(context: &Context) -> Checked {
    let input = "2 ** 100\nprimes.clear()\nlen(primes)\n1/0\nexit(3)\n'x' * 3\n";
    let output = run(context, "evaluate", &[], input)?;
    let wanted = "1267650600228229401496703205376\nNone\n2262\n\
                  ZeroDivisionError: division by zero\nxxx\n";
    let said = output.err().contains("then 6 clones in ");
    if output.status == 0 && output.out() == wanted && said {
        return Ok(PASSED);
    }
    Err(format!(
        "{} {} {}",
        output.status,
        output.out(),
        output.err()
    ))
}

/// The bug is found, and told so that it can be found again.
fn fuzz(context: &Context) -> Checked {
    let output = run(context, "fuzz", &["4", "3", "400"], "")?;
    let out = output.out();
    let told = |line: &str| line.starts_with("seed ") && line.contains(", not ");
    if output.status == 1 && !out.is_empty() && out.lines().all(told) {
        return Ok(PASSED);
    }
    Err(format!("{} {out} {}", output.status, output.err()))
}

pub(crate) fn cases() -> Vec<Case> {
    [
        (
            "examples/evaluate",
            evaluate as fn(&Context) -> Checked,
            "python3",
        ),
        ("examples/fuzz", fuzz, "lua5.4"),
    ]
    .into_iter()
    .map(|(name, body, program)| {
        let case = Case::function(name, body).not_native(ONLY_VMM);
        case.needs(&[program]).seconds(120)
    })
    .collect()
}
