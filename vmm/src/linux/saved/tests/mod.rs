//! A guest with one of everything is saved, made again in another machine, and goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Parts, Place, Records, Refused, RestoreError, identity, restore, save};
use crate::linux::fs::{MountKind, MountSpec};
use crate::linux::process::FdTable;
use crate::linux::testing::{self, DATA, Machine, Turn, XSAVE};
use crate::linux::thread::{Fpu, Thread, XsaveArea};
use crate::linux::time::TscInfo;
use crate::snapshot::records::{Identity, Role};
use image::Image;

mod damage;
mod frozen;
pub(crate) mod image;
mod kinds;

/// A place in the program's pages for strings and what calls return.
const AT: u64 = DATA + 0x2000;
/// Where a child of the tests' program keeps nothing.
const BUF: u64 = DATA + 0x8000;

/// A guest, its program's thread, and the directory of the host it can write to.
pub(super) struct Guest {
    m: Machine,
    t: Box<Thread>,
    host: Arc<tempfile::TempDir>,
    /// Its descriptors that have something to tell.
    fds: BTreeMap<&'static str, u64>,
}

fn fpu_area() -> XsaveArea {
    let mut area = vec![0; XSAVE];
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    area[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
    area[512] = 3;
    XsaveArea(area)
}

impl Guest {
    fn new() -> Self {
        let host = tempfile::tempdir().unwrap();
        let spec = |at: &str, kind| MountSpec {
            at: at.into(),
            kind,
        };
        let memory = |size| MountKind::Mem { size, mode: 0o755 };
        let m = Machine::with_mounts(vec![
            spec("/", memory(1 << 20)),
            spec("/proc", MountKind::Proc),
            spec("/dev", MountKind::Dev),
            spec("/tmp", memory(1 << 20)),
            spec(
                "/host",
                MountKind::Host {
                    root: host.path().into(),
                    writable: true,
                },
            ),
        ]);
        let mut t = m.first();
        t.fpu = Fpu::Saved(fpu_area());
        Self {
            m,
            t,
            host: Arc::new(host),
            fds: BTreeMap::new(),
        }
    }

    /// A call's result, of which the test is sure.
    fn call(&mut self, nr: i64, args: &[u64]) -> u64 {
        let result = self.m.result(&mut self.t, nr as u64, args);
        assert!(result >= 0, "call {nr} of {args:x?}: {result}");
        result as u64
    }

    /// Puts a string where a call finds it.
    fn text(&self, text: &str) -> u64 {
        let bytes = [text.as_bytes(), b"\0"].concat();
        self.m.mem(&self.t).write(AT, &bytes).unwrap();
        AT
    }

    fn open(&mut self, path: &str, flags: i32) -> u64 {
        let path = self.text(path);
        self.call(libc::SYS_open, &[path, flags as u64, 0o644])
    }

    fn write(&mut self, fd: u64, text: &str) {
        let at = self.text(text);
        let n = self.call(libc::SYS_write, &[fd, at, text.len() as u64]);
        assert_eq!(n as usize, text.len());
    }

    fn read(&mut self, fd: u64) -> String {
        let n = self.call(libc::SYS_read, &[fd, BUF, 0x1000]);
        let mut bytes = vec![0; n as usize];
        self.m.mem(&self.t).read(BUF, &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Remembers a descriptor by a name.
    fn keep(&mut self, name: &'static str, fd: u64) {
        self.fds.insert(name, fd);
    }

    fn pair(&self) -> [u64; 2] {
        let pair: [i32; 2] = self.m.mem(&self.t).read_obj(AT).unwrap();
        pair.map(|fd| fd as u64)
    }

    fn pipe(&mut self) -> [u64; 2] {
        self.call(libc::SYS_pipe2, &[AT, 0]);
        self.pair()
    }

    fn peek(&self, at: u64) -> u32 {
        self.m.mem(&self.t).read_obj(at).unwrap()
    }

    fn poke(&self, at: u64, value: u32) {
        self.m.mem(&self.t).write_obj(at, &value).unwrap();
    }

    /// Stops the guest with these threads besides its own, and writes it down.
    fn save(self, others: Vec<Thread>) -> Saved {
        let Self { m, t, host, fds } = self;
        let sched = Arc::clone(&m.k.sched);
        sched.enqueue(t);
        for mut t in others {
            t.fpu = Fpu::Saved(fpu_area());
            sched.enqueue(Box::new(t));
        }
        sched.stop();
        let mut image = Image::new(&m.k.memory);
        let records = save(&m.k, &mut image).unwrap();
        drop(sched.drain());
        let procs = std::mem::take(&mut m.k.state().procs);
        drop(procs);
        Saved {
            records,
            image,
            host,
            fds,
        }
    }
}

/// A guest as data.
struct Saved {
    records: Records,
    image: Image,
    host: Arc<tempfile::TempDir>,
    fds: BTreeMap<&'static str, u64>,
}

fn parts() -> Parts<'static> {
    Parts {
        place: Place::Alone,
        memory: testing::memory(),
        sched: Arc::default(),
        files: FdTable::default(),
        tty: None,
        tsc: TscInfo::unusable(),
        tree: None,
        info: crate::linux::exec::MachineInfo::default(),
        fpu: (fpu_area(), 7),
    }
}

/// Who a guest is that is made again.
fn identity() -> Identity {
    let (number, of, template) = (3, 5, "warm".to_owned());
    Identity {
        role: Role::Clone {
            number,
            of,
            template,
        },
        settings: vec![b"LANG=C".to_vec()],
    }
}

/// Makes a guest of records.
fn again(records: &Records, image: &mut Image) -> Result<Machine, RestoreError> {
    let parts = parts();
    image.load_into(&parts.memory);
    let k = restore(records, parts, image, identity())?;
    Ok(Machine::of(k))
}

impl Saved {
    /// The guest, going on, and its other threads by number. The records have been bytes in between.
    fn restore(mut self) -> (Guest, Vec<Thread>) {
        let bytes = postcard::to_stdvec(&self.records).unwrap();
        let records = postcard::from_bytes(&bytes).unwrap();
        let m = again(&records, &mut self.image).unwrap();
        let mut threads: Vec<Thread> = m.k.sched.drain().into_iter().map(|t| *t).collect();
        let main = m.k.state().main;
        let at = threads.iter().position(|t| t.tid == main).unwrap();
        let t = Box::new(threads.remove(at));
        threads.sort_by_key(|t| t.tid);
        // As before it goes on.
        assert!(identity::renew(&m.k.memory, &t.mm));
        let Self { host, fds, .. } = self;
        (Guest { m, t, host, fds }, threads)
    }
}

/// `records` with what is not the same twice as `other` has it.
fn like(records: &Records, other: &Records) -> Records {
    let mut records = records.clone();
    records.machine.clock = other.machine.clock;
    records.machine.next_key = other.machine.next_key;
    records
}

fn parked(turn: &Turn) {
    assert!(matches!(turn, Turn::Parked(_)), "{turn:?}");
}
