//! `memfd_create`: a file in memory without a name.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::Description;
use super::super::fs::{Caller, Seals};

/// The calls of this file.
pub const TABLE: &[Entry] = &[Entry {
    nr: 319,
    name: "memfd_create",
    args: &[Arg::Str, Arg::Hex],
    handler: sys_memfd_create,
}];

const MFD_CLOEXEC: u32 = 1;
const MFD_ALLOW_SEALING: u32 = 2;
const MFD_NOEXEC_SEAL: u32 = 8;
const MFD_EXEC: u32 = 16;
/// Longest name, so that `memfd:` and it fit a directory entry.
const NAME_MAX: usize = 249;

fn sys_memfd_create(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(1);
    // Huge pages are not offered.
    let known = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL | MFD_EXEC;
    if flags & !known != 0 || flags & (MFD_NOEXEC_SEAL | MFD_EXEC) == MFD_NOEXEC_SEAL | MFD_EXEC {
        return Err(Errno::INVAL.into());
    }
    let seals = match (flags & MFD_NOEXEC_SEAL, flags & MFD_ALLOW_SEALING) {
        (0, 0) => Seals::SEAL,
        (0, _) => Seals::empty(),
        _ => Seals::EXEC,
    };
    let name = match c.mem().read_cstr(a.u64(0), NAME_MAX + 1) {
        Err(Errno::NAMETOOLONG) => return Err(Errno::INVAL.into()),
        other => other?,
    };
    let file = c.k.vfs.memory_file(&Caller::of(c), &name, seals)?;
    Ok(c.add_fd(Description::new(file, 2), flags & MFD_CLOEXEC != 0)? as u64)
}
