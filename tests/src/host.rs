//! Where the tests run, as told by the environment.

use std::fmt;
use std::fs::OpenOptions;

/// A kind of host; `VMM_TEST_HOST` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// `/dev/kvm` of the machine itself, whatever that is.
    Kvm,
    /// The rig: an emulated machine whose KVM has nested paging.
    Npt,
    /// The rig with shadow paging.
    Shadow,
    /// The rig without `/dev/kvm`: only refusals can be tested.
    NoKvm,
    /// Linux itself: the programs run without the VMM, to prove that the tests expect what is true.
    Native,
}

impl Host {
    /// From `VMM_TEST_HOST`; without it, the machine's own `/dev/kvm`.
    ///
    /// # Errors
    /// A name that is none.
    pub fn from_env() -> Result<Self, String> {
        match std::env::var("VMM_TEST_HOST").as_deref() {
            Err(_) | Ok("kvm" | "") => Ok(Self::Kvm),
            Ok("npt") => Ok(Self::Npt),
            Ok("shadow") => Ok(Self::Shadow),
            Ok("no-kvm") => Ok(Self::NoKvm),
            Ok("native") => Ok(Self::Native),
            Ok(other) => Err(format!(
                "VMM_TEST_HOST={other}: use kvm, npt, shadow, no-kvm or native"
            )),
        }
    }

    /// Runs inside the rig, where everything is slower and the processor is emulated.
    #[must_use]
    pub fn in_rig(self) -> bool {
        match self {
            Self::Npt | Self::Shadow | Self::NoKvm => true,
            Self::Kvm => false,
            Self::Native => emulated(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm (/dev/kvm of this machine)",
            Self::Npt => "npt (emulated machine, nested paging)",
            Self::Shadow => "shadow (emulated machine, shadow paging)",
            Self::NoKvm => "no-kvm (emulated machine without /dev/kvm)",
            Self::Native => "native (no VMM: the programs on Linux itself)",
        })
    }
}

/// Whether this machine's processor is an emulated one.
#[must_use]
pub fn emulated() -> bool {
    std::env::var_os("VMM_TEST_EMULATED_CPU").is_some()
}

/// Whether `/dev/kvm` can be opened.
///
/// # Errors
/// Why not, for the reason of a skip.
pub fn kvm_usable() -> Result<(), String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|e| format!("no usable /dev/kvm: {e}"))
}
