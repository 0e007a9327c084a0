//! The tree of locks, as one order: a lock may be taken when every lock held comes before it here.

/// A lock's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number; locks are taken with rising numbers.
    pub rank: u8,
    /// Its name here.
    pub name: &'static str,
}

/// A type that stands for a place.
pub trait Rank: 'static {
    /// The place.
    const PLACE: Place;
}

macro_rules! ranks {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Clone, Copy)]
        #[repr(u8)]
        enum Order { $($name,)* }

        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default)]
            pub struct $name;

            impl Rank for $name {
                const PLACE: Place = Place {
                    rank: Order::$name as u8,
                    name: stringify!($name),
                };
            }
        )*
    };
}

ranks! {
    /// Calls whose strace line is not complete.
    StraceOpen,
    /// How a guest of the library's ended.
    Finish,
    /// Where a guest is asked to go back.
    ResetDoor,
    /// Who hears those that ask on the sockets of the guests of this process.
    Porter,
    /// These sockets.
    Doors,
    /// Who is served on one.
    Visit,
    /// Who takes a guest of the library's down.
    TakeDown,
    /// Conversations of a pool.
    PoolTalks,
    /// Clones that a process runs for `vmm fork`.
    RunningClones,
    /// Clones whose end is waited for.
    WaitingClones,
    /// What a process that runs clones says to `vmm fork`.
    CloneNews,
    /// Machines there whose clones have ended.
    FreeMachines,
    /// Machines that wait for a clone of a template.
    WarmMachines,
    /// The clones of a machine that they share, as others see them.
    SharedClones,
    /// A machine that guests share, until its end.
    MachineThreads,
    /// Who gives back memory because it is used up.
    LeavingSpace,
    /// The guests of a machine.
    MachineGuests,
    /// What a machine failed with.
    MachineFailure,
    /// Writing the guest down, from the stop to the end of the file: one at a time.
    Saving,
    /// A frozen guest.
    Template,
    /// Pages to be read ahead.
    WorkingSets,
    /// Who looks at the guest of a name.
    Inspectors,
    /// A machine as its first program's end found it.
    LastLook,
    /// The host's descriptors it waits for.
    EventSet,
    /// An open file's offset: held for the read or write that uses it.
    Offset,
    /// The names an open directory shows.
    DirSnapshot,
    /// What an open file of the VMM's own says.
    SynthContent,
    /// Where things are in an address space; `brk` holds it while it maps.
    Layout,
    /// The process tree: [`crate::linux::kernel::Kernel::state`].
    KernelState,
    /// What an epoll looks at.
    EpollMembers,
    /// What a socket is: idle, listening, connected.
    SocketState,
    /// What a program has set of a socket.
    SocketOptions,
    /// Which socket has which name.
    SocketNames,
    /// The pipe behind a FIFO.
    FifoPipe,
    /// A pipe's content.
    PipeRing,
    /// What the pipes of a machine use together.
    PipeRoom,
    /// An eventfd's count.
    EventCount,
    /// What an open `/dev/vmm` has asked for and shows.
    VmmFile,
    /// The guest's wishes to be frozen.
    Freezes,
    /// The `flock` an open file has.
    FlockHeld,
    /// All `flock`s.
    FlockTable,
    /// All record locks.
    RecordLocks,
    /// A mapped file's bytes: orders writes against writing back.
    FileIo,
    /// Names of an in-memory file system while they move.
    MemTree,
    /// An in-memory directory's names.
    MemEntries,
    /// An in-memory inode's attributes.
    MemMeta,
    /// An in-memory file's content.
    MemPages,
    /// The terminal settings the guest wants.
    TtyWanted,
    /// Whether the first program is stopped.
    MainStops,
    /// When which timer is due.
    TimerSchedule,
    /// A template that is being laid under a machine.
    Layering,
    /// What guards an address space's mappings; held while it maps.
    Guards,
    /// The files that are mapped.
    MappedFiles,
    /// Who is told when a page of a snapshot cannot be had: one of a file in memory may be read with its content locked.
    ImageFailure,
    /// The pool of what the VMM and the monitor share.
    MonitorPool,
    /// The memory manager's supervisor tables.
    Supervisor,
    /// An address space.
    Space,
    /// A section.
    Section,
    /// The PFN database, and all clone blocks.
    Pfns,
    /// What KVM has of the virtual machine: a slot is added when the PFN database gives out its first frame.
    VmLife,
    /// The list of address spaces.
    SpaceRegistry,
    /// Who waits for a read, a write or free frames.
    PagingEvents,
    /// Run queue, wait queues and deadlines.
    SchedQueues,
    /// Where the FPU state of a thread is that has left a virtual CPU.
    LeftFpu,
    /// Which guest gets a worker next, and when the clock thread sees to which.
    Roster,
    /// Flushes that wait for a virtual CPU.
    FlushQueues,
    /// The line a guest is printing.
    ReadyLine,
    /// Rung when a guest may be ready.
    ReadyBell,
    /// Whether the thread that writes mapped files back has something to do.
    WritebackBell,
    /// Who looks at the files that are mapped.
    FileLooks,
    /// A thread that looks after memory: whether it was started.
    Aide,
    /// What the thread that waits for the end of a guest of the library's has to do.
    HostDesk,
}
