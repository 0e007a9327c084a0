//! Making the address space of an opened program.

use std::sync::Arc;

use rustix::io::Errno;

use super::elf::PHENT;
use super::error::ExecError;
use super::map::{Builder, Mappable, Places, Randomness};
use super::stack::{self, InitialStack, Strings, at};
use super::{MachineInfo, PAGE};
use crate::linux::fs::Caller;
use crate::linux::process::{AddressSpace, Credentials, MmLayout};

/// Clock ticks a second, as `sysconf(_SC_CLK_TCK)` tells.
const CLKTCK: u64 = 100;

/// All that goes into a new space.
pub(super) struct Image {
    pub(super) main: Mappable,
    pub(super) interpreter: Option<Mappable>,
    pub(super) strings: Strings,
    pub(super) execfn: Vec<u8>,
    /// For messages.
    pub(super) name: String,
    pub(super) stack_limit: u64,
}

impl Image {
    /// Makes the space; on failure it is gone again.
    pub(super) fn build(
        &self,
        caller: &Caller<'_>,
        random: Randomness,
    ) -> Result<(Arc<AddressSpace>, u64, u64), ExecError> {
        let k = caller.k;
        let space = k
            .memory
            .manager
            .create_space()
            .map_err(|_| ExecError::NoMemory {
                path: self.name.clone(),
            })?;
        // Dropping it deletes the space.
        let mm = AddressSpace::new(&k.memory, space, MmLayout::default());
        let path = || self.name.clone();
        match self.fill(caller, &mm, random) {
            Ok((rip, rsp)) => Ok((mm, rip, rsp)),
            Err(Errno::NOMEM) => Err(ExecError::NoMemory { path: path() }),
            Err(Errno::TOOBIG) => Err(ExecError::TooLong),
            Err(errno) => Err(ExecError::Map {
                path: path(),
                errno,
            }),
        }
    }

    fn fill(
        &self,
        caller: &Caller<'_>,
        mm: &Arc<AddressSpace>,
        random: Randomness,
    ) -> Result<(u64, u64), Errno> {
        let builder = Builder {
            memory: &caller.k.memory,
            mm,
            places: Places::new(self.stack_limit, random),
        };
        let bias = builder.program(&self.main, random.program)?;
        let entry = self.main.elf.entry.wrapping_add(bias);
        let (base, rip) = match &self.interpreter {
            Some(interpreter) => {
                let at = builder.interpreter(interpreter)?;
                let base = if interpreter.elf.relocatable {
                    interpreter.elf.start().wrapping_add(at)
                } else {
                    0
                };
                (base, interpreter.elf.entry.wrapping_add(at))
            }
            None => (0, entry),
        };
        let aux = self.auxv(caller.k.info, &caller.cred, bias, base);
        let content = self.stack(builder.places.stack_top, &aux);
        let rsp = content.sp;
        builder.stack(&content, self.main.elf.executable_stack)?;
        builder.layout(content, self.main.elf.end.wrapping_add(bias), random.heap);
        Ok((rip, rsp))
    }

    fn stack(&self, top: u64, aux: &[(u64, u64)]) -> InitialStack {
        stack::build(top, &self.strings, &self.execfn, random_bytes(), aux)
    }

    /// The auxiliary vector but for what points into the stack.
    fn auxv(&self, info: MachineInfo, cred: &Credentials, bias: u64, base: u64) -> Vec<(u64, u64)> {
        let elf = &self.main.elf;
        let secure = cred.uid[0] != cred.uid[1] || cred.gid[0] != cred.gid[1];
        let phdr = if elf.phdr == 0 {
            0
        } else {
            elf.phdr.wrapping_add(bias)
        };
        let vdso = info.vdso.map(|va| (at::SYSINFO_EHDR, va));
        vdso.into_iter()
            .chain([
                (at::MINSIGSTKSZ, info.minsigstksz),
                (at::HWCAP, info.hwcap),
                (at::PAGESZ, PAGE),
                (at::CLKTCK, CLKTCK),
                (at::PHDR, phdr),
                (at::PHENT, PHENT),
                (at::PHNUM, elf.phnum),
                (at::BASE, base),
                (at::FLAGS, 0),
                (at::ENTRY, elf.entry.wrapping_add(bias)),
                (at::UID, u64::from(cred.uid[0])),
                (at::EUID, u64::from(cred.uid[1])),
                (at::GID, u64::from(cred.gid[0])),
                (at::EGID, u64::from(cred.gid[1])),
                (at::SECURE, u64::from(secure)),
                (at::HWCAP2, info.hwcap2),
            ])
            .collect()
    }
}

/// Sixteen bytes from the host's generator. If it has none (it blocks only before the host's first
/// seconds are over), the clock and the process id, which only weakens the guest's stack protector.
fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    if got != Ok(bytes.len()) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        bytes[..8].copy_from_slice(&now.tv_nsec.to_le_bytes());
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    }
    bytes
}

/// Random words for the places of a program.
pub(super) fn randomness() -> Randomness {
    let words = [random_bytes(), random_bytes()].concat();
    let word =
        |n: usize| u64::from_le_bytes(words[n * 8..n * 8 + 8].try_into().unwrap_or_default());
    Randomness {
        stack: word(0),
        mappings: word(1),
        program: word(2),
        heap: word(3),
    }
}
