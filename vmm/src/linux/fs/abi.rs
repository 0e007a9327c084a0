//! The layouts of the calls about files, as x86-64 has them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::FsStat;
use crate::linux::file::{DirEntry, Stat};

/// `struct stat` (stat(2)).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "named as in stat(2)")]
pub struct RawStat {
    pub st_dev: u64,
    pub st_ino: u64,
    pub st_nlink: u64,
    pub st_mode: u32,
    pub st_uid: u32,
    pub st_gid: u32,
    pub pad: u32,
    pub st_rdev: u64,
    pub st_size: i64,
    pub st_blksize: i64,
    pub st_blocks: i64,
    pub times: [[i64; 2]; 3],
    pub reserved: [i64; 3],
}

impl From<&Stat> for RawStat {
    fn from(s: &Stat) -> Self {
        let time = |(seconds, nanos): (i64, u32)| [seconds, nanos.into()];
        Self {
            st_dev: s.dev,
            st_ino: s.ino,
            st_nlink: s.nlink,
            st_mode: s.mode,
            st_uid: s.uid,
            st_gid: s.gid,
            pad: 0,
            st_rdev: s.rdev,
            st_size: s.size as i64,
            st_blksize: s.blksize as i64,
            st_blocks: s.blocks as i64,
            times: [time(s.atime), time(s.mtime), time(s.ctime)],
            reserved: [0; 3],
        }
    }
}

/// `struct statx_timestamp` (statx(2)).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "named as in statx(2)")]
pub struct RawStatxTime {
    pub tv_sec: i64,
    pub tv_nsec: u32,
    pub pad: i32,
}

/// `struct statx` (statx(2)).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "named as in statx(2)")]
pub struct RawStatx {
    pub stx_mask: u32,
    pub stx_blksize: u32,
    pub stx_attributes: u64,
    pub stx_nlink: u32,
    pub stx_uid: u32,
    pub stx_gid: u32,
    pub stx_mode: u16,
    pub pad: u16,
    pub stx_ino: u64,
    pub stx_size: u64,
    pub stx_blocks: u64,
    pub stx_attributes_mask: u64,
    /// Access, birth, change, modification.
    pub times: [RawStatxTime; 4],
    /// Of the device: major, minor; of the file system: major, minor.
    pub devices: [u32; 4],
    pub reserved: [u64; 14],
}

/// `STATX_BASIC_STATS`.
const BASIC_STATS: u32 = 0x7ff;

impl From<&Stat> for RawStatx {
    fn from(s: &Stat) -> Self {
        let time = |(tv_sec, tv_nsec): (i64, u32)| RawStatxTime {
            tv_sec,
            tv_nsec,
            pad: 0,
        };
        Self {
            stx_mask: BASIC_STATS,
            stx_blksize: s.blksize as u32,
            stx_nlink: u32::try_from(s.nlink).unwrap_or(u32::MAX),
            stx_uid: s.uid,
            stx_gid: s.gid,
            stx_mode: s.mode as u16,
            stx_ino: s.ino,
            stx_size: s.size,
            stx_blocks: s.blocks,
            times: [
                time(s.atime),
                RawStatxTime::default(),
                time(s.ctime),
                time(s.mtime),
            ],
            devices: [
                rustix::fs::major(s.rdev),
                rustix::fs::minor(s.rdev),
                rustix::fs::major(s.dev),
                rustix::fs::minor(s.dev),
            ],
            ..Self::default()
        }
    }
}

/// `struct statfs` (statfs(2)).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "named as in statfs(2)")]
pub struct RawStatfs {
    pub f_type: u64,
    pub f_bsize: u64,
    pub f_blocks: u64,
    pub f_bfree: u64,
    pub f_bavail: u64,
    pub f_files: u64,
    pub f_ffree: u64,
    pub f_fsid: [i32; 2],
    pub f_namelen: u64,
    pub f_frsize: u64,
    pub f_flags: u64,
    pub reserved: [u64; 4],
}

/// `ST_RDONLY`, `ST_VALID`.
const ST_RDONLY: u64 = 1;
const ST_VALID: u64 = 0x20;

impl RawStatfs {
    /// The layout of `s` on mount `mount`.
    #[must_use]
    pub fn new(s: &FsStat, read_only: bool, mount: usize) -> Self {
        Self {
            f_type: s.kind,
            f_bsize: s.block_size,
            f_blocks: s.blocks,
            f_bfree: s.free,
            f_bavail: s.available,
            f_files: s.files,
            f_ffree: s.files_free,
            f_fsid: [mount as i32 + 1, 0],
            f_namelen: super::NAME_MAX as u64,
            f_frsize: s.block_size,
            f_flags: ST_VALID | if read_only { ST_RDONLY } else { 0 },
            reserved: [0; 4],
        }
    }
}

/// Which layout getdents(2) or getdents64(2) wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirent {
    /// `struct linux_dirent`: the type is the record's last byte.
    Old,
    /// `struct linux_dirent64`.
    New,
}

impl Dirent {
    /// Appends an entry to `out` if at most `limit` bytes are in it then; `next` is the offset of
    /// the entry after it. Says whether it did.
    pub fn put(self, out: &mut Vec<u8>, limit: usize, entry: &DirEntry, next: u64) -> bool {
        let name = entry.name.len();
        let length = match self {
            Self::Old => 18 + name + 2,
            Self::New => 19 + name + 1,
        }
        .next_multiple_of(8);
        if out.len() + length > limit {
            return false;
        }
        let start = out.len();
        out.extend_from_slice(&entry.ino.to_le_bytes());
        out.extend_from_slice(&next.to_le_bytes());
        out.extend_from_slice(&(length as u16).to_le_bytes());
        if self == Self::New {
            out.push(entry.kind);
        }
        out.extend_from_slice(&entry.name);
        out.resize(start + length, 0);
        if self == Self::Old {
            out[start + length - 1] = entry.kind;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_the_sizes_of_the_abi() {
        assert_eq!(size_of::<RawStat>(), 144);
        assert_eq!(size_of::<RawStatx>(), 256);
        assert_eq!(size_of::<RawStatfs>(), 120);
    }

    #[test]
    fn entry_that_does_not_fit_is_left_out() {
        let entry = DirEntry {
            ino: 7,
            kind: 8,
            name: b"abc".to_vec(),
        };
        let mut out = Vec::new();
        assert!(Dirent::New.put(&mut out, 24, &entry, 1));
        assert_eq!(out.len(), 24);
        assert_eq!((out[18], &out[19..23]), (8, &b"abc\0"[..]));
        assert!(!Dirent::New.put(&mut out, 47, &entry, 2));
        assert!(Dirent::Old.put(&mut out, 48, &entry, 2));
        assert_eq!((out[47], &out[42..46]), (8, &b"abc\0"[..]));
    }
}
