//! Simulated guest RAM and a simulated CPU's address translation, for tests of this crate and of its
//! callers. Nothing here is used otherwise.

mod mmu;
mod store;

use core::marker::PhantomData;

pub use mmu::{PageFault, SimMmu, Translation};
pub use store::SimStore;

use crate::backend::Platform;

/// A file of a simulated platform, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SimFile(pub u32);

/// A platform whose guest RAM is simulated; `L` is the mutex, for example `parking_lot::RawMutex`.
pub struct SimPlatform<L>(PhantomData<fn() -> L>);

impl<L: lock_api::RawMutex + Send + Sync + 'static> Platform for SimPlatform<L> {
    type Store = SimStore<L>;
    type Lock = L;
    type Backing = SimFile;
}
