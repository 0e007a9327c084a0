//! Page-granular pools, and the special pool that debugs what is allocated.

mod nonpaged;
mod special;

pub use nonpaged::{NonPagedPool, NotAllocated, PoolFull, PoolMode, PoolPages, PoolUsage};
pub use special::{Quarantine, QuarantineLimits, SLACK_BYTE, slack_damage};
