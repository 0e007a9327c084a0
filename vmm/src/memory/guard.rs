//! What `--guard-alloc` counts. The guards themselves are the Linux layer's: `linux::mm::guard`.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Lines said at most; everything is counted.
const SAID_MAX: u64 = 100;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the guard pages and patterns of a machine came to.
        #[derive(Debug, Default)]
        pub struct GuardCounters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct GuardReport {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl GuardCounters {
            /// The counters now.
            #[must_use]
            pub fn snapshot(&self) -> GuardReport {
                GuardReport { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Mappings with guard pages.
    guarded,
    /// Mappings without, because frames were short.
    refused,
    /// Mappings whose pattern was damaged.
    damaged,
    /// Faults on guard pages and in unmapped ranges.
    faults,
    /// Ranges that went into quarantine.
    quarantined,
    /// Ranges that left it because it was full.
    released,
}

impl GuardCounters {
    /// Counts one, and whether it should still be said.
    pub fn say(counter: &AtomicU64) -> bool {
        counter.fetch_add(1, Ordering::Relaxed) < SAID_MAX
    }
}
