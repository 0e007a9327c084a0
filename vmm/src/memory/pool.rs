//! The frame pool: one memfd, mapped here and given to KVM as memory slots.
//!
//! Guest-physical layout, in frames: the *monitor zone* (what the ring-0 monitor shares with the
//! VMM), the *table zone* (page tables), the *data zone*. The zones are slots of their own, so that
//! a clone can map them differently. Beyond the pool lie the frames of *layers* ([`Layer`]), which are read like any
//! other and never stored to. Guest-writable memory is never a `&[u8]` here: everything goes
//! through `vm-memory`'s volatile slices and atomics.

use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::FallocateFlags;
use shadow_mm::{EntryIndex, FrameStore, Pfn, PfnRange, TABLE_ENTRIES, exchange_word};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

use super::layer::Layer;
use crate::locks::{Mutex, rank};

/// Bytes of a frame.
pub const FRAME: usize = 4096;

/// Why a pool could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No memfd.
    #[error("cannot create {bytes} bytes of anonymous memory")]
    Create {
        /// Size asked for.
        bytes: u64,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The memfd could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// The mapping library's reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A file is no layer.
    #[error("cannot map {bytes} bytes of a template")]
    Layer {
        /// Size asked for.
        bytes: u64,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Guests cannot be shown a layer.
    #[error("the machine has no room for a template")]
    Show(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There are too many layers, or their frames have no numbers.
    #[error("no room for a layer of {pages} pages above the guest's memory")]
    NoRoom {
        /// Its pages.
        pages: u64,
    },
}

/// Most layers one pool lies above.
const MAX_LAYERS: usize = 8;

/// Makes frames reachable for guests; false if that cannot be.
pub type OpenFrames = Box<dyn Fn(PfnRange) -> bool + Send + Sync>;

/// Shows guests a layer, which is these frames from now on.
pub type ShowLayer = Box<
    dyn Fn(PfnRange, &Layer) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + Send + Sync,
>;

/// The pool. Frame N of the guest-physical space is at byte `N * 4096` of the memfd.
pub struct Pool {
    file: Arc<File>,
    region: Arc<MmapRegion>,
    /// What is done before data frames are used for the first time.
    open: OpenFrames,
    show: ShowLayer,
    /// Layers are laid one at a time.
    layering: Mutex<rank::Layering, ()>,
    /// From the first on, with rising frames.
    layers: [OnceLock<(PfnRange, Layer)>; MAX_LAYERS],
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("region", &self.region)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `frames` frames, all zero, none of them resident in the host yet.
    ///
    /// # Errors
    /// The host has no memory or address space for it.
    pub fn new(frames: u64) -> Result<Self, PoolError> {
        let bytes = frames * FRAME as u64;
        let create = |source| PoolError::Create { bytes, source };
        let fd = rustix::fs::memfd_create("vmm-pool", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| create(e.into()))?;
        let file = File::from(fd);
        file.set_len(bytes).map_err(create)?;
        let file = Arc::new(file);
        let size = usize::try_from(bytes).expect("64-bit host");
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), size)
            .map_err(|source| PoolError::Map { bytes, source })?;
        Ok(Self {
            file,
            region: Arc::new(region),
            open: Box::new(|_all_are_reachable| true),
            show: Box::new(|_, _is_seen_here| Ok(())),
            layering: Mutex::default(),
            layers: [const { OnceLock::new() }; MAX_LAYERS],
        })
    }

    /// Has `open` make data frames reachable before they are used for the first time, and `show` layers when they are laid; without
    /// it they all are from the start.
    #[must_use]
    pub fn opened_by(self, open: OpenFrames, show: ShowLayer) -> Self {
        Self { open, show, ..self }
    }

    /// Lays a layer under the pool: from now on, and as long as the pool is there, its frames are there to be mapped, and nothing can be stored
    /// to them. One that lies there already is where it was.
    ///
    /// # Errors
    /// There is no room for it, or guests cannot be shown it.
    pub fn lay(&self, layer: &Layer) -> Result<PfnRange, PoolError> {
        let _alone = self.layering.lock();
        let mut laid = self.layers.iter().map_while(OnceLock::get);
        if let Some((frames, _)) = laid.find(|(_, known)| known == layer) {
            return Ok(*frames);
        }
        let pages = layer.pages();
        let no_room = || PoolError::NoRoom { pages };
        let place = self.layers.iter().find(|place| place.get().is_none());
        let free = self.layers().last().map_or(self.frames(), PfnRange::end);
        let (place, frames) = place.zip(layer.placed(free)).ok_or_else(no_room)?;
        (self.show)(frames, layer).map_err(PoolError::Show)?;
        let (frames, _) = place.get_or_init(|| (frames, layer.clone()));
        Ok(*frames)
    }

    /// The layers' frames.
    pub fn layers(&self) -> impl Iterator<Item = PfnRange> {
        let there = self.layers.iter().map_while(OnceLock::get);
        there.map(|(frames, _)| *frames)
    }

    /// Frames in the pool.
    #[must_use]
    pub fn frames(&self) -> u64 {
        (self.region.size() / FRAME) as u64
    }

    /// The memfd, to be passed to other processes.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The mapping.
    #[must_use]
    pub fn region(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// The bytes of a frame of the pool.
    #[must_use]
    pub fn frame(&self, frame: Pfn) -> VolatileSlice<'_> {
        self.bytes(u64::from(frame.get()) * FRAME as u64, FRAME)
    }

    /// The bytes of any frame, a layer's too: to be loaded only.
    ///
    /// # Panics
    /// If there is no such frame: our bug.
    #[must_use]
    fn loadable(&self, frame: Pfn) -> VolatileSlice<'_> {
        if u64::from(frame.get()) < self.frames() {
            return self.frame(frame);
        }
        let mut layers = self.layers.iter().map_while(OnceLock::get);
        let (frames, layer) = layers
            .find(|(frames, _)| frames.contains(frame))
            .expect("a frame of the pool or of a layer");
        let at = (frame.get() - frames.start.get()) as usize * FRAME;
        layer
            .region()
            .get_slice(at, FRAME)
            .expect("a page of the layer")
    }

    /// Bytes by guest-physical address.
    ///
    /// # Panics
    /// If they are not in the pool: our bug.
    #[must_use]
    pub fn bytes(&self, gpa: u64, len: usize) -> VolatileSlice<'_> {
        let at = usize::try_from(gpa).expect("64-bit host");
        self.region
            .get_slice(at, len)
            .expect("an address inside the pool")
    }

    /// The aligned word at `offset` of a frame.
    ///
    /// # Panics
    /// If it is not aligned or not in the pool: our bug.
    #[must_use]
    pub fn word(&self, frame: Pfn, offset: usize) -> &AtomicU32 {
        self.region
            .get_atomic_ref(u64::from(frame.get()) as usize * FRAME + offset)
            .expect("an aligned word inside the pool")
    }

    /// The entries of a table. Looked up once for all of them: a table that is copied has 512.
    #[expect(
        unsafe_code,
        reason = "vm-memory has references to single atomics only"
    )]
    fn table(&self, table: Pfn) -> &[AtomicU64; TABLE_ENTRIES] {
        let frame = self.frame(table).ptr_guard_mut();
        // SAFETY: the frame is 4096 bytes of the mapping, which lives as long as `self`; frames are aligned in it, and it is to
        // pages; any bits are a valid word, and who else looks at them, hardware included, does so atomically.
        unsafe { &*frame.as_ptr().cast() }
    }

    fn entry(&self, table: Pfn, index: EntryIndex) -> &AtomicU64 {
        &self.table(table)[index.get()]
    }
}

impl FrameStore for Pool {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        self.entry(table, index).load(Ordering::SeqCst)
    }

    fn entries(&self, table: Pfn) -> [u64; TABLE_ENTRIES] {
        let mut words = [0; TABLE_ENTRIES];
        // As bytes it is one copy instead of 512 loads. What hardware changes in an entry meanwhile is in one byte.
        self.frame(table).copy_to(words.as_mut_bytes());
        words
    }

    fn fill(&self, table: Pfn, entries: &[u64; TABLE_ENTRIES]) {
        self.frame(table).copy_from(entries.as_bytes());
    }

    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64 {
        self.entry(table, index).swap(new, Ordering::SeqCst)
    }

    fn compare_exchange(
        &self,
        table: Pfn,
        index: EntryIndex,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.entry(table, index)
            .compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
    }

    fn exchange(&self, table: Pfn, old: &[u64; TABLE_ENTRIES], new: &[u64; TABLE_ENTRIES]) {
        for (entry, (old, new)) in self.table(table).iter().zip(old.iter().zip(new)) {
            exchange_word(*old, *new, |old, new| {
                entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            });
        }
    }

    fn open(&self, frames: PfnRange) -> bool {
        (self.open)(frames)
    }

    fn zero(&self, frame: Pfn) {
        self.frame(frame).copy_from(&[0_u8; FRAME]);
    }

    fn discard(&self, frames: PfnRange) {
        let byte = |frame: u64| frame * FRAME as u64;
        let (start, length) = (byte(frames.start.get().into()), byte(frames.count.into()));
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&*self.file, flags, start, length).is_err() {
            (0..frames.count).for_each(|n| self.zero(Pfn::new(frames.start.get() + n)));
        }
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        self.loadable(from).copy_to_volatile_slice(self.frame(to));
    }

    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]) {
        self.loadable(frame)
            .read_slice(into, offset)
            .expect("a range inside a frame");
    }

    fn write(&self, frame: Pfn, offset: usize, from: &[u8]) {
        self.frame(frame)
            .write_slice(from, offset)
            .expect("a range inside a frame");
    }
}
