//! `vmm fork --isolation vm`: each clone in a machine of its own, the machines in worker processes ([`super::worker`]).
//!
//! Every virtual machine hangs a notifier on its process's address space, which all changes of that then call: so machines
//! are spread over processes, [`MOST_IN_A_PROCESS`] in each at most. This process has no machine. It starts the workers,
//! tells each which clones to run, at most [`AHEAD`] before it hears that one runs, and hears how they end.
//!
//! A worker that dies takes its clones with it. They are named in one line and count as ended with status 125;
//! those that wait for their turn get another worker. Workers end with this process: they are its children, with a signal
//! for its death, and they end when their socket is closed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::wire::{Line, Lot, News, One, Order};
use super::{ForkArgs, ForkError, numbered, start};
use crate::cli::{STATUS_FAILURE, say};

/// Machines that share a process at most.
pub(super) const MOST_IN_A_PROCESS: u8 = 100;

/// Clones that a worker has been told of and that do not run yet.
const AHEAD: usize = 2;

/// Runs the clones to their end: 0, or the status of the first that did not end with it.
pub(super) fn run(args: &ForkArgs, template: &File) -> Result<u8, ForkError> {
    let mut fleet = Fleet {
        args,
        template,
        most: args.jobs.unwrap_or(args.count).min(args.count) as usize,
        workers: Vec::new(),
        next: 1,
        failed: None,
    };
    loop {
        fleet.hand_out()?;
        if fleet.workers.is_empty() {
            return Ok(fleet.failed.map_or(0, |(_, status)| status));
        }
        fleet.listen()?;
    }
}

/// The workers, and what is left to do.
struct Fleet<'a> {
    args: &'a ForkArgs,
    template: &'a File,
    /// Clones at once.
    most: usize,
    workers: Vec<Worker>,
    /// The next clone.
    next: u32,
    /// The first that did not end with 0, and its status.
    failed: Option<(u32, u8)>,
}

/// A process that runs clones. Dropping it ends it.
struct Worker {
    process: Child,
    line: Line,
    /// The clones it was told of and that have not ended.
    clones: BTreeSet<u32>,
    /// Of these, those that do not run yet.
    waiting: BTreeSet<u32>,
}

impl Worker {
    fn has_room(&self, most: usize) -> bool {
        self.waiting.len() < AHEAD && self.clones.len() < most
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Fleet<'_> {
    /// Gives clones to workers as long as there are both, and lets those workers go that have nothing left to do.
    fn hand_out(&mut self) -> Result<(), ForkError> {
        let each = self.args.per_process.unwrap_or(MOST_IN_A_PROCESS).into();
        while self.next <= self.args.count {
            let running: usize = self.workers.iter().map(|worker| worker.clones.len()).sum();
            if running >= self.most {
                return Ok(());
            }
            let free = self.workers.iter().enumerate();
            let free = free.filter(|(_, worker)| worker.has_room(each));
            let free = free.min_by_key(|(_, worker)| worker.clones.len());
            let at = match free.map(|(at, _)| at) {
                Some(at) => at,
                None if self.workers.len() < self.most.div_ceil(each) => {
                    let worker = self.start_worker()?;
                    self.workers.push(worker);
                    self.workers.len() - 1
                }
                None => return Ok(()),
            };
            self.give(at)?;
        }
        self.workers.retain(|worker| !worker.clones.is_empty());
        Ok(())
    }

    fn start_worker(&self) -> Result<Worker, ForkError> {
        let (line, theirs) = Line::pair().map_err(start)?;
        let vmm = std::env::current_exe().map_err(start)?;
        let parent = std::process::id().to_string();
        let process = Command::new(vmm)
            .args(["run-clones", "--parent", &parent])
            .stdin(theirs)
            .spawn()
            .map_err(start)?;
        let worker = Worker {
            process,
            line,
            clones: BTreeSet::new(),
            waiting: BTreeSet::new(),
        };
        let lot = Lot {
            template: self.args.guest.clone(),
            of: self.args.count,
            cpus: self.args.cpus,
            timeout: self.args.timeout,
        };
        // One that is gone already shows that when it is listened to.
        let _gone = worker
            .line
            .say(&Order::Serve(lot), &[self.template.as_fd()]);
        Ok(worker)
    }

    /// Tells a worker of the next clone.
    fn give(&mut self, at: usize) -> Result<(), ForkError> {
        let (args, number) = (self.args, self.next);
        let opened = |pattern: &Option<String>, open: fn(&PathBuf) -> io::Result<File>| {
            let path = pattern.as_ref().map(|text| numbered(text, number).into());
            let open =
                |path: PathBuf| open(&path).map_err(|source| ForkError::File { path, source });
            path.map(open).transpose()
        };
        let stdin = opened(&args.stdin, |path| File::open(path))?;
        let stdout = opened(&args.stdout, |path| File::create(path))?;
        let settings = args.env.iter().map(|text| numbered(text, number));
        let one = One {
            number,
            name: args.name.as_ref().map(|name| format!("{name}-{number}")),
            settings: settings.collect(),
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
        };
        let with: Vec<_> = [&stdin, &stdout].into_iter().flatten().collect();
        let with: Vec<_> = with.iter().map(AsFd::as_fd).collect();
        let worker = &mut self.workers[at];
        match worker.line.say(&Order::Start(one), &with) {
            Err(error) if !is_gone(&error) => return Err(start(error)),
            // It is told of what it was given when it is listened to.
            Ok(()) | Err(_) => {}
        }
        worker.clones.insert(number);
        worker.waiting.insert(number);
        self.next += 1;
        Ok(())
    }

    /// Waits until a worker says something.
    fn listen(&mut self) -> Result<(), ForkError> {
        let lines = self.workers.iter();
        let mut fds: Vec<_> = lines
            .map(|worker| PollFd::new(&worker.line, PollFlags::IN))
            .collect();
        rustix::io::retry_on_intr(|| poll(&mut fds, None)).map_err(|errno| start(errno.into()))?;
        let spoke: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        // From the last, so that those before keep their places.
        for at in (0..spoke.len()).rev().filter(|at| spoke[*at]) {
            match self.workers[at].line.hear::<News>() {
                Ok(Some((news, _))) => self.note(at, news),
                Ok(None) | Err(_) => self.mourn(at)?,
            }
        }
        Ok(())
    }

    fn note(&mut self, at: usize, news: News) {
        let worker = &mut self.workers[at];
        match news {
            News::Runs(number) => _ = worker.waiting.remove(&number),
            News::Ended { number, status } => {
                worker.clones.remove(&number);
                // One that could not be made never ran.
                worker.waiting.remove(&number);
                self.ended(number, status);
            }
        }
    }

    fn ended(&mut self, number: u32, status: u8) {
        if status != 0 && self.failed.is_none_or(|(first, _)| number < first) {
            self.failed = Some((number, status));
        }
    }

    /// A worker has died: so have its clones.
    fn mourn(&mut self, at: usize) -> Result<(), ForkError> {
        let mut worker = self.workers.swap_remove(at);
        // It may only have lost its voice.
        let _ = worker.process.kill();
        let status = worker.process.wait().map_err(start)?;
        say(&obituary(worker.process.id(), status, &worker.clones));
        for number in std::mem::take(&mut worker.clones) {
            self.ended(number, STATUS_FAILURE);
        }
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::PIPE, Errno::CONNRESET].map(Errno::raw_os_error);
    error
        .raw_os_error()
        .is_some_and(|errno| gone.contains(&errno))
}

/// One line for a worker's end.
fn obituary(process: u32, status: ExitStatus, clones: &BTreeSet<u32>) -> String {
    let which = match clones.len() {
        1 => "clone",
        _ => "clones",
    };
    let clones = ranges(clones);
    format!("vmm: process {process} failed ({status}), and with it {which} {clones}\n")
}

/// Numbers as people write them: `1-4, 9`.
fn ranges(numbers: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            Some(_) | None => runs.push((*number, *number)),
        }
    }
    let runs = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    runs.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_a_row_are_ranges() {
        for (numbers, text) in [
            (&[][..], ""),
            (&[7], "7"),
            (&[1, 2, 3, 5, 8, 9], "1-3, 5, 8-9"),
        ] {
            assert_eq!(ranges(&numbers.iter().copied().collect()), text);
        }
    }
}
