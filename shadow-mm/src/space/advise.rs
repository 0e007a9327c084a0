//! What a fork does with a mapping (`madvise`).

use crate::addr::{Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::space::Space;
use crate::vad::{MAX_MAPPINGS, MapKind, Vad, VadFlags};

/// Advice about a range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum VadAdvice {
    /// `MADV_DONTFORK`: a child does not get it.
    DontFork,
    /// `MADV_DOFORK`: a child gets it again.
    DoFork,
    /// `MADV_WIPEONFORK`: a child gets it empty. Anonymous memory only.
    WipeOnFork,
    /// `MADV_KEEPONFORK`: a child gets its content again.
    KeepOnFork,
}

/// Why advice was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AdviseError {
    /// Part of the range is not mapped (`ENOMEM`); what is mapped before it has taken the advice.
    #[error("page {vpn} is not mapped")]
    NotMapped {
        /// The first page that is not.
        vpn: Vpn,
    },
    /// Only anonymous memory can be wiped (`EINVAL`); nothing has changed.
    #[error("page {vpn} is not anonymous memory")]
    NotAnonymous {
        /// The first page of the mapping that is not.
        vpn: Vpn,
    },
    /// Cutting mappings would make one too many (`ENOMEM`); nothing has changed.
    #[error("the address space has its {MAX_MAPPINGS} mappings")]
    TooManyMappings,
}

impl<P: Platform> Manager<P> {
    /// Sets what forks do with a range.
    ///
    /// # Errors
    /// See [`AdviseError`].
    pub fn advise(
        &self,
        space: &Space<P>,
        range: VpnRange,
        advice: VadAdvice,
    ) -> Result<(), AdviseError> {
        let mut state = space.state.lock();
        let vads = &mut state.vads;
        let covered = vads.covered_prefix(range);
        let covered = covered.ok_or(AdviseError::NotMapped { vpn: range.start() })?;
        let file = |vad: &&Vad<P::Backing>| vad.kind != MapKind::Anonymous;
        if advice == VadAdvice::WipeOnFork
            && let Some(vad) = vads.overlapping(covered).find(file)
        {
            return Err(AdviseError::NotAnonymous {
                vpn: vad.range.start(),
            });
        }
        if vads.len_without(covered) + vads.overlapping(covered).count() > MAX_MAPPINGS {
            return Err(AdviseError::TooManyMappings);
        }
        for mut vad in vads.carve(covered) {
            vad.flags = advised(vad.flags, advice);
            vads.insert(vad);
        }
        match Vpn::new(covered.end()).filter(|vpn| range.contains(*vpn)) {
            Some(vpn) => Err(AdviseError::NotMapped { vpn }),
            None => Ok(()),
        }
    }
}

fn advised(flags: VadFlags, advice: VadAdvice) -> VadFlags {
    match advice {
        VadAdvice::DontFork => flags | VadFlags::DONT_FORK,
        VadAdvice::DoFork => flags - VadFlags::DONT_FORK,
        VadAdvice::WipeOnFork => flags | VadFlags::WIPE_ON_FORK,
        VadAdvice::KeepOnFork => flags - VadFlags::WIPE_ON_FORK,
    }
}
