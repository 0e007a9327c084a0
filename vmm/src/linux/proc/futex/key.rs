//! What a word is known by: never a frame, which may change under it.
//!
//! The word of a shared mapping is known by the section and its place there, so that processes that map it
//! anywhere meet. Any other word is known by its address space and address; so is every word that is said to
//! be private (`FUTEX_PRIVATE_FLAG`), without a look at the mapping.
//!
//! A section's number is used again once nobody maps it. Who still waits for a word of a mapping that has gone
//! may be woken for another's sake then; as for any wake-up, the caller looks at the word again.

use serde::{Deserialize, Serialize};
use shadow_mm::{GuestVa, Prot, SectionId, Sharing, SpaceId};

use crate::linux::Errno;
use crate::linux::exec::USER_END;
use crate::linux::process::AddressSpace;
use crate::memory::Memory;

/// A word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FutexKey {
    /// A word of one address space.
    Private {
        /// The space.
        space: SpaceId,
        /// The word's address.
        va: u64,
    },
    /// A word of shared memory, or of a file that is mapped shared.
    Shared {
        /// Its section.
        section: SectionId,
        /// Where it is there, in bytes.
        offset: u64,
    },
}

/// Who may wait for a word and wake those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Scope {
    /// Threads that share the address space (`FUTEX_PRIVATE_FLAG`).
    Process,
    /// Whoever maps the word.
    Mapping,
}

/// The key of the word at `va`. No lock may be held.
///
/// # Errors
/// `EINVAL` if the word is not aligned, `EFAULT` if no word can be there: as Linux has it, a word that is
/// said to be private need not be mapped.
pub(crate) fn futex_key(
    memory: &Memory,
    mm: &AddressSpace,
    va: u64,
    scope: Scope,
) -> Result<FutexKey, Errno> {
    if !va.is_multiple_of(4) {
        return Err(Errno::INVAL);
    }
    let at = GuestVa::new(va).filter(|_| va < USER_END);
    let at = at.ok_or(Errno::FAULT)?;
    let space = mm.space.id();
    let private = FutexKey::Private { space, va };
    if scope == Scope::Process {
        return Ok(private);
    }
    let vad = memory.manager.find_vad(&mm.space, at.vpn());
    let vad = vad.filter(|vad| vad.prot.contains(Prot::READ));
    let vad = vad.ok_or(Errno::FAULT)?;
    match (vad.sharing(), vad.view()) {
        (Sharing::Shared, Some((section, first))) => {
            let offset = first + (va - vad.range.start().va().get());
            if offset / FRAME >= memory.manager.section_size(section).div_ceil(FRAME) {
                return Err(Errno::FAULT);
            }
            let section = section.id();
            Ok(FutexKey::Shared { section, offset })
        }
        (Sharing::Shared | Sharing::Private, _) => Ok(private),
    }
}

const FRAME: u64 = crate::memory::FRAME as u64;
