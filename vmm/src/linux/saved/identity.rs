//! What must not be the same in two guests made of one.
//!
//! * The sixteen random bytes at `AT_RANDOM` are new in every address space. The C library has taken its stack
//!   guard from the old ones when the program started, and keeps it; who asks `getauxval` later gets new
//!   ones. They are made when a program first runs: a guest that only waits has no page of its own.
//! * Ranges with `MADV_WIPEONFORK` are empty, as in a fork's child: random number generators keep their
//!   state there so that no copy of it is ever used.
//! * `getrandom(2)` and `/dev/urandom` ask the host each time and need nothing.

use shadow_mm::{GuestVa, VadFlags, Vpn};

use super::error::{Damaged, RestoreError};
use super::load::Loader;
use crate::linux::Errno;
use crate::linux::exec::stack::random_at;
use crate::linux::process::AddressSpace;
use crate::linux::user_mem::UserMem;
use crate::memory::Memory;
use std::sync::Arc;

/// Makes this guest another one than its siblings, but for what can wait until a program runs: [`renew`] is called before it
/// does.
pub(super) fn tell_apart(l: &Loader<'_>) -> Result<(), RestoreError> {
    for mm in l.spaces() {
        wipe(l, mm)?;
        mm.renew_later();
    }
    Ok(())
}

/// Does what was put off, and says whether it was: a program runs for the first time since it was made again. No lock may
/// be held.
pub fn renew(memory: &Memory, mm: &Arc<AddressSpace>) -> bool {
    let first = mm.take_renewal();
    if first && let Err(error) = new_random(memory, mm) {
        tracing::error!(%error, "a guest shares random bytes with another one");
    }
    first
}

fn new_random(memory: &Memory, mm: &Arc<AddressSpace>) -> Result<(), Errno> {
    let at = random_at(&mm.layout.lock().auxv);
    if let Some(at) = at {
        let mut bytes = [0; 16];
        let flags = rustix::rand::GetRandomFlags::empty();
        rustix::rand::getrandom(&mut bytes, flags)?;
        // A program may have unmapped or protected them: then nobody reads them.
        let _ = UserMem::new(memory, mm).write(at, &bytes);
    }
    Ok(())
}

fn wipe(l: &Loader<'_>, mm: &Arc<AddressSpace>) -> Result<(), Damaged> {
    let manager = &l.k.memory.manager;
    let mut from = GuestVa::new(0).map(GuestVa::vpn);
    while let Some(vad) = from.and_then(|at| manager.query(&mm.space, at)) {
        if vad.flags.contains(VadFlags::WIPE_ON_FORK) {
            let discarded = manager.discard(&mm.space, vad.range);
            l.k.memory.submit(discarded.flush);
            discarded
                .result
                .map_err(|_| Damaged("a range that is not mapped"))?;
        }
        from = Vpn::new(vad.range.end());
    }
    Ok(())
}
