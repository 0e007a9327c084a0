//! Writing the pages of address spaces: of those that were kept once the guest goes on, of others while it stands still.

use std::io;
use std::sync::Arc;

use shadow_mm::{ImageRun, MapKind, Section, SectionPage, VadInfo, Vpn, VpnRange};

use super::look::{Look, Views, is_zero};
use super::save::{ImageWriter, Later, SaveError, whole};
use super::{ImageContent, Runs, SpaceData};
use crate::memory::{Backing, FRAME, Space, VmmPlatform};
use crate::snapshot::format::StoredPage;

/// Entries looked at in one go, with the space locked.
const AT_ONCE: usize = 512;

impl ImageWriter<'_> {
    /// Writes the pages of a space that was kept.
    pub(super) fn save_kept(&mut self, later: &Later<'_>) -> Result<(), SaveError> {
        let Some(data) = self.data.spaces.get_mut(later.at.0 as usize) else {
            debug_assert!(false, "no space {:?} was begun", later.at);
            return Ok(());
        };
        let mut data = std::mem::take(data);
        self.save_private(later.kept.space(), &later.private, &mut data)?;
        self.data.spaces[later.at.0 as usize] = data;
        Ok(())
    }

    /// Writes the pages of private mappings.
    pub(super) fn save_private(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        private: &[VadInfo<Backing>],
        data: &mut SpaceData,
    ) -> Result<(), SaveError> {
        data.working_set = self.working_set(space);
        let images = self.memory.manager.image_runs(space);
        for vad in private {
            self.save_pages(space, vad, &images, &mut data.pages)?;
        }
        Ok(())
    }

    /// The pages of one private mapping: what has an entry, and what only the image has.
    fn save_pages(
        &mut self,
        space: &Space<VmmPlatform>,
        vad: &VadInfo<Backing>,
        images: &[ImageRun<Backing>],
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let memory = self.memory;
        let views = self.views(vad);
        let mut at = vad.range.start();
        let mut part = Some(vad.range);
        while let Some(range) = part {
            let mut looks = Vec::new();
            let next = memory
                .manager
                .saved_pages(space, range, AT_ONCE, |vpn, page| {
                    let views = match is_over(images, vpn) {
                        true => Views::Left,
                        false => views,
                    };
                    looks.extend(Look::new(memory, page, views).map(|look| (vpn, look)));
                });
            for (vpn, look) in looks {
                self.save_image(images, VpnRange::between(at, vpn.get()), runs)?;
                self.save_page(space, vad, (vpn, look), runs)?;
                at = Vpn::new(vpn.get() + 1).unwrap_or(vpn);
            }
            part = next.and_then(|next| whole(range, next));
        }
        self.save_image(images, whole(vad.range, at), runs)
    }

    /// A template has the pages of programs and libraries too that the guest has mapped: its clones need not read them, and
    /// have them together. Not of files that the guest maps to be written to: those stay the files' to keep.
    fn views(&self, vad: &VadInfo<Backing>) -> Views {
        let MapKind::View { section, .. } = &vad.kind else {
            return Views::Left;
        };
        let file = self.memory.sections.of(section);
        match file.is_some_and(|file| file.writer().is_none()) && self.is_template() {
            true => Views::Taken,
            false => Views::Left,
        }
    }

    /// One page that has an entry.
    fn save_page(
        &mut self,
        space: &Space<VmmPlatform>,
        vad: &VadInfo<Backing>,
        (vpn, look): (Vpn, Look),
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let bytes = look.settle(self.memory, space, vpn)?;
        let zeroes = bytes.as_ref().is_none_or(|(_, bytes)| is_zero(bytes));
        if zeroes && vad.kind == MapKind::Anonymous {
            return Ok(());
        }
        let stored = match bytes {
            None => self.add_page(&[0; FRAME])?,
            Some((key, bytes)) => match self.written.get(&key) {
                Some(stored) => *stored,
                None => {
                    let stored = self.add_page(&bytes)?;
                    self.written.insert(key, stored);
                    stored
                }
            },
        };
        runs.push(vpn.get(), stored);
        Ok(())
    }

    /// Pages that are still as the snapshot has them that the guest came from.
    fn save_image(
        &mut self,
        images: &[ImageRun<Backing>],
        range: Option<VpnRange>,
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let Some(range) = range else { return Ok(()) };
        for run in images {
            let Some(part) = run.range.intersect(range) else {
                continue;
            };
            for vpn in part.iter() {
                let ahead = vpn.get() - run.range.start().get();
                let page = SectionPage::new(run.first.get() + ahead);
                let page = page.ok_or(SaveError::TooMany("pages"))?;
                let stored = self.image_page(&run.section, page)?;
                runs.push(vpn.get(), stored);
            }
        }
        Ok(())
    }

    /// Where a page of the old snapshot is in the new one: where it was, if the new one builds on it.
    pub(super) fn image_page(
        &mut self,
        section: &Section<Backing>,
        page: SectionPage,
    ) -> Result<StoredPage, SaveError> {
        let key = (section.id(), page);
        if let Some(stored) = self.copied.get(&key) {
            return Ok(*stored);
        }
        let gone = || SaveError::Read(io::ErrorKind::NotFound.into());
        let content = section.backing().ok_or_else(gone)?;
        let image = Arc::clone(&content.0).as_any();
        let image = image.downcast_ref::<ImageContent>();
        if self.base.is_some() && image.map(|image| image.snapshot().id()) == self.base {
            return Ok(StoredPage::new(page.get()));
        }
        let mut bytes = Box::new([0; FRAME]);
        let read = content.0.read_at(page.offset(), &mut bytes[..]);
        read.map_err(SaveError::Read)?;
        let stored = self.add_page(&bytes)?;
        self.copied.insert(key, stored);
        Ok(stored)
    }

    /// Pages used lately, in runs.
    fn working_set(&self, space: &Space<VmmPlatform>) -> Vec<(u64, u64)> {
        let mut set: Vec<(u64, u64)> = Vec::new();
        let end = self.memory.manager.limits().user_end.vpn().get();
        let mut part = Vpn::new(0).and_then(|zero| VpnRange::between(zero, end));
        while let Some(range) = part {
            let visit = |vpn: Vpn, page: shadow_mm::PageInfo| {
                if !page.accessed && page.age > 0 {
                    return;
                }
                match set.last_mut() {
                    Some((start, count)) if *start + *count == vpn.get() => *count += 1,
                    Some(_) | None => set.push((vpn.get(), 1)),
                }
            };
            let manager = &self.memory.manager;
            let next = manager.resident_from(space, range, AT_ONCE, visit);
            part = next.and_then(|next| whole(range, next));
        }
        set
    }
}

/// Whether a page lies over one of the runs, which rise.
fn is_over(images: &[ImageRun<Backing>], vpn: Vpn) -> bool {
    let after = images.partition_point(|run| run.range.start() <= vpn);
    images[..after]
        .last()
        .is_some_and(|run| run.range.contains(vpn))
}
