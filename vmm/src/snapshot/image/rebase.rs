//! A guest that was frozen goes on on its template's pages.
//!
//! When a template is written, what of the guest's private memory nobody has stored to since is there twice. The template's pages are
//! laid under its machine, as under a clone's, and its spaces are rebased ([`shadow_mm::Manager::rebase`]): what is theirs in
//! both places is the template's from then on, and the host gets the memory back. That takes the kept spaces, which tell what has
//! changed.
//!
//! A guest at work, one that has stored to much of it meanwhile, keeps its pages: it would pay a copy for each that it stores to next.
//! It is done once in a machine: layers stay as long as it does, and a guest that freezes itself again and again would hold on to all of
//! its templates. It is not done in a machine that has a layer already, a clone's.

use std::sync::Arc;

use shadow_mm::{ImageRun, Level, PfnRange, Rebased, Section, SectionError, SectionPage, Vpn};

use super::save::Later;
use super::{ImageContent, ImageData, Run, range};
use crate::memory::{Backing, Memory, PoolError};
use crate::snapshot::read::Snapshot;

/// Frames that are given back to the host in one go: nobody can have them meanwhile.
const AT_ONCE: usize = 512;

/// A guest is at work that has stored, while it was copied, to more pages than this (with those in the same leaf tables), and to more than
/// this part of all. One that stores to one page after the other, each of which is copied for it, gets through a quarter.
const AT_WORK: (u64, u64) = (4096, 8);

/// How often is waited for flushes that have the frames: one of many tables takes more than one turn.
const TURNS: usize = 4;

/// Why a guest does not go on on its template's pages. It goes on on its own.
#[derive(Debug, thiserror::Error)]
pub enum RebaseError {
    /// The template cannot be laid under the machine.
    #[error(transparent)]
    Layer(#[from] PoolError),
    /// There is no memory for the section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A space of the guest. Others may have been rebased.
    #[error(transparent)]
    Space(#[from] shadow_mm::RebaseError),
}

/// A guest whose memory was copied to a template, and is kept as it was copied.
#[derive(Debug)]
pub struct Copied<'a> {
    memory: &'a Memory,
    spaces: Vec<(Later<'a>, Vec<Run>)>,
}

impl<'a> Copied<'a> {
    pub(super) fn new(memory: &'a Memory, later: Vec<Later<'a>>, data: ImageData) -> Self {
        let mut spaces = data.spaces;
        let mut runs = |at: usize| {
            spaces
                .get_mut(at)
                .map(|data| std::mem::take(&mut data.pages.0))
        };
        let spaces = later.into_iter();
        let spaces = spaces.filter_map(|kept| runs(kept.at.0 as usize).map(|runs| (kept, runs)));
        Self {
            memory,
            spaces: spaces.collect(),
        }
    }

    /// Has the guest go on on the pages of `template`, to which it was copied, and ends the copy. Gives back how many of its pages are the
    /// template's now. No lock may be held that a system call may hold.
    ///
    /// # Errors
    /// See [`RebaseError`].
    pub fn rebase(self, template: &Arc<Snapshot>) -> Result<u64, RebaseError> {
        let Self { memory, spaces } = self;
        let pool = memory.manager.store();
        if pool.layers().next().is_some() || is_at_work(memory, &spaces) {
            return Ok(0);
        }
        let Some(layer) = template.layer()? else {
            return Ok(0);
        };
        let frames = pool.lay(layer)?;
        let section = section(memory, template, frames)?;
        let mut pages = 0;
        let done = spaces.iter().try_for_each(|(kept, runs)| {
            pages += rebase_space(memory, (kept, runs), &image(&section, runs))?;
            Ok(())
        });
        drop(spaces);
        give_back(memory, pages);
        tracing::debug!(pages, "the guest goes on on its template's pages");
        done.map(|()| pages)
    }
}

/// A section over the template's pages, which are these frames.
fn section(
    memory: &Memory,
    template: &Arc<Snapshot>,
    frames: PfnRange,
) -> Result<Section<Backing>, SectionError> {
    let content = Arc::new(ImageContent::new(Arc::clone(template)));
    let backing = Backing(content as _);
    memory.manager.create_frozen_section(backing, frames)
}

/// What the runs of a space are in the section.
fn image(section: &Section<Backing>, runs: &[Run]) -> Vec<ImageRun<Backing>> {
    let runs = runs.iter().filter_map(|run| {
        Some(ImageRun {
            range: range(run.start, run.count)?,
            section: section.clone(),
            first: SectionPage::new(run.stored)?,
        })
    });
    runs.collect()
}

/// The leaf tables that translate a space's runs: a page of each, and how many pages of the runs it has.
fn tables(runs: &[Run]) -> Vec<(Vpn, u64)> {
    let table = Level::Directory.pages();
    let mut tables: Vec<(Vpn, u64)> = Vec::new();
    for run in runs {
        let mut at = run.start;
        while at < run.end()
            && let Some(page) = Vpn::new(at)
        {
            let end = (at - at % table).saturating_add(table).min(run.end());
            match tables.last_mut() {
                Some((last, pages)) if last.get() / table == at / table => *pages += end - at,
                Some(_) | None => tables.push((page, end - at)),
            }
            at = end;
        }
    }
    tables
}

/// Whether the guest has changed much of what was kept.
fn is_at_work(memory: &Memory, spaces: &[(Later<'_>, Vec<Run>)]) -> bool {
    let (mut all, mut changed) = (0, 0);
    for (kept, runs) in spaces {
        for (page, pages) in tables(runs) {
            let (of, kept) = (&kept.of, kept.kept.space());
            match memory.manager.is_as_kept(of, kept, page) {
                Some(true) => all += pages,
                Some(false) => (all, changed) = (all + pages, changed + pages),
                // What has ended does not go on.
                None => break,
            }
        }
    }
    tracing::debug!(
        changed,
        all,
        "pages that were stored to while they were copied"
    );
    changed > AT_WORK.0 && changed.saturating_mul(AT_WORK.1) > all
}

/// Rebases a space, a leaf table after the other.
fn rebase_space(
    memory: &Memory,
    (kept, runs): (&Later<'_>, &[Run]),
    image: &[ImageRun<Backing>],
) -> Result<u64, shadow_mm::RebaseError> {
    let mut pages = 0;
    for (page, _) in tables(runs) {
        let done = memory
            .manager
            .rebase(&kept.of, kept.kept.space(), page, image);
        match done {
            Ok(Rebased { flush, pages: more }) => {
                memory.submit(flush);
                pages += more;
            }
            // It has ended meanwhile, or executes another program.
            Err(shadow_mm::RebaseError::SpaceDeleted) => return Ok(pages),
            Err(error) => return Err(error),
        }
    }
    Ok(pages)
}

/// Gives the host the memory of frames that came back.
fn give_back(memory: &Memory, mut pages: u64) {
    let mut turns = 0..TURNS;
    while turns.next().is_some() && memory.finish_flushes() {}
    while pages > 0 && !memory.manager.frames_short() {
        let most = pages.min(AT_ONCE as u64) as usize;
        match memory.manager.discard_free(most) {
            0 => return,
            done => pages -= done as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use shadow_mm::MapKind;

    use super::super::tests::{Guest, NoFiles, RW, done, get, map, put, sharing};
    use super::super::{ImageWriter, Saved};
    use super::*;
    use crate::snapshot::format::PartKind;
    use crate::snapshot::read::Trust;
    use crate::snapshot::records::SaveMemory;
    use crate::snapshot::write::Writer;

    const FIRST: u64 = 0x100;
    /// In another leaf table.
    const SECOND: u64 = 0x400;

    /// Has spaces written to a template, which go on with `meanwhile` before that is there, and then on the template.
    fn freeze(memory: &Memory, spaces: &[&Guest], meanwhile: impl FnOnce()) -> u64 {
        let mut nobody = |_| ();
        let writer = Writer::in_memory("a template").expect("memory");
        let mut image = ImageWriter::new(memory, writer, None, &mut nobody);
        for space in spaces {
            image.space(space, &mut NoFiles).expect("it is kept");
        }
        let copying = memory.begin_copy();
        meanwhile();
        let Saved {
            writer,
            spaces,
            copied,
        } = image.finish().expect("an image");
        let parts = [(PartKind::Spaces, spaces.as_slice())];
        let file = writer.finish(&parts).expect("a template").file;
        let template = Snapshot::from_file(file, "a template".into(), Trust::Sealed, None);
        let copied = copied.expect("it is kept until it lies on the template");
        let pages = copied.rebase(&Arc::new(template.expect("a template")));
        drop(copying);
        pages.expect("it lies on the template")
    }

    #[test]
    fn what_nobody_has_stored_to_is_the_templates_and_the_host_has_the_memory_back() {
        let memory = sharing(2000);
        let parent = memory.manager.create_space().expect("a space");
        for (start, count) in [(FIRST, 200), (SECOND, 100)] {
            let all = range(start, count).expect("a range");
            map(&memory, &parent, all, RW, MapKind::Anonymous);
            all.iter()
                .for_each(|page| put(&memory, &parent, page.get(), page.get()));
        }
        let child = memory.fork(&parent).expect("a fork");
        put(&memory, &child, FIRST, 1);
        assert_eq!(memory.manager.stats().data.active, 301);
        let blocks = || {
            memory
                .manager
                .store()
                .file()
                .metadata()
                .expect("a file")
                .blocks()
        };
        let before = blocks();
        let pages = freeze(&memory, &[&parent, &child], || {
            put(&memory, &parent, SECOND, 2);
        });
        assert_eq!(
            pages,
            200 + 300,
            "but for the table with the page that was stored to"
        );
        let stats = memory.manager.stats();
        assert_eq!((stats.data.active, stats.pages_rebased), (100, 500));
        // 202 frames less, and some page tables more.
        let less = before.saturating_sub(blocks()) / 8;
        assert!((180..=202).contains(&less), "{less} pages");
        let check = || {
            for (space, first, second) in [(&parent, FIRST, 2), (&child, 1, SECOND)] {
                assert_eq!(
                    (get(&memory, space, FIRST), get(&memory, space, SECOND)),
                    (first, second)
                );
                assert_eq!(get(&memory, space, FIRST + 199), FIRST + 199);
                assert_eq!(get(&memory, space, SECOND + 99), SECOND + 99);
            }
        };
        check();
        put(&memory, &parent, FIRST + 7, 3);
        assert_eq!(get(&memory, &child, FIRST + 7), FIRST + 7);
        let again = freeze(&memory, &[&parent, &child], || ());
        assert_eq!(again, 0, "a layer stays as long as the machine");
        check();
        assert_eq!(get(&memory, &parent, FIRST + 7), 3);
        done(&memory, &[&parent, &child]);
        let stats = memory.manager.stats();
        assert_eq!((stats.data.active, stats.commit_charged), (0, 0));
    }

    #[test]
    fn guest_at_work_keeps_its_pages() {
        const TABLES: u64 = 12;
        const PAGES: u64 = TABLES * 512;
        let memory = sharing(10_000);
        let guest = memory.manager.create_space().expect("a space");
        let all = range(SECOND, PAGES).expect("a range");
        map(&memory, &guest, all, RW, MapKind::Anonymous);
        all.iter()
            .for_each(|page| put(&memory, &guest, page.get(), page.get()));
        // A page in each of nine leaf tables.
        let stores = || (0..9).for_each(|n| put(&memory, &guest, SECOND + n * 512, n + 1));
        assert_eq!(freeze(&memory, &[&guest], stores), 0);
        let stats = memory.manager.stats();
        assert_eq!((stats.data.active, stats.pages_rebased), (PAGES, 0));
        assert_eq!(memory.manager.store().layers().count(), 0);
        // Once it waits, it goes on on its template.
        assert_eq!(freeze(&memory, &[&guest], || ()), PAGES);
        for n in 0..TABLES {
            let at = SECOND + n * 512;
            let first = if n < 9 { n + 1 } else { at };
            assert_eq!(get(&memory, &guest, at), first);
            assert_eq!(get(&memory, &guest, at + 1), at + 1);
        }
        done(&memory, &[&guest]);
    }
}
