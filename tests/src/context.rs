//! What a running case has at hand: the host, the programs, a folder of its own, and the one way
//! to launch something under the VMM, which checks what must hold for every run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::case::Launch;
use crate::host::Host;
use crate::process::{self, Limits, Output};

/// What all cases share.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where we are.
    pub host: Host,
    /// The program under test.
    pub vmm: PathBuf,
    /// Folder of the guest's test programs.
    pub programs: PathBuf,
}

/// What one case has.
#[derive(Debug)]
pub struct Context {
    /// What all share.
    pub setup: Setup,
    /// The case's time limit, stretched for the host.
    pub timeout: Duration,
    folder: TempDir,
}

/// The environment of every program, under the VMM and natively.
pub const ENVIRONMENT: [(&str, &str); 4] = [
    ("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),
    ("LC_ALL", "C"),
    ("HOME", "/"),
    ("TERM", "dumb"),
];

impl Context {
    /// A context with a fresh folder.
    ///
    /// # Errors
    /// No folder can be made.
    pub fn new(setup: &Setup, timeout: Duration) -> Result<Self, String> {
        let folder = tempfile::Builder::new()
            .prefix("vmm-test-")
            .tempdir()
            .map_err(|e| format!("no folder: {e}"))?;
        for part in ["work", "tmp"] {
            fs::create_dir(folder.path().join(part)).map_err(|e| format!("no folder: {e}"))?;
        }
        // The emulated machine is some twenty times slower than a real one; on /dev/kvm a busy
        // builder needs some room too.
        let timeout = if setup.host.in_rig() {
            timeout * 3
        } else {
            timeout
        };
        Ok(Self {
            setup: setup.clone(),
            timeout,
            folder,
        })
    }

    /// How much, or how often: the second where all is emulated. It has to cross what the case is about (memory that does not
    /// suffice, pages that do not fit into one table) as the first does.
    #[must_use]
    pub fn amount<T>(&self, whole: T, emulated: T) -> T {
        match self.setup.host.in_rig() {
            true => emulated,
            false => whole,
        }
    }

    /// The folder that the case may fill; empty at first.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// A guest test program.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.setup.programs.join(name)
    }

    /// Writes a file into the case's folder.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(
        &self,
        name: &str,
        content: impl AsRef<[u8]>,
        mode: u32,
    ) -> Result<PathBuf, String> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.work().join(name);
        let made = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, content))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)));
        made.map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }

    fn expand(&self, text: &str) -> String {
        text.replace("{work}", &self.work().to_string_lossy())
            .replace("{programs}", &self.setup.programs.to_string_lossy())
    }

    /// The words that start a program under the VMM, up to the program itself.
    #[must_use]
    pub fn prefix(&self, options: &[String]) -> Vec<String> {
        let mut words = vec![
            self.setup.vmm.to_string_lossy().into_owned(),
            "run".to_owned(),
        ];
        for (name, value) in self.environment() {
            words.extend(["--env".to_owned(), format!("{name}={value}")]);
        }
        words.extend(options.iter().map(|o| self.expand(o)));
        words.push("--".to_owned());
        words
    }

    fn environment(&self) -> Vec<(String, String)> {
        let mut all: Vec<(String, String)> = ENVIRONMENT
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect();
        if self.setup.host.in_rig() {
            all.push(("VMM_TEST_EMULATED_CPU".to_owned(), "1".to_owned()));
        }
        all
    }

    /// The words that start `vmm boot` with these options, in which `{work}`, `{programs}` and
    /// `{guest}` (the folder with a whole Linux) stand for folders.
    #[must_use]
    pub fn boot_words(&self, options: &[&str]) -> Vec<String> {
        let guest = std::env::var("VMM_TEST_GUEST").unwrap_or_default();
        let mut words = vec![
            self.setup.vmm.to_string_lossy().into_owned(),
            "boot".to_owned(),
        ];
        words.extend(
            options
                .iter()
                .map(|o| self.expand(o).replace("{guest}", &guest)),
        );
        words
    }

    /// Boots a kernel and waits for its end; the VMM must not panic, nor leave anything behind.
    ///
    /// # Errors
    /// It does, or the time is over.
    pub fn boot(&self, options: &[&str], launch: &Launch) -> Result<Output, String> {
        let output = self.finish(&self.boot_words(options), launch)?;
        if output.err().contains("panicked at") {
            return Err(format!("the VMM panicked:\n{}", shorten(&output.err(), 30)));
        }
        self.nothing_left_behind()?;
        Ok(output)
    }

    /// The command that runs words in the environment that all programs have.
    #[must_use]
    pub fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new(words.first().map_or("", String::as_str));
        command.args(words.get(1..).unwrap_or_default());
        command
            .env_clear()
            .envs(self.environment())
            .current_dir(self.work());
        if words
            .first()
            .is_some_and(|w| Path::new(w) == self.setup.vmm)
        {
            command.env("TMPDIR", self.folder.path().join("tmp"));
        }
        command
    }

    /// The program and arguments of a launch on this host.
    #[must_use]
    pub fn words(&self, launch: &Launch) -> Vec<String> {
        let args = match &launch.rig_args {
            Some(args) if self.setup.host.in_rig() => args,
            _ => &launch.args,
        };
        let mut words = vec![self.expand(&launch.program)];
        words.extend(args.iter().map(|a| self.expand(a)));
        words
    }

    /// Runs a launch's program on Linux itself.
    ///
    /// # Errors
    /// It cannot be started, or its time is over.
    pub fn native(&self, launch: &Launch) -> Result<Output, String> {
        let words = self.words(launch);
        self.finish(&words, launch)
    }

    /// Runs a launch under the VMM, and checks what holds for every run: no panic, and nothing in
    /// use when the guest has ended.
    ///
    /// # Errors
    /// One of these does not hold, or the time is over.
    pub fn run(&self, launch: &Launch) -> Result<Output, String> {
        let options = match &launch.rig_options {
            Some(options) if self.setup.host.in_rig() => options,
            _ => &launch.options,
        };
        let mut options = options.clone();
        options.push("--stats=json".to_owned());
        let mut words = self.prefix(&options);
        words.extend(self.words(launch));
        let mut output = self.finish(&words, launch)?;
        let ended_by_itself = !matches!(output.status, 124..=127) && launch.signal.is_none();
        let stats = take_stats(&mut output);
        if output.err().contains("panicked at") {
            return Err(format!("the VMM panicked:\n{}", shorten(&output.err(), 30)));
        }
        match stats {
            Some(used) => match used.in_use {
                Some(0) => {}
                other => return Err(format!("frames in use at exit: {other:?}\n{}", used.line)),
            },
            None if ended_by_itself => {
                let (status, err) = (output.status, shorten(&output.err(), 20));
                return Err(format!(
                    "no statistics on the last line (status {status}):\n{err}"
                ));
            }
            None => {}
        }
        self.nothing_left_behind()?;
        Ok(output)
    }

    fn finish(&self, words: &[String], launch: &Launch) -> Result<Output, String> {
        let limits = Limits {
            timeout: self.timeout,
            signal: launch.signal,
        };
        let output = process::run(&mut self.command(words), &launch.stdin, &limits)
            .map_err(|e| format!("{}: {e}", words.join(" ")))?;
        if output.timed_out {
            return Err(format!(
                "did not end in {:?}\nstdout: {}\nstderr: {}",
                self.timeout,
                shorten(&output.out(), 20),
                shorten(&output.err(), 20)
            ));
        }
        Ok(output)
    }

    fn nothing_left_behind(&self) -> Result<(), String> {
        let tmp = self.folder.path().join("tmp");
        let left: Vec<_> = fs::read_dir(&tmp)
            .map_err(|e| e.to_string())?
            .flatten()
            .collect();
        match left.first() {
            None => Ok(()),
            Some(file) => Err(format!("left behind: {}", file.path().display())),
        }
    }

    /// Whether somebody may create what only root may.
    #[must_use]
    pub fn is_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    /// A file of the machine, or a reason for not finding it.
    ///
    /// # Errors
    /// There is no such program.
    pub fn find(&self, name: &str) -> Result<PathBuf, String> {
        process::find_program(name).ok_or_else(|| format!("{name} is not installed"))
    }

    /// The case's folder's parent, for making things outside a root.
    #[must_use]
    pub fn outside(&self) -> &Path {
        self.folder.path()
    }
}

struct Stats {
    line: String,
    in_use: Option<u64>,
}

/// Takes the statistics' line off the end of standard error.
fn take_stats(output: &mut Output) -> Option<Stats> {
    let text = output.err();
    let line = text
        .lines()
        .last()
        .filter(|l| l.starts_with('{'))?
        .to_owned();
    let value: serde_json::Value = serde_json::from_str(&line).ok()?;
    let kept = output.stderr.len() - (line.len() + usize::from(text.ends_with('\n')));
    output.stderr.truncate(kept);
    let in_use = value
        .pointer("/memory/frames_in_use")
        .and_then(serde_json::Value::as_u64);
    Some(Stats { line, in_use })
}

/// The last lines of a text.
#[must_use]
pub fn shorten(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    let more = if from > 0 {
        format!("[{from} lines before]\n")
    } else {
        String::new()
    };
    more + &all[from..].join("\n")
}
