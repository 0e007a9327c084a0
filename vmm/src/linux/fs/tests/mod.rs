//! A machine without virtual CPUs: its calls are made as a worker would make them.

mod calls;
mod confined;
mod proc;

use std::path::Path;
use std::sync::Arc;

use super::{MountKind, MountSpec, Vfs};
use crate::linux::Errno;
use crate::linux::call::{Args, Stop};
use crate::linux::file::Description;
use crate::linux::kernel::Kernel;
use crate::linux::testing::{self, DATA};
use crate::linux::thread::Thread;
use crate::linux::user_mem::UserMem;

/// Where arguments and results go.
const MEMORY: u64 = DATA;
const RESULT: u64 = MEMORY + 8 * 4096;
const AT_FDCWD: u64 = -100_i64 as u64;

/// An argument of a call.
enum A<'a> {
    S(&'a str),
    N(u64),
}

/// A machine and its first program, process 2 of user 0.
struct Machine {
    inner: testing::Machine,
    t: Box<Thread>,
}

impl Machine {
    fn new(mounts: Vec<MountSpec>) -> Self {
        let inner = testing::Machine::with_mounts(mounts);
        let t = inner.first();
        Self { inner, t }
    }

    fn k(&self) -> &Kernel {
        &self.inner.k
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
        UserMem::new(&self.k().memory, &self.t.mm)
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
        let table = crate::linux::table::Table::default();
        let handler = table.get(nr).expect("the call is in the table").handler;
        match self.inner.with(&mut self.t, |c| handler(c, &Args(raw))) {
            Ok(value) => Ok(value),
            Err(Stop::Errno(errno)) => Err(errno),
            Err(stop) => panic!("{stop:?}"),
        }
    }

    fn description(&self, fd: u64) -> Arc<Description> {
        let state = self.k().state();
        Arc::clone(&state.procs[&2].files.fds[&(fd as i32)].description)
    }

    fn open(&mut self, path: &str, flags: u32) -> Result<u64, Errno> {
        self.call(
            257,
            &[A::N(AT_FDCWD), A::S(path), A::N(flags.into()), A::N(0o644)],
        )
    }

    /// What an open file gives from its start.
    fn read(&self, fd: u64) -> Result<Vec<u8>, Errno> {
        let description = self.description(fd);
        let mut out = vec![0; 65536];
        let n = description.file.read(self.k(), 0, &mut out)?;
        out.truncate(n);
        Ok(out)
    }

    fn write(&self, fd: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let description = self.description(fd);
        assert!(description.writable());
        description.file.write(self.k(), 0, bytes)
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
