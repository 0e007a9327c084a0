//! What a guest sees of the host: the folder it was given, and nothing else. Each case tries a way
//! out and must fail without showing the secret that lies outside. A VMM that lets it out must not do
//! harm: what a case would write or remove outside has a name that nobody else has.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;

use tests::case::{Case, Checked, Launch, PASSED, Verdict};
use tests::context::Context;
use tests::process::Output;

const SECRET: &str = "the host's secret";

/// A root with busybox in it, and a secret file beside it.
fn jail(context: &Context) -> Result<(), String> {
    let busybox = context.find("busybox")?;
    let root = context.work().join("root");
    fs::create_dir_all(root.join("bin")).map_err(|e| e.to_string())?;
    fs::copy(busybox, root.join("bin/busybox")).map_err(|e| e.to_string())?;
    context.write("vmm-test-secret", SECRET, 0o644)?;
    context.write("root/vmm-test-inside", "inside\n", 0o644)?;
    Ok(())
}

fn inside(context: &Context, line: &str) -> Result<Output, String> {
    let launch =
        Launch::new("/bin/busybox", &["sh", "-c", line]).options(&["--root", "{work}/root"]);
    let output = context.run(&launch)?;
    if output.out().contains(SECRET) || output.err().contains(SECRET) {
        return Err(format!(
            "the guest got out: `{line}` prints\n{}",
            output.out()
        ));
    }
    Ok(output)
}

/// The line must print only what is given.
fn prints(context: &Context, line: &str, want: &str) -> Result<(), String> {
    let output = inside(context, line)?;
    if output.out() == want {
        return Ok(());
    }
    Err(format!(
        "`{line}`: {:?}, not {want:?}; {}",
        output.out(),
        output.err()
    ))
}

fn dots(context: &Context) -> Checked {
    jail(context)?;
    let work = context.work();
    let secret = work.join("vmm-test-secret");
    let climb = format!("../../../../../../../..{}", secret.display());
    for path in [
        "/../vmm-test-secret",
        "../vmm-test-secret",
        &climb,
        "/bin/../../vmm-test-secret",
        &secret.to_string_lossy(),
    ] {
        prints(context, &format!("cat {path} 2>/dev/null; echo $?"), "1\n")?;
    }
    prints(
        context,
        "cd /; cd ..; pwd; cat ../vmm-test-inside",
        "/\ninside\n",
    )?;
    Ok(PASSED)
}

fn links(context: &Context) -> Checked {
    jail(context)?;
    let root = context.work().join("root");
    let link =
        |to: &std::path::Path, name: &str| symlink(to, root.join(name)).map_err(|e| e.to_string());
    link(&context.work().join("vmm-test-secret"), "absolute")?;
    link("../vmm-test-secret".as_ref(), "relative")?;
    link("../../../../../../../../etc".as_ref(), "folder")?;
    link(&context.work(), "up")?;
    link("/vmm-test-inside".as_ref(), "good")?;
    prints(context, "cat /absolute 2>/dev/null; echo $?", "1\n")?;
    prints(context, "cat /relative 2>/dev/null; echo $?", "1\n")?;
    prints(
        context,
        "cat /up/vmm-test-secret 2>/dev/null; echo $?",
        "1\n",
    )?;
    prints(
        context,
        "cat /folder/passwd 2>/dev/null; ls /folder/ 2>/dev/null; cd /folder 2>/dev/null; pwd",
        "/\n",
    )?;
    prints(context, "cat /good", "inside\n")?;
    Ok(PASSED)
}

fn magic_links(context: &Context) -> Checked {
    jail(context)?;
    let secret = context.work().join("vmm-test-secret");
    let secret = secret.display();
    for place in [
        "/proc/self/root",
        "/proc/1/root",
        "/proc/self/cwd/..",
        "/proc/self/cwd",
    ] {
        prints(
            context,
            &format!("cat {place}{secret} 2>/dev/null; echo $?"),
            "1\n",
        )?;
    }
    // Descriptors of the VMM's own must not be reachable either.
    let line = "for f in /proc/self/fd/* /dev/fd/*; do readlink $f; done 2>/dev/null | grep -v '^pipe:\\|^/dev/\\|^/proc\\|^socket:\\|^/$' | wc -l";
    prints(context, line, "0\n")?;
    Ok(PASSED)
}

/// Only regular files, folders and links are opened; the rest is refused without waiting.
fn special_files(context: &Context) -> Checked {
    jail(context)?;
    let root = context.work().join("root");
    let made = Command::new("mkfifo")
        .arg(root.join("vmm-test-fifo"))
        .status();
    let socket = UnixListener::bind(root.join("vmm-test-socket"));
    if !made.is_ok_and(|s| s.success()) || socket.is_err() {
        return Err("cannot make a FIFO and a socket".to_owned());
    }
    let mut names = vec!["vmm-test-fifo", "vmm-test-socket"];
    let mut skipped = Vec::new();
    let device = |name: &str, major: &str, minor: &str| {
        Command::new("mknod")
            .arg(root.join(name))
            .args(["c", major, minor])
            .status()
            .is_ok_and(|s| s.success())
    };
    if context.is_root()
        && device("vmm-test-device", "1", "5")
        && device("vmm-test-kvm", "10", "232")
    {
        names.extend(["vmm-test-device", "vmm-test-kvm"]);
    } else {
        skipped.push("device nodes: only root can make them".to_owned());
    }
    for name in names {
        prints(
            context,
            &format!("head -c 1 < /{name} 2>/dev/null | wc -c; (: > /{name}) 2>/dev/null; echo $?"),
            "0\n1\n",
        )?;
    }
    Ok(Verdict::Passed(skipped))
}

/// Nothing of the host's processes, environment and devices shows.
fn no_host_in_sight(context: &Context) -> Checked {
    jail(context)?;
    let launch = Launch::new(
        "/bin/busybox",
        &[
            "sh",
            "-c",
            "env; cat /proc/self/environ /proc/1/environ | tr '\\0' '\\n'",
        ],
    )
    .options(&["--root", "{work}/root"]);
    let output = context.run(&launch)?;
    let strangers: Vec<String> = output
        .out()
        .lines()
        .filter(|l| {
            l.starts_with("CARGO")
                || l.starts_with("VMM_") && !l.contains("EMULATED")
                || l.starts_with("TMPDIR")
        })
        .map(str::to_owned)
        .collect();
    if !strangers.is_empty() {
        return Err(format!("the host's environment shows: {strangers:?}"));
    }
    let host_pid = std::process::id();
    prints(
        context,
        &format!(
            "[ -e /proc/{host_pid} ] && [ {host_pid} -gt 50 ] && echo there; ls /proc | grep -c '^[0-9]' | awk '{{ print ($1 < 6) }}'"
        ),
        "1\n",
    )?;
    prints(
        context,
        "ls /dev | grep -c '^kvm\\|^sd\\|^vd\\|^mem\\|^loop\\|^nvme\\|^dm-\\|^vport'",
        "0\n",
    )?;
    prints(
        context,
        "ls /sys 2>/dev/null | grep -c 'block\\|firmware\\|bus'",
        "0\n",
    )?;
    prints(context, "[ -e /dev/kvm ] || echo none", "none\n")?;
    let mounts = inside(context, "cat /proc/mounts")?.out();
    let work = context.work().to_string_lossy().into_owned();
    if mounts.contains(&work) {
        return Err(format!("/proc/mounts names the host's folder: {mounts}"));
    }
    Ok(PASSED)
}

/// Without --root there is the program, its interpreter and its libraries.
fn no_root(context: &Context) -> Checked {
    context.write("vmm-test-secret", SECRET, 0o644)?;
    let secret = context.work().join("vmm-test-secret");
    let line = format!(
        "cat {} 2>/dev/null; cat /etc/passwd 2>/dev/null; ls /home /root /etc 2>/dev/null; echo end",
        secret.display()
    );
    let output = context.run(&Launch::new("busybox", &["sh", "-c", &line]))?;
    if output.out() == "end\n" {
        return Ok(PASSED);
    }
    Err(format!("more than nothing: {}", output.out()))
}

/// Ways out of a writable folder.
fn writable(context: &Context) -> Checked {
    jail(context)?;
    fs::create_dir(context.work().join("data")).map_err(|e| e.to_string())?;
    symlink(
        context.work().join("vmm-test-secret"),
        context.work().join("data/out"),
    )
    .map_err(|e| e.to_string())?;
    let secret = context.work().join("vmm-test-secret");
    let secret = secret.display();
    let line = format!(
        "cd /vmm-test-data || exit 9; echo broken > out; echo broken > ../vmm-test-secret; ln -s {secret} mine; \
         echo broken > mine; ln {secret} hard; ln -s ../../ up; echo broken > up/vmm-test-secret; mknod null c 1 3; \
         mv /vmm-test-inside .; mv out /bin/vmm-test-out; echo end"
    );
    let launch = Launch::new("/bin/busybox", &["sh", "-c", &line]).options(&[
        "--root",
        "{work}/root",
        "--rw",
        "{work}/data:/vmm-test-data",
    ]);
    let output = context.run(&launch)?;
    let now =
        fs::read_to_string(context.work().join("vmm-test-secret")).map_err(|e| e.to_string())?;
    let names: Vec<_> = fs::read_dir(context.work())
        .map_err(|e| e.to_string())?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    if now != SECRET || names.len() != 3 || !context.work().join("root/vmm-test-inside").exists() {
        return Err(format!(
            "changed outside: {now:?}, {names:?}; {}",
            output.err()
        ));
    }
    let null = fs::symlink_metadata(context.work().join("data/null"));
    if null.is_ok_and(|m| !m.is_file()) {
        return Err("a device was made on the host".to_owned());
    }
    if output.out() == "end\n" {
        Ok(PASSED)
    } else {
        Err(format!("no end: {}", output.err()))
    }
}

pub(crate) fn cases() -> Vec<Case> {
    type Check = fn(&Context) -> Checked;
    let all: [(&str, Check); 7] = [
        ("dots", dots),
        ("links", links),
        ("magic_links", magic_links),
        ("special_files", special_files),
        ("no_host_in_sight", no_host_in_sight),
        ("no_root", no_root),
        ("writable", writable),
    ];
    all.into_iter()
        .map(|(name, f)| Case::function(&format!("confinement/{name}"), f).needs(&["busybox"]))
        .map(Case::any_paging)
        .collect()
}
