//! A driver for tests: sets a device up through its registers, and puts requests into its queue. And
//! drivers that mean harm: whatever they write, the device answers or asks for a reset, and ends.
#![cfg_attr(not(test), expect(dead_code, reason = "fuzz targets use some of it"))]

#[cfg(test)]
mod concurrent;
#[cfg(test)]
mod console;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod flushes;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod registers;

use std::sync::Arc;

use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::mmio::Transport;
use super::queue::{Left, QUEUE_SIZE};
use crate::hv::kvm::board;
use crate::kernel::memory::{self, Memory};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NEEDS_RESET: u32 = 64;

pub(in crate::devices) struct Driver {
    pub(in crate::devices) transport: Arc<Transport>,
    memory: Memory,
    interrupt: EventFd,
    pub(in crate::devices) available: u16,
    /// The queue that is used.
    pub(in crate::devices) queue: u32,
}

/// A buffer: its bytes, or how many are to be written.
enum Buffer<'a> {
    Out(&'a [u8]),
    In(usize),
}

impl Driver {
    pub(in crate::devices) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory::create(1 << 20).unwrap();
        let interrupt = board::event().unwrap();
        let line = interrupt.try_clone().unwrap();
        let transport = Transport::new(device, &memory, line);
        Self {
            transport,
            memory,
            interrupt,
            available: 0,
            queue: 0,
        }
    }

    fn set(&self, register: u64, value: u32) {
        self.transport
            .mmio_write(MmioAddress(0), register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport
            .mmio_read(MmioAddress(0), register, &mut data);
        u32::from_le_bytes(data)
    }

    /// What Linux does, with the features in `leave_out` not taken.
    pub(in crate::devices) fn start(mut self, leave_out: u64) -> Self {
        self.set_up(leave_out);
        self
    }

    /// The same, for a device that was in use; nothing has been announced then.
    pub(in crate::devices) fn set_up(&mut self, leave_out: u64) {
        self.available = 0;
        for index in [AVAILABLE, USED] {
            self.fill(index + 2, &[0; 2]);
        }
        assert_eq!(self.get(0), 0x7472_6976);
        assert_eq!(self.get(4), 2);
        self.set(0x70, 0);
        self.set(0x70, 3);
        for page in 0..2 {
            self.set(0x14, page);
            let offered = self.get(0x10);
            self.set(0x24, page);
            self.set(0x20, offered & !((leave_out >> (page * 32)) as u32));
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11);
        self.set(0x30, self.queue);
        assert_eq!(self.get(0x34), u32::from(QUEUE_SIZE));
        self.set(0x38, u32::from(SIZE));
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            self.set(register, address as u32);
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15);
    }

    /// How many answers the used ring has; none if the device asks for a reset.
    pub(in crate::devices) fn used(&self) -> Option<u16> {
        let used = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        (self.get(0x70) & NEEDS_RESET == 0).then_some(used)
    }

    pub(in crate::devices) fn descriptor(
        &self,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(DESCRIPTORS + u64::from(index) * 16);
        self.memory.write_slice(&raw, at).unwrap();
    }

    fn announce(&mut self, head: u16) -> Left {
        self.offer(head);
        self.transport.serve(self.queue as usize)
    }

    /// Writes into memory.
    pub(in crate::devices) fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a request into the queue.
    pub(in crate::devices) fn offer(&mut self, head: u16) {
        let at = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.write_obj(self.available, index).unwrap();
    }

    /// One request; what was written into its buffers, and the length the device tells.
    fn request(&mut self, buffers: &[Buffer<'_>]) -> (Vec<u8>, u32) {
        let mut at = DATA;
        let mut to = Vec::new();
        for (index, buffer) in (0..).zip(buffers) {
            let more = if usize::from(index) + 1 < buffers.len() {
                NEXT
            } else {
                0
            };
            let (length, flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
                    (bytes.len(), more)
                }
                Buffer::In(length) => {
                    to.push((at, *length));
                    (*length, more | WRITE)
                }
            };
            self.descriptor(index, at, length as u32, flags, index + 1);
            at += length as u64;
        }
        let used_before: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        // An interrupt is wanted for the next answer.
        let event = GuestAddress(AVAILABLE + 4 + u64::from(SIZE) * 2);
        self.memory.write_obj(used_before, event).unwrap();
        assert_eq!(self.announce(0), Left::Nothing);
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, used_before.wrapping_add(1));
        let entry = USED + 4 + u64::from(used_before % SIZE) * 8;
        let length = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        assert!(self.interrupt.read().is_ok());
        assert_eq!(self.get(0x60) & 1, 1);
        self.set(0x64, 1);
        let mut all = Vec::new();
        for (at, length) in to {
            let mut part = vec![0; length];
            self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            all.extend(part);
        }
        (all, length)
    }
}
