//! `lseek`.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::O_PATH;

/// The calls of this file.
pub const TABLE: &[Entry] = &[Entry {
    nr: 8,
    name: "lseek",
    args: &[Arg::Fd, Arg::Int, Arg::Int],
    handler: sys_lseek,
}];

/// What an offset is relative to, or looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whence {
    Set,
    Current,
    End,
    Data,
    Hole,
}

impl Whence {
    fn new(value: i32) -> Result<Self, Errno> {
        Ok(match value {
            0 => Self::Set,
            1 => Self::Current,
            2 => Self::End,
            3 => Self::Data,
            4 => Self::Hole,
            _ => return Err(Errno::INVAL),
        })
    }

    /// The new offset. A file is taken to be all data, with a hole at its end (lseek(2) allows
    /// it).
    fn apply(self, offset: i64, now: u64, size: u64) -> Result<u64, Errno> {
        let base = match self {
            Self::Set => 0,
            Self::Current => now,
            Self::End => size,
            Self::Data | Self::Hole => {
                let at = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
                return match (at < size, self) {
                    (false, _) => Err(Errno::NXIO),
                    (true, Self::Hole) => Ok(size),
                    (true, _) => Ok(at),
                };
            }
        };
        let base = i64::try_from(base).map_err(|_| Errno::OVERFLOW)?;
        let to = base.checked_add(offset).ok_or(Errno::OVERFLOW)?;
        u64::try_from(to).map_err(|_| Errno::INVAL)
    }
}

fn sys_lseek(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    if d.flags() & O_PATH != 0 {
        return Err(Errno::BADF.into());
    }
    let whence = Whence::new(a.i32(2))?;
    if !d.file.seekable() {
        return Err(Errno::SPIPE.into());
    }
    if !d.file.moves() {
        return Ok(0);
    }
    let size = match whence {
        Whence::Set | Whence::Current => 0,
        Whence::End | Whence::Data | Whence::Hole => d.file.stat(c.k)?.size,
    };
    if let Some(shared) = d.file.shared_offset() {
        let to = whence.apply(a.i64(1), shared.tell()?, size)?;
        shared.seek(to)?;
        return Ok(to);
    }
    let mut offset = d.offset.lock();
    *offset = whence.apply(a.i64(1), *offset, size)?;
    Ok(*offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_before_the_start_gives_einval() {
        assert_eq!(Whence::Set.apply(-1, 0, 0), Err(Errno::INVAL));
        assert_eq!(Whence::Current.apply(-5, 4, 0), Err(Errno::INVAL));
        assert_eq!(Whence::End.apply(-4, 0, 4), Ok(0));
    }

    #[test]
    fn beyond_the_largest_offset_gives_eoverflow() {
        assert_eq!(Whence::Current.apply(i64::MAX, 1, 0), Err(Errno::OVERFLOW));
    }

    #[test]
    fn data_and_hole_see_one_piece_of_data() {
        assert_eq!(Whence::Data.apply(3, 0, 10), Ok(3));
        assert_eq!(Whence::Hole.apply(3, 0, 10), Ok(10));
        assert_eq!(Whence::Data.apply(10, 0, 10), Err(Errno::NXIO));
    }
}
