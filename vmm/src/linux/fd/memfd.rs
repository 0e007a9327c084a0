//! `memfd_create`: a file in memory without a name.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::Description;
use super::super::fs::Caller;

/// The calls of this file.
pub const TABLE: &[Entry] = &[Entry {
    nr: 319,
    name: "memfd_create",
    args: &[Arg::Str, Arg::Hex],
    handler: sys_memfd_create,
}];

const MFD_CLOEXEC: u32 = 1;
/// `MFD_NOEXEC_SEAL` and `MFD_EXEC`: whether it may be executed is not told apart.
const MFD_EXECUTABLE: u32 = 8 | 16;
/// Longest name, so that `memfd:` and it fit a directory entry.
const NAME_MAX: usize = 249;

fn sys_memfd_create(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(1);
    // Seals and huge pages are not offered.
    if flags & !(MFD_CLOEXEC | MFD_EXECUTABLE) != 0 || flags & MFD_EXECUTABLE == MFD_EXECUTABLE {
        return Err(Errno::INVAL.into());
    }
    let name = match c.mem().read_cstr(a.u64(0), NAME_MAX + 1) {
        Err(Errno::NAMETOOLONG) => return Err(Errno::INVAL.into()),
        other => other?,
    };
    let file = c.k.vfs.memory_file(&Caller::of(c), &name)?;
    Ok(c.add_fd(Description::new(file, 2), flags & MFD_CLOEXEC != 0)? as u64)
}
