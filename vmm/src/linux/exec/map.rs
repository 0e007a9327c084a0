//! Putting a program's segments, its stack and its layout into a fresh address space.

use std::sync::Arc;

use rustix::io::Errno;
use shadow_mm::{
    MapKind, MapRequest, Placement, Prot, Section, Sharing, VadFlags, VadTag, Vpn, VpnRange,
};

use super::elf::{Elf, Segment};
use super::stack::InitialStack;
use super::{MIN_VA, PAGE, USER_END, map_errno, page_down, page_up};
use crate::linux::mm::TAG_STACK;
use crate::linux::process::{AddressSpace, MmLayout};
use crate::linux::user_mem::UserMem;
use crate::memory::{Backing, Memory};

/// Where position-independent programs start: two thirds of Linux's address space.
const PIE_BASE: u64 = 0x5555_5555_4000;
/// Random pages added to it (`mmap_rnd_bits`), and taken from the place of the mappings.
const MMAP_RANDOM: u64 = (1 << 28) - 1;
/// Random pages between the end of user addresses and the stack.
const STACK_RANDOM: u64 = (1 << 22) - 1;
/// Random pages between a program's data and its heap.
const BRK_RANDOM: u64 = (1 << 13) - 1;
/// Pages kept free below the stack (`stack_guard_gap`).
const STACK_GUARD: u64 = 256;
/// Smallest and largest stack, whatever its limit.
const STACK_RANGE: (u64, u64) = (512 << 10, 1 << 30);

/// Random words for the layout; all zero for a fixed one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Randomness {
    pub(super) stack: u64,
    pub(super) mappings: u64,
    pub(super) program: u64,
    pub(super) heap: u64,
}

/// A file to be mapped.
#[derive(Clone, Debug)]
pub(super) struct Mappable {
    pub(super) elf: Elf,
    pub(super) section: Section<Backing>,
}

/// Addresses of the stack and the mappings, fixed before anything is mapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) stack_low: u64,
    pub(super) stack_top: u64,
    pub(super) mmap_top: u64,
}

impl Places {
    /// For a stack of at most `limit` bytes.
    pub(super) fn new(limit: u64, random: Randomness) -> Self {
        let stack_top = USER_END - PAGE - (random.stack & STACK_RANDOM) * PAGE;
        let size = page_down(limit.clamp(STACK_RANGE.0, STACK_RANGE.1));
        let stack_low = stack_top - size;
        let mmap_top = stack_low - STACK_GUARD * PAGE - (random.mappings & MMAP_RANDOM) * PAGE;
        Self {
            stack_low,
            stack_top,
            mmap_top,
        }
    }
}

/// A space under construction.
pub(super) struct Builder<'a> {
    pub(super) memory: &'a Memory,
    pub(super) mm: &'a Arc<AddressSpace>,
    pub(super) places: Places,
}

impl Builder<'_> {
    /// Maps the program itself and returns what is to be added to its link-time addresses.
    pub(super) fn program(&self, program: &Mappable, random: u64) -> Result<u64, Errno> {
        let elf = &program.elf;
        let bias = if elf.relocatable {
            let base = PIE_BASE + (random & MMAP_RANDOM) * PAGE;
            (base & !(elf.align - 1)).wrapping_sub(elf.start())
        } else {
            0
        };
        self.segments(program, bias)?;
        Ok(bias)
    }

    /// Maps the interpreter below the other mappings and returns its bias.
    pub(super) fn interpreter(&self, interpreter: &Mappable) -> Result<u64, Errno> {
        let elf = &interpreter.elf;
        let bias = if elf.relocatable {
            let place = self.map(MapRequest {
                placement: Placement::Anywhere {
                    hint: None,
                    below: vpn(self.places.mmap_top)?,
                },
                count: elf.span_pages(),
                prot: Prot::empty(),
                kind: MapKind::Anonymous,
                flags: VadFlags::NO_RESERVE,
                tag: VadTag::default(),
            })?;
            let flush = self
                .memory
                .manager
                .unmap(&self.mm.space, place)
                .map_err(|_| Errno::NOMEM)?;
            self.memory.submit(flush);
            place.start().va().get().wrapping_sub(elf.start())
        } else {
            0
        };
        self.segments(interpreter, bias)?;
        Ok(bias)
    }

    fn segments(&self, file: &Mappable, bias: u64) -> Result<(), Errno> {
        let low = file.elf.start().wrapping_add(bias);
        let high = low
            .checked_add(file.elf.span_pages() * PAGE)
            .ok_or(Errno::NOMEM)?;
        if low < MIN_VA || high > self.places.mmap_top {
            return Err(Errno::NOMEM);
        }
        file.elf
            .segments
            .iter()
            .try_for_each(|segment| self.segment(file, segment, bias))
    }

    fn segment(&self, file: &Mappable, segment: &Segment, bias: u64) -> Result<(), Errno> {
        let at = segment.start.wrapping_add(bias);
        if segment.file_pages > 0 {
            self.map(MapRequest {
                placement: Placement::Fixed(vpn(at)?),
                count: segment.file_pages,
                prot: segment.prot,
                kind: MapKind::View {
                    section: file.section.clone(),
                    offset: segment.offset,
                    sharing: Sharing::Private,
                },
                flags: VadFlags::empty(),
                tag: VadTag::default(),
            })?;
        }
        if let Some(from) = segment
            .zero_from
            .filter(|_| segment.prot.contains(Prot::WRITE))
        {
            let from = from.wrapping_add(bias);
            let zeros = [0; PAGE as usize];
            UserMem::new(self.memory, self.mm)
                .write(from, &zeros[..(page_up(from) - from) as usize])?;
        }
        // As Linux's default policy: what can obviously never be there is refused at once.
        if segment.zero_pages > u64::from(self.memory.manager.layout().data.count) {
            return Err(Errno::NOMEM);
        }
        if segment.zero_pages > 0 {
            self.map(MapRequest {
                placement: Placement::Fixed(vpn(at + segment.file_pages * PAGE)?),
                count: segment.zero_pages,
                prot: segment.zero_prot(),
                kind: MapKind::Anonymous,
                flags: VadFlags::empty(),
                tag: VadTag::default(),
            })?;
        }
        Ok(())
    }

    /// Maps the stack and writes its initial content.
    pub(super) fn stack(&self, content: &InitialStack, executable: bool) -> Result<(), Errno> {
        let Places {
            stack_low,
            stack_top,
            ..
        } = self.places;
        if content.sp < stack_low {
            return Err(Errno::TOOBIG);
        }
        let exec = if executable {
            Prot::EXEC
        } else {
            Prot::empty()
        };
        self.map(MapRequest {
            placement: Placement::FixedNoReplace(vpn(stack_low)?),
            count: (stack_top - stack_low) / PAGE,
            prot: Prot::READ | Prot::WRITE | exec,
            kind: MapKind::Anonymous,
            flags: VadFlags::NO_RESERVE | VadFlags::GROWS_DOWN,
            tag: TAG_STACK,
        })?;
        UserMem::new(self.memory, self.mm).write(content.sp, &content.bytes)
    }

    /// Notes where things are.
    pub(super) fn layout(&self, content: InitialStack, end: u64, random: u64) {
        let brk = page_up(end) + (random & BRK_RANDOM) * PAGE;
        *self.mm.layout.lock() = MmLayout {
            brk_start: brk,
            brk,
            stack: (self.places.stack_low, self.places.stack_top),
            mmap_top: self.places.mmap_top,
            args: content.args,
            envs: content.envs,
            auxv: content.auxv,
        };
    }

    fn map(&self, request: MapRequest<Backing>) -> Result<VpnRange, Errno> {
        let mapped = self
            .memory
            .manager
            .map(&self.mm.space, request)
            .map_err(map_errno)?;
        self.memory.submit(mapped.flush);
        Ok(mapped.range)
    }
}

fn vpn(va: u64) -> Result<Vpn, Errno> {
    Vpn::new(va / PAGE).ok_or(Errno::NOMEM)
}
