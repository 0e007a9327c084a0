//! `select` and `pselect6`.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Stop, SysResult};
use super::super::file::Ready;
use super::super::time::{Timespec, Timeval};
use super::poll::{Patience, lookup, take_mask};

const ARGS: &[Arg] = &[Arg::Int, Arg::Hex, Arg::Hex, Arg::Hex, Arg::Hex];

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 23,
        name: "select",
        args: ARGS,
        handler: sys_select,
    },
    Entry {
        nr: 270,
        name: "pselect6",
        args: ARGS,
        handler: sys_pselect6,
    },
];

/// What each of the three sets reports (select(2), "Correspondence between select() and poll()").
const MEANING: [Ready; 3] = [
    Ready::IN
        .union(Ready::RDNORM)
        .union(Ready::HUP)
        .union(Ready::ERR),
    Ready::OUT.union(Ready::WRNORM).union(Ready::ERR),
    Ready::PRI,
];

/// An `fd_set` as long as the call's `nfds` says, in words of 64 descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct FdSet(Vec<u64>);

impl FdSet {
    fn empty(nfds: usize) -> Self {
        Self(vec![0; nfds.div_ceil(64)])
    }

    fn contains(&self, fd: usize) -> bool {
        self.0
            .get(fd / 64)
            .is_some_and(|word| word >> (fd % 64) & 1 != 0)
    }

    fn insert(&mut self, fd: usize) {
        if let Some(word) = self.0.get_mut(fd / 64) {
            *word |= 1 << (fd % 64);
        }
    }

    fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// The three sets of a call, with where they are in guest memory (0 for none).
struct Sets {
    nfds: usize,
    at: [u64; 3],
    sets: [FdSet; 3],
}

impl Sets {
    /// Reads them. `nfds` beyond the descriptors that can be open is cut, as Linux does.
    fn read(c: &Ctx<'_>, nfds: i32, at: [u64; 3]) -> Result<Self, Errno> {
        let nfds = usize::try_from(nfds).map_err(|_| Errno::INVAL)?;
        let table = c.with_process(|p| p.files.fds.keys().next_back().map_or(0, |fd| *fd + 1));
        let nfds = nfds.min((table as usize).max(1).next_multiple_of(64).max(256));
        let mut sets: [FdSet; 3] = std::array::from_fn(|_| FdSet::empty(nfds));
        for (set, &at) in sets.iter_mut().zip(&at) {
            if at != 0 {
                c.mem().read(at, set.0.as_mut_bytes())?;
            }
        }
        Ok(Self { nfds, at, sets })
    }

    /// Looks at all files: which are ready, or a wait for them.
    fn look(&self, c: &Ctx<'_>, patience: Patience) -> Result<[FdSet; 3], Stop> {
        let asked: Vec<usize> = (0..self.nfds)
            .filter(|&fd| self.sets.iter().any(|set| set.contains(fd)))
            .collect();
        let files = lookup(c, asked.iter().map(|&fd| fd as i32));
        let mut found: [FdSet; 3] = std::array::from_fn(|_| FdSet::empty(self.nfds));
        let mut wait = patience.wait();
        for (&fd, file) in asked.iter().zip(&files) {
            let file = &file.as_ref().ok_or(Errno::BADF)?.file;
            let now = file.ready(c.viewer());
            for ((set, found), meaning) in self.sets.iter().zip(&mut found).zip(MEANING) {
                if set.contains(fd) && now.intersects(meaning) {
                    found.insert(fd);
                }
            }
        }
        if found.iter().any(|set| set.len() > 0) || patience.is_over(c) {
            return Ok(found);
        }
        for (&fd, file) in asked.iter().zip(&files) {
            let wanted = self
                .sets
                .iter()
                .zip(MEANING)
                .filter(|(set, _)| set.contains(fd));
            let interest = wanted.fold(Ready::empty(), |all, (_, meaning)| all | meaning);
            if let Some(d) = file {
                d.file.watch(c.viewer(), interest, &mut wait);
            }
        }
        Err(Stop::Block(wait))
    }

    fn write(&self, c: &Ctx<'_>, found: &[FdSet; 3]) -> Result<(), Errno> {
        for (set, &at) in found.iter().zip(&self.at) {
            if at != 0 {
                c.mem().write(at, set.0.as_bytes())?;
            }
        }
        Ok(())
    }
}

fn select(c: &Ctx<'_>, a: &Args, patience: Patience) -> SysResult {
    let sets = Sets::read(c, a.i32(0), [a.u64(1), a.u64(2), a.u64(3)])?;
    let found = sets.look(c, patience)?;
    sets.write(c, &found)?;
    Ok(found.iter().map(FdSet::len).sum())
}

fn sys_select(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = a.u64(4);
    let ns = if at == 0 {
        None
    } else {
        Some(c.mem().read_obj::<Timeval>(at)?.to_ns()?)
    };
    let patience = Patience::of(c, ns);
    let result = select(c, a, patience);
    if !matches!(result, Err(Stop::Block(_)))
        && let Some(left) = patience.left(c)
    {
        // Linux ignores that it cannot be stored.
        let _ = c.mem().write_obj(at, &Timeval::from_ns(left));
    }
    result
}

/// The sixth argument of `pselect6`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct MaskArg {
    at: u64,
    size: u64,
}

fn sys_pselect6(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = a.u64(4);
    let ns = if at == 0 {
        None
    } else {
        Some(c.mem().read_obj::<Timespec>(at)?.to_ns()?)
    };
    if a.u64(5) != 0 {
        let mask: MaskArg = c.mem().read_obj(a.u64(5))?;
        take_mask(c, mask.at, mask.size)?;
    }
    let patience = Patience::of(c, ns);
    let result = select(c, a, patience);
    if !matches!(result, Err(Stop::Block(_)))
        && let Some(left) = patience.left(c)
    {
        // Linux ignores that it cannot be stored.
        let _ = c.mem().write_obj(at, &Timespec::from_ns(left));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_found_where_they_were_put() {
        let mut set = FdSet::empty(130);
        assert_eq!(set.0.len(), 3);
        for fd in [0, 63, 64, 129] {
            set.insert(fd);
        }
        assert!([0, 63, 64, 129].iter().all(|&fd| set.contains(fd)) && !set.contains(1));
        assert_eq!(set.0, vec![1 | 1 << 63, 1, 2]);
        assert_eq!(set.len(), 4);
        assert!(!set.contains(1000));
    }
}
