//! An image as what a guest sees of it, for tests that compare guests.

use std::collections::BTreeMap;

use super::{Image, Runs, VadData};
use crate::memory::FRAME;
use crate::snapshot::format::StoredPage;

/// Pages by number; those of zeroes are not there.
pub(crate) type Pages = BTreeMap<u64, Vec<u8>>;

/// What an image has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dump {
    /// Each space: its mappings, its limits, its pages.
    pub(crate) spaces: Vec<(Vec<String>, (u64, u64), Pages)>,
    /// Each section, and its pages.
    pub(crate) sections: Vec<(String, Pages)>,
    /// Each file in memory: its length, and its pages.
    pub(crate) bytes: Vec<(u64, Pages)>,
}

impl Image {
    fn pages(&self, runs: &Runs) -> Pages {
        let mut pages = Pages::new();
        for run in &runs.0 {
            for ahead in 0..run.count {
                let mut bytes = vec![0; FRAME];
                let at = StoredPage::new(run.stored + ahead);
                let read = self.snapshot().read_pages(at, &mut bytes);
                assert_eq!(read.expect("a page"), FRAME);
                if bytes.iter().any(|&byte| byte != 0) {
                    pages.insert(run.start + ahead, bytes);
                }
            }
        }
        pages
    }

    /// All it has.
    pub(crate) fn dump(&self) -> Dump {
        let data = self.data();
        let mapping = |vad: &VadData| format!("{vad:?}");
        let spaces = data.spaces.iter().map(|space| {
            let vads = space.vads.iter().map(mapping).collect();
            (vads, space.limits, self.pages(&space.pages))
        });
        let sections = data.sections.iter().map(|section| {
            let what = (section.bytes, section.charged);
            let over = (section.content, section.writer);
            (format!("{what:?} {over:?}"), self.pages(&section.pages))
        });
        let bytes = data.bytes.iter();
        Dump {
            spaces: spaces.collect(),
            sections: sections.collect(),
            bytes: bytes.map(|b| (b.length, self.pages(&b.pages))).collect(),
        }
    }
}
