//! KVM: the virtual machine, its virtual CPUs, and what this host's KVM does (found by probing).

/// A virtual CPU's state could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("the virtual CPU's {what} could not be {verb}")]
pub struct CpuError {
    /// Which state.
    pub what: &'static str,
    /// `read` or `set`.
    pub verb: &'static str,
    /// The host's reason.
    #[source]
    pub source: std::io::Error,
}
