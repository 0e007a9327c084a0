//! Ids: of the process, and of its user and groups (credentials(7)). A process may do what its own
//! effective user id 0, or its own ids, allow: there are no separate capabilities.

use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::Process;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 39,
        name: "getpid",
        args: &[],
        handler: |c, _| Ok(c.t.pid as u64),
    },
    Entry {
        nr: 102,
        name: "getuid",
        args: &[],
        handler: |c, _| id(c, |p| p.cred.uid[0]),
    },
    Entry {
        nr: 104,
        name: "getgid",
        args: &[],
        handler: |c, _| id(c, |p| p.cred.gid[0]),
    },
    Entry {
        nr: 105,
        name: "setuid",
        args: &[Int],
        handler: sys_setuid,
    },
    Entry {
        nr: 106,
        name: "setgid",
        args: &[Int],
        handler: sys_setgid,
    },
    Entry {
        nr: 107,
        name: "geteuid",
        args: &[],
        handler: |c, _| id(c, |p| p.cred.uid[1]),
    },
    Entry {
        nr: 108,
        name: "getegid",
        args: &[],
        handler: |c, _| id(c, |p| p.cred.gid[1]),
    },
    Entry {
        nr: 110,
        name: "getppid",
        args: &[],
        handler: |c, _| id(c, |p| p.ppid as u32),
    },
    Entry {
        nr: 113,
        name: "setreuid",
        args: &[Int, Int],
        handler: sys_setreuid,
    },
    Entry {
        nr: 114,
        name: "setregid",
        args: &[Int, Int],
        handler: sys_setregid,
    },
    Entry {
        nr: 115,
        name: "getgroups",
        args: &[Int, Hex],
        handler: sys_getgroups,
    },
    Entry {
        nr: 116,
        name: "setgroups",
        args: &[Int, Hex],
        handler: sys_setgroups,
    },
    Entry {
        nr: 117,
        name: "setresuid",
        args: &[Int, Int, Int],
        handler: sys_setresuid,
    },
    Entry {
        nr: 118,
        name: "getresuid",
        args: &[Hex, Hex, Hex],
        handler: sys_getresuid,
    },
    Entry {
        nr: 119,
        name: "setresgid",
        args: &[Int, Int, Int],
        handler: sys_setresgid,
    },
    Entry {
        nr: 120,
        name: "getresgid",
        args: &[Hex, Hex, Hex],
        handler: sys_getresgid,
    },
    Entry {
        nr: 122,
        name: "setfsuid",
        args: &[Int],
        handler: |c, _| id(c, |p| p.cred.uid[1]),
    },
    Entry {
        nr: 123,
        name: "setfsgid",
        args: &[Int],
        handler: |c, _| id(c, |p| p.cred.gid[1]),
    },
    Entry {
        nr: 125,
        name: "capget",
        args: &[Hex, Hex],
        handler: sys_capget,
    },
    Entry {
        nr: 126,
        name: "capset",
        args: &[Hex, Hex],
        handler: sys_capset,
    },
    Entry {
        nr: 186,
        name: "gettid",
        args: &[],
        handler: |c, _| Ok(c.t.tid as u64),
    },
];

/// `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65_536;

/// "Leave it" in the calls that set several ids.
const KEEP: u32 = u32::MAX;

fn id(c: &Ctx<'_>, get: impl FnOnce(&Process) -> u32) -> SysResult {
    Ok(u64::from(c.with_process(|p| get(p))))
}

/// Real, effective and saved id.
type Ids = [u32; 3];

/// setuid(2), setgid(2).
fn set_one(ids: Ids, root: bool, new: u32) -> Result<Ids, Errno> {
    match new {
        KEEP => Err(Errno::INVAL),
        _ if root => Ok([new; 3]),
        _ if new == ids[0] || new == ids[2] => Ok([ids[0], new, ids[2]]),
        _ => Err(Errno::PERM),
    }
}

/// setreuid(2), setregid(2).
fn set_two(ids: Ids, root: bool, real: u32, effective: u32) -> Result<Ids, Errno> {
    let may = |new: u32, from: &[u32]| new == KEEP || root || from.contains(&new);
    if !may(real, &ids[..2]) || !may(effective, &ids) {
        return Err(Errno::PERM);
    }
    let mut new = [pick(real, ids[0]), pick(effective, ids[1]), ids[2]];
    if real != KEEP || (effective != KEEP && effective != ids[0]) {
        new[2] = new[1];
    }
    Ok(new)
}

/// setresuid(2), setresgid(2).
fn set_three(ids: Ids, root: bool, new: Ids) -> Result<Ids, Errno> {
    if !root && !new.iter().all(|id| *id == KEEP || ids.contains(id)) {
        return Err(Errno::PERM);
    }
    Ok([
        pick(new[0], ids[0]),
        pick(new[1], ids[1]),
        pick(new[2], ids[2]),
    ])
}

fn pick(new: u32, old: u32) -> u32 {
    if new == KEEP { old } else { new }
}

/// Which ids a call sets.
#[derive(Clone, Copy)]
enum Kind {
    User,
    Group,
}

fn change(c: &Ctx<'_>, kind: Kind, set: impl FnOnce(Ids, bool) -> Result<Ids, Errno>) -> SysResult {
    c.with_process(|p| {
        let root = p.cred.uid[1] == 0;
        let ids = match kind {
            Kind::User => &mut p.cred.uid,
            Kind::Group => &mut p.cred.gid,
        };
        *ids = set(*ids, root)?;
        Ok(0)
    })
}

fn sys_setuid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::User, |ids, root| set_one(ids, root, a.u32(0)))
}

fn sys_setgid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::Group, |ids, root| set_one(ids, root, a.u32(0)))
}

fn sys_setreuid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::User, |ids, root| {
        set_two(ids, root, a.u32(0), a.u32(1))
    })
}

fn sys_setregid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::Group, |ids, root| {
        set_two(ids, root, a.u32(0), a.u32(1))
    })
}

fn sys_setresuid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::User, |ids, root| {
        set_three(ids, root, [a.u32(0), a.u32(1), a.u32(2)])
    })
}

fn sys_setresgid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, Kind::Group, |ids, root| {
        set_three(ids, root, [a.u32(0), a.u32(1), a.u32(2)])
    })
}

fn sys_getresuid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let ids = c.with_process(|p| p.cred.uid);
    write_ids(c, a, ids)
}

fn sys_getresgid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let ids = c.with_process(|p| p.cred.gid);
    write_ids(c, a, ids)
}

fn write_ids(c: &Ctx<'_>, a: &Args, ids: Ids) -> SysResult {
    for (n, id) in ids.iter().enumerate() {
        c.mem().write_obj(a.u64(n), id)?;
    }
    Ok(0)
}

fn sys_getgroups(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let groups = c.with_process(|p| p.cred.groups.clone());
    let room = usize::try_from(a.i32(0)).map_err(|_| Errno::INVAL)?;
    if room == 0 {
        return Ok(groups.len() as u64);
    }
    if room < groups.len() {
        return Err(Errno::INVAL.into());
    }
    let bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    c.mem().write(a.u64(1), &bytes)?;
    Ok(groups.len() as u64)
}

fn sys_setgroups(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if c.with_process(|p| p.cred.uid[1] != 0) {
        return Err(Errno::PERM.into());
    }
    let count = usize::try_from(a.i32(0))
        .ok()
        .filter(|&n| n <= GROUPS_MAX)
        .ok_or(Errno::INVAL)?;
    let mut bytes = vec![0; count * 4];
    c.mem().read(a.u64(1), &mut bytes)?;
    let (groups, _) = bytes.as_chunks::<4>();
    let groups = groups.iter().map(|b| u32::from_le_bytes(*b)).collect();
    c.with_process(|p| p.cred.groups = groups);
    Ok(0)
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words a set.
const CAPABILITY_V3: u32 = 0x2008_0522;
/// Version 2, laid out the same.
const CAPABILITY_V2: u32 = 0x2007_1026;
/// Version 1: one word a set.
const CAPABILITY_V1: u32 = 0x1998_0330;
/// All capabilities there are, in two words.
const ALL_CAPABILITIES: [u32; 2] = [u32::MAX, 0x1ff];

/// Words a set of the version in the header has; corrects the header if there is no such version.
fn capability_words(c: &Ctx<'_>, header: u64) -> Result<usize, Errno> {
    match c.mem().read_obj::<u32>(header)? {
        CAPABILITY_V1 => Ok(1),
        CAPABILITY_V2 | CAPABILITY_V3 => Ok(2),
        _ => {
            c.mem().write_obj(header, &CAPABILITY_V3)?;
            Err(Errno::INVAL)
        }
    }
}

fn sys_capget(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let words = match capability_words(c, a.u64(0)) {
        Err(Errno::INVAL) if a.u64(1) == 0 => return Ok(0),
        words => words?,
    };
    let header: [u32; 2] = c.mem().read_obj(a.u64(0))?;
    let pid = if header[1] == 0 {
        c.t.pid
    } else {
        header[1] as i32
    };
    let root = c.k.state().process(pid)?.cred.uid[1] == 0;
    if a.u64(1) == 0 {
        return Ok(0);
    }
    for (n, &all) in ALL_CAPABILITIES.iter().enumerate().take(words) {
        let word = if root { all } else { 0 };
        c.mem()
            .write_obj(a.u64(1).wrapping_add(n as u64 * 12), &[word, word, 0])?;
    }
    Ok(0)
}

fn sys_capset(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let words = capability_words(c, a.u64(0))?;
    let mut asks = false;
    for n in 0..words {
        let set: [u32; 3] = c.mem().read_obj(a.u64(1).wrapping_add(n as u64 * 12))?;
        asks |= set != [0; 3];
    }
    if asks && c.with_process(|p| p.cred.uid[1] != 0) {
        return Err(Errno::PERM.into());
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_setuid_sets_all_three() {
        assert_eq!(set_one([0, 0, 0], true, 5), Ok([5, 5, 5]));
        assert_eq!(set_one([0, 0, 0], true, KEEP), Err(Errno::INVAL));
    }

    #[test]
    fn user_may_only_take_its_own_ids() {
        assert_eq!(set_one([5, 6, 7], false, 7), Ok([5, 7, 7]));
        assert_eq!(set_one([5, 6, 7], false, 6), Err(Errno::PERM));
        assert_eq!(set_two([5, 6, 7], false, 7, KEEP), Err(Errno::PERM));
        assert_eq!(set_two([5, 6, 7], false, 6, 5), Ok([6, 5, 5]));
        assert_eq!(set_three([5, 6, 7], false, [7, KEEP, 5]), Ok([7, 6, 5]));
        assert_eq!(
            set_three([5, 6, 7], false, [8, KEEP, KEEP]),
            Err(Errno::PERM)
        );
    }

    #[test]
    fn effective_id_alone_leaves_the_saved_one() {
        assert_eq!(set_two([5, 6, 7], false, KEEP, 5), Ok([5, 5, 7]));
        assert_eq!(set_two([5, 6, 7], false, KEEP, 7), Ok([5, 7, 7]));
    }
}
