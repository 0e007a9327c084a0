//! A machine without virtual CPUs: its calls are made as a worker would make them.

mod calls;
mod confined;
mod proc;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use shadow_mm::{MapKind, MapRequest, Placement, Prot, VadFlags, VadTag, Vpn};

use super::{MountKind, MountSpec, Vfs};
use crate::linux::Errno;
use crate::linux::call::{Args, CallRecord, Ctx, Stop};
use crate::linux::kernel::Kernel;
use crate::linux::process::{
    AddressSpace, Credentials, FdTable, Life, MmLayout, Pending, Pid, Process, SIGNALS, SigAction,
    Unreported, Usage,
};
use crate::linux::table::Table;
use crate::linux::thread::{AltStack, Cpu, Fpu, Regs, Thread, ThreadShared, XsaveArea};
use crate::linux::user_mem::UserMem;

/// Where the program's memory is: eight pages for arguments, eight for results.
const MEMORY: u64 = 0x10_0000;
const RESULT: u64 = MEMORY + 8 * 4096;
const AT_FDCWD: u64 = -100_i64 as u64;

struct NoCpu;

impl Cpu for NoCpu {
    fn save_fpu<'t>(&mut self, fpu: &'t mut Fpu) -> Result<&'t mut XsaveArea, crate::hv::CpuError> {
        *fpu = Fpu::Saved(XsaveArea(Vec::new()));
        match fpu {
            Fpu::Saved(area) => Ok(area),
            Fpu::Initial | Fpu::Live => unreachable!("just saved"),
        }
    }

    fn xsave_layout(&self) -> (usize, u64) {
        (0, 0)
    }
}

/// An argument of a call.
enum A<'a> {
    S(&'a str),
    N(u64),
}

struct Machine {
    k: Kernel,
    t: Thread,
    table: Table,
}

impl Machine {
    /// A machine with these mounts and one process, 2, whose user is 0.
    fn new(mounts: Vec<MountSpec>) -> Self {
        let k = Kernel::for_tests(Vfs::new(mounts, 1 << 20).unwrap());
        let space = k.memory.manager.create_space().unwrap();
        let request = MapRequest {
            placement: Placement::Fixed(Vpn::new(MEMORY / 4096).unwrap()),
            count: 16,
            prot: Prot::READ | Prot::WRITE,
            kind: MapKind::Anonymous,
            flags: VadFlags::empty(),
            tag: VadTag(0),
        };
        let mapped = k.memory.manager.map(&space, request).unwrap();
        k.memory.manager.flushed(mapped.flush);
        let mm = Arc::new(AddressSpace {
            space,
            layout: parking_lot::Mutex::new(MmLayout::default()),
        });
        k.state().procs.insert(2, process(2, &mm, &k));
        let t = Thread {
            tid: 2,
            pid: 2,
            regs: Regs::default(),
            fpu: Fpu::Initial,
            last_cpu: None,
            call: None,
            mask: 0,
            saved_mask: None,
            altstack: AltStack::default(),
            clear_child_tid: 0,
            robust_list: (0, 0),
            personality: 0,
            mm,
            shared: Arc::default(),
        };
        Self {
            k,
            t,
            table: Table::default(),
        }
    }

    /// A host directory as the root, and `/proc` and `/dev`.
    fn over(root: &Path, writable: bool) -> Self {
        let at = |at: &str, kind| MountSpec {
            at: at.as_bytes().to_vec(),
            kind,
        };
        Self::new(vec![
            at(
                "/",
                MountKind::Host {
                    root: root.to_owned(),
                    writable,
                },
            ),
            at("/proc", MountKind::Proc),
            at("/sys", MountKind::Sys),
            at("/dev", MountKind::Dev),
            at(
                "/dev/shm",
                MountKind::Mem {
                    size: 1 << 19,
                    mode: 0o1777,
                },
            ),
            at(
                "/tmp",
                MountKind::Mem {
                    size: 1 << 19,
                    mode: 0o1777,
                },
            ),
        ])
    }

    fn mem(&self) -> UserMem<'_> {
        UserMem::new(&self.k.memory, &self.t.mm)
    }

    /// Makes call `nr`.
    fn call(&mut self, nr: u64, args: &[A<'_>]) -> Result<u64, Errno> {
        let mut at = MEMORY;
        let mut raw = [0; 6];
        for (n, arg) in args.iter().enumerate() {
            raw[n] = match arg {
                A::N(value) => *value,
                A::S(text) => {
                    let start = at;
                    self.mem()
                        .write(start, &[text.as_bytes(), b"\0"].concat())
                        .unwrap();
                    at += 4096 + 1024;
                    start
                }
            };
        }
        let handler = self
            .table
            .get(nr)
            .expect("the call is in the table")
            .handler;
        let mut cpu = NoCpu;
        let call = CallRecord {
            nr,
            args: Args(raw),
            ..CallRecord::default()
        };
        let mut c = Ctx {
            k: &self.k,
            t: &mut self.t,
            cpu: &mut cpu,
            call,
            interrupted: false,
        };
        match handler(&mut c, &Args(raw)) {
            Ok(value) => Ok(value),
            Err(Stop::Errno(errno)) => Err(errno),
            Err(stop) => panic!("{stop:?}"),
        }
    }

    fn open(&mut self, path: &str, flags: u32) -> Result<u64, Errno> {
        self.call(
            257,
            &[A::N(AT_FDCWD), A::S(path), A::N(flags.into()), A::N(0o644)],
        )
    }

    /// What an open file gives from its start.
    fn read(&self, fd: u64) -> Result<Vec<u8>, Errno> {
        let description = {
            let state = self.k.state();
            Arc::clone(&state.procs[&2].files.fds[&(fd as i32)].description)
        };
        let mut out = vec![0; 65536];
        let n = description.file.read(&self.k, 0, &mut out)?;
        out.truncate(n);
        Ok(out)
    }

    fn write(&self, fd: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let description = {
            let state = self.k.state();
            Arc::clone(&state.procs[&2].files.fds[&(fd as i32)].description)
        };
        assert!(description.writable());
        description.file.write(&self.k, 0, bytes)
    }

    fn cat(&mut self, path: &str) -> Result<String, Errno> {
        let fd = self.open(path, 0)?;
        Ok(String::from_utf8(self.read(fd)?).unwrap())
    }

    /// The mode of what is at `path`, not following a link.
    fn mode(&mut self, path: &str) -> Result<u32, Errno> {
        self.call(6, &[A::S(path), A::N(RESULT)])?;
        Ok(self.mem().read_obj::<super::abi::RawStat>(RESULT)?.st_mode)
    }

    fn readlink(&mut self, path: &str) -> Result<String, Errno> {
        let n = self.call(89, &[A::S(path), A::N(RESULT), A::N(4096)])?;
        let mut out = vec![0; n as usize];
        self.mem().read(RESULT, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// The names in a directory, sorted.
    fn list(&mut self, path: &str) -> Result<Vec<String>, Errno> {
        let fd = self.open(path, 0o200_000)?;
        let mut names = Vec::new();
        loop {
            let n = self.call(217, &[A::N(fd), A::N(RESULT), A::N(256)])? as usize;
            if n == 0 {
                break;
            }
            let mut raw = vec![0; n];
            self.mem().read(RESULT, &mut raw)?;
            let mut at = 0;
            while at < n {
                let length = usize::from(u16::from_le_bytes([raw[at + 16], raw[at + 17]]));
                let name = raw[at + 19..at + length].split(|&b| b == 0).next().unwrap();
                names.push(String::from_utf8(name.to_vec()).unwrap());
                at += length;
            }
        }
        names.sort();
        Ok(names)
    }
}

fn process(pid: Pid, mm: &Arc<AddressSpace>, k: &Kernel) -> Process {
    Process {
        pid,
        ppid: 1,
        pgid: pid,
        sid: pid,
        has_execed: true,
        life: Life::Running,
        unreported: Unreported::None,
        exiting: None,
        exit_signal: 17,
        children: BTreeSet::new(),
        threads: BTreeMap::from([(pid, Arc::<ThreadShared>::default())]),
        thread_pending: BTreeMap::new(),
        thread_masks: BTreeMap::new(),
        pending: Pending::default(),
        actions: [SigAction::default(); SIGNALS],
        files: FdTable::default(),
        cwd: k.vfs.root(),
        umask: 0o022,
        cred: Credentials::default(),
        rlimits: [(u64::MAX, u64::MAX); 16],
        mm: Some(Arc::clone(mm)),
        exe: k.vfs.root(),
        comm: b"test".to_vec(),
        nice: 0,
        vfork_waits: false,
        itimer_real: None,
        started: 0,
        usage: Usage::default(),
        children_usage: Usage::default(),
    }
}
