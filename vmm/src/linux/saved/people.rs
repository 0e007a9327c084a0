//! Processes and threads, made again together: each must be the other's.

use std::collections::{BTreeMap, BTreeSet};

use super::error::{Damaged, RestoreError, require};
use super::load::Loader;
use super::records::Records;
use crate::linux::proc::futex::saved::SavedWord;
use crate::linux::process::{INIT, Life, PID_MAX, Pid, Process, State, TtyState};
use crate::linux::thread::Thread;

/// Puts the processes into the kernel; gives their threads, those that would run first in their order.
pub(super) fn load(l: &Loader<'_>, records: &Records) -> Result<Vec<Thread>, RestoreError> {
    let mut processes = BTreeMap::new();
    for saved in &records.processes {
        let process = saved.load(l)?;
        require(
            processes.insert(saved.pid(), Box::new(process)).is_none(),
            "a process's number twice",
        )?;
    }
    let mut threads = Vec::new();
    let mut tids = BTreeSet::new();
    for saved in &records.threads {
        let thread = saved.load(l)?;
        require(tids.insert(saved.tid()), "a thread's number twice")?;
        join(&mut processes, &thread)?;
        threads.push(thread);
    }
    for process in processes.values_mut() {
        check(process)?;
    }
    let machine = &records.machine;
    let main = processes.get(&machine.main).map(|p| p.life);
    let runs = matches!(main, Some(Life::Running | Life::Stopped(_)));
    require(runs && machine.main != INIT, "the first program")?;
    require(processes.contains_key(&INIT), "no reaper")?;
    require((1..PID_MAX).contains(&machine.next_pid), "the next number")?;
    relate(&mut processes)?;
    let mut state = l.k.state();
    state.next_pid = machine.next_pid;
    state.main = machine.main;
    // Who started the VMM is asked anew.
    state.tty = TtyState {
        outer_shell: false,
        ..machine.tty_state
    };
    load_futexes(l, records, &mut state)?;
    state.procs = processes;
    Ok(threads)
}

/// Makes a thread one of its process's.
fn join(processes: &mut BTreeMap<Pid, Box<Process>>, t: &Thread) -> Result<(), Damaged> {
    let others = t.tid != t.pid && processes.contains_key(&t.tid);
    require(!others, "a thread with a process's number")?;
    let p = processes
        .get_mut(&t.pid)
        .ok_or(Damaged("a thread's process"))?;
    let same =
        p.mm.as_ref()
            .is_some_and(|mm| std::sync::Arc::ptr_eq(mm, &t.mm));
    require(same && p.pid != INIT, "a thread's memory")?;
    p.threads.insert(t.tid, std::sync::Arc::clone(&t.shared));
    p.thread_masks.insert(t.tid, t.mask);
    Ok(())
}

/// What a process must be, with the threads it has.
fn check(p: &mut Process) -> Result<(), Damaged> {
    let lives = p.pid != INIT && !matches!(p.life, Life::Zombie(_));
    require(lives != p.threads.is_empty(), "a process's threads")?;
    let exec = p.exec.is_none_or(|tid| p.threads.contains_key(&tid));
    require(exec, "a thread in execve")?;
    let threads = &p.threads;
    p.thread_pending.retain(|tid, _| threads.contains_key(tid));
    p.thread_names.retain(|tid, _| threads.contains_key(tid));
    Ok(())
}

/// Tells parents of their children.
fn relate(processes: &mut BTreeMap<Pid, Box<Process>>) -> Result<(), Damaged> {
    let families: Vec<_> = processes.values().map(|p| (p.pid, p.ppid)).collect();
    for (pid, ppid) in families {
        if pid == INIT {
            require(ppid == 0, "the reaper's parent")?;
            continue;
        }
        // Upwards to the reaper, or in a circle.
        let mut at = ppid;
        let mut steps = 0;
        while at != INIT {
            at = processes
                .get(&at)
                .ok_or(Damaged("a process's parent"))?
                .ppid;
            steps += 1;
            require(
                steps <= processes.len(),
                "a process that is its own ancestor",
            )?;
        }
        let parent = processes
            .get_mut(&ppid)
            .ok_or(Damaged("a process's parent"))?;
        parent.children.insert(pid);
    }
    Ok(())
}

fn load_futexes(l: &Loader<'_>, records: &Records, state: &mut State) -> Result<(), Damaged> {
    let waiting: BTreeSet<_> = records
        .threads
        .iter()
        .filter(|t| t.waits_for_futex())
        .map(super::super::proc::saved::SavedThread::tid)
        .collect();
    let key = |word: SavedWord| {
        let mm = l.space(word.space)?;
        word.key(&l.k.memory, mm)
    };
    records
        .futexes
        .load(&mut state.futexes, key, |tid| waiting.contains(&tid))
}
