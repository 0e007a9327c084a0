//! A buffer in guest memory that may be in pieces (`struct iovec`), addressed as one.

use shadow_mm::Access;

use super::super::Errno;
use super::super::user_mem::UserMem;

/// Most pieces a call takes (`IOV_MAX`).
pub const IOV_MAX: usize = 1024;
/// Most bytes one call transfers (`MAX_RW_COUNT`: what fits an `int`, in whole pages).
pub const MAX_RW_COUNT: usize = 0x7fff_f000;

/// Pieces of guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestBuf {
    pieces: Vec<(u64, usize)>,
    len: usize,
}

impl GuestBuf {
    /// One piece.
    #[must_use]
    pub fn new(base: u64, len: u64) -> Self {
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_RW_COUNT);
        Self {
            pieces: vec![(base, len)],
            len,
        }
    }

    /// From `(base, length)` pairs; what is beyond [`MAX_RW_COUNT`] in all is left out.
    ///
    /// # Errors
    /// `EINVAL`: a length is negative as a `ssize_t`, or there are more than [`IOV_MAX`].
    pub fn from_pairs(pairs: &[(u64, u64)]) -> Result<Self, Errno> {
        if pairs.len() > IOV_MAX || pairs.iter().any(|&(_, len)| i64::try_from(len).is_err()) {
            return Err(Errno::INVAL);
        }
        let mut buf = Self::default();
        for &(base, len) in pairs {
            let room = MAX_RW_COUNT - buf.len;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(room);
            if len > 0 {
                buf.pieces.push((base, len));
                buf.len += len;
            }
        }
        Ok(buf)
    }

    /// From an array of `count` `struct iovec` at `at`.
    ///
    /// # Errors
    /// `EFAULT`, `EINVAL`.
    pub fn from_iovec(mem: UserMem<'_>, at: u64, count: u64) -> Result<Self, Errno> {
        if count > IOV_MAX as u64 {
            return Err(Errno::INVAL);
        }
        let mut pairs = Vec::with_capacity(count as usize);
        for i in 0..count {
            let [base, len]: [u64; 2] = mem.read_obj(at.wrapping_add(i * 16))?;
            pairs.push((base, len));
        }
        Self::from_pairs(&pairs)
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of the `len` bytes from `from` on.
    fn parts(&self, from: usize, len: usize) -> impl Iterator<Item = (u64, usize)> + '_ {
        let mut skip = from;
        let mut left = len;
        self.pieces.iter().filter_map(move |&(base, size)| {
            let skipped = skip.min(size);
            skip -= skipped;
            let n = (size - skipped).min(left);
            left -= n;
            (n > 0).then(|| (base.wrapping_add(skipped as u64), n))
        })
    }

    /// How many of the `len` bytes from `from` on can be accessed.
    #[must_use]
    pub fn accessible(&self, mem: UserMem<'_>, from: usize, len: usize, access: Access) -> usize {
        let mut done = 0;
        for (va, n) in self.parts(from, len) {
            let got = mem.accessible(va, n, access);
            done += got;
            if got < n {
                break;
            }
        }
        done
    }

    /// Copies `data` to guest memory, from byte `from` of the buffer on. Gives the bytes copied:
    /// all, or those before the first that cannot be written.
    #[must_use]
    pub fn store(&self, mem: UserMem<'_>, from: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for (va, n) in self.parts(from, data.len()) {
            if mem.write(va, &data[done..done + n]).is_err() {
                return done + mem.accessible(va, n, Access::Write);
            }
            done += n;
        }
        done
    }

    /// Copies from guest memory, from byte `from` of the buffer on. Gives the bytes copied: all,
    /// or those before the first that cannot be read.
    #[must_use]
    pub fn load(&self, mem: UserMem<'_>, from: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (va, n) in self.parts(from, into.len()) {
            if mem.read(va, &mut into[done..done + n]).is_err() {
                let fine = mem.accessible(va, n, Access::Read);
                let again = mem.read(va, &mut into[done..done + fine]);
                return if again.is_ok() { done + fine } else { done };
            }
            done += n;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(buf: &GuestBuf, from: usize, len: usize) -> Vec<(u64, usize)> {
        buf.parts(from, len).collect()
    }

    #[test]
    fn range_across_pieces_is_split() {
        let buf = GuestBuf::from_pairs(&[(0x1000, 10), (0x2000, 0), (0x3000, 20)]).unwrap();
        assert_eq!(buf.len(), 30);
        assert_eq!(parts(&buf, 0, 30), vec![(0x1000, 10), (0x3000, 20)]);
        assert_eq!(parts(&buf, 4, 8), vec![(0x1004, 6), (0x3000, 2)]);
        assert_eq!(parts(&buf, 10, 100), vec![(0x3000, 20)]);
        assert_eq!(parts(&buf, 30, 1), vec![]);
    }

    #[test]
    fn negative_length_gives_einval() {
        assert_eq!(GuestBuf::from_pairs(&[(0, 1 << 63)]), Err(Errno::INVAL));
    }

    #[test]
    fn total_is_cut_at_the_limit() {
        let buf = GuestBuf::from_pairs(&[(0, 0x7000_0000), (0, 0x7000_0000)]).unwrap();
        assert_eq!(buf.len(), MAX_RW_COUNT);
    }
}
