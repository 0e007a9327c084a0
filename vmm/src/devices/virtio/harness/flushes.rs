//! In which order a disk writes and flushes, and that it does both before it answers.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::{Bytes, GuestAddress};

use super::super::block::{Access, Block};
use super::super::disk_file::Storage;
use super::super::queue::Left;
use super::disk::{DISCARD, FLUSH, PUT, ZERO, header, range};
use super::{Buffer, DATA, Driver, NEXT, WRITE};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Did {
    Write { at: u64, first: u8, bytes: usize },
    Flush,
    Punch { at: u64, bytes: u64 },
}

/// Keeps nothing, and remembers what was done. Fails from operation number `fails` on.
#[derive(Clone, Debug, Default)]
struct Recorder {
    log: Arc<Mutex<Vec<Did>>>,
    fails: Option<usize>,
}

impl Recorder {
    fn add(&self, did: Did) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        if self.fails.is_some_and(|at| log.len() >= at) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        log.push(did);
        Ok(())
    }

    fn take(&self) -> Vec<Did> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Storage for Recorder {
    fn read_at(&self, to: &mut [u8], _at: u64) -> io::Result<()> {
        to.fill(0);
        Ok(())
    }

    fn write_at(&self, from: &[u8], at: u64) -> io::Result<()> {
        let (first, bytes) = (from[0], from.len());
        self.add(Did::Write { at, first, bytes })
    }

    fn flush(&self) -> io::Result<()> {
        self.add(Did::Flush)
    }

    fn punch(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.add(Did::Punch { at, bytes })
    }
}

fn disk(recorder: &Recorder, leave_out: u64) -> Driver {
    let storage = Box::new(recorder.clone());
    let block = Block::new(storage, 64, Access::ReadWrite, "x");
    Driver::new(Box::new(block)).start(leave_out)
}

/// One request; its status.
fn put(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let header = header(kind, sector);
    let parts: &[Buffer<'_>] = match data {
        [] => &[Buffer::Out(&header), Buffer::In(1)],
        data => &[Buffer::Out(&header), Buffer::Out(data), Buffer::In(1)],
    };
    driver.request(parts).0[0]
}

fn write(sector: u64, first: u8, sectors: usize) -> Did {
    let (at, bytes) = (sector * 512, sectors * 512);
    Did::Write { at, first, bytes }
}

#[test]
fn flush_is_answered_after_what_was_written_before_it() {
    let recorder = Recorder::default();
    let mut driver = disk(&recorder, 0);
    // Looked at after each answer: what was answered has been done.
    assert_eq!(put(&mut driver, PUT, 1, &[1; 1024]), 0);
    assert_eq!(recorder.take(), [write(1, 1, 2)]);
    assert_eq!(put(&mut driver, FLUSH, 0, &[]), 0);
    assert_eq!(recorder.take(), [Did::Flush]);
    assert_eq!(put(&mut driver, DISCARD, 0, &range(8, 8, 0)), 0);
    let (at, bytes) = (4096, 4096);
    assert_eq!(recorder.take(), [Did::Punch { at, bytes }]);
}

#[test]
fn driver_that_knows_no_flushes_gets_one_before_each_answer() {
    let recorder = Recorder::default();
    let mut driver = disk(&recorder, 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(put(&mut driver, PUT, 0, &[2; 512]), 0);
    assert_eq!(recorder.take(), [write(0, 2, 1), Did::Flush]);
    assert_eq!(put(&mut driver, ZERO, 0, &range(1, 1, 0)), 0);
    let (at, bytes) = (512, 512);
    assert_eq!(recorder.take(), [Did::Punch { at, bytes }, Did::Flush]);
}

/// A driver that does not wait for answers: writes and flushes announced at once.
#[test]
fn requests_announced_together_are_done_in_order() {
    let recorder = Recorder::default();
    let mut driver = disk(&recorder, 0);
    for i in 0..4_u16 {
        let at = DATA + u64::from(i) * 0x1000;
        let put = |bytes: &[u8], at| driver.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let kind = if i % 2 == 0 { PUT } else { FLUSH };
        put(&header(kind, u64::from(i)), at);
        put(&[i as u8; 512], at + 16);
        let status = i * 4 + 2;
        let second = if kind == PUT { status - 1 } else { status };
        driver.descriptor(i * 4, at, 16, NEXT, second);
        driver.descriptor(status - 1, at + 16, 512, NEXT, status);
        driver.descriptor(status, at + 2048, 1, WRITE, 0);
    }
    for head in [0, 4, 8] {
        driver.offer(head);
    }
    assert_eq!(driver.announce(12), Left::Nothing);
    let expected = [write(0, 0, 1), Did::Flush, write(2, 2, 1), Did::Flush];
    assert_eq!(recorder.take(), expected);
}

#[test]
fn driver_hears_of_what_failed() {
    let recorder = Recorder {
        fails: Some(1),
        ..Recorder::default()
    };
    let mut driver = disk(&recorder, 0);
    assert_eq!(put(&mut driver, PUT, 0, &[1; 512]), 0);
    assert_eq!(put(&mut driver, FLUSH, 0, &[]), 1);
    assert_eq!(put(&mut driver, PUT, 0, &[1; 512]), 1);
    assert_eq!(recorder.take().len(), 1);
}
