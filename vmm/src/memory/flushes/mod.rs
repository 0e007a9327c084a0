//! The TLB shoot-down: which virtual CPUs must drop translations before a [`Flush`] is true, and when
//! the frames it protects may be used again.
//!
//! Every flush gets a *ticket*, a number that only grows. A virtual CPU is *inside* from just before
//! it enters ring 3 until it has left it, and *covers* a ticket if it has dropped, at its last entry
//! or later, what flushes up to that ticket made stale.
//!
//! * **Submitting** marks every virtual CPU that runs, or ran last, the flush's space *stale* (its next entry
//!   flushes) and ejects those that are inside. Nobody waits here, so locks may be held.
//! * A fork that shares tables gives its parent another root. Whoever is about to enter looks at the root again once he
//!   counts as inside; whoever is inside already is ejected by the fork's flush, and enters with the new one.
//! * A *wide* flush, of tables that spaces share, concerns every virtual CPU. No entry waits for one: it only
//!   takes pages away that come back when they are wanted.
//! * An operation's flush is submitted a moment after the operation has let go of the space; until then it is
//!   *unannounced*, and nobody enters the space: a thread may already have been given what another one lost.
//! * **Entering** a space waits until no other virtual CPU is inside it with a ticket of that space
//!   uncovered: so a system call that took something away has taken it from everybody when it
//!   returns to ring 3. Those waited for are on their way out of the guest and need no lock for it; whoever
//!   waits is not inside itself. [`Flushes::quiesce`] is the same wait without an entry, for a fork.
//! * Where KVM shadows page tables, the tables a flush names must also be *touched* by the monitor of
//!   any one virtual CPU, and those that run the space must load CR3 after a touch. Touches change nothing, so
//!   they may be made twice: as long as a flush is not known to be touched, each virtual CPU that enters its space
//!   touches for itself, which needs no order between them. A space that runs nowhere is
//!   touched by a worker that has nothing else to do, or along with somebody's entry ([`Flushes::errand`]). Workers
//!   that wait for frames in the middle of system calls can do neither, and what they wait for may be the
//!   touches: so there is a *spare* virtual CPU that does nothing else, made when it is first called ([`Flushes::call_spare`]).
//! * A machine that *rests* ([`crate::hv::kvm::vm::Turn`]) has no virtual CPU that knows a translation, and KVM no shadow
//!   page: every flush is touched, and those submitted meanwhile need nothing.
//! * A flush is **acknowledged** (handed back, its frames go home) when it is touched and no virtual CPU
//!   is inside its space with its ticket uncovered. Where the processor walks the tables that is at
//!   once for a space that nobody else runs.
//!
//! Not here: whether a virtual CPU that has left the guest may still hold a translation. It may, and
//! cannot use it.
//!
//! The lock is a leaf. The fast path of an entry takes none: it announces itself and then looks
//! for flushes, a submitter counts its flush and then looks for who is inside, so one of them sees the
//! other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use guest::{abi, monitor};
use parking_lot::Condvar;
use shadow_mm::{Flush, Pfn, SpaceId};

use crate::hv::kvm::vm::Turn;
use crate::hv::probe::Paging;
use crate::locks::{WaitGuard, WaitMutex, rank};
use crate::memory::{Space, VmmPlatform};

#[cfg(test)]
mod tests;

/// Takes a virtual CPU out of the guest.
pub trait Eject: Send + Sync {
    /// Makes it leave soon. One that is just about to enter comes back at once; has no effect on one that
    /// stays out.
    fn eject(&self);
}

/// The spare virtual CPU's thread, which is started when it is first called.
pub trait Spare: Send + Sync {
    /// Has it look whether it was called ([`Flushes::take_call`]).
    fn call(&self);
    /// Has it give its virtual CPU back: the others have, and the machine is to rest.
    fn rest(&self);
}

/// Wakes a worker that sleeps for want of threads; false if none does.
pub type WakeIdle = Box<dyn Fn() -> bool + Send + Sync>;

/// One virtual CPU.
#[derive(Default)]
struct Cpu {
    /// The number of the space it runs or ran last.
    space: AtomicU64,
    /// Guest-physical address of the root it has loaded.
    root: AtomicU64,
    /// It is in ring 3, or about to be without looking at flushes again.
    inside: AtomicBool,
    /// Its next entry flushes.
    stale: AtomicBool,
    /// Tickets up to this one it has done its part for. Changed under the lock.
    covered: AtomicU64,
    eject: OnceLock<Arc<dyn Eject>>,
}

/// Counts of shoot-downs.
#[derive(Debug, Default)]
struct Counters {
    shootdowns: AtomicU64,
    kicks: AtomicU64,
    acknowledged: AtomicU64,
    waits: AtomicU64,
    errands: AtomicU64,
}

/// What was counted, for `--stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ShootdownStats {
    /// Flushes that found another virtual CPU inside their space.
    pub shootdowns: u64,
    /// Virtual CPUs ejected for them.
    pub kicks: u64,
    /// Flushes acknowledged, with or without a kick.
    pub acknowledged: u64,
    /// Entries and forks that waited for others to leave.
    pub waits: u64,
    /// Monitor runs made only to touch tables of spaces that run nowhere.
    pub errands: u64,
}

/// Whose translations a flush is about. Wide flushes, of tables that spaces share, are everybody's: they have the
/// number that no space has, and so do virtual CPUs that run none.
const EVERYBODY: SpaceId = SpaceId::new(0);

/// The space that a flush is about, or everybody.
pub(super) fn concerns(flush: &Flush) -> SpaceId {
    if flush.is_wide() {
        EVERYBODY
    } else {
        flush.space()
    }
}

/// Flushes that wait.
pub struct Flushes {
    paging: Paging,
    cpus: Vec<Cpu>,
    /// Flushes in `queues`, to skip the lock when there are none.
    waiting: AtomicUsize,
    /// Those of them that are not touched.
    untouched: AtomicUsize,
    /// Somebody waits for what [`Flushes::errand`] does.
    hurried: AtomicBool,
    queues: WaitMutex<rank::FlushQueues, Queues>,
    /// Signalled when a virtual CPU has left the guest or a flush is done.
    left: Condvar,
    wake_idle: OnceLock<WakeIdle>,
    spare: OnceLock<Arc<dyn Spare>>,
    spare_called: AtomicBool,
    counters: Counters,
}

impl std::fmt::Debug for Flushes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flushes")
            .field("waiting", &self.waiting)
            .field("untouched", &self.untouched)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Queues {
    /// The last ticket given out.
    ticket: u64,
    /// KVM has no virtual machine: there is nothing to touch.
    resting: bool,
    /// By whom they concern, in the order of their tickets.
    spaces: BTreeMap<SpaceId, Vec<Item>>,
}

/// A flush that is not acknowledged.
#[derive(Debug)]
struct Item {
    ticket: u64,
    flush: Flush,
    touched: bool,
    /// Some entry of another space has taken the touch along.
    carried: bool,
}

/// What an entry does on the way in, and what it will have done.
#[derive(Debug, Default)]
#[must_use = "give it to Flushes::leave"]
pub struct Entry {
    /// Words for the monitor to touch.
    pub touches: Vec<u64>,
    /// Whether the TLB must be flushed, after the touches.
    pub needed: bool,
    /// Guest-physical address of the root to enter with.
    pub root: u64,
    space: Option<SpaceId>,
    /// Spaces with the last ticket whose touches are among `touches`.
    covers: Vec<(SpaceId, u64)>,
}

/// Words of other spaces' tables that wait before an entry that needs no flush itself goes through the
/// monitor for them.
const MANY_TOUCHES: usize = 64;

/// How long [`Flushes::settle`] waits at most. Longer than any virtual CPU takes to leave the guest;
/// its caller only asks again.
const PATIENCE: Duration = Duration::from_secs(1);

impl Flushes {
    /// For `cpus` virtual CPUs on a host that pages this way.
    #[must_use]
    pub fn new(paging: Paging, cpus: usize) -> Self {
        Self {
            paging,
            cpus: std::iter::repeat_with(Cpu::default).take(cpus).collect(),
            waiting: AtomicUsize::new(0),
            untouched: AtomicUsize::new(0),
            hurried: AtomicBool::new(false),
            queues: WaitMutex::default(),
            left: Condvar::new(),
            wake_idle: OnceLock::new(),
            spare: OnceLock::new(),
            spare_called: AtomicBool::new(false),
            counters: Counters::default(),
        }
    }

    /// How virtual CPU `cpu` is taken out of the guest; before it first enters.
    pub fn set_eject(&self, cpu: usize, eject: Arc<dyn Eject>) {
        // Set once: a worker keeps its virtual CPU for life.
        let _ = self.cpus[cpu].eject.set(eject);
    }

    /// How a sleeping worker is woken for an errand.
    pub fn set_wake_idle(&self, wake: WakeIdle) {
        let _ = self.wake_idle.set(wake);
    }

    /// Who the spare virtual CPU is.
    pub fn set_spare(&self, spare: Arc<dyn Spare>) {
        // Set once: there is one.
        let _ = self.spare.set(spare);
    }

    /// Has the spare virtual CPU run the errands that wait. It is called by who cannot, or finds nobody else.
    pub fn call_spare(&self) {
        if self.errand_waits() {
            self.spare_called.store(true, Ordering::SeqCst);
            if let Some(spare) = self.spare.get() {
                spare.call();
            }
        }
    }

    /// Has the spare virtual CPU given back, for the machine to rest.
    pub fn rest_spare(&self) {
        if let Some(spare) = self.spare.get() {
            spare.rest();
        }
    }

    /// Whether the spare virtual CPU was called; asks only once.
    #[must_use]
    pub fn take_call(&self) -> bool {
        self.spare_called.swap(false, Ordering::SeqCst)
    }

    /// Takes a flush. Gives it back if it needs nothing more: to be acknowledged.
    #[must_use]
    pub fn submit(&self, mut flush: Flush) -> Option<Flush> {
        let whose = concerns(&flush);
        let mut queues = self.queues.lock();
        queues.ticket += 1;
        let ticket = queues.ticket;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let (mut inside, mut loaded) = (Vec::new(), false);
        for cpu in &self.cpus {
            if cpu.runs(whose) {
                loaded = true;
                cpu.stale.store(true, Ordering::SeqCst);
                if cpu.inside.load(Ordering::SeqCst) {
                    inside.push(cpu);
                }
            }
        }
        flush.announced();
        let touched = self.paging == Paging::Hardware || queues.resting;
        if touched && inside.is_empty() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            self.counters.acknowledged.fetch_add(1, Ordering::Relaxed);
            return Some(flush);
        }
        if !touched {
            self.untouched.fetch_add(1, Ordering::SeqCst);
        }
        let item = Item {
            ticket,
            touched,
            carried: false,
            flush,
        };
        queues.spaces.entry(whose).or_default().push(item);
        drop(queues);
        self.eject(&inside);
        if !loaded && !touched {
            self.wake_idle();
        }
        None
    }

    fn eject(&self, cpus: &[&Cpu]) {
        if cpus.is_empty() {
            return;
        }
        let c = &self.counters;
        c.shootdowns.fetch_add(1, Ordering::Relaxed);
        c.kicks.fetch_add(cpus.len() as u64, Ordering::Relaxed);
        for cpu in cpus {
            if let Some(eject) = cpu.eject.get() {
                eject.eject();
            }
        }
    }

    fn wake_idle(&self) -> bool {
        self.wake_idle.get().is_some_and(|wake| wake())
    }

    /// Virtual CPU `cpu` is about to enter `space`: waits for others, then says what to do on the way
    /// in. No lock may be held.
    pub fn enter(&self, cpu: usize, space: &Space<VmmPlatform>) -> Entry {
        loop {
            wait_for_announcements(space);
            if let Some(entry) = self.try_enter(cpu, space) {
                return entry;
            }
        }
    }

    /// `None`, and the virtual CPU is not inside, if a fork has given the space another root meanwhile.
    fn try_enter(&self, cpu: usize, space: &Space<VmmPlatform>) -> Option<Entry> {
        let me = &self.cpus[cpu];
        let (root, id) = (space.root().gpa(), space.id());
        let moved = || space.root().gpa() != root;
        let switched = me.load(id, root);
        me.inside.store(true, Ordering::SeqCst);
        let stale = me.stale.load(Ordering::SeqCst);
        // The fork's flush, if it is not seen here, sees this one inside.
        if !switched && !stale && self.waiting.load(Ordering::SeqCst) == 0 && !moved() {
            return Some(Entry {
                root,
                space: Some(id),
                ..Entry::default()
            });
        }
        // Not while waiting: two that wait for each other would do so for ever.
        me.inside.store(false, Ordering::SeqCst);
        let mut queues = self.queues.lock();
        self.left.notify_all();
        self.gate(&mut queues, id);
        me.inside.store(true, Ordering::SeqCst);
        if moved() {
            me.inside.store(false, Ordering::SeqCst);
            self.left.notify_all();
            return None;
        }
        let stale = me.stale.swap(false, Ordering::SeqCst);
        me.covered.store(queues.ticket, Ordering::SeqCst);
        let mut entry = Entry {
            root,
            needed: stale || switched,
            space: Some(id),
            ..Entry::default()
        };
        if self.untouched.load(Ordering::SeqCst) > 0 {
            entry.cover(&queues, id);
            entry.cover(&queues, EVERYBODY);
            if entry.needed || self.untouched.load(Ordering::SeqCst) > MANY_TOUCHES {
                self.take_along(&mut queues, &mut entry);
            }
        }
        Some(entry)
    }

    /// Waits until no virtual CPU is inside `space` with a flush of it, as of now, uncovered.
    fn gate(&self, queues: &mut WaitGuard<'_, rank::FlushQueues, Queues>, space: SpaceId) {
        let last = |q: &Queues| {
            q.spaces
                .get(&space)
                .and_then(|items| items.last())
                .map(|i| i.ticket)
        };
        let Some(upto) = last(queues) else { return };
        if self.uncovered(space, upto) {
            self.counters.waits.fetch_add(1, Ordering::Relaxed);
        }
        while self.uncovered(space, upto) {
            queues.wait(&self.left);
        }
    }

    /// Whether a virtual CPU is inside a space that a flush is about, and does not cover `ticket`.
    fn uncovered(&self, whose: SpaceId, ticket: u64) -> bool {
        self.cpus.iter().any(|cpu| {
            cpu.inside.load(Ordering::SeqCst)
                && cpu.runs(whose)
                && cpu.covered.load(Ordering::SeqCst) < ticket
        })
    }

    /// Waits until what was taken from `space` until now is gone from every virtual CPU that runs it.
    /// No lock may be held.
    pub fn quiesce(&self, space: &Space<VmmPlatform>) {
        wait_for_announcements(space);
        self.quiesce_for(space.id());
    }

    /// The same for whom a flush concerns that was submitted: for a space that may be gone by now, or
    /// everybody.
    pub fn quiesce_for(&self, whose: SpaceId) {
        if self.waiting.load(Ordering::SeqCst) != 0 {
            self.gate(&mut self.queues.lock(), whose);
        }
    }

    /// Adds touches of spaces that run nowhere.
    fn take_along(&self, queues: &mut Queues, entry: &mut Entry) {
        let own = entry.space;
        let running = |whose| {
            let inside = |cpu: &Cpu| cpu.inside.load(Ordering::SeqCst) && cpu.runs(whose);
            self.cpus.iter().any(inside)
        };
        for (&space, items) in &mut queues.spaces {
            let waits = items.iter().any(|i| !i.touched && !i.carried);
            let covered = Some(space) == own || space == EVERYBODY;
            if covered || !waits || running(space) {
                continue;
            }
            for item in items.iter_mut().filter(|i| !i.touched) {
                if entry.touches.len() >= monitor::MAX_TABLES {
                    return;
                }
                entry.take(space, item);
            }
        }
    }

    /// Virtual CPU `cpu` has left the guest; `flushed` says whether what `entry` asked for was done. Gives
    /// back what is to be acknowledged.
    #[must_use]
    pub fn leave(&self, cpu: usize, entry: &Entry, flushed: bool) -> Vec<Flush> {
        let me = &self.cpus[cpu];
        me.inside.store(false, Ordering::SeqCst);
        if !entry.needed && self.waiting.load(Ordering::SeqCst) == 0 {
            return Vec::new();
        }
        if entry.needed && !flushed {
            me.stale.store(true, Ordering::SeqCst);
        }
        self.finish(entry, flushed)
    }

    /// Notes what was touched and collects what is done.
    fn finish(&self, entry: &Entry, flushed: bool) -> Vec<Flush> {
        let mut queues = self.queues.lock();
        for &(space, upto) in &entry.covers {
            for item in queues.spaces.get_mut(&space).into_iter().flatten() {
                if item.ticket <= upto && !item.touched {
                    item.carried = false;
                    item.touched = flushed;
                    self.untouched
                        .fetch_sub(usize::from(flushed), Ordering::SeqCst);
                }
            }
        }
        let mut done = Vec::new();
        let spaces = entry.covers.iter().map(|&(space, _)| space);
        for space in spaces.chain(entry.space).chain([EVERYBODY]) {
            self.collect(&mut queues, space, &mut done);
        }
        self.left.notify_all();
        done
    }

    /// Takes out what is done of one space.
    fn collect(&self, queues: &mut Queues, space: SpaceId, done: &mut Vec<Flush>) {
        let Some(items) = queues.spaces.get_mut(&space) else {
            return;
        };
        let before = items.len();
        let ready = |i: &mut Item| i.touched && !self.uncovered(space, i.ticket);
        done.extend(items.extract_if(.., ready).map(|item| item.flush));
        let taken = before - items.len();
        if items.is_empty() {
            queues.spaces.remove(&space);
        }
        self.waiting.fetch_sub(taken, Ordering::SeqCst);
        self.counters
            .acknowledged
            .fetch_add(taken as u64, Ordering::Relaxed);
    }

    /// Whether the monitor has something to touch that nobody's entry may do soon.
    #[must_use]
    pub fn errand_waits(&self) -> bool {
        self.untouched.load(Ordering::SeqCst) > 0
    }

    /// Whether somebody waits for an errand; asks for it only once.
    #[must_use]
    pub fn take_hurry(&self) -> bool {
        self.hurried.load(Ordering::SeqCst) && self.hurried.swap(false, Ordering::SeqCst)
    }

    /// Touches for virtual CPU `cpu` to make without entering ring 3, on a root no thread runs on; then
    /// give the entry to [`Flushes::errand_done`]. `None` when there are none.
    #[must_use]
    pub fn errand(&self, cpu: usize, root: Pfn) -> Option<Entry> {
        if !self.errand_waits() {
            return None;
        }
        self.cpus[cpu].load(EVERYBODY, root.gpa());
        let mut queues = self.queues.lock();
        let mut entry = Entry {
            needed: true,
            ..Entry::default()
        };
        for (&space, items) in &mut queues.spaces {
            for item in items.iter_mut().filter(|i| !i.touched) {
                if entry.touches.len() >= monitor::MAX_TABLES {
                    break;
                }
                entry.take(space, item);
            }
        }
        self.counters.errands.fetch_add(1, Ordering::Relaxed);
        (!entry.covers.is_empty()).then_some(entry)
    }

    /// The errand is done, or was not. Gives back what is to be acknowledged.
    #[must_use]
    pub fn errand_done(&self, entry: &Entry, flushed: bool) -> Vec<Flush> {
        self.finish(entry, flushed)
    }

    /// Whether any flush is not acknowledged, so that its frames may come back soon.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0
    }

    /// Has somebody make the touches that wait, soon: a worker that sleeps, or one that is taken out
    /// of the guest for it.
    pub fn hurry(&self) {
        if !self.errand_waits() {
            return;
        }
        self.hurried.store(true, Ordering::SeqCst);
        if self.wake_idle() {
            return;
        }
        let inside = |cpu: &&Cpu| cpu.inside.load(Ordering::SeqCst);
        if let Some(eject) = self
            .cpus
            .iter()
            .find(inside)
            .and_then(|cpu| cpu.eject.get())
        {
            eject.eject();
        } else {
            self.call_spare();
        }
    }

    /// Waits until the flushes submitted so far are acknowledged, or for a second. What must be touched
    /// must be touched by somebody else meanwhile. No lock may be held.
    pub fn settle(&self) {
        let until = Instant::now() + PATIENCE;
        let mut queues = self.queues.lock();
        let upto = queues.ticket;
        let waits = |q: &Queues| q.spaces.values().flatten().any(|item| item.ticket <= upto);
        while waits(&queues) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queues.wait_for(&self.left, left);
        }
    }

    /// The machine begins to rest, or is about to wake. What is done by that is given back by [`Self::rested`].
    pub fn turn(&self, turn: Turn) {
        let mut queues = self.queues.lock();
        queues.resting = turn == Turn::Rests;
        if queues.resting {
            for item in queues.spaces.values_mut().flatten() {
                (item.touched, item.carried) = (true, false);
            }
            self.untouched.store(0, Ordering::SeqCst);
        }
    }

    /// What a machine's rest has done, to be acknowledged.
    #[must_use]
    pub fn rested(&self) -> Vec<Flush> {
        let mut queues = self.queues.lock();
        let spaces: Vec<_> = queues.spaces.keys().copied().collect();
        let mut done = Vec::new();
        for space in spaces {
            self.collect(&mut queues, space, &mut done);
        }
        self.left.notify_all();
        done
    }

    /// Everything that waits: for the end of the machine, when no virtual CPU will run again.
    #[must_use]
    pub fn drain(&self) -> Vec<Flush> {
        let mut queues = self.queues.lock();
        let spaces = std::mem::take(&mut queues.spaces);
        self.waiting.store(0, Ordering::SeqCst);
        self.untouched.store(0, Ordering::SeqCst);
        spaces
            .into_values()
            .flatten()
            .map(|item| item.flush)
            .collect()
    }

    /// The counts.
    #[must_use]
    pub fn stats(&self) -> ShootdownStats {
        let c = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ShootdownStats {
            shootdowns: get(&c.shootdowns),
            kicks: get(&c.kicks),
            acknowledged: get(&c.acknowledged),
            waits: get(&c.waits),
            errands: get(&c.errands),
        }
    }
}

impl Cpu {
    /// Notes what it is about to run; true if that is something else than before.
    fn load(&self, space: SpaceId, root: u64) -> bool {
        let space = space.get();
        let other = self.space.swap(space, Ordering::SeqCst) != space;
        (self.root.swap(root, Ordering::SeqCst) != root) | other
    }

    /// Whether a flush is about the space it runs or ran last.
    fn runs(&self, whose: SpaceId) -> bool {
        whose == EVERYBODY || self.space.load(Ordering::SeqCst) == whose.get()
    }
}

impl Entry {
    /// Adds the touches of the space that is entered, whoever else may be making them.
    fn cover(&mut self, queues: &Queues, space: SpaceId) {
        let Some(items) = queues.spaces.get(&space) else {
            return;
        };
        for item in items.iter().filter(|item| !item.touched) {
            self.add(space, item);
        }
    }

    /// Takes the touches of another space's flush along.
    fn take(&mut self, space: SpaceId, item: &mut Item) {
        item.carried = true;
        self.add(space, item);
    }

    fn add(&mut self, space: SpaceId, item: &Item) {
        self.touches.extend(touches(&item.flush));
        self.needed = true;
        match self.covers.last_mut() {
            Some((last, ticket)) if *last == space => *ticket = item.ticket,
            _ => self.covers.push((space, item.ticket)),
        }
    }
}

/// Waits until nobody is between an operation on the space and its [`Flushes::submit`]: the caller may be about to run
/// on what that operation made room for. Nothing blocks in between, so the wait is as short.
fn wait_for_announcements(space: &Space<VmmPlatform>) {
    while space.unannounced() != 0 {
        std::thread::yield_now();
    }
}

/// The words to touch for a flush.
fn touches(flush: &Flush) -> impl Iterator<Item = u64> {
    let entries = flush
        .entries()
        .iter()
        .map(|e| abi::TABLES_VA + e.table.gpa() + e.index.get() as u64 * 8);
    let tables = flush
        .tables()
        .iter()
        .map(|t| abi::TABLES_VA + t.gpa() + abi::TOUCH_TABLE);
    entries.chain(tables)
}
