//! Page-granular pools, and the special pool that debugs what is allocated.

mod special;

pub use special::{Quarantine, QuarantineLimits, SLACK_BYTE, slack_damage};
