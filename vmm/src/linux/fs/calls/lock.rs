//! flock(2).

use std::sync::Arc;

use rustix::io::Errno;

use crate::linux::call::{Args, Ctx, Stop, SysResult, Wait};
use crate::linux::file::O_PATH;

const LOCK_SH: u32 = 1;
const LOCK_EX: u32 = 2;
const LOCK_NB: u32 = 4;
const LOCK_UN: u32 = 8;

pub(super) fn flock(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let description = c.file(a.i32(0))?;
    if description.flags() & O_PATH != 0 {
        return Err(Errno::BADF.into());
    }
    let wanted = a.u32(1);
    let exclusive = match wanted & !LOCK_NB {
        LOCK_SH => false,
        LOCK_EX => true,
        LOCK_UN => {
            let gone = description.flock.lock().take();
            drop(gone);
            return Ok(0);
        }
        _ => return Err(Errno::INVAL.into()),
    };
    let stat = description.file.stat(c.k)?;
    let mut held = description.flock.lock();
    if held
        .as_ref()
        .is_some_and(|lock| lock.is_exclusive() == exclusive)
    {
        return Ok(0);
    }
    // As on Linux: what was held is given up before the other kind is waited for.
    drop(held.take());
    match c
        .k
        .vfs
        .flocks()
        .take(&Arc::clone(&c.k.sched), (stat.dev, stat.ino), exclusive)
    {
        Ok(lock) => {
            *held = Some(lock);
            Ok(0)
        }
        Err(_) if wanted & LOCK_NB != 0 => Err(Errno::WOULDBLOCK.into()),
        Err(key) => Err(Stop::Block(Wait::on(key))),
    }
}
