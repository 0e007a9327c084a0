//! What the machine counts: exits, ioctls, calls. Counted, never timed.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of the machine.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct Exits {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The counters now.
            #[must_use]
            pub fn snapshot(&self) -> Exits {
                Exits { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// System calls made by the guest.
    syscalls,
    /// System calls that are not there (ENOSYS).
    unknown_syscalls,
    /// Page faults that exited.
    page_faults,
    /// Other exceptions that exited.
    exceptions,
    /// Kicks: signals, the end of a turn, or nothing at all.
    kicks,
    /// Forged system calls.
    forged,
    /// Exits of the monitor that ring 3 did not cause.
    monitor,
    /// Exits that must not happen; each ended a thread.
    broken,
    /// Entries that went through the monitor to flush.
    flushes,
    /// Page-table words the monitor touched.
    touches,
    /// FPU states copied out of a virtual CPU.
    fpu_saves,
    /// FPU states copied into a virtual CPU.
    fpu_loads,
    /// Those of them that took an ioctl.
    fpu_loads_by_kvm,
}

/// Adds one.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
