//! The guest's test programs: `guest/programs/*.c`, built as static Linux programs, and its kernels:
//! `guest/kernels/*.c`, built as ELF files without anything else, under `kernels/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder with the built programs: `$VMM_TEST_PROGRAMS`, or built here.
///
/// # Errors
/// A program that does not compile, or no compiler.
pub fn folder() -> Result<PathBuf, String> {
    if let Some(dir) = std::env::var_os("VMM_TEST_PROGRAMS") {
        return Ok(dir.into());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/programs");
    let target = target_folder()?.join("guest-programs");
    fs::create_dir_all(&target).map_err(|e| format!("{}: {e}", target.display()))?;
    build(&source, &target, PROGRAM)?;
    let kernels = target.join("kernels");
    fs::create_dir_all(&kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    build(&source.join("../kernels"), &kernels, KERNEL)?;
    Ok(target)
}

const PROGRAM: &[&str] = &[
    "-static",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Wno-stringop-overflow",
    "-lm",
];
const KERNEL: &[&str] = &[
    "-static",
    "-O1",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-pic",
    "-no-pie",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-nostdlib",
    "-Wl,-Ttext-segment=0x400000,--build-id=none,-z,noexecstack",
];

/// The folder that cargo builds into, found from where this program is.
fn target_folder() -> Result<PathBuf, String> {
    above(3)
}

/// The folder's name of the profile that this program was built with.
fn profile() -> Result<String, String> {
    let folder = above(2)?;
    let name = folder.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned)
        .ok_or_else(|| format!("{} is no folder of a profile", folder.display()))
}

/// This program is `target/<profile>/deps/<this>`.
fn above(levels: usize) -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|e| format!("where am I: {e}"))?;
    exe.ancestors()
        .nth(levels)
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("{} is not in a target folder", exe.display()))
}

fn build(source: &Path, target: &Path, options: &[&str]) -> Result<(), String> {
    let entries = fs::read_dir(source).map_err(|e| format!("{}: {e}", source.display()))?;
    let files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    let header = newest(
        files
            .iter()
            .filter(|f| f.extension().is_some_and(|e| e == "h")),
    );
    for file in files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| e == "c"))
    {
        let out = target.join(file.file_stem().unwrap_or_default());
        if newest([file].into_iter()).max(header) < newest([&out].into_iter()) {
            continue;
        }
        // Libraries come after what uses them.
        let done = Command::new("cc")
            .arg("-o")
            .arg(&out)
            .arg(file)
            .args(options)
            .output()
            .map_err(|e| format!("cc: {e} (install gcc and libc6-dev)"))?;
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr);
            return Err(format!("cc {}:\n{why}", file.display()));
        }
    }
    Ok(())
}

fn newest<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Option<std::time::SystemTime> {
    files
        .filter_map(|f| fs::metadata(f).ok()?.modified().ok())
        .max()
}

/// The `vmm` to test: `$VMM_BIN`, or the one of the same profile, built now.
///
/// # Errors
/// It does not build.
pub fn vmm() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("VMM_BIN") {
        return Ok(path.into());
    }
    let target = target_folder()?;
    let profile = profile()?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "-p", "vmm", "--manifest-path"]);
    cargo.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
    cargo.arg("--target-dir").arg(&target);
    // Cargo calls the folder of its first profile otherwise than the profile.
    let name = if profile == "debug" { "dev" } else { &profile };
    cargo.args(["--profile", name]);
    let built = cargo.status().map_err(|e| format!("cargo: {e}"))?;
    if !built.success() {
        return Err("vmm does not build".to_owned());
    }
    Ok(target.join(profile).join("vmm"))
}
