//! The memory of a guest, for people to look at: collected ([`collect`]), and shown as text ([`text`]),
//! as JSON, or as a page with a map of the frames ([`html`]).
//!
//! What it is not: a snapshot. A guest goes on while it is looked at; every lock is held for a few
//! thousand frames or entries only, so the parts are of slightly different moments.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub mod collect;
pub mod html;
pub mod text;

/// The number of the format; readers refuse others.
pub const FORMAT: u32 = 1;

/// A guest's memory. `docs/control.md` describes the fields for users of the JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// [`FORMAT`].
    pub format: u32,
    /// The guest.
    pub guest: About,
    /// Exit status, if it has ended.
    pub status: Option<u8>,
    /// How long it had run, in milliseconds.
    pub uptime_ms: u64,
    /// Bytes of a frame.
    pub frame_bytes: u64,
    /// The frames.
    pub zones: Vec<Zone>,
    /// What the numbers in the zones' runs mean.
    pub legend: Legend,
    /// The templates under the guest's memory: what a process has frozen is their pages.
    #[serde(default)]
    pub layers: Vec<LayerFrames>,
    /// Frames of guest pages by how many entries map them: the count of entries, and how many frames.
    pub sharing: Vec<(u32, u64)>,
    /// Processes that have memory.
    pub processes: Vec<Process>,
    /// Some processes or mappings were left out, because they are too many.
    pub truncated: bool,
    /// What `vmm run --stats=json` prints, at this moment.
    pub counters: serde_json::Value,
}

/// Which guest it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its name, or its number.
    pub id: String,
    /// The VMM's process.
    pub pid: u32,
    /// The VMM's version.
    pub version: String,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// A template's frames: they are not the guest's, and it cannot store to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerFrames {
    /// The first frame's number.
    pub first: u32,
    /// How many there are.
    pub frames: u64,
}

/// One zone of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zone {
    /// `data` or `tables`.
    pub name: String,
    /// The first frame's number.
    pub first: u32,
    /// How many there are.
    pub frames: u64,
    /// How many are in which state: the lists and their lengths, and what is on none.
    pub states: BTreeMap<String, u64>,
    /// All of them.
    pub runs: Vec<Run>,
}

/// Neighbouring frames of which the same is known: how many, their state, owner and process (as
/// indices into the legend; process 0 is none), the entries that map each, and 1 if something holds
/// them plus 2 if they were modified.
pub type Run = (u32, u8, u8, u32, u32, u8);

/// The words for the numbers in a [`Run`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Legend {
    /// By state.
    pub states: Vec<String>,
    /// By owner.
    pub owners: Vec<String>,
}

/// One process's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number in the guest.
    pub pid: i32,
    /// Its parent's.
    pub ppid: i32,
    /// `running`, `stopped` or `ended`.
    pub state: String,
    /// Its name.
    pub name: String,
    /// Threads.
    pub threads: usize,
    /// The number of its address space: processes with the same one share it.
    pub space: u64,
    /// Pages, of which.
    pub virtual_pages: u64,
    /// Most pages that were mapped.
    pub peak_virtual_pages: u64,
    /// Pages with a frame: the working set.
    pub resident: u64,
    /// Most pages that had a frame.
    pub peak_resident: u64,
    /// Pages that are its own alone.
    pub private: u64,
    /// Pages of a template that it has mapped: they take no frame. Counted with the mappings only.
    #[serde(default)]
    pub frozen: u64,
    /// Page tables.
    pub tables: u64,
    /// The least pages the trimmer leaves it while others have more, and the most it lets it have.
    pub working_set: (u64, u64),
    /// Resident pages by age: used since they were last looked at, then how often in a row not.
    pub ages: Vec<u64>,
    /// Its mappings.
    pub maps: Vec<Mapping>,
}

/// One mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// `rwxp`.
    pub rights: String,
    /// What is mapped: a path, `[heap]`, `[stack]`, or nothing.
    pub name: String,
    /// Where in it, in bytes.
    pub offset: u64,
    /// Pages with a frame.
    pub resident: u64,
    /// Pages that are a template's, mapped and not stored to; not among the resident ones.
    #[serde(default)]
    pub frozen: u64,
    /// Those other entries map too, or might.
    pub shared: u64,
    /// Those stored to since they were last looked at.
    pub dirty: u64,
}

impl Inspection {
    /// One of its zones.
    #[must_use]
    pub fn zone(&self, name: &str) -> Option<&Zone> {
        self.zones.iter().find(|zone| zone.name == name)
    }

    /// How many frames guest pages would need if none were shared, less those they do need.
    #[must_use]
    pub fn frames_saved(&self) -> u64 {
        let saved = |(share, frames): &(u32, u64)| u64::from(share.saturating_sub(1)) * frames;
        self.sharing.iter().map(saved).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A guest with a few frames.
    pub(crate) fn example() -> Inspection {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Inspection {
            format: FORMAT,
            guest: About {
                id: "warm".to_owned(),
                pid: 7,
                version: "0".to_owned(),
                command: names(&["/bin/sh", "-c", "x"]),
            },
            status: None,
            uptime_ms: 65_000,
            frame_bytes: 4096,
            zones: vec![Zone {
                name: "data".to_owned(),
                first: 512,
                frames: 1000,
                states: [("zeroed".to_owned(), 996), ("active".to_owned(), 4)].into(),
                runs: vec![
                    (1, 2, 2, 2, 1, 0),
                    (1, 2, 2, 3, 1, 0),
                    (2, 2, 1, 1, 2, 2),
                    (996, 0, 0, 0, 0, 0),
                ],
            }],
            legend: Legend {
                states: names(&["zeroed", "free", "active", "in flight", "not shown"]),
                owners: names(&["nobody", "one entry", "clone block"]),
            },
            layers: vec![LayerFrames {
                first: 2048,
                frames: 300,
            }],
            sharing: vec![(1, 2), (2, 1), (3, 1)],
            processes: vec![Process {
                pid: 1,
                name: "sh".to_owned(),
                state: "running".to_owned(),
                resident: 4,
                frozen: 6,
                ages: vec![3, 1, 0, 0],
                maps: vec![Mapping {
                    start: 0x1000,
                    end: 0x3000,
                    rights: "rw-p".to_owned(),
                    name: "[heap]".to_owned(),
                    resident: 2,
                    frozen: 6,
                    ..Mapping::default()
                }],
                ..Process::default()
            }],
            truncated: false,
            counters: serde_json::json!({"memory": {"faults": {"demand_zero": 3}}}),
        }
    }

    #[test]
    fn json_comes_back_as_it_was() {
        let text = serde_json::to_string(&example()).unwrap();
        assert_eq!(
            serde_json::from_str::<Inspection>(&text).unwrap(),
            example()
        );
    }

    #[test]
    fn saved_frames_are_those_sharing_avoids() {
        assert_eq!(example().frames_saved(), 3);
    }
}
