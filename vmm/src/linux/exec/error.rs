//! Why a program could not be started: what `execve` returns, and what a person is told.

use crate::linux::Errno;

/// What is wrong with one `PT_LOAD` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentFault {
    /// `p_filesz > p_memsz`.
    #[error("{filesz:#x} file bytes for {memsz:#x} bytes of memory")]
    FileLarger {
        /// `p_filesz`.
        filesz: u64,
        /// `p_memsz`.
        memsz: u64,
    },
    /// It wraps around or ends above the user's addresses.
    #[error("{memsz:#x} bytes at {va:#x} do not fit below the end of user addresses")]
    TooHigh {
        /// `p_vaddr`.
        va: u64,
        /// `p_memsz`.
        memsz: u64,
    },
    /// It starts in the pages nobody may map.
    #[error("{va:#x} is below the lowest address that may be mapped")]
    TooLow {
        /// First page.
        va: u64,
    },
    /// Its file bytes are not in the file.
    #[error("{filesz:#x} bytes at offset {offset:#x} of a file of {length:#x} bytes")]
    PastFile {
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        filesz: u64,
        /// Bytes in the file.
        length: u64,
    },
    /// `p_vaddr` and `p_offset` differ in their position in the page.
    #[error("address {va:#x} and offset {offset:#x} differ within the page")]
    Alignment {
        /// `p_vaddr`.
        va: u64,
        /// `p_offset`.
        offset: u64,
    },
}

/// What is wrong with an ELF file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Neither ELF nor a script.
    #[error("not an ELF file")]
    NotElf,
    /// Not 64-bit little-endian x86-64.
    #[error("not for x86-64")]
    OtherMachine,
    /// An object file or a core dump.
    #[error("not an executable or a shared object")]
    NotProgram,
    /// Entry size, number or extent of the program headers.
    #[error("unusable program header table")]
    HeaderTable,
    /// `PT_INTERP` holds no path.
    #[error("unusable interpreter path")]
    InterpreterPath,
    /// No `PT_LOAD` header with memory.
    #[error("nothing to load")]
    NoSegments,
    /// A bad `PT_LOAD` header.
    #[error("bad segment in program header {index}: {fault}")]
    Segment {
        /// Which program header.
        index: usize,
        /// What is wrong with it.
        #[source]
        fault: SegmentFault,
    },
    /// `e_entry` is in no segment.
    #[error("entry point {entry:#x} lies outside the segments")]
    EntryOutside {
        /// `e_entry`.
        entry: u64,
    },
    /// The file ends within its headers.
    #[error("the file is cut short")]
    Truncated,
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Read(Errno),
}

impl ElfError {
    /// What `execve` returns for a program with this fault.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotElf
            | Self::OtherMachine
            | Self::NotProgram
            | Self::HeaderTable
            | Self::InterpreterPath
            | Self::Truncated => Errno::NOEXEC,
            Self::Segment {
                fault: SegmentFault::TooLow { .. },
                ..
            } => Errno::PERM,
            Self::Segment {
                fault: SegmentFault::PastFile { .. },
                ..
            } => Errno::NOEXEC,
            Self::NoSegments | Self::Segment { .. } | Self::EntryOutside { .. } => Errno::INVAL,
            Self::Read(errno) => *errno,
        }
    }
}

/// Why a program could not be started. Shown as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecError {
    /// The program, or a script's interpreter, could not be opened: it is not there, no regular file,
    /// or not executable.
    #[error("{path}: {errno}")]
    Open {
        /// As given.
        path: String,
        /// The file tree's reason.
        errno: Errno,
    },
    /// It lies on a file system whose files cannot be mapped.
    #[error("{path}: cannot be mapped: {errno}")]
    NotMappable {
        /// As given.
        path: String,
        /// The file's reason.
        errno: Errno,
    },
    /// A bad program.
    #[error("{path}: {fault}")]
    Elf {
        /// As given.
        path: String,
        /// What is wrong with it.
        #[source]
        fault: ElfError,
    },
    /// The ELF interpreter (dynamic linker) could not be used.
    #[error("{program}: its interpreter {path}: {errno}")]
    Interpreter {
        /// The program.
        program: String,
        /// The interpreter in its `PT_INTERP`.
        path: String,
        /// Why not.
        errno: Errno,
    },
    /// The ELF interpreter is a bad program.
    #[error("{program}: its interpreter {path}: {fault}")]
    InterpreterElf {
        /// The program.
        program: String,
        /// The interpreter in its `PT_INTERP`.
        path: String,
        /// What is wrong with it.
        #[source]
        fault: ElfError,
    },
    /// A `#!` line without a usable interpreter path.
    #[error("{path}: unusable #! line")]
    ScriptLine {
        /// The script.
        path: String,
    },
    /// A script that its interpreter could not open again: `fexecve` of a close-on-exec descriptor.
    #[error("{path}: the script's descriptor is closed on exec")]
    ScriptInaccessible {
        /// The script.
        path: String,
    },
    /// Interpreters of interpreters.
    #[error("{path}: too many levels of script interpreters")]
    TooManyLevels {
        /// The last one.
        path: String,
    },
    /// Arguments and environment do not fit.
    #[error("argument list too long")]
    TooLong,
    /// The space for it could not be made.
    #[error("{path}: no memory to load it")]
    NoMemory {
        /// The program.
        path: String,
    },
    /// Its segments could not be mapped.
    #[error("{path}: cannot be mapped at its addresses: {errno}")]
    Map {
        /// The program or its interpreter.
        path: String,
        /// Why not.
        errno: Errno,
    },
}

impl ExecError {
    /// What `execve` returns.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Open { errno, .. }
            | Self::Interpreter { errno, .. }
            | Self::Map { errno, .. } => *errno,
            Self::NotMappable { .. } | Self::ScriptLine { .. } => Errno::NOEXEC,
            Self::Elf { fault, .. } => fault.errno(),
            Self::InterpreterElf {
                fault: ElfError::Read(errno),
                ..
            } => *errno,
            Self::InterpreterElf { .. } => Errno::LIBBAD,
            Self::ScriptInaccessible { .. } => Errno::NOENT,
            Self::TooManyLevels { .. } => Errno::LOOP,
            Self::TooLong => Errno::TOOBIG,
            Self::NoMemory { .. } => Errno::NOMEM,
        }
    }
}

/// A guest's bytes in a message.
pub(super) fn show(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}
