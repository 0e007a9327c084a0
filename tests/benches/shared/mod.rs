//! What the benchmarks that start a VMM have in common: which one, how they end, and the emulated machine that some run in.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Where in the emulated machine things are put.
pub(crate) const FOLDER: &str = "/vmm-bench";

/// The VMM to measure: `VMM_BIN`, or the one built beside this program.
///
/// # Errors
/// It is not there.
pub(crate) fn vmm() -> Result<PathBuf, String> {
    let vmm = match std::env::var_os("VMM_BIN") {
        Some(path) => PathBuf::from(path),
        // Beside `deps`, where this program is.
        None => {
            let this = std::env::current_exe().map_err(|e| e.to_string())?;
            let folder = this.parent().unwrap_or(&this);
            folder.with_file_name("vmm")
        }
    };
    if vmm.exists() {
        return Ok(vmm);
    }
    let path = vmm.display();
    Err(format!(
        "{path} is not there: run `cargo build --release` first"
    ))
}

/// The end of `main`.
pub(crate) fn end(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The emulated machine with this kind of host, ready for a program and its arguments, with the VMM in it.
///
/// # Errors
/// It cannot be prepared, or there is no such host.
pub(crate) fn rig(host: &str, vmm: &Path) -> Result<Command, String> {
    let rig = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig");
    // Installs QEMU where it is missing.
    run(Command::new(&rig).args(["--no-userland", "--prepare"]))?;
    let mut command = Command::new(&rig);
    command.args(["-n", "--no-userland", "--timeout", "900"]);
    match host {
        "npt" => {}
        "shadow" => _ = command.arg("--shadow"),
        other => return Err(format!("VMM_BENCH_HOST: npt or shadow, not {other}")),
    }
    command.args(["--env", &format!("VMM_BIN={FOLDER}/vmm")]);
    command.args(["--add", &format!("{}:{FOLDER}/vmm", vmm.display())]);
    Ok(command)
}

/// Runs a command to its end.
///
/// # Errors
/// It failed.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let program = Path::new(command.get_program()).display().to_string();
    match command.stdin(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{program}: {status}")),
        Err(error) => Err(format!("{program}: {error}")),
    }
}
