//! `vmm fork --isolation vm`: each clone in a machine of its own, the machines in worker processes ([`super::worker`]).
//!
//! Every virtual machine hangs a notifier on its process's address space, which all changes of that then call: so machines
//! are spread over processes, [`MOST_IN_A_PROCESS`] in each at most. This process has no machine. It starts the workers,
//! tells each which clones to run, at most [`AHEAD`] before it hears that one runs, and hears how they end.
//!
//! If the guest is a pool ([`super::pool`]), that is the first worker: it runs as many clones as it has room for.
//!
//! A worker that dies takes its clones with it. They are named in one line and count as ended with status 125;
//! those that wait for their turn get another worker. Workers end with this process: they are its children, with a signal
//! for its death, and they end when their socket is closed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::named::Named;
use super::wire::{End, Line, Lot, News, One, Order};
use super::{ForkArgs, ForkError, numbered, start};
use crate::cli::snapshot::{template, wait_until_ready};
use crate::cli::{STATUS_FAILURE, say, say_line};
use crate::control::client;
use crate::control::rundir::{self, CLONES};

/// Machines that share a process at most.
pub(super) const MOST_IN_A_PROCESS: u8 = 100;

/// Clones that a worker has been told of and that do not run yet.
const AHEAD: usize = 2;

/// Runs the clones to their end: 0, or the status of the first that did not end with it.
pub(super) fn run(args: &ForkArgs) -> Result<u8, ForkError> {
    let mut fleet = Fleet {
        args,
        workers: pool(args)?.into_iter().collect(),
        named: Named::new(args)?,
        template: None,
        most: args.jobs.unwrap_or(args.count).min(args.count) as usize,
        leaving: Vec::new(),
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

fn lot(args: &ForkArgs) -> Lot {
    Lot {
        template: Some(args.guest.clone()),
        of: args.count,
        cpus: args.cpus,
        timeout_ms: args.timeout.map(|time| time.as_millis() as u64),
    }
}

/// The pool that the guest is, if it is one, and its machines are like those wanted.
fn pool(args: &ForkArgs) -> Result<Option<Worker>, ForkError> {
    // Before anything is opened, and emptied, for its copies.
    wait_until_ready(&args.guest)?;
    if !suits_a_pool(args, io::stdin().is_terminal()) {
        return Ok(None);
    }
    let Ok(stream) = client::connect(&rundir::folder(), &args.guest, CLONES) else {
        return Ok(None);
    };
    let line = Line::over(stream);
    let answer = line.say(&Order::Serve(lot(args)), &[]);
    let answer = answer.and_then(|()| line.hear()).map_err(start)?;
    let Some((News::Room(room), _)) = answer else {
        // It ends.
        return Ok(None);
    };
    Ok((room > 0).then(|| Worker {
        process: None,
        line,
        room: room as usize,
        clones: BTreeSet::new(),
        waiting: BTreeSet::new(),
    }))
}

/// Whether a pool's machines are like those wanted, and can have the standard input that is: a terminal is read by its
/// foreground alone, which is this command and its workers.
fn suits_a_pool(args: &ForkArgs, on_a_terminal: bool) -> bool {
    let others = args.anew || args.cpus.is_some() || args.per_process.is_some();
    let reads_it = on_a_terminal && args.stdin.as_deref() == Some("-");
    !others && !reads_it
}

/// Descriptors 0 to 2 of a clone, and what comes with the order: files that were named, or else, but for standard input, this
/// process's, which a worker has too.
fn ends(files: [Option<&File>; 3], is_worker: bool) -> [(End, Option<BorrowedFd<'_>>); 3] {
    let own = [
        None,
        Some(rustix::stdio::stdout()),
        Some(rustix::stdio::stderr()),
    ];
    let is_open = |fd: &BorrowedFd<'_>| rustix::io::fcntl_getfd(fd).is_ok();
    std::array::from_fn(|n| match (files[n], own[n].filter(is_open)) {
        (Some(file), _) => (End::Given, Some(file.as_fd())),
        (None, None) => (End::Nothing, None),
        (None, Some(_)) if is_worker => (End::Own, None),
        (None, Some(own)) => (End::Given, Some(own)),
    })
}

/// The workers, and what is left to do.
struct Fleet<'a> {
    args: &'a ForkArgs,
    named: Named<'a>,
    /// Once a worker needs it.
    template: Option<File>,
    /// Clones at once.
    most: usize,
    workers: Vec<Worker>,
    /// Those that have nothing left to do and were told to end. The host takes its time for their machines, and is waited
    /// for once all are told.
    leaving: Vec<Worker>,
    /// The next clone.
    next: u32,
    /// The first that did not end with 0, and its status.
    failed: Option<(u32, u8)>,
}

/// A process that runs clones. Dropping it ends it, if it is a child of this one.
struct Worker {
    /// None: it is a pool.
    process: Option<Child>,
    line: Line,
    /// Clones that it runs at most.
    room: usize,
    /// The clones it was told of and that have not ended.
    clones: BTreeSet<u32>,
    /// Of these, those that do not run yet.
    waiting: BTreeSet<u32>,
}

impl Worker {
    /// Tells it to end.
    fn end(&mut self) {
        if let Some(process) = &mut self.process {
            // One that has ended already was what is wanted.
            let _ = process.kill();
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.len() < AHEAD && self.clones.len() < self.room
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        if let Some(process) = &mut self.process {
            let _ = process.wait();
        }
    }
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        // All before one is waited for.
        self.workers.iter_mut().for_each(Worker::end);
    }
}

impl Fleet<'_> {
    /// Gives clones to workers as long as there are both, and lets those workers go that have nothing left to do.
    fn hand_out(&mut self) -> Result<(), ForkError> {
        let each: usize = self.args.per_process.unwrap_or(MOST_IN_A_PROCESS).into();
        while self.next <= self.args.count {
            let running: usize = self.workers.iter().map(|worker| worker.clones.len()).sum();
            if running >= self.most {
                return Ok(());
            }
            let free = self.workers.iter().enumerate();
            let free = free.filter(|(_, worker)| worker.has_room());
            let free = free.min_by_key(|(_, worker)| worker.clones.len());
            let at = match free.map(|(at, _)| at) {
                Some(at) => at,
                None if self.room() < self.most => {
                    let worker = self.start_worker(each)?;
                    self.workers.push(worker);
                    self.workers.len() - 1
                }
                None => return Ok(()),
            };
            self.give(at)?;
        }
        let idle = |worker: &mut Worker| worker.clones.is_empty();
        for mut worker in self.workers.extract_if(.., idle) {
            worker.end();
            self.leaving.push(worker);
        }
        Ok(())
    }

    /// Clones that all workers together may run.
    fn room(&self) -> usize {
        self.workers.iter().map(|worker| worker.room).sum()
    }

    fn start_worker(&mut self, room: usize) -> Result<Worker, ForkError> {
        let template = match self.template.take() {
            Some(there) => there,
            None => template(&self.args.guest, self.args.anew)?.1,
        };
        let template = self.template.insert(template);
        let (line, theirs) = Line::pair().map_err(start)?;
        let vmm = std::env::current_exe().map_err(start)?;
        let parent = std::process::id().to_string();
        let process = Command::new(vmm)
            .args(["run-clones", "--parent", &parent])
            .stdin(theirs)
            .spawn()
            .map_err(start)?;
        let worker = Worker {
            process: Some(process),
            line,
            room,
            clones: BTreeSet::new(),
            waiting: BTreeSet::new(),
        };
        // One that is gone already shows that when it is listened to.
        let order = Order::Serve(lot(self.args));
        let _gone = worker.line.say(&order, &[template.as_fd()]);
        Ok(worker)
    }

    /// Tells a worker of the next clone.
    fn give(&mut self, at: usize) -> Result<(), ForkError> {
        let (args, number) = (self.args, self.next);
        let files = self.named.of(number)?;
        let files = std::array::from_fn(|n| files[n].as_ref().or(self.named.common(n)));
        let settings = args.env.iter().map(|text| numbered(text, number));
        let worker = &mut self.workers[at];
        let ends = ends(files, worker.process.is_some());
        let one = One {
            number,
            name: args.name.as_ref().map(|name| format!("{name}-{number}")),
            env: settings.collect(),
            stdio: ends.map(|(end, _)| end),
        };
        let with: Vec<_> = ends.into_iter().filter_map(|(_, fd)| fd).collect();
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
                self.ended(number, status);
            }
            News::Failed { number, why } => {
                worker.clones.remove(&number);
                // One that could not be made never ran.
                worker.waiting.remove(&number);
                say_line(&why);
                self.ended(number, STATUS_FAILURE);
            }
            // Said before the first order; said of what is none.
            News::Room(_) | News::Error(_) => {}
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
        let died = match &mut worker.process {
            Some(process) => {
                // It may only have lost its voice.
                let _ = process.kill();
                let status = process.wait().map_err(start)?;
                format!("process {} failed ({status})", process.id())
            }
            None => format!("pool `{}` has ended", self.args.guest),
        };
        if !worker.clones.is_empty() || worker.process.is_some() {
            say(&obituary(&died, &worker.clones));
        }
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
fn obituary(died: &str, clones: &BTreeSet<u32>) -> String {
    let which = match clones.len() {
        1 => "clone",
        _ => "clones",
    };
    format!("vmm: {died}, and with it {which} {}\n", ranges(clones))
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
    use super::super::testing::args;
    use super::*;

    #[test]
    fn terminal_is_not_read_by_a_pool() {
        for (words, on_a_terminal, suits) in [
            (&[][..], true, true),
            (&["--stdin", "in.%i"], true, true),
            (&["--stdin", "-"], false, true),
            (&["--stdin", "-"], true, false),
            (&["--cpus", "2"], false, false),
        ] {
            let found = suits_a_pool(&args(words), on_a_terminal);
            assert_eq!(found, suits, "{words:?} {on_a_terminal}");
        }
    }

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
