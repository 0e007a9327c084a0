//! The quotas of the model: nothing is charged to a space beyond its own, whatever it does.

use shadow_mm::CommitLimit;

use super::verbs::agree;
use super::world::{Outcome, World};

/// What a space may be charged, and what it was charged when somebody looked last.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quota {
    limit: CommitLimit,
    charged: u64,
}

impl Quota {
    /// A child's.
    pub(crate) fn inherited(self) -> Self {
        Self { charged: 0, ..self }
    }
}

impl World {
    pub(crate) fn set_quota(&mut self, which: usize, pages: Option<u64>) -> Outcome {
        let limit = pages.map_or(CommitLimit::Unlimited, CommitLimit::Pages);
        let process = &mut self.processes[which];
        self.mm.set_quota(&process.cpu.space, limit);
        process.quota.limit = limit;
        Ok(())
    }

    /// What grew since the last look is within its quota; what was above it when that was set may stay.
    pub(crate) fn check_quotas(&mut self) -> Outcome {
        for process in &mut self.processes {
            let usage = self.mm.usage(&process.cpu.space);
            let Quota { limit, charged } = process.quota;
            agree("quota", usage.quota, limit)?;
            if let CommitLimit::Pages(pages) = limit
                && usage.charged > charged.max(pages)
            {
                return Err(format!(
                    "{} pages charged, the quota is {pages}",
                    usage.charged
                ));
            }
            process.quota.charged = usage.charged;
        }
        Ok(())
    }
}
