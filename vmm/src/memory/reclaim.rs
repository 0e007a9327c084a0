//! Keeping frames available: the pager thread, which trims, has flushes finished and writes modified pages
//! out, and the zeroer thread, which zeroes free frames before they are wanted.
//!
//! Two marks drive the pager: below the *low* one it is woken, at the *high* one it rests. Its rounds get harder
//! as long as frames are lacking: pages not used for long, then pages not used lately, then any. Whoever
//! finds no frame at all waits for it here, and is told when waiting is of no use: when a
//! round, at its hardest, gained nothing, and no copy of kept spaces is under way, whose end gives frames back.
//!
//! The pager holds no lock while it waits for flushes or for the disk. On hosts that shadow page tables
//! a flush takes a worker: those that wait here run errands meanwhile ([`crate::machine::worker`]). A
//! system call that pins pages while it holds locks cannot; there a wait may end with no memory.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use shadow_mm::{CommitLimit, FrameStore, IoFailed, StatsSnapshot, TrimMode};

use super::paging::Event;
use super::{FRAME, Memory};

/// The pager is woken when fewer than one data frame in this many is left...
const LOW_DIVISOR: u64 = 32;
/// ... and rests when one in this many is.
const HIGH_DIVISOR: u64 = 16;
/// A system call begins when one in this many is left, if that can be had.
const CALL_DIVISOR: u64 = 128;
/// How often the pager looks without being woken.
const IDLE_LOOK: Duration = Duration::from_millis(500);
/// How long nothing is written after a write has failed.
const BACK_OFF: Duration = Duration::from_secs(1);
/// Hardest rounds without any gain after which waiting is said to be of no use.
const BARREN_ROUNDS: u32 = 3;
/// Table frames that one fault may take: a path without its root.
const PATH_TABLES: u64 = 3;
/// Waits for table frames after which waiting is said to be of no use: nothing takes tables away from a living space,
/// so only somebody's end, or a flush of it, brings some.
const TABLELESS_WAITS: u32 = 50;
/// How long each of them is.
const TABLELESS_WAIT: Duration = Duration::from_millis(2);
/// Free frames that the zeroer leaves unzeroed, for pages that are overwritten anyway.
const ZEROER_LEAVES: u64 = 64;
/// Frames the zeroer zeroes before it looks again.
const ZEROER_BATCH: usize = 64;
/// How soon the zeroer looks again when there was something to do...
const ZEROER_LOOK: Duration = Duration::from_millis(50);
/// ... and at last, when there is nothing for long, before it ends.
const ZEROER_REST: Duration = Duration::from_secs(2);

/// Whether waiting for frames helped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// There are frames.
    There,
    /// Not yet: wait again.
    Wait,
    /// There will be none.
    Never,
}

/// What the pager and those who wait for it share.
#[derive(Debug, Default)]
pub(super) struct Reclaim {
    /// Somebody wants frames.
    wanted: Event,
    /// A round is over.
    round: Event,
    /// The threads are to end.
    end: Event,
    /// The pager is wanted already.
    called: AtomicBool,
    ending: AtomicBool,
    running: AtomicBool,
    /// Rounds in a row that gained nothing.
    barren: AtomicU32,
    /// Waits in a row that found too few table frames.
    tableless: AtomicU32,
    /// Copies of kept spaces under way (`super::keep`).
    pub(super) copies: AtomicU32,
    /// The space the next round begins with.
    turn: AtomicUsize,
}

/// What a round gained.
#[derive(Clone, Copy, Debug, Default)]
struct Gain {
    trimmed: u64,
    written: u64,
    flushed: bool,
}

impl Memory {
    /// Lets programs have what memory and page file hold, less what the VMM needs to keep going.
    pub fn limit_commit(&self) {
        let stats = self.manager.stats();
        let pages = stats.data.total - stats.data.total / LOW_DIVISOR + stats.page_file_slots;
        self.manager.set_commit_limit(CommitLimit::Pages(pages));
    }

    /// Whether pages of the guest's own can be had back, not files' alone.
    pub fn has_page_file(&self) -> bool {
        self.page_file.get().is_some()
    }

    /// Calls the pager if frames are running low.
    pub(super) fn watch_level(&self) {
        let available = self.manager.available();
        if available < self.low() && !self.reclaim.called.swap(true, Ordering::SeqCst) {
            self.call_pager();
            self.reclaim.wanted.notify();
        }
    }

    pub(super) fn low(&self) -> u64 {
        (u64::from(self.manager.layout().data.count) / LOW_DIVISOR).max(16)
    }

    fn high(&self) -> u64 {
        (u64::from(self.manager.layout().data.count) / HIGH_DIVISOR).max(32)
    }

    /// Lets the pager have a round before a system call begins, if few frames are left and that may
    /// help: the call may hold locks when it wants frames itself. True if it was waited for. No lock may be held.
    pub fn give_way(&self) -> bool {
        let frames = u64::from(self.manager.layout().data.count);
        let reclaim = &self.reclaim;
        let hopeless = !self.has_page_file() || reclaim.barren.load(Ordering::SeqCst) > 0;
        if hopeless || self.manager.available() >= frames / CALL_DIVISOR {
            return false;
        }
        self.call_pager_and_wait();
        true
    }

    fn call_pager_and_wait(&self) {
        self.call_pager();
        let seen = self.reclaim.round.seen();
        self.reclaim.called.store(true, Ordering::SeqCst);
        self.reclaim.wanted.notify();
        self.reclaim.round.wait_for(seen, Duration::from_millis(10));
    }

    /// Waits for frames, for a moment only. No lock should be held.
    pub fn wait_for_room(&self) -> Room {
        // Asked before: what its end gives back may come just after the look.
        let copying = self.is_copying();
        match self.look_for_room() {
            Room::Never if copying => {
                std::thread::sleep(TABLELESS_WAIT);
                Room::Wait
            }
            room => room,
        }
    }

    fn look_for_room(&self) -> Room {
        let reclaim = &self.reclaim;
        if !self.call_pager() && !reclaim.running.load(Ordering::SeqCst) {
            return Room::Never;
        }
        self.call_pager_and_wait();
        if self.manager.available() > 0 {
            self.tables_are_there()
        } else if reclaim.barren.load(Ordering::SeqCst) >= BARREN_ROUNDS
            && reclaim.barren.swap(0, Ordering::SeqCst) >= BARREN_ROUNDS
        {
            // Told to one only: what it gives up may be enough for the others.
            Room::Never
        } else {
            Room::Wait
        }
    }

    /// Whether whoever lacks frames although there are data frames may try again.
    fn tables_are_there(&self) -> Room {
        let tableless = &self.reclaim.tableless;
        if self.manager.available_tables() >= PATH_TABLES {
            tableless.store(0, Ordering::SeqCst);
            return Room::There;
        }
        self.flushes.hurry();
        std::thread::sleep(TABLELESS_WAIT);
        if tableless.fetch_add(1, Ordering::SeqCst) < TABLELESS_WAITS {
            // It may have lacked a data frame only.
            return Room::There;
        }
        // Told to one only, as above.
        tableless.store(0, Ordering::SeqCst);
        Room::Never
    }

    /// Waits for frames until there are some, or will be none. The caller may be in the middle of a system call.
    pub(super) fn make_room(&self) -> bool {
        loop {
            self.flushes.call_spare();
            match self.wait_for_room() {
                Room::There => return true,
                Room::Never => return false,
                Room::Wait => {}
            }
        }
    }

    /// The pager thread: returns when [`Self::end_paging`] is called.
    pub fn run_pager(&self) {
        let reclaim = &self.reclaim;
        reclaim.running.store(true, Ordering::SeqCst);
        let mut no_writes_until = Instant::now();
        while !reclaim.ending.load(Ordering::SeqCst) {
            let seen = reclaim.wanted.seen();
            reclaim.called.store(false, Ordering::SeqCst);
            let lacking = self.high().saturating_sub(self.manager.available());
            if self.manager.available() >= self.low() || lacking == 0 {
                reclaim.barren.store(0, Ordering::SeqCst);
                reclaim.round.notify();
                reclaim.wanted.wait_for(seen, IDLE_LOOK);
                continue;
            }
            self.reclaim_frames(&mut no_writes_until);
            reclaim.round.notify();
            if reclaim.barren.load(Ordering::SeqCst) > 0 {
                // Nothing to gain now: look again when somebody asks, and not at once.
                reclaim.wanted.wait_for(seen, Duration::from_millis(5));
            }
        }
        reclaim.running.store(false, Ordering::SeqCst);
        reclaim.round.notify();
    }

    /// Rounds of rising hardness, until enough frames are available or nothing is left to take.
    fn reclaim_frames(&self, no_writes_until: &mut Instant) {
        for mode in [
            TrimMode::Old,
            TrimMode::Unused,
            TrimMode::Unused,
            TrimMode::Any,
        ] {
            let mut gain = Gain::default();
            gain.written += self.write_modified(no_writes_until);
            let lacking = self.high().saturating_sub(self.manager.available());
            if lacking > 0 {
                gain.trimmed += self.trim_spaces(lacking, mode);
                gain.flushed = self.finish_flushes();
                gain.written += self.write_modified(no_writes_until);
                gain.written += self.write_files();
            }
            self.reclaim.round.notify();
            let gained = gain.trimmed > 0 || gain.written > 0 || gain.flushed;
            let available = self.manager.available();
            if gained || available > 0 {
                self.reclaim.barren.store(0, Ordering::SeqCst);
            } else if mode == TrimMode::Any {
                self.reclaim.barren.fetch_add(1, Ordering::SeqCst);
            }
            if available >= self.high() || self.reclaim.ending.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Trims spaces in turn until `lacking` pages are taken or each was asked; gives back how many.
    fn trim_spaces(&self, lacking: u64, mode: TrimMode) -> u64 {
        let spaces = self.manager.spaces();
        if spaces.is_empty() {
            return 0;
        }
        let first = self.reclaim.turn.load(Ordering::Relaxed) % spaces.len();
        let mut taken = 0;
        // A few pages more than each one's share at a time, so that no space pays for all.
        let share = (2 * lacking / spaces.len() as u64).max(16);
        for space in spaces.iter().cycle().skip(first).take(spaces.len()) {
            self.reclaim.turn.fetch_add(1, Ordering::Relaxed);
            let usage = self.manager.usage(space);
            let excess = usage.resident.saturating_sub(usage.working_set_max);
            let goal = share.max(excess).min(lacking - taken);
            let trimmed = self.manager.trim(space, goal, mode);
            self.submit(trimmed.flush);
            taken += trimmed.pages;
            if taken >= lacking {
                break;
            }
        }
        taken
    }

    /// Writes modified pages until none is left or enough frames are available; gives back how many
    /// reached the page file.
    fn write_modified(&self, no_writes_until: &mut Instant) -> u64 {
        let mut stored = 0;
        while self.manager.available() < self.high() && Instant::now() >= *no_writes_until {
            match self.write_cluster() {
                Ok(0) => break,
                Ok(pages) => stored += pages,
                Err(IoFailed) => *no_writes_until = Instant::now() + BACK_OFF,
            }
        }
        stored
    }

    /// Writes back what was stored to mapped files, if there are pages of them that only wait for it and frames are
    /// still lacking; gives back how many frames that made available.
    fn write_files(&self) -> u64 {
        let data = self.manager.stats().data;
        if data.modified_no_write == 0 || data.available() >= self.high() {
            return 0;
        }
        self.sections.tidy(self);
        self.manager.available().saturating_sub(data.available())
    }

    /// Writes one cluster; gives back how many pages it was for, zero if none is to be written.
    fn write_cluster(&self) -> Result<u64, IoFailed> {
        let Some((file, ticket)) = self
            .page_file
            .get()
            .and_then(|file| Some((file, self.manager.start_write()?)))
        else {
            return Ok(0);
        };
        let mut buffer = vec![0_u8; ticket.length()];
        for (frame, bytes) in ticket.frames().iter().zip(buffer.chunks_mut(FRAME)) {
            self.manager.store().read(*frame, 0, bytes);
        }
        let result = file.write(ticket.offset(), &buffer).map_err(|error| {
            file.report("written", &error);
            IoFailed
        });
        let pages = ticket.frames().len() as u64;
        let _ = self.manager.complete_write(ticket, result);
        result.map(|()| pages)
    }

    /// Whether there are more free frames than the zeroer leaves.
    pub(super) fn has_frames_to_zero(&self) -> bool {
        self.manager.stats().data.free > ZEROER_LEAVES
    }

    /// The zeroer thread: returns when [`Self::end_paging`] is called, or there was nothing to do for long.
    pub fn run_zeroer(&self) {
        // Only for the host's comfort: what is refused here does no harm.
        let _ = rustix::process::setpriority_process(None, 19);
        let mut rest = ZEROER_LOOK;
        loop {
            let seen = self.reclaim.end.seen();
            if self.reclaim.ending.load(Ordering::SeqCst) {
                return;
            }
            let StatsSnapshot { data, .. } = self.manager.stats();
            // What a copy gives back, the host is to have.
            let zeroed = if data.free > ZEROER_LEAVES && !self.is_copying() {
                let most = (data.free - ZEROER_LEAVES).min(ZEROER_BATCH as u64) as usize;
                self.manager.zero_ahead(most)
            } else {
                0
            };
            if zeroed == 0 {
                if rest > ZEROER_REST {
                    return;
                }
                self.reclaim.end.wait_for(seen, rest);
                rest *= 2;
            } else {
                rest = ZEROER_LOOK;
            }
        }
    }

    /// Ends both threads.
    pub fn end_paging(&self) {
        self.reclaim.ending.store(true, Ordering::SeqCst);
        self.reclaim.wanted.notify();
        self.reclaim.end.notify();
    }
}
