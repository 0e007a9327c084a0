//! Running a command to its end, with input, a time limit, and everything it printed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use rustix::thread::disable_transparent_huge_pages;

/// What came of a command.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit status, or 128+N for signal N.
    pub status: i32,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: Vec<u8>,
    /// It was killed because the time was over.
    pub timed_out: bool,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// Shell's number for how a process ended.
#[must_use]
pub fn shell_status(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The process id in rustix's terms.
#[must_use]
pub fn pid_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// How a command is to be run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Killed after this long.
    pub timeout: Duration,
    /// A signal to send after a while: to see what a person's Ctrl-C or a `kill` does.
    pub signal: Option<(Duration, Signal)>,
}

/// Runs a command in a process group of its own; the whole group is killed when it ends or when
/// its time is over.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, stdin: &[u8], limits: &Limits) -> io::Result<Output> {
    let started = Instant::now();
    let mut child = command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = pid_of(&child);
    if let Some(mut pipe) = child.stdin.take() {
        let input = stdin.to_vec();
        // A program that does not read its input ends this with a broken pipe.
        thread::spawn(move || drop(pipe.write_all(&input)));
    }
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let mut status = None;
    if let Some((when, signal)) = limits.signal {
        status = ended_by(&mut child, started + when.min(limits.timeout))?;
        if let (None, Some(pid)) = (status, pid) {
            kill_process(pid, signal)?;
        }
    }
    if status.is_none() {
        status = ended_by(&mut child, started + limits.timeout)?;
    }
    let timed_out = status.is_none();
    let status = match status {
        Some(status) => status,
        None => kill(&mut child, pid)?,
    };
    let elapsed = started.elapsed();
    if let Some(pid) = pid {
        // Nobody is left in the group most of the time.
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let late = Duration::from_secs(10);
    Ok(Output {
        status: shell_status(status),
        stdout: stdout.recv_timeout(late).unwrap_or_default(),
        stderr: stderr.recv_timeout(late).unwrap_or_default(),
        timed_out,
        elapsed,
    })
}

/// Waits for the end of a process that is about to end; one that does not is killed.
///
/// # Errors
/// It did not end in time.
pub fn wait_within(child: &mut Child, limit: Duration) -> Result<ExitStatus, String> {
    match ended_by(child, Instant::now() + limit) {
        Ok(Some(status)) => Ok(status),
        Ok(None) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("did not end within {} s", limit.as_secs()))
        }
        Err(why) => Err(why.to_string()),
    }
}

/// How a process has ended, if it does until then. Looking again and again would take the emulated machine, which has one
/// processor, much of its time.
fn ended_by(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    let pid = pid_of(child).ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // It has not been waited for, so the number is its own.
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn kill(child: &mut Child, pid: Option<Pid>) -> io::Result<ExitStatus> {
    if let Some(pid) = pid {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    child.kill()?;
    child.wait()
}

fn collect<R: Read + Send + 'static>(pipe: Option<R>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut all);
        }
        let _ = sender.send(all);
    });
    receiver
}

/// The word that has this program start another one without transparent huge pages.
const SMALL_PAGES: &str = "--with-small-pages";

/// The same command, without the rest of our environment, in a process that has no transparent huge pages: what memory such a
/// process takes does not depend on when Linux makes one. Our own program is started, and becomes it.
///
/// # Errors
/// Nobody knows where our own program is.
pub fn with_small_pages(command: &Command) -> io::Result<Command> {
    let mut small = Command::new(std::env::current_exe()?);
    small
        .arg(SMALL_PAGES)
        .arg(command.get_program())
        .args(command.get_args());
    let set = command.get_envs();
    small
        .env_clear()
        .envs(set.filter_map(|(name, value)| Some((name, value?))));
    if let Some(folder) = command.get_current_dir() {
        small.current_dir(folder);
    }
    Ok(small)
}

/// Becomes the command that [`with_small_pages`] was asked for, if this process was started for that; gives back the status when
/// that fails.
#[must_use]
pub fn become_small() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != SMALL_PAGES {
        return None;
    }
    let program = words.next()?;
    // Inherited by what this process starts, and by what it becomes.
    let why = match disable_transparent_huge_pages(true) {
        Ok(()) => Command::new(program).args(words).exec(),
        Err(error) => error.into(),
    };
    eprintln!("not started with small pages: {why}");
    Some(ExitCode::from(126))
}

/// Finds a program in the folders where a distribution puts its own.
#[must_use]
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| std::path::Path::new(dir).join(name))
        .find(|path| File::open(path).is_ok())
}
