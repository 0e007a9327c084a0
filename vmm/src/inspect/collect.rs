//! Collects what a guest's memory looks like, from any thread, while the guest runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::{
    FrameOwner, FrameRun, FrameZone, PageInfo, PfnRange, PfnState, Prot, Vpn, VpnRange,
};

use super::{About, FORMAT, Inspection, LayerFrames, Legend, Mapping, Process, Run, Zone};
use crate::linux::kernel::Kernel;
use crate::linux::mm::guard::{TAG_FREED, TAG_GUARD};
use crate::linux::process::{AddressSpace, Life};
use crate::memory::{FRAME, Memory};

/// Frames or entries looked at with one lock held.
const STEP: usize = 4096;
/// Processes that are described.
const PROCESSES_MAX: usize = 4096;
/// Mappings that are described, of each process and of all of them.
const MAPPINGS_MAX: usize = 8192;
const ALL_MAPPINGS_MAX: usize = 65_536;
/// Runs of frames that are told of one zone; the frames after them are one run of unknown frames.
const RUNS_MAX: usize = 1 << 20;
/// Data zones beyond this many frames do not say which process a frame is.
const OWNERS_MAX: u32 = 1 << 22;

/// Ages that are told apart.
const AGES: usize = 4;

/// The state of a frame that was not looked at.
const UNKNOWN: &str = "not shown";

/// The states in the legend, in its order.
const STATES: [PfnState; 7] = [
    PfnState::Zeroed,
    PfnState::Free,
    PfnState::Active,
    PfnState::InFlight,
    PfnState::Standby,
    PfnState::Modified,
    PfnState::ModifiedNoWrite,
];
/// The owners in the legend, in its order.
const OWNERS: [(FrameOwner, &str); 7] = [
    (FrameOwner::Nobody, "nobody"),
    (FrameOwner::Entry, "one entry"),
    (FrameOwner::Tables, "shared table"),
    (FrameOwner::Clone, "clone block"),
    (FrameOwner::Root, "address space"),
    (FrameOwner::Supervisor, "supervisor"),
    (FrameOwner::Section, "file or shared memory"),
];

/// What the collection cannot see for itself.
pub struct Given {
    /// Which guest.
    pub guest: About,
    /// Its exit status.
    pub status: Option<u8>,
    /// How long it has run.
    pub uptime_ms: u64,
    /// What was counted.
    pub counters: serde_json::Value,
}

/// How much is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// No maps, neither of frames nor of processes.
    Summary,
    /// All.
    Full,
}

/// Looks at a guest.
#[must_use]
pub fn collect(kernel: &Kernel, given: Given, detail: Detail) -> Inspection {
    let memory = &kernel.memory;
    let data = memory.manager.layout().data;
    let mut walk = Walk {
        memory,
        users: match detail {
            Detail::Full if data.count <= OWNERS_MAX => vec![0; data.count as usize],
            Detail::Full | Detail::Summary => Vec::new(),
        },
        first: data.start.get(),
        mappings_left: match detail {
            Detail::Full => ALL_MAPPINGS_MAX,
            Detail::Summary => 0,
        },
        truncated: false,
    };
    let mut processes = walk.processes(kernel);
    if processes.len() > PROCESSES_MAX {
        processes.truncate(PROCESSES_MAX);
        walk.truncated = true;
    }
    let mut sharing = BTreeMap::new();
    let zones = [("data", FrameZone::Data), ("tables", FrameZone::Tables)]
        .map(|(name, zone)| walk.zone(name, zone, detail, &mut sharing));
    let states = STATES.iter().map(|state| state.name().to_owned());
    Inspection {
        format: FORMAT,
        guest: given.guest,
        status: given.status,
        uptime_ms: given.uptime_ms,
        frame_bytes: FRAME as u64,
        zones: zones.into(),
        legend: Legend {
            states: states.chain([UNKNOWN.to_owned()]).collect(),
            owners: OWNERS.map(|(_, name)| name.to_owned()).into(),
        },
        layers: memory.manager.store().layers().map(layer).collect(),
        sharing: sharing.into_iter().collect(),
        processes,
        truncated: walk.truncated && detail == Detail::Full,
        counters: given.counters,
    }
}

struct Walk<'a> {
    memory: &'a Memory,
    /// For each data frame, a process that maps it.
    users: Vec<u32>,
    /// The first data frame.
    first: u32,
    mappings_left: usize,
    truncated: bool,
}

impl Walk<'_> {
    fn processes(&mut self, kernel: &Kernel) -> Vec<Process> {
        let described: Vec<_> = {
            let state = kernel.state();
            let procs = state.procs.values().filter(|p| p.mm.is_some());
            procs
                .take(PROCESSES_MAX + 1)
                .filter_map(|p| Some((describe(p), Arc::clone(p.mm.as_ref()?))))
                .collect()
        };
        let walked = described.into_iter();
        walked
            .map(|(process, mm)| self.process(process, &mm))
            .collect()
    }

    fn process(&mut self, mut process: Process, mm: &AddressSpace) -> Process {
        let usage = self.memory.manager.usage(&mm.space);
        process.space = mm.space.id().get();
        process.virtual_pages = usage.virtual_pages;
        process.peak_virtual_pages = usage.peak_virtual_pages;
        process.resident = usage.resident;
        process.peak_resident = usage.peak_resident;
        process.private = usage.private;
        process.tables = usage.tables;
        process.working_set = (usage.working_set_min, usage.working_set_max);
        if self.mappings_left == 0 {
            return process;
        }
        process.ages = vec![0; AGES];
        let layout = mm.layout.lock().clone();
        let mut from = Vpn::new(0);
        let mut left = MAPPINGS_MAX.min(self.mappings_left);
        while let Some(vad) = from.and_then(|from| self.memory.manager.query(&mm.space, from)) {
            if left == 0 {
                self.truncated = true;
                break;
            }
            left -= 1;
            self.mappings_left -= 1;
            let (start, end) = (vad.range.start().get() * 4096, vad.range.end() * 4096);
            let (name, offset) = match vad.file() {
                Some((backing, offset)) => (
                    String::from_utf8_lossy(&backing.0.path()).into_owned(),
                    offset,
                ),
                None if vad.tag == TAG_GUARD => ("[guard]".to_owned(), 0),
                None if vad.tag == TAG_FREED => ("[unmapped]".to_owned(), 0),
                None => (layout.area(start, end).to_owned(), 0),
            };
            let mut mapping = Mapping {
                start,
                end,
                rights: rights(vad.prot),
                name,
                offset,
                ..Mapping::default()
            };
            self.residents(&mut process, &mut mapping, mm, vad.range);
            process.maps.push(mapping);
            from = Vpn::new(vad.range.end());
        }
        process
    }

    /// Counts a mapping's pages, a few at a time.
    fn residents(
        &mut self,
        process: &mut Process,
        mapping: &mut Mapping,
        mm: &AddressSpace,
        range: VpnRange,
    ) {
        let mut part = Some(range);
        while let Some(range) = part {
            let next = self
                .memory
                .manager
                .resident_from(&mm.space, range, STEP, |_, page| {
                    if page.frozen {
                        mapping.frozen += 1;
                        process.frozen += 1;
                        return;
                    }
                    mapping.resident += 1;
                    mapping.shared += u64::from(page.shared);
                    mapping.dirty += u64::from(page.dirty);
                    process.ages[age(page)] += 1;
                    let at = page.frame.get().wrapping_sub(self.first) as usize;
                    if let Some(user) = self.users.get_mut(at)
                        && *user == 0
                    {
                        *user = process.pid as u32;
                    }
                });
            part = next.and_then(|next| VpnRange::between(next, range.end()));
        }
    }

    fn zone(
        &mut self,
        name: &str,
        zone: FrameZone,
        detail: Detail,
        sharing: &mut BTreeMap<u32, u64>,
    ) -> Zone {
        let layout = self.memory.manager.layout();
        let range = match zone {
            FrameZone::Data => layout.data,
            FrameZone::Tables => layout.tables,
        };
        let mut states = BTreeMap::from(STATES.map(|state| (state.name().to_owned(), 0)));
        let mut runs: Vec<Run> = Vec::new();
        let mut told = 0_u64;
        let mut from = Some(range.start);
        while let Some(at) = from {
            let (some, next) = self.memory.manager.frame_runs(zone, at, STEP as u32);
            for run in some {
                *states.entry(run.info.state.name().to_owned()).or_insert(0) +=
                    u64::from(run.count);
                if zone == FrameZone::Data && run.info.share > 0 {
                    *sharing.entry(run.info.share).or_insert(0) += u64::from(run.count);
                }
                if detail == Detail::Full && runs.len() < RUNS_MAX {
                    told += u64::from(run.count);
                    self.split(run, zone, &mut runs);
                }
            }
            from = next;
        }
        if detail == Detail::Full && told < u64::from(range.count) {
            self.truncated = true;
            let left = (u64::from(range.count) - told) as u32;
            runs.push((left, STATES.len() as u8, 0, 0, 0, 0));
        }
        Zone {
            name: name.to_owned(),
            first: range.start.get(),
            frames: u64::from(range.count),
            states,
            runs,
        }
    }

    /// A run, cut where another process maps the frames.
    fn split(&self, run: FrameRun, zone: FrameZone, runs: &mut Vec<Run>) {
        let info = run.info;
        let state = STATES.iter().position(|s| *s == info.state).unwrap_or(0);
        let owner = OWNERS.iter().position(|(o, _)| *o == info.owner);
        let flags = u8::from(info.held) | u8::from(info.modified) << 1;
        let mut add = |count, user| {
            let of = (
                state as u8,
                owner.unwrap_or(0) as u8,
                info.share,
                user,
                flags,
            );
            match runs.last_mut() {
                Some(last) if (last.1, last.2, last.3, last.4, last.5) == of => last.0 += count,
                _ => runs.push((count, of.0, of.1, of.2, of.3, of.4)),
            }
        };
        if zone == FrameZone::Tables || info.share == 0 || self.users.is_empty() {
            return add(run.count, 0);
        }
        let start = run.first.get().wrapping_sub(self.first) as usize;
        for user in self.users.iter().skip(start).take(run.count as usize) {
            add(1, *user);
        }
    }
}

fn layer(frames: PfnRange) -> LayerFrames {
    LayerFrames {
        first: frames.start.get(),
        frames: frames.count.into(),
    }
}

fn describe(p: &crate::linux::process::Process) -> Process {
    let state = match p.life {
        Life::Running => "running",
        Life::Stopped(_) => "stopped",
        Life::Zombie(_) => "ended",
    };
    Process {
        pid: p.pid,
        ppid: p.ppid,
        state: state.to_owned(),
        name: String::from_utf8_lossy(&p.comm).into_owned(),
        threads: p.threads.len(),
        ..Process::default()
    }
}

/// 0 if it was used since it was last looked at, else how often in a row it was not, as far as that is
/// known.
fn age(page: PageInfo) -> usize {
    if page.accessed {
        0
    } else {
        usize::from(page.age).clamp(1, AGES - 1)
    }
}

fn rights(prot: Prot) -> String {
    let letters = [(Prot::READ, 'r'), (Prot::WRITE, 'w'), (Prot::EXEC, 'x')];
    let letter = |(bit, letter)| if prot.contains(bit) { letter } else { '-' };
    letters.into_iter().map(letter).chain(['p']).collect()
}
