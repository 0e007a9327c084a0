//! The host's signals to the VMM become signals to the guest, and a guest whose first program is
//! stopped stops the VMM: so Ctrl-C, Ctrl-Z and `fg` mean what they mean natively.
//!
//! Two threads: one takes the host's signals, one stops the VMM when it must be.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Condvar;
use signal_hook::consts::{
    SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGWINCH,
};
use signal_hook::iterator::{Handle, Signals};

use super::super::kernel::Kernel;
use super::super::process::SigInfo;
use super::super::signal;
use super::host_job::under_job_control;
use super::job::{keyboard_group, main_group};
use crate::locks::{WaitMutex, rank};

/// How long the guest has to end after `SIGTERM` or `SIGHUP`.
const GRACE: Duration = Duration::from_secs(3);
/// How often it is asked whether it has.
const PACE: Duration = Duration::from_millis(20);

/// The host's signals that are passed on.
const TAKEN: [i32; 7] = [SIGINT, SIGQUIT, SIGTSTP, SIGWINCH, SIGTERM, SIGHUP, SIGCONT];

/// The signals a process ignores, from its `/proc/PID/status`: bit N-1 for signal N.
fn ignored_signals(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Tells the stopping thread that the first program was stopped.
#[derive(Debug, Default)]
pub struct MainStops {
    state: WaitMutex<rank::MainStops, StopState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct StopState {
    /// The signal that stopped it.
    stopped: Option<i32>,
    over: bool,
}

impl MainStops {
    /// The first program was stopped by `signo`: the VMM stops too. May be called with the state
    /// locked.
    pub fn stopped(&self, signo: i32) {
        self.state.lock().stopped = Some(signo);
        self.changed.notify_all();
    }

    fn end(&self) {
        self.state.lock().over = true;
        self.changed.notify_all();
    }

    /// The signal that stopped the program; `None` when the machine ends.
    fn wait(&self) -> Option<i32> {
        let mut state = self.state.lock();
        loop {
            if state.over {
                return None;
            }
            if let Some(signo) = state.stopped.take() {
                return Some(signo);
            }
            state.wait(&self.changed);
        }
    }
}

/// The two threads. From [`HostSignals::start`] until the process ends, the signals do not have
/// their default effect on the VMM.
pub struct HostSignals {
    kernel: Arc<Kernel>,
    handle: Handle,
    threads: Vec<JoinHandle<()>>,
}

impl HostSignals {
    /// Starts to take the host's signals. To be called when the first program is in
    /// [`State::procs`](super::super::process::State::procs).
    ///
    /// # Errors
    /// The host's.
    pub fn start(kernel: &Arc<Kernel>) -> std::io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = ignored_signals(&status);
        // What a person made the VMM ignore (nohup(1)) it ignores for the guest too.
        let taken = TAKEN
            .iter()
            .filter(|&&signo| signal::bit(signo) & ignored == 0);
        let mut signals = Signals::new(taken)?;
        if let Some(tty) = &kernel.tty {
            tty.restore_on_panic();
        }
        let handle = signals.handle();
        kernel.state().tty.outer_shell = under_job_control();
        let k = Arc::clone(kernel);
        let taker = std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signo in signals.forever() {
                    take(&k, signo);
                }
            })?;
        let k = Arc::clone(kernel);
        let stopper = std::thread::Builder::new()
            .name("stops".into())
            .spawn(move || {
                while let Some(signo) = k.io.main_stops.wait() {
                    stop_vmm(&k, signo);
                }
            })?;
        Ok(Self {
            kernel: Arc::clone(kernel),
            handle,
            threads: vec![taker, stopper],
        })
    }

    /// Ends the threads and gives the terminal back.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        self.handle.close();
        self.kernel.io.main_stops.end();
        for thread in self.threads.drain(..) {
            // A panic in it has been reported; there is nothing left to do for it.
            let _ = thread.join();
        }
        if let Some(tty) = &self.kernel.tty {
            tty.restore();
        }
    }
}

impl Drop for HostSignals {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn take(k: &Arc<Kernel>, signo: i32) {
    match signo {
        SIGCONT => {
            if let Some(tty) = &k.tty {
                tty.reapply();
            }
            send(k, Target::Keyboard, SIGCONT);
            send(k, Target::Main, SIGCONT);
        }
        SIGTERM | SIGHUP => {
            send(k, Target::Main, signo);
            end_after_grace(k, signo);
        }
        _ => send(k, Target::Keyboard, signo),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The foreground group.
    Keyboard,
    /// The first program's group.
    Main,
}

fn send(k: &Kernel, target: Target, signo: i32) {
    let mut state = k.state();
    let group = match target {
        Target::Keyboard => keyboard_group(&state),
        Target::Main => main_group(&state),
    };
    if let Some(group) = group {
        // The group may have ended: then there is nobody to tell.
        let _ = signal::send_to_group(k, &mut state, group, SigInfo::kernel(signo));
    }
}

/// Ends the machine as if `signo` had ended the first program, if it does not end by itself.
fn end_after_grace(k: &Arc<Kernel>, signo: i32) {
    let kernel = Arc::clone(k);
    let spawned = std::thread::Builder::new()
        .name("grace".into())
        .spawn(move || {
            let until = Instant::now() + GRACE;
            while Instant::now() < until {
                if kernel.sched.has_ended() {
                    return;
                }
                std::thread::sleep(PACE);
            }
            kernel.state().main_status.get_or_insert(signo);
            kernel.sched.end();
        });
    if let Err(error) = spawned {
        tracing::error!(%error, "cannot wait for the guest to end");
        k.state().main_status.get_or_insert(signo);
        k.sched.end();
    }
}

/// Stops the VMM as the first program was stopped. Returns when it goes on.
fn stop_vmm(k: &Kernel, signo: i32) {
    if let Some(tty) = &k.tty {
        tty.restore();
    }
    let signo = match signo {
        SIGTSTP | SIGTTIN | SIGTTOU => signo,
        _ => signal_hook::consts::SIGSTOP,
    };
    if let Err(error) = signal_hook::low_level::emulate_default_handler(signo) {
        tracing::warn!(%error, "cannot stop with the guest");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tvmm\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001003\n";
        assert_eq!(ignored_signals(status), 0x1003);
        assert_eq!(ignored_signals(""), 0);
    }

    #[test]
    fn end_comes_before_a_stop() {
        let stops = MainStops::default();
        stops.stopped(SIGTSTP);
        assert_eq!(stops.wait(), Some(SIGTSTP));
        stops.stopped(SIGTSTP);
        stops.end();
        assert_eq!(stops.wait(), None);
    }
}
