//! Every operation, done to the manager and to the model.

use std::collections::BTreeMap;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, DiscardError, Keep, MapError, MapKind, MapRequest, PAGE_SIZE, Placement, Prot,
    ProtectError, RemapError, RemapRequest, UnmapError, VadAdvice, VpnRange,
};

use super::common::{range, request, vpn};
use super::files::ViewPage;
use super::ops::{self, MapOp, Op};
use super::world::{Bytes, Outcome, PageModel, World, place};

impl World {
    pub(crate) fn perform(&mut self, op: Op) -> Outcome {
        let alive = self.processes.len();
        let pick = |which: u8| usize::from(which) % alive.max(1);
        // An absurd count means all that is left of the lower half, the supervisor slot included.
        let span = |page, count: u64| {
            let start = place(page).get();
            range(
                start,
                if count > 1 << 32 {
                    (1 << 35) - start
                } else {
                    count
                },
            )
        };
        match op {
            Op::Unpin(n, byte) => return self.unpin(usize::from(n), byte),
            Op::FinishRead(n, end) => return self.finish_read(usize::from(n), end),
            Op::StartWrite => return self.start_write(),
            Op::LookAtKept(n) => return self.look_at_kept(usize::from(n)),
            Op::DropKept(n) => return self.drop_kept(usize::from(n)),
            Op::Rebase(n) => return self.rebase(usize::from(n)),
            Op::FinishWrite(n, written) => return self.finish_write(usize::from(n), written),
            Op::FinishPageIn(n, end) => return self.finish_page_in(usize::from(n), end),
            Op::Acknowledge => {
                self.unacknowledged
                    .drain(..)
                    .for_each(|flush| self.mm.flushed(flush));
                return Ok(());
            }
            _ if alive == 0 => return Ok(()),
            _ => {}
        }
        match op {
            Op::Map(w, map) => self.map(pick(w), map, true),
            Op::MapAnywhere(w, map) => self.map(pick(w), map, false),
            Op::Unmap(w, p, n) => self.unmap(pick(w), span(p, n)),
            Op::Protect(w, p, n, prot) => self.protect(pick(w), span(p, n), prot),
            Op::Discard(w, p, n) => self.discard(pick(w), span(p, n)),
            Op::Attach(w, p, n, first) => self.attach(pick(w), span(p, n), first),
            Op::Reset(w, (most, unseen)) => self.reset(pick(w), Keep { most, unseen }),
            Op::Save(w) => self.save(pick(w)),
            Op::Keep(w) => self.keep(pick(w)),
            Op::KeepSection(number) => self.keep_section(number),
            Op::Advise(w, p, n, advice) => self.advise(pick(w), span(p, n), advice),
            Op::Remap {
                which,
                page,
                count,
                new_count,
                may_move,
                to,
            } => {
                let fixed = to.map(place);
                let old = span(page, count);
                self.remap(
                    pick(which),
                    RemapRequest {
                        old,
                        new_count,
                        may_move,
                        fixed,
                    },
                )
            }
            Op::Write(w, p, slot, byte) => {
                self.access(pick(w), place(p).get(), Access::Write, |bytes| {
                    bytes[usize::from(slot)] = byte;
                })
            }
            Op::WriteApart(w, first, apart, byte) => {
                ops::pages_apart(first, apart).try_for_each(|page| {
                    self.access(pick(w), place(page).get(), Access::Write, |bytes| {
                        bytes[0] = byte;
                    })?;
                    // Before the next one changes what was copied ahead.
                    self.note_copies();
                    Ok(())
                })
            }
            Op::Read(w, p) => self.access(pick(w), place(p).get(), Access::Read, |_| {}),
            Op::Execute(w, p) => self.access(pick(w), place(p).get(), Access::Execute, |_| {}),
            Op::Fork(w) => self.fork(pick(w)),
            Op::Exit(w) => self.exit(pick(w)),
            Op::Quota(w, pages) => self.set_quota(pick(w), pages),
            Op::Pin(w, p, write) => self.pin(pick(w), place(p).get(), write),
            Op::StartRead(w, p) => self.start_read(pick(w), place(p).get()),
            Op::Resize(number, size) => self.resize(number, size),
            Op::WriteBack(number, end) => self.write_back(number, end),
            Op::StoreBytes(number, page, what) => self.store_bytes(number, page, what),
            Op::LoadBytes(number, page) => self.load_bytes(number, page),
            Op::Punch(number, page, count) => self.punch(number, page, count),
            Op::Reserve(number, page, count) => self.reserve(number, page, count),
            Op::Forget(number) => self.forget_clean(number),
            Op::NewSection(number) => self.new_section(number),
            Op::Lay(number, over) => self.lay(number, over),
            Op::StartPageIn(w, p) => self.start_read(pick(w), place(p).get()),
            Op::Trim(w, goal, mode) => self.trim(pick(w), goal.into(), mode),
            Op::Unpin(..)
            | Op::LookAtKept(..)
            | Op::DropKept(..)
            | Op::Rebase(..)
            | Op::FinishRead(..)
            | Op::Acknowledge
            | Op::StartWrite
            | Op::FinishWrite(..)
            | Op::FinishPageIn(..) => Ok(()),
        }
    }

    fn map(&mut self, which: usize, map: MapOp, fixed: bool) -> Outcome {
        let MapOp {
            page,
            count,
            prot,
            view,
        } = map;
        let kind = match view {
            Some((file, first, sharing)) => MapKind::View {
                section: self.files[file].section.clone(),
                offset: first * PAGE_SIZE as u64,
                sharing,
            },
            None => MapKind::Anonymous,
        };
        let mut wanted: MapRequest<SimFile> = request(place(page).get(), count, prot, kind);
        if !fixed {
            let below = vpn(place(page).get() + 6);
            wanted.placement = Placement::Anywhere { hint: None, below };
        }
        let mapped = self.mm.map(&self.processes[which].cpu.space, wanted);
        let mapped = match mapped {
            // Whether it is promised is the manager's to say; that nothing changed shows later.
            Err(MapError::NoCommit { .. } | MapError::NoMemory) => return Ok(()),
            mapped => mapped.map_err(|e| e.to_string())?,
        };
        let id = self.processes[which].id;
        let start = mapped.range.start().get();
        let taken = self.processes[which]
            .pages
            .range(start..mapped.range.end())
            .next()
            .is_some();
        if !fixed && (taken || mapped.range.end() > place(page).get() + 6) {
            return Err(format!("placed at {:?}", mapped.range));
        }
        self.move_pins(id, |page| {
            (!mapped.range.contains(vpn(page))).then_some(page)
        });
        for n in 0..count {
            let view = view.map(|(file, first, sharing)| ViewPage {
                file,
                page: first + n,
                sharing,
            });
            let page = PageModel {
                prot,
                view,
                image: None,
                own: fresh(view),
                dont_fork: false,
                wipe: false,
            };
            self.processes[which].pages.insert(start + n, page);
        }
        self.flush(which, mapped.flush);
        Ok(())
    }

    fn unmap(&mut self, which: usize, range: VpnRange) -> Outcome {
        let flush = self.mm.unmap(&self.processes[which].cpu.space, range);
        let flush = match flush {
            Err(UnmapError::NoMemory) => return Ok(()),
            flush => flush.map_err(|e| e.to_string())?,
        };
        self.flush(which, flush);
        self.forget(which, range);
        Ok(())
    }

    fn forget(&mut self, which: usize, range: VpnRange) {
        let id = self.processes[which].id;
        self.processes[which]
            .pages
            .retain(|page, _| !range.contains(vpn(*page)));
        self.move_pins(id, |page| (!range.contains(vpn(page))).then_some(page));
    }

    /// The pages from the start up to the first hole.
    fn prefix(&self, which: usize, range: VpnRange) -> Vec<u64> {
        let pages = &self.processes[which].pages;
        (range.start().get()..range.end())
            .take_while(|page| pages.contains_key(page))
            .collect()
    }

    fn protect(&mut self, which: usize, range: VpnRange, prot: Prot) -> Outcome {
        let done = self
            .mm
            .protect(&self.processes[which].cpu.space, range, prot);
        self.flush(which, done.flush);
        if matches!(
            done.result,
            Err(ProtectError::NoCommit { .. } | ProtectError::NoMemory { .. })
        ) {
            return Ok(());
        }
        let prefix = self.prefix(which, range);
        for page in &prefix {
            if let Some(model) = self.processes[which].pages.get_mut(page) {
                model.prot = prot;
            }
        }
        agree(
            "protect",
            done.result.is_ok(),
            prefix.len() as u64 == range.count(),
        )
    }

    fn discard(&mut self, which: usize, range: VpnRange) -> Outcome {
        let done = self.mm.discard(&self.processes[which].cpu.space, range);
        self.flush(which, done.flush);
        if done.result == Err(DiscardError::NoMemory) {
            return Ok(());
        }
        let hole = range.start().get() + self.prefix(which, range).len() as u64;
        let expected = if hole == range.end() {
            Ok(())
        } else {
            Err(DiscardError::NotMapped { vpn: vpn(hole) })
        };
        let process = &mut self.processes[which];
        for (_, model) in process.pages.range_mut(range.start().get()..range.end()) {
            (model.own, model.image) = (fresh(model.view), None);
        }
        let id = process.id;
        self.move_pins(id, |page| (!range.contains(vpn(page))).then_some(page));
        agree("discard", done.result, expected)
    }

    fn advise(&mut self, which: usize, range: VpnRange, advice: VadAdvice) -> Outcome {
        let result = self
            .mm
            .advise(&self.processes[which].cpu.space, range, advice);
        let prefix = self.prefix(which, range);
        let pages = &mut self.processes[which].pages;
        let file = prefix.iter().any(|page| pages[page].view.is_some());
        if advice == VadAdvice::WipeOnFork && file {
            return agree("advise", result.is_ok(), false);
        }
        for page in &prefix {
            let Some(model) = pages.get_mut(page) else {
                continue;
            };
            match advice {
                VadAdvice::DontFork => model.dont_fork = true,
                VadAdvice::DoFork => model.dont_fork = false,
                VadAdvice::WipeOnFork => model.wipe = true,
                VadAdvice::KeepOnFork => model.wipe = false,
            }
        }
        agree(
            "advise",
            result.is_ok(),
            prefix.len() as u64 == range.count(),
        )
    }

    fn remap(&mut self, which: usize, request: RemapRequest) -> Outcome {
        let space = self.processes[which].cpu.space.clone();
        let whole = self.mm.find_vad(&space, request.old.start());
        let whole = whole.filter(|vad| vad.range.end() >= request.old.end());
        let mapped = match self.mm.remap(&space, request) {
            Ok(mapped) => mapped,
            Err(RemapError::NotOneMapping { .. }) => return agree("remap", whole.is_none(), true),
            // Whether there is room is the manager's to say; that nothing changed shows later.
            Err(_) => return Ok(()),
        };
        if whole.is_none() {
            return Err("remapped a hole".into());
        }
        let (old, new) = (request.old, mapped.range);
        self.flush(which, mapped.flush);
        let id = self.processes[which].id;
        let moved: BTreeMap<u64, PageModel> = (old.start().get()..old.end())
            .filter_map(|page| Some((page, self.processes[which].pages.remove(&page)?)))
            .collect();
        if new.start() != old.start() {
            self.forget(which, new);
        }
        let to = |page: u64| {
            let ahead = page - old.start().get();
            (ahead < new.count()).then(|| new.start().get() + ahead)
        };
        self.move_pins(id, |page| {
            if old.contains(vpn(page)) {
                to(page)
            } else {
                Some(page)
            }
        });
        let pattern = moved[&old.start().get()];
        for ahead in 0..new.count() {
            let page = moved.get(&(old.start().get() + ahead)).copied();
            let page = page.unwrap_or_else(|| grown(pattern, ahead));
            self.processes[which]
                .pages
                .insert(new.start().get() + ahead, page);
        }
        Ok(())
    }
}

/// What a space has of a page before it stores to it: anonymous memory is its own from the start.
pub(crate) fn fresh(view: Option<ViewPage>) -> Option<Bytes> {
    view.is_none().then(Bytes::default)
}

/// A page a remapped mapping gained, `ahead` pages above its start.
fn grown(pattern: PageModel, ahead: u64) -> PageModel {
    let view = pattern.view.map(|view| ViewPage {
        page: view.page + ahead,
        ..view
    });
    PageModel {
        view,
        image: None,
        own: fresh(view),
        ..pattern
    }
}

pub(crate) fn agree<T: PartialEq + Copy + core::fmt::Debug>(
    what: &str,
    got: T,
    expected: T,
) -> Outcome {
    if got == expected {
        Ok(())
    } else {
        Err(format!("{what}: got {got:?}, expected {expected:?}"))
    }
}
