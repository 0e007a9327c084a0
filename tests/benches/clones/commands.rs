//! The same guest by commands: `vmm restore` of a file, `vmm fork` of the guest and of a pool, each with processes of its own.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::{Bench, COLD_ROUNDS, Result, median, micros, tsc};

impl Bench {
    /// The guest out of a file that `vmm snapshot` wrote, and out of a copy of it, with a process of its own.
    pub(super) fn restored(&self, dir: &Path) -> Result<()> {
        let path = dir.join("guest.snap");
        self.snapshot(dir, &path)?;
        self.restore(&path, "vmm restore")?;
        let copy = dir.join("copy.snap");
        std::fs::copy(&path, &copy)?;
        self.restore(&copy, "vmm restore of a copy, which is read first")?;
        std::fs::remove_file(copy)?;
        Ok(std::fs::remove_file(path)?)
    }

    fn command(&self, dir: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(&self.vmm);
        command.args(words).env("XDG_RUNTIME_DIR", dir);
        command.stderr(Stdio::null());
        command
    }

    /// A guest called `warm` that waits for what it is to do, until its input ends.
    fn waits(&self, dir: &Path) -> Result<Child> {
        let memory = self.memory().to_string();
        let options = ["run", "--memory", &memory, "--name", "warm"];
        let mut guest = self.command(dir, &options);
        guest.args(["--ready-freeze", "--"]).arg(&self.program);
        let guest = guest.arg(self.mib.to_string());
        guest.stdin(Stdio::piped());
        Ok(guest.stdout(Stdio::null()).spawn()?)
    }

    /// Has it written to the file `path`.
    fn snapshot(&self, dir: &Path, path: &Path) -> Result<()> {
        let mut guest = self.waits(dir)?;
        let saved = self.command(dir, &["snapshot", "warm"]).arg(path).status();
        drop(guest.stdin.take());
        let ended = guest.wait()?;
        match saved?.success() && ended.success() {
            true => Ok(()),
            false => Err("vmm snapshot failed".into()),
        }
    }

    /// A copy by `vmm fork`, of the guest and of a pool.
    pub(super) fn forks(&self, dir: &Path) -> Result<()> {
        let mut guest = self.waits(dir)?;
        let mut pool = self.command(dir, &["pool", "warm"]).spawn()?;
        let input = dir.join("input");
        std::fs::write(&input, b"c")?;
        let input = input.to_string_lossy();
        let forked = ["warm-pool", "warm"].map(|of| {
            let words = ["fork", of, "--stdin", &input];
            self.goes_on(&format!("vmm fork {of}"), || self.command(dir, &words))
        });
        drop(guest.stdin.take());
        let killed = self.command(dir, &["kill", "warm-pool"]).status()?;
        let ended = [guest.wait()?, pool.wait()?, killed];
        forked.into_iter().collect::<Result<Vec<_>>>()?;
        match ended.iter().all(std::process::ExitStatus::success) {
            true => Ok(()),
            false => Err("the guest or its pool failed".into()),
        }
    }

    /// Restores the guest some times.
    fn restore(&self, path: &Path, what: &str) -> Result<()> {
        self.goes_on(what, || {
            let mut command = self.command(path, &["restore"]);
            command.arg(path);
            command
        })
    }

    /// Runs a command some times that has a guest go on, which says when it did.
    fn goes_on(&self, what: &str, command: impl Fn() -> Command) -> Result<()> {
        let (mut first, mut all) = (Vec::new(), Vec::new());
        for _ in 0..COLD_ROUNDS {
            let (from, started) = (tsc(), Instant::now());
            let mut guest = command();
            guest.stdin(Stdio::piped());
            let mut guest = guest.stdout(Stdio::piped()).spawn()?;
            let mut stdin = guest.stdin.take().ok_or("no pipe")?;
            // One that reads it from elsewhere has ended perhaps.
            let _ = stdin.write_all(b"c");
            drop(stdin);
            let output = guest.wait_with_output()?;
            let went_on = output.stdout.first_chunk();
            let went_on = u64::from_le_bytes(*went_on.ok_or("the guest said nothing")?);
            all.push(micros(started));
            first.push(went_on.saturating_sub(from) as f64 / self.ticks);
        }
        self.row(&format!("{what}: first instruction"), median(first), "");
        self.row(&format!("{what}: the end"), median(all), "");
        Ok(())
    }
}
