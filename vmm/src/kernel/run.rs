//! Running a machine: a thread for each processor, one for signals, and this one, which waits for the
//! end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::BootError;
use super::config::BootConfig;
use super::console::Screen;
use super::end::{End, Ending, Watch};
use super::machine::{Attached, Machine};
use super::stats::{BootReport, Counters};
use super::terminal::RawMode;
use crate::devices::Devices;
use crate::hv::kvm::board_cpu::{BoardCpu, Stop};
use crate::machine::kick::Kicker;

/// How long what was written may take to arrive, and threads to end, after the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a machine ended, and what was counted.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How.
    pub end: End,
    /// The counts.
    pub report: BootReport,
}

/// Boots a kernel and waits until its machine ends.
///
/// # Errors
/// It could not be started. Once it runs, whatever happens is an [`End`].
pub fn boot(config: &BootConfig, say: impl Fn(&str)) -> Result<Ended, BootError> {
    let mut machine = Machine::new(config)?;
    let mut terminal = Terminal::default();
    for Attached {
        console, keyboard, ..
    } in &machine.consoles
    {
        terminal.raw = terminal.raw.or(console.enter()?);
        terminal.screens.extend(console.screen(keyboard)?);
    }
    let terminal = Arc::new(terminal);
    let signals = watch_signals(&machine.ending, &terminal)?;
    // Now keys are the guest's.
    for attached in &mut machine.consoles {
        let console = &mut attached.console;
        if let Some(notice) = &console.notice {
            say(notice);
        }
        console.start_input(&attached.keyboard, &machine.ending)?;
    }
    let counters = Arc::new(Counters::default());
    let started = Instant::now();
    let threads = start_cpus(&mut machine, &counters)?;
    let deadline = config.timeout.map(|timeout| started + timeout);
    let end = machine.ending.wait(deadline);
    let elapsed = started.elapsed();

    for attached in &machine.consoles {
        attached.output.finish(PATIENCE);
    }
    threads.wait_for_the_end(PATIENCE);
    machine.virtio.stop(PATIENCE);
    signals.close();
    // Whoever still holds it is about to end with the process.
    drop(terminal);
    let report = BootReport {
        end: end.word(),
        cpus: config.cpus,
        memory: config.memory,
        milliseconds: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        exits: counters.snapshot(),
        ioctls: machine.vm.ioctls.load(Ordering::Relaxed),
    };
    Ok(Ended { end, report })
}

/// The person's terminal, if there is one, and everything else that has a size.
#[derive(Debug, Default)]
struct Terminal {
    raw: Option<RawMode>,
    screens: Vec<Screen>,
}

/// Ends the machine on a signal; makes the terminal raw again after a stop, and tells of its size.
fn watch_signals(
    ending: &Arc<Ending>,
    terminal: &Arc<Terminal>,
) -> Result<signal_hook::iterator::Handle, BootError> {
    let taken = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGCONT, SIGWINCH];
    let mut signals = Signals::new(taken).map_err(BootError::Thread)?;
    let handle = signals.handle();
    let (ending, terminal) = (Arc::clone(ending), Arc::downgrade(terminal));
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let _watch = Watch {
                ending: &ending,
                thread: "signal",
            };
            for signal in signals.forever() {
                let terminal = terminal.upgrade();
                match (signal, terminal.as_deref()) {
                    (SIGCONT, Some(Terminal { raw: Some(raw), .. })) => raw.again(),
                    (SIGWINCH, Some(terminal)) => terminal.screens.iter().for_each(Screen::look),
                    (SIGCONT | SIGWINCH, _) => {}
                    (signal, _) => ending.tell(End::Signal(signal)),
                }
            }
        })
        .map_err(BootError::Thread)?;
    Ok(handle)
}

/// The processors' threads.
struct CpuThreads {
    /// Each drops its end when it is done.
    done: mpsc::Receiver<()>,
}

impl CpuThreads {
    /// Waits, at most so long: a thread may be inside a write that never returns.
    fn wait_for_the_end(self, patience: Duration) {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.done.recv_timeout(left) {
                Ok(()) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    tracing::debug!("a processor's thread has not ended in time");
                    return;
                }
            }
        }
    }
}

fn start_cpus(machine: &mut Machine, counters: &Arc<Counters>) -> Result<CpuThreads, BootError> {
    let (alive, done) = mpsc::channel();
    for (index, cpu) in machine.cpus.drain(..).enumerate() {
        let devices = Arc::clone(&machine.devices);
        let ending = Arc::clone(&machine.ending);
        let counters = Arc::clone(counters);
        let alive: mpsc::Sender<()> = alive.clone();
        let spawned = thread::Builder::new()
            .name(format!("cpu{index}"))
            .spawn(move || {
                let _alive = alive;
                let _watch = Watch {
                    ending: &ending,
                    thread: "processor",
                };
                run_cpu(cpu, &devices, &ending, &counters);
            });
        if let Err(error) = spawned {
            machine.ending.tell(End::Bug("processor"));
            return Err(BootError::Thread(error));
        }
    }
    Ok(CpuThreads { done })
}

/// Runs one processor until the machine ends.
fn run_cpu(mut cpu: BoardCpu, devices: &Devices, ending: &Ending, counters: &Counters) {
    let kicker = Kicker::for_this_thread();
    if let Err(error) = cpu.set_kick_signal(Kicker::signal()) {
        ending.tell(End::Stuck(error.to_string()));
        return;
    }
    ending.add_kicker(kicker);
    while !ending.has_come() {
        match cpu.run(devices) {
            Ok(Stop::Access(access)) => counters.access(access),
            Ok(Stop::Kicked) => counters.kick(),
            Ok(Stop::TripleFault) => ending.tell(End::TripleFault),
            Ok(Stop::Stuck(why)) => ending.tell(End::Stuck(why)),
            Err(error) => ending.tell(End::Stuck(format!("{error}: {}", error.source))),
        }
    }
}
