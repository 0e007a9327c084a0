//! Who lets go of files, beside who looks at them.

use std::sync::mpsc::channel;
use std::time::Duration;

use super::super::{PageFile, paging_tests};
use super::*;
use crate::memory::content::Content;

/// A file that nobody reads.
#[derive(Debug)]
struct Empty;

impl Content for Empty {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn version(&self) -> io::Result<Version> {
        Ok(Version::default())
    }
    fn id(&self) -> FileId {
        FileId::Host { dev: 1, ino: 1 }
    }
    fn keeps(&self) -> bool {
        true
    }
    fn identity(&self) -> (u64, u64) {
        (1, 1)
    }
    fn path(&self) -> Vec<u8> {
        b"/empty".to_vec()
    }
    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

/// When the files of a guest that has ended are let go, while they are written back, their sections are gone.
#[test]
fn sections_of_a_guest_that_has_ended_are_gone_though_somebody_looked() {
    for lets_go in [Sections::release, Sections::close] {
        let file = PageFile::create(&std::env::temp_dir(), 1 << 20).unwrap();
        let memory = paging_tests::memory(file);
        let content = Backing(Arc::new(Empty));
        let mapped = memory.sections.open(&memory, &content, Intent::Read);
        drop(mapped.unwrap());
        let looked = memory.sections.look();
        assert_eq!(
            (looked.files.len(), memory.manager.stats().sections),
            (1, 1)
        );
        let (tell, told) = channel();
        let of = Arc::clone(&memory);
        let thread = std::thread::spawn(move || {
            lets_go(&of.sections, &of);
            tell.send(of.manager.stats().sections).unwrap();
        });
        // It is not done before who looks is: if it is, it has left something.
        let early = told.recv_timeout(Duration::from_millis(100)).ok();
        drop(looked);
        let left = early.unwrap_or_else(|| told.recv().unwrap());
        assert_eq!(left, 0);
        thread.join().unwrap();
    }
}
