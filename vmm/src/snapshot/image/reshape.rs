//! Giving a space the mappings and the image back that it had.
//!
//! Where a mapping is another one than it was, or the image under it was taken away, it is unmapped and mapped again; where it
//! is the same, its page tables stay. What it costs goes by the number of mappings, and by the pages that are unmapped.

use shadow_mm::{
    ImageError, ImageRun, MapError, MapKind, MapRequest, PAGE_SIZE, Placement, Section, SpaceUsage,
    UnmapError, VadInfo, Vpn, VpnRange,
};

use crate::memory::{Backing, Memory, Space, VmmPlatform};

/// Why a space does not get back what it had. It has something in between.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReshapeError {
    #[error("a mapping cannot be taken away")]
    Unmap(#[from] UnmapError),
    #[error("a mapping cannot be made again")]
    Map(#[from] MapError),
    #[error("pages cannot be put under a mapping")]
    Image(#[from] ImageError),
    /// It is charged for more or less than it was, or has other mappings.
    #[error("the mappings are not what they were")]
    Different,
}

/// What a space has mapped, and what lies under it.
#[derive(Clone, Debug)]
pub(super) struct Form {
    vads: Vec<VadInfo<Backing>>,
    runs: Vec<ImageRun<Backing>>,
    sums: (u64, u64, u64),
}

impl Form {
    /// What `space` has.
    pub(super) fn of(memory: &Memory, space: &Space<VmmPlatform>) -> Self {
        let mut vads = Vec::new();
        let mut from = Vpn::new(0);
        while let Some(vad) = from.and_then(|from| memory.manager.query(space, from)) {
            from = Vpn::new(vad.range.end());
            vads.push(vad);
        }
        Self {
            vads,
            runs: memory.manager.image_runs(space),
            sums: sums(&memory.manager.usage(space)),
        }
    }

    /// The same without what is in these ranges, which rise.
    pub(super) fn without(mut self, ranges: &[VpnRange]) -> Self {
        let gone = |vad: &VadInfo<Backing>| ranges.iter().any(|r| r.intersect(vad.range).is_some());
        for vad in self.vads.extract_if(.., |vad| gone(vad)) {
            let pages = vad.range.count();
            let charged = if vad.charged { pages } else { 0 };
            let (mapped, mappings, charges) = self.sums;
            self.sums = (mapped - pages, mappings - 1, charges - charged);
        }
        let runs = std::mem::take(&mut self.runs).into_iter();
        self.runs = runs.flat_map(|run| outside(&run, ranges)).collect();
        self
    }

    fn edges(&self) -> impl Iterator<Item = u64> {
        let vads = self.vads.iter().map(|vad| vad.range);
        let all = vads.chain(self.runs.iter().map(|run| run.range));
        all.flat_map(|range| [range.start().get(), range.end()])
    }

    /// To look at it page by page, rising.
    fn look(&self) -> Looking<'_> {
        Looking {
            form: self,
            vad: 0,
            run: 0,
        }
    }
}

/// The parts of a run that are in none of these ranges, which rise.
fn outside(run: &ImageRun<Backing>, ranges: &[VpnRange]) -> Vec<ImageRun<Backing>> {
    let mut from = run.range.start().get();
    let edges = ranges
        .iter()
        .map(|range| (range.start().get(), range.end()));
    let edges = edges.chain([(run.range.end(), run.range.end())]);
    let mut parts = Vec::new();
    for (start, end) in edges {
        let between = Vpn::new(from).and_then(|from| VpnRange::between(from, start));
        parts.extend(between.and_then(|between| run.part(between)));
        from = from.max(end);
    }
    parts
}

/// Pages mapped, mappings, and pages charged.
fn sums(usage: &SpaceUsage) -> (u64, u64, u64) {
    (usage.virtual_pages, usage.mappings, usage.charged)
}

/// A form, looked at from some page on.
struct Looking<'a> {
    form: &'a Form,
    vad: usize,
    run: usize,
}

/// What is at a page: its mapping, and its run of the image.
type At<'a> = (Option<&'a VadInfo<Backing>>, Option<&'a ImageRun<Backing>>);

impl<'a> Looking<'a> {
    /// What is at a page, which is not below the one before.
    fn at(&mut self, page: Vpn) -> At<'a> {
        let (vads, runs) = (&self.form.vads, &self.form.runs);
        while vads
            .get(self.vad)
            .is_some_and(|v| v.range.end() <= page.get())
        {
            self.vad += 1;
        }
        while runs
            .get(self.run)
            .is_some_and(|r| r.range.end() <= page.get())
        {
            self.run += 1;
        }
        (
            vads.get(self.vad).filter(|vad| vad.range.contains(page)),
            runs.get(self.run).filter(|run| run.range.contains(page)),
        )
    }
}

/// Where in its section a page is that is `page` here.
fn section_page(
    (section, start, first): (&Section<Backing>, Vpn, u64),
    page: Vpn,
) -> (&Section<Backing>, u64) {
    (section, first + (page.get() - start.get()))
}

/// Whether the same is at a page.
fn alike((vad, run): At<'_>, (other, under): At<'_>, page: Vpn) -> bool {
    let shows = |vad: &VadInfo<Backing>| match &vad.kind {
        MapKind::Anonymous => None,
        MapKind::View {
            section,
            offset,
            sharing,
        } => {
            let first = offset / PAGE_SIZE as u64;
            let (section, at) = section_page((section, vad.range.start(), first), page);
            Some((section.clone(), at, *sharing))
        }
    };
    let mapping = |vad: &VadInfo<Backing>| (vad.prot, vad.flags, vad.tag, vad.charged, shows(vad));
    let image = |run: &ImageRun<Backing>| {
        let of = (&run.section, run.range.start(), run.first.get());
        let (section, at) = section_page(of, page);
        (section.clone(), at)
    };
    vad.map(mapping) == other.map(mapping) && run.map(image) == under.map(image)
}

/// Has `space` be of that form, but for its pages.
pub(super) fn reshape(
    memory: &Memory,
    space: &Space<VmmPlatform>,
    form: &Form,
) -> Result<(), ReshapeError> {
    let now = Form::of(memory, space);
    let differ = differences(&now, form);
    for range in &differ {
        memory.submit(memory.manager.unmap(space, *range)?);
    }
    for range in &differ {
        map(memory, space, (form, *range))?;
    }
    match sums(&memory.manager.usage(space)) == form.sums {
        true => Ok(()),
        false => Err(ReshapeError::Different),
    }
}

/// The ranges in which two forms are not the same, rising; as few as there can be.
fn differences(one: &Form, other: &Form) -> Vec<VpnRange> {
    let mut edges: Vec<u64> = one.edges().chain(other.edges()).collect();
    edges.sort_unstable();
    edges.dedup();
    let (mut a, mut b) = (one.look(), other.look());
    let mut found: Vec<VpnRange> = Vec::new();
    // Nothing that is the same has come since the last one.
    let mut open = false;
    for part in edges.windows(2) {
        let range = Vpn::new(part[0]).and_then(|start| VpnRange::between(start, part[1]));
        let Some(range) = range else { continue };
        let (has, had) = (a.at(range.start()), b.at(range.start()));
        if alike(has, had, range.start()) {
            open &= has.0.is_none();
            continue;
        }
        let joined = found.last().filter(|_| open);
        let joined = joined.and_then(|last| VpnRange::between(last.start(), range.end()));
        match (joined, found.last_mut()) {
            (Some(joined), Some(last)) => *last = joined,
            (_, _) => found.push(range),
        }
        open = true;
    }
    found
}

/// Maps what a form has in a range where nothing is mapped.
fn map(
    memory: &Memory,
    space: &Space<VmmPlatform>,
    (form, range): (&Form, VpnRange),
) -> Result<(), ReshapeError> {
    let first = form
        .vads
        .partition_point(|vad| vad.range.end() <= range.start().get());
    for vad in &form.vads[first..] {
        let Some(part) = vad.range.intersect(range) else {
            break;
        };
        let request = MapRequest {
            placement: Placement::FixedNoReplace(part.start()),
            count: part.count(),
            prot: vad.prot,
            kind: vad.kind_from(part.start()),
            flags: vad.flags,
            tag: vad.tag,
        };
        memory.submit(memory.manager.map(space, request)?.flush);
    }
    let first = form
        .runs
        .partition_point(|run| run.range.end() <= range.start().get());
    for run in &form.runs[first..] {
        let Some(part) = run.part(range) else {
            break;
        };
        memory
            .manager
            .attach_image(space, part.range, &part.section, part.first)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
