//! What `vmm boot` refuses, and how: status 125 and one clear line, before anything starts.

use std::path::Path;

use tests::case::{Case, Checked, Launch, On, PASSED};
use tests::context::Context;
use tests::process::Output;

const FAILURE: i32 = 125;
const PAGE: usize = 4096;

/// A bzImage as far as its header goes, whose protected-mode part has `blocks` of 16 bytes.
fn bzimage(blocks: u32) -> Vec<u8> {
    let mut file = vec![0; 1024 + blocks as usize * 16];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup sectors
    put(0x1f4, &blocks.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]); // loaded high
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd limit
    put(0x236, &[1]); // a 64-bit kernel
    put(0x238, &255_u32.to_le_bytes()); // command line
    put(0x258, &0x100_0000_u64.to_le_bytes()); // preferred address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // unpacked size
    // Turns the machine off: mov dx, 0x600; mov al, 0x34; out dx, al; hlt
    put(1024 + 0x200, &[0x66, 0xba, 0, 6, 0xb0, 0x34, 0xee, 0xf4]);
    file
}

fn refused(context: &Context, options: &[&str], text: &str) -> Result<(), String> {
    let output = context.boot(options, &Launch::default())?;
    let err = output.err();
    if output.status != FAILURE || !output.stdout.is_empty() || err.lines().count() != 1 {
        return Err(format!(
            "{options:?}: status {}, not {FAILURE} and one line:\n{err}{}",
            output.status,
            output.out()
        ));
    }
    if !err.contains(text) {
        return Err(format!("{options:?}: no {text:?} in {err}"));
    }
    Ok(())
}

fn kernels(context: &Context) -> Checked {
    let good = bzimage(1000);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let mut arm = std::fs::read(context.program("kernels/flat")).map_err(|e| e.to_string())?;
    arm[18] = 183;
    for (name, content, text) in [
        ("empty", Vec::new(), "empty"),
        (
            "text",
            b"not a kernel\n".repeat(100),
            "neither a bzImage nor",
        ),
        ("gzip", [&[0x1f, 0x8b][..], &[0; 2000]].concat(), "gzip"),
        ("old", with(0x206, &[0x0a, 2]), "boot protocol 2.10"),
        ("low", with(0x211, &[0]), "bzImage"),
        ("only_32_bits", with(0x236, &[0]), "not a 64-bit kernel"),
        (
            "huge",
            with(0x260, &0x7fff_f000_u32.to_le_bytes()),
            "--memory",
        ),
        ("far", with(0x258, &u64::MAX.to_le_bytes()), "--memory"),
        (
            "promises_more",
            with(0x1f4, &u32::MAX.to_le_bytes()),
            "cut off",
        ),
        ("arm", arm, "not for x86-64"),
    ] {
        context.write(name, content, 0o644)?;
        let path = format!("{{work}}/{name}");
        refused(context, &["--kernel", &path, "--memory", "64M"], text)?;
    }
    context.write("good", &good, 0o644)?;
    let output = context.boot(&["--kernel", "{work}/good"], &Launch::default())?;
    if output.status != 0 {
        return Err(format!("the good one: {}: {}", output.status, output.err()));
    }
    for (path, text) in [
        ("/no/such/kernel", "/no/such/kernel"),
        ("{work}", "not a regular file"),
        ("/dev/zero", "not a regular file"),
    ] {
        refused(context, &["--kernel", path], text)?;
    }
    Ok(PASSED)
}

/// A kernel cut off anywhere is refused, or (behind what its header promises) runs.
fn cut_off(context: &Context) -> Checked {
    let elf = std::fs::read(context.program("kernels/flat")).map_err(|e| e.to_string())?;
    for (name, whole, step) in [("bzimage", bzimage(1000), 997), ("elf", elf, 1021)] {
        for length in (0..whole.len()).step_by(step) {
            let file = context.write(name, &whole[..length], 0o644)?;
            let path = file.to_string_lossy();
            let options = ["--kernel", &path, "--cmdline", "hello", "--timeout", "20"];
            let output = context.boot(&options, &Launch::default())?;
            let refused = output.status == FAILURE && output.err().lines().count() == 1;
            // An ELF file's sections, which come last, are not needed.
            let enough = name == "elf" && length > 0x3000 && output.status == 0;
            if !(refused || enough) {
                return Err(format!(
                    "{name}, {length} bytes: status {}: {}",
                    output.status,
                    output.err()
                ));
            }
        }
    }
    Ok(PASSED)
}

/// What `flat` prints of an initrd: its length, and a sum over a word of each page and all of the last, zero behind its end.
fn seen(initrd: &[u8]) -> String {
    let mut padded = initrd.to_vec();
    padded.resize(initrd.len().next_multiple_of(PAGE), 0);
    let pages = padded.chunks_exact(PAGE);
    let mut sum = 0_u64;
    for (left, page) in (1..=pages.len()).rev().zip(pages) {
        let one = left % (PAGE / 8) * 8;
        let part = if left == 1 { page } else { &page[one..one + 8] };
        for word in part.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            sum = (sum ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }
    let (high, low) = ((sum >> 32) as u32, sum as u32);
    format!("{:08x}\n{high:08x}\n{low:08x}\ndone\n", initrd.len())
}

/// Boots `flat` with an initrd.
fn with_initrd(context: &Context, memory: &str) -> Result<Output, String> {
    let options = ["--kernel", "{programs}/kernels/flat", "--cmdline", "initrd"];
    let more = ["--initrd", "{work}/initrd", "--memory", memory];
    let all = [&options[..], &more, &["--timeout", "20"]].concat();
    context.boot(&all, &Launch::default())
}

/// An initrd cut off anywhere is as good as any other for the loader: the kernel gets it byte for byte, and nothing behind it.
fn initrd_cut_off(context: &Context) -> Checked {
    let whole: Vec<u8> = (0..64 << 10_u32)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect();
    for length in (0..=whole.len()).step_by(context.amount(1021, 4091)) {
        let initrd = &whole[..length];
        context.write("initrd", initrd, 0o644)?;
        let output = with_initrd(context, "16M")?;
        if output.status != 0 || output.out() != seen(initrd) || !output.stderr.is_empty() {
            return Err(format!(
                "{length} bytes: status {}: {}{}",
                output.status,
                output.out(),
                output.err()
            ));
        }
    }
    Ok(PASSED)
}

/// The largest initrd that fits is loaded whole; with a page more, it is refused and told how many bytes are free.
fn largest_initrd(context: &Context) -> Checked {
    let mut fits = 0;
    let mut too_large = (8 << 20) / PAGE;
    let mut refusal = String::new();
    while fits + 1 < too_large {
        let pages = usize::midpoint(fits, too_large);
        let initrd = vec![pages as u8; pages * PAGE];
        context.write("initrd", &initrd, 0o644)?;
        let output = with_initrd(context, "8M")?;
        match output.status {
            0 if output.out() == seen(&initrd) => fits = pages,
            FAILURE if output.err().lines().count() == 1 && output.stdout.is_empty() => {
                (too_large, refusal) = (pages, output.err());
            }
            status => return Err(format!("{pages} pages: {status}: {}", output.err())),
        }
    }
    let room = (fits * PAGE) as f64 / f64::from(1 << 20);
    let room = format!("only {room:.1} MiB of --memory 8 MiB are free");
    if !refusal.contains(&room) {
        return Err(format!("{room:?} is not in {refusal}"));
    }
    Ok(PASSED)
}

/// Headers with bytes changed: whatever comes, the VMM goes on, and ends.
fn damaged(context: &Context) -> Checked {
    let elf = std::fs::read(context.program("kernels/flat")).map_err(|e| e.to_string())?;
    let rounds = context.amount(40, 10);
    let mut state = 4711_u64;
    for round in 0..rounds {
        for (whole, header) in [(bzimage(100), 0x1f1..0x268), (elf.clone(), 4..64 + 5 * 56)] {
            let mut bytes = whole;
            for _ in 0..=round % 3 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = header.start + (state >> 33) as usize % header.len();
                bytes[at] = (state >> 24) as u8;
            }
            let file = context.write("damaged", bytes, 0o644)?;
            let path = file.to_string_lossy();
            let options = ["--kernel", &path, "--cmdline", "hello", "--timeout", "0.5"];
            let output = context
                .boot(&options, &Launch::default())
                .map_err(|why| format!("round {round}: {why}"))?;
            if !matches!(output.status, 0 | 120..=125) {
                return Err(format!(
                    "round {round}: {}: {}",
                    output.status,
                    output.err()
                ));
            }
        }
    }
    Ok(PASSED)
}

fn initrds_and_options(context: &Context) -> Checked {
    context.write("kernel", bzimage(100), 0o644)?;
    let large = std::fs::File::create(context.work().join("large")).map_err(|e| e.to_string())?;
    large.set_len(1 << 30).map_err(|e| e.to_string())?;
    let long = "x".repeat(300);
    let missing = Path::new("/no/such/folder/log")
        .to_string_lossy()
        .into_owned();
    for (options, text) in [
        (["--initrd", "/no/such/initrd"], "/no/such/initrd"),
        (["--initrd", "{work}"], "not a regular file"),
        (["--initrd", "{work}/large"], "only"),
        (["--memory", "4M"], "a machine has"),
        (["--memory", "1000T"], "a machine has"),
        (["--memory", "lots"], "not a size"),
        (["--cpus", "0"], "--cpus"),
        (["--cpus", "255"], "--cpus"),
        (["--timeout", "0"], "--timeout"),
        (["--cmdline", &long], "--cmdline"),
        (["--console", &missing], "--console"),
        (["--console", "virtio:/no/such/folder/log"], "--console"),
        (["--console=stdio", "--console=virtio:stdio"], "stdio"),
        (["--console=pty", "--console=stdio"], "--console"),
        (["--bogus", "1"], "--bogus"),
    ] {
        let all = [&["--kernel", "{work}/kernel"][..], &options].concat();
        refused(context, &all, text)?;
    }
    refused(context, &[], "--kernel")?;
    Ok(PASSED)
}

fn disks(context: &Context) -> Checked {
    context.write("kernel", bzimage(100), 0o644)?;
    context.write("odd", vec![0; 1000], 0o644)?;
    context.write("empty", b"", 0o644)?;
    let path = context.write("used", vec![0; 4096], 0o644)?;
    let used = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let lock = rustix::fs::FlockOperation::NonBlockingLockShared;
    rustix::fs::flock(&used, lock).map_err(|e| e.to_string())?;
    for (disk, text) in [
        ("/no/such/disk", "/no/such/disk"),
        ("{work}", "disk"),
        ("/dev/null", "not a regular file"),
        ("{work}/odd", "sectors"),
        ("{work}/empty", "sectors"),
        ("{work}/used", "another machine, or another --disk, uses it"),
    ] {
        refused(
            context,
            &["--kernel", "{work}/kernel", "--disk", disk],
            text,
        )?;
    }
    // Read-only, several may.
    let options = ["--kernel", "{work}/kernel", "--disk", "{work}/used:ro"];
    let output = context.boot(&options, &Launch::default())?;
    if output.status != 0 {
        return Err(format!("shared: {}: {}", output.status, output.err()));
    }
    let mut many = vec!["--kernel", "{work}/kernel"];
    for _ in 0..19 {
        many.extend(["--disk", "{work}/used:ro"]);
    }
    refused(context, &many, "18 at most")?;
    Ok(PASSED)
}

fn without_kvm(context: &Context) -> Checked {
    refused(
        context,
        &["--kernel", "{programs}/kernels/flat"],
        "/dev/kvm",
    )?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("boot/input/kernels", kernels),
        Case::function("boot/input/cut_off", cut_off).seconds(180),
        Case::function("boot/input/initrd_cut_off", initrd_cut_off).seconds(180),
        Case::function("boot/input/largest_initrd", largest_initrd).seconds(180),
        Case::function("boot/input/damaged", damaged).seconds(180),
        Case::function("boot/input/initrds_and_options", initrds_and_options),
        Case::function("boot/input/disks", disks),
        Case::function("boot/input/no_kvm", without_kvm).on(On::NoKvm),
    ]
    .map(Case::any_paging)
    .into()
}
