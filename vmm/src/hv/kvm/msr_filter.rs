//! Which model-specific registers a guest can reach at all (KVM API, `KVM_X86_SET_MSR_FILTER`).

use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};

use super::vm::{Vm, VmError, refused};

/// Windows in which registers can be allowed: first register, how many. Outside there are none.
const WINDOWS: [(u32, u32); 5] = [
    (0, 0x1000),
    (0x4b56_4d00, 0x20),
    (0xc000_0080, 0x100),
    (0xc001_0000, 0x400),
    (0xc001_1000, 0x100),
];

/// Whether a filter is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtered {
    /// It is.
    Yes,
    /// This KVM has none: it answers for all registers it knows.
    No,
}

impl Vm {
    /// Makes every access to a model-specific register that is not allowed `#GP` in the guest.
    ///
    /// # Errors
    /// KVM refused.
    pub fn filter_msrs(
        &self,
        may_read: impl Fn(u32) -> bool,
        may_write: impl Fn(u32) -> bool,
    ) -> Result<Filtered, VmError> {
        let fd = self.fd()?;
        if !fd.check_extension(Cap::X86MsrFilter) {
            return Ok(Filtered::No);
        }
        let maps: Vec<[Vec<u8>; 2]> = WINDOWS
            .iter()
            .map(|&window| [bitmap(window, &may_read), bitmap(window, &may_write)])
            .collect();
        let mut ranges = Vec::new();
        for (&(base, msr_count), [read, write]) in WINDOWS.iter().zip(&maps) {
            for (flags, bitmap) in [
                (MsrFilterRangeFlags::READ, read),
                (MsrFilterRangeFlags::WRITE, write),
            ] {
                ranges.push(MsrFilterRange {
                    flags,
                    base,
                    msr_count,
                    bitmap,
                });
            }
        }
        fd.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
            .map_err(refused("a filter for MSRs"))?;
        Ok(Filtered::Yes)
    }
}

/// A bit for each register of a window: set if it is allowed.
fn bitmap((first, count): (u32, u32), allowed: impl Fn(u32) -> bool) -> Vec<u8> {
    let byte = |at: u32| (0..8).fold(0, |byte, bit| byte | u8::from(allowed(at + bit)) << bit);
    (0..count / 8).map(|i| byte(first + i * 8)).collect()
}

/// Whether a register can be allowed at all.
#[cfg(test)]
pub(crate) fn in_a_window(index: u32) -> bool {
    WINDOWS
        .iter()
        .any(|&(first, count)| index >= first && index - first < count)
}
