//! epoll(7): a set of files to wait for.
//!
//! A wait looks at every member; it does not scale to thousands of descriptors as Linux's does.
//! Level-triggered members are reported as `poll` would. An edge-triggered one is reported when it
//! is ready and was not, or when [`File::edges`] has moved since it was last reported.

use std::sync::{Arc, Weak};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Stop, SysResult, Wait, WaitKey};
use super::super::file::{Description, File, Ready, Stat, Viewer};
use super::super::kernel::Kernel;
use super::super::saved::{Refused, SavedFile, Saver};
use super::super::sched::Sched;
use super::super::time::Timespec;
use super::eventfd::anonymous_stat;
use super::poll::{Patience, take_mask};
use super::table::O_CLOEXEC;
use crate::locks::{Mutex, rank};

mod saved;

pub use saved::SavedMember;

const WAIT: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int, Arg::Int, Arg::Hex, Arg::Int];

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 213,
        name: "epoll_create",
        args: &[Arg::Int],
        handler: sys_epoll_create,
    },
    Entry {
        nr: 232,
        name: "epoll_wait",
        args: WAIT,
        handler: sys_epoll_wait,
    },
    Entry {
        nr: 233,
        name: "epoll_ctl",
        args: &[Arg::Fd, Arg::Int, Arg::Fd, Arg::Hex],
        handler: sys_epoll_ctl,
    },
    Entry {
        nr: 281,
        name: "epoll_pwait",
        args: WAIT,
        handler: sys_epoll_pwait,
    },
    Entry {
        nr: 291,
        name: "epoll_create1",
        args: &[Arg::Hex],
        handler: sys_epoll_create1,
    },
    Entry {
        nr: 441,
        name: "epoll_pwait2",
        args: WAIT,
        handler: sys_epoll_pwait2,
    },
];

const CTL_ADD: i32 = 1;
const CTL_DEL: i32 = 2;
const CTL_MOD: i32 = 3;
const EPOLLET: u32 = 1 << 31;
const EPOLLONESHOT: u32 = 1 << 30;
/// Deepest nesting of one epoll in another (`EP_MAX_NESTS`).
const MAX_NESTS: usize = 4;
/// Most events one call reports, so that its buffer stays small; more come with the next call.
const MAX_REPORT: usize = 1024;

/// `struct epoll_event`, packed on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Event {
    events: u32,
    data: [u8; 8],
}

#[derive(Clone, Debug)]
struct Member {
    fd: i32,
    /// Gone when every descriptor of the description is closed.
    of: Weak<Description>,
    event: Event,
    /// Reported, and not to be again until `EPOLL_CTL_MOD` (`EPOLLONESHOT`).
    spent: bool,
    /// Readiness and edge count when it was last looked at, for `EPOLLET`.
    seen: (Ready, u64),
}

impl Member {
    fn wanted(&self) -> Ready {
        let bits = (self.event.events & 0xffff) as u16;
        Ready::from_bits_truncate(bits) | Ready::ERR | Ready::HUP
    }

    /// What there is to report, given readiness and edge count now. Remembers them.
    fn look(&mut self, ready: Ready, edges: u64) -> Ready {
        let now = ready & self.wanted();
        if self.spent {
            return Ready::empty();
        }
        if self.event.events & EPOLLET == 0 {
            return now;
        }
        let (before, edges_before) = std::mem::replace(&mut self.seen, (now, edges));
        if edges != edges_before || !before.contains(now) {
            now
        } else {
            Ready::empty()
        }
    }
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll {
    members: Mutex<rank::EpollMembers, Vec<Member>>,
    sched: Arc<Sched>,
    /// Woken when the set changes.
    key: WaitKey,
}

impl Epoll {
    fn new(sched: &Arc<Sched>) -> Self {
        Self {
            members: Mutex::default(),
            sched: Arc::clone(sched),
            key: sched.new_key(),
        }
    }

    /// The members whose description is still open, for looking at without the lock.
    fn open_members(&self) -> Vec<(Member, Arc<Description>)> {
        let mut members = self.members.lock();
        members.retain(|m| m.of.strong_count() > 0);
        members
            .iter()
            .filter_map(|m| Some((m.clone(), m.of.upgrade()?)))
            .collect()
    }

    fn control(&self, op: i32, fd: i32, of: &Arc<Description>, event: Event) -> Result<(), Errno> {
        let mut members = self.members.lock();
        members.retain(|m| m.of.strong_count() > 0);
        let weak = Arc::downgrade(of);
        let at = members
            .iter()
            .position(|m| m.fd == fd && m.of.ptr_eq(&weak));
        let member = Member {
            fd,
            of: weak,
            event,
            spent: false,
            seen: (Ready::empty(), u64::MAX),
        };
        match (op, at) {
            (CTL_ADD, None) => members.push(member),
            (CTL_ADD, Some(_)) => return Err(Errno::EXIST),
            (CTL_DEL, Some(at)) => drop(members.remove(at)),
            (CTL_MOD, Some(at)) => members[at] = member,
            (CTL_DEL | CTL_MOD, None) => return Err(Errno::NOENT),
            _ => return Err(Errno::INVAL),
        }
        drop(members);
        self.sched.wake(self.key);
        Ok(())
    }

    /// At most `max` events; reported members go to the end, so that all get their turn.
    fn collect(&self, by: Viewer<'_>, max: usize) -> Vec<Event> {
        let looks: Vec<_> = self
            .open_members()
            .into_iter()
            .map(|(m, d)| (m.fd, m.of, d.file.ready(by), d.file.edges()))
            .collect();
        let mut members = self.members.lock();
        let mut out = Vec::new();
        for (fd, of, ready, edges) in looks {
            if out.len() >= max {
                break;
            }
            let found = members.iter().position(|m| m.fd == fd && m.of.ptr_eq(&of));
            let Some(at) = found else { continue };
            let now = members[at].look(ready, edges);
            if !now.is_empty() {
                let mut member = members.remove(at);
                out.push(Event {
                    events: u32::from(now.bits()),
                    data: member.event.data,
                });
                member.spent = member.event.events & EPOLLONESHOT != 0;
                members.push(member);
            }
        }
        out
    }

    /// How deep other instances are nested in this one; `ELOOP` if `target` is among them or it is
    /// too deep.
    fn depth(&self, target: &Self, level: usize) -> Result<(), Errno> {
        if std::ptr::eq(self, target) || level > MAX_NESTS {
            return Err(Errno::LOOP);
        }
        for (_, d) in self.open_members() {
            if let Some(inner) = d.file.as_any().downcast_ref::<Self>() {
                inner.depth(target, level + 1)?;
            }
        }
        Ok(())
    }
}

impl File for Epoll {
    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(anonymous_stat())
    }

    fn ready(&self, by: Viewer<'_>) -> Ready {
        let any = self
            .open_members()
            .into_iter()
            .any(|(mut m, d)| !m.look(d.file.ready(by), d.file.edges()).is_empty());
        if any {
            Ready::IN | Ready::RDNORM
        } else {
            Ready::empty()
        }
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key)
    }

    fn watch(&self, by: Viewer<'_>, _: Ready, wait: &mut Wait) {
        wait.keys.push(self.key);
        for (member, d) in self.open_members() {
            if !member.spent {
                d.file.watch(by, member.wanted(), wait);
            }
        }
    }

    fn edges(&self) -> u64 {
        self.open_members()
            .iter()
            .fold(0, |sum, (_, d)| sum.wrapping_add(d.file.edges()))
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"anon_inode:[eventpoll]".to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Epoll)
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn sys_epoll_create(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.i32(0) <= 0 {
        Err(Errno::INVAL.into())
    } else {
        make(c, 0)
    }
}

fn sys_epoll_create1(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u32(0))
}

fn make(c: &Ctx<'_>, flags: u32) -> SysResult {
    if flags & !O_CLOEXEC != 0 {
        return Err(Errno::INVAL.into());
    }
    let description = Description::new(Arc::new(Epoll::new(&c.k.sched)), 2);
    Ok(c.add_fd(description, flags & O_CLOEXEC != 0)? as u64)
}

fn sys_epoll_ctl(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (op, fd) = (a.i32(1), a.i32(2));
    let event = match op {
        CTL_DEL => Event {
            events: 0,
            data: [0; 8],
        },
        _ => c.mem().read_obj(a.u64(3))?,
    };
    let own = c.file(a.i32(0))?;
    let target = c.file(fd)?;
    let epoll = own
        .file
        .as_any()
        .downcast_ref::<Epoll>()
        .ok_or(Errno::INVAL)?;
    if Arc::ptr_eq(&own, &target) {
        return Err(Errno::INVAL.into());
    }
    if target.file.wait_key().is_none() {
        // Regular files and directories are always ready.
        return Err(Errno::PERM.into());
    }
    if let (CTL_ADD, Some(inner)) = (op, target.file.as_any().downcast_ref::<Epoll>()) {
        inner.depth(epoll, 1)?;
    }
    epoll.control(op, fd, &target, event)?;
    Ok(0)
}

fn sys_epoll_wait(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    wait(c, a, u64::try_from(a.i32(3)).ok().map(|ms| ms * 1_000_000))
}

fn sys_epoll_pwait(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    take_mask(c, a.u64(4), a.u64(5))?;
    sys_epoll_wait(c, a)
}

fn sys_epoll_pwait2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = a.u64(3);
    let ns = if at == 0 {
        None
    } else {
        Some(c.mem().read_obj::<Timespec>(at)?.to_ns()?)
    };
    take_mask(c, a.u64(4), a.u64(5))?;
    wait(c, a, ns)
}

fn wait(c: &mut Ctx<'_>, a: &Args, ns: Option<u64>) -> SysResult {
    let max = usize::try_from(a.i32(2)).unwrap_or(0).min(MAX_REPORT);
    if max == 0 {
        return Err(Errno::INVAL.into());
    }
    let own = c.file(a.i32(0))?;
    let epoll = own
        .file
        .as_any()
        .downcast_ref::<Epoll>()
        .ok_or(Errno::INVAL)?;
    let size = size_of::<Event>();
    let max = max.min(
        c.mem()
            .accessible(a.u64(1), max * size, shadow_mm::Access::Write)
            / size,
    );
    if max == 0 {
        return Err(Errno::FAULT.into());
    }
    let patience = Patience::of(c, ns);
    let events = epoll.collect(c.viewer(), max);
    if events.is_empty() && !patience.is_over(c) {
        let mut wait = patience.wait();
        epoll.watch(c.viewer(), Ready::IN, &mut wait);
        return Err(Stop::Block(wait));
    }
    c.mem().write(a.u64(1), events.as_bytes())?;
    Ok(events.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::super::pipe::Pipe;
    use super::*;

    fn event(events: u32) -> Event {
        Event {
            events,
            data: 7_u64.to_ne_bytes(),
        }
    }

    fn member(events: u32) -> Member {
        let of = Weak::new();
        Member {
            fd: 0,
            of,
            event: event(events),
            spent: false,
            seen: (Ready::empty(), u64::MAX),
        }
    }

    #[test]
    fn level_triggered_member_is_reported_every_time() {
        let mut m = member(1);
        assert_eq!(m.look(Ready::IN | Ready::OUT, 1), Ready::IN);
        assert_eq!(m.look(Ready::IN, 1), Ready::IN);
    }

    #[test]
    fn edge_triggered_member_is_reported_once_an_edge() {
        let mut m = member(1 | EPOLLET);
        assert_eq!(m.look(Ready::IN, 1), Ready::IN);
        assert_eq!(m.look(Ready::IN, 1), Ready::empty());
        assert_eq!(m.look(Ready::IN, 2), Ready::IN);
        assert_eq!(m.look(Ready::empty(), 2), Ready::empty());
        assert_eq!(m.look(Ready::IN, 2), Ready::IN);
    }

    #[test]
    fn closed_description_leaves_the_set() {
        let sched = Arc::new(Sched::default());
        let epoll = Epoll::new(&sched);
        let (reader, _writer) = Pipe::pair(&sched, &Arc::default()).unwrap();
        let d = Description::new(reader, 0);
        assert_eq!(epoll.control(CTL_MOD, 3, &d, event(1)), Err(Errno::NOENT));
        assert_eq!(epoll.control(CTL_ADD, 3, &d, event(1)), Ok(()));
        assert_eq!(epoll.control(CTL_ADD, 3, &d, event(1)), Err(Errno::EXIST));
        assert_eq!(epoll.open_members().len(), 1);
        drop(d);
        assert!(epoll.open_members().is_empty());
    }

    #[test]
    fn circle_of_instances_gives_eloop() {
        let sched = Arc::new(Sched::default());
        let inner = Arc::new(Epoll::new(&sched));
        let outer = Epoll::new(&sched);
        let d = Description::new(Arc::clone(&inner) as Arc<dyn File>, 2);
        assert_eq!(inner.depth(&outer, 1), Ok(()));
        assert_eq!(outer.control(CTL_ADD, 3, &d, event(1)), Ok(()));
        assert_eq!(outer.depth(&inner, 1), Err(Errno::LOOP));
    }
}
