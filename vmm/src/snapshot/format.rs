//! The snapshot file: a header, the pages, the parts.
//!
//! ```text
//! 0       4096                                          end
//! ├───────┼──────────────────────────┬──────┬──────┬─────┤
//! │header │ page 0, page 1, ...      │ part │ part │ ... │
//! └───────┴──────────────────────────┴──────┴──────┴─────┘
//! ```
//! Nothing lies between, and no byte is outside a checksum (XXH3, 64 bits): the header has one of its
//! own, one for each part, and a part has one for each *cluster* of [`CLUSTER`] pages. Numbers are
//! little-endian. The header's length, magic, version and checksum are where they are in every version,
//! so that a newer one is known to be newer.
//!
//! The header of a file on a disk has a [`Seal`]: what the host says of the file as long as nobody has written to it. It
//! spares looking at all pages before a guest is made of them; it vouches for no byte, the checksums do.

use xxhash_rust::xxh3::xxh3_64;

use crate::memory::FRAME;

/// Bytes of the header, and where the pages begin.
pub const HEADER: usize = 4096;
/// Pages with a checksum in common: what a page-in reads at most.
pub const CLUSTER: usize = 16;
/// What a snapshot begins with.
pub const MAGIC: [u8; 8] = *b"VMMSNAP\n";
/// The version this VMM writes, and the newest it reads.
pub const VERSION: u32 = 3;

/// Where the header's checksum is.
const SUM_AT: usize = HEADER - 8;
const VERSION_AT: usize = 8;
const LENGTH_AT: usize = 16;
const PAGES_AT: usize = 24;
const BASE_PAGES_AT: usize = 32;
const ID_AT: usize = 40;
const BASE_AT: usize = 56;
const COUNT_AT: usize = 72;
const INODE_AT: usize = 80;
const TIME_AT: usize = 88;
const PARTS_AT: usize = 96;
/// Bytes of a part's line in the header.
const PART: usize = 32;
/// Most parts the header has room for.
pub const MAX_PARTS: usize = (SUM_AT - PARTS_AT) / PART;

/// Tells snapshots apart, so that one can name the one it builds on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SnapshotId(pub [u8; 16]);

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A page of a snapshot. The pages of what it builds on come first, then its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoredPage(u64);

impl StoredPage {
    /// Page `number`.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What a part is. Numbers are never used again for something else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum PartKind {
    /// What the guest was: for people, and to make a machine like the one it was in.
    Machine = 1,
    /// The records of the Linux layer.
    Records = 2,
    /// The address spaces: mappings, and where their pages are.
    Spaces = 3,
    /// A checksum for each cluster of pages.
    Sums = 4,
    /// The pages that were in use, to be read ahead.
    WorkingSet = 5,
}

/// Where a part is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Its [`PartKind`]; unknown ones are skipped.
    pub kind: u32,
    /// Its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// Their checksum.
    pub sum: u64,
}

/// What the host says of a file that is as it was finished. Whoever writes to it changes its time, and a copy has another
/// inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The number of its inode.
    pub inode: u64,
    /// When it was modified, in nanoseconds since 1970. Not 0.
    pub modified_ns: u64,
}

/// The header, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Bytes of the whole file.
    pub length: u64,
    /// Pages in this file.
    pub pages: u64,
    /// Pages in those it builds on, which come before its own.
    pub base_pages: u64,
    /// Which snapshot this is.
    pub id: SnapshotId,
    /// Which one it builds on.
    pub base: Option<SnapshotId>,
    /// What the host said of it when it was finished; `None` for one that is only in memory.
    pub seal: Option<Seal>,
    /// The parts.
    pub parts: Vec<Part>,
}

/// Why a header is not one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin as one.
    #[error("not a snapshot")]
    Magic,
    /// It is of a version to come.
    #[error("made by a newer vmm (format {0}; this vmm reads up to format {VERSION})")]
    Newer(u32),
    /// It is of a version that is not read any more.
    #[error("made by an older vmm (format {0}; this vmm reads format {VERSION})")]
    Older(u32),
    /// A version that never was.
    #[error("of format {0}, which never was")]
    NoVersion(u32),
    /// The checksum is another one.
    #[error("damaged: its header is not what was written")]
    Checksum,
    /// The checksum is right, and still it makes no sense.
    #[error("damaged: its header makes no sense")]
    Nonsense,
    /// The file's length is not what the header says.
    #[error("damaged: it has {found} bytes, {expected} were written")]
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        found: u64,
    },
}

/// The checksum of some bytes.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Where one of this file's own pages is, counted from the first of its own.
#[must_use]
pub fn page_offset(own: u64) -> u64 {
    HEADER as u64 + own * FRAME as u64
}

fn put(block: &mut [u8; HEADER], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(block: &[u8; HEADER], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(block: &[u8; HEADER], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn id_at(block: &[u8; HEADER], at: usize) -> SnapshotId {
    let mut id = SnapshotId::default();
    id.0.copy_from_slice(&block[at..at + 16]);
    id
}

impl Header {
    /// The bytes to write.
    ///
    /// # Panics
    /// With more than [`MAX_PARTS`] parts: our bug.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        assert!(self.parts.len() <= MAX_PARTS, "too many parts");
        let mut block = [0; HEADER];
        put(&mut block, 0, &MAGIC);
        put(&mut block, VERSION_AT, &VERSION.to_le_bytes());
        put(&mut block, LENGTH_AT, &self.length.to_le_bytes());
        put(&mut block, PAGES_AT, &self.pages.to_le_bytes());
        put(&mut block, BASE_PAGES_AT, &self.base_pages.to_le_bytes());
        put(&mut block, ID_AT, &self.id.0);
        put(&mut block, BASE_AT, &self.base.unwrap_or_default().0);
        let count = self.parts.len() as u64;
        put(&mut block, COUNT_AT, &count.to_le_bytes());
        let (inode, time) = self.seal.map_or((0, 0), |s| (s.inode, s.modified_ns));
        put(&mut block, INODE_AT, &inode.to_le_bytes());
        put(&mut block, TIME_AT, &time.to_le_bytes());
        for (n, part) in self.parts.iter().enumerate() {
            let at = PARTS_AT + n * PART;
            put(&mut block, at, &u64::from(part.kind).to_le_bytes());
            put(&mut block, at + 8, &part.offset.to_le_bytes());
            put(&mut block, at + 16, &part.length.to_le_bytes());
            put(&mut block, at + 24, &part.sum.to_le_bytes());
        }
        let sum = checksum(&block[..SUM_AT]);
        put(&mut block, SUM_AT, &sum.to_le_bytes());
        block
    }

    /// What the first bytes of a file of `found` bytes say.
    ///
    /// # Errors
    /// See [`HeaderError`]. A header that is accepted names no byte outside the file.
    pub fn decode(block: &[u8; HEADER], found: u64) -> Result<Self, HeaderError> {
        if block[..MAGIC.len()] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = u32_at(block, VERSION_AT);
        if version > VERSION {
            return Err(HeaderError::Newer(version));
        }
        if checksum(&block[..SUM_AT]) != u64_at(block, SUM_AT) {
            return Err(HeaderError::Checksum);
        }
        match version {
            VERSION => {}
            0 => return Err(HeaderError::NoVersion(version)),
            older => return Err(HeaderError::Older(older)),
        }
        let base = id_at(block, BASE_AT);
        let count = u64_at(block, COUNT_AT);
        if count > MAX_PARTS as u64 {
            return Err(HeaderError::Nonsense);
        }
        let seal = Seal {
            inode: u64_at(block, INODE_AT),
            modified_ns: u64_at(block, TIME_AT),
        };
        let header = Self {
            length: u64_at(block, LENGTH_AT),
            pages: u64_at(block, PAGES_AT),
            base_pages: u64_at(block, BASE_PAGES_AT),
            id: id_at(block, ID_AT),
            base: (base != SnapshotId::default()).then_some(base),
            seal: (seal.modified_ns != 0).then_some(seal),
            parts: (0..count as usize).map(|n| part_at(block, n)).collect(),
        };
        if header.length != found {
            let expected = header.length;
            return Err(HeaderError::Length { expected, found });
        }
        if header.fills_the_file() {
            Ok(header)
        } else {
            Err(HeaderError::Nonsense)
        }
    }

    /// Whether pages and parts follow each other up to the end.
    fn fills_the_file(&self) -> bool {
        let pages = self.pages.checked_mul(FRAME as u64);
        let mut end = pages.and_then(|bytes| bytes.checked_add(HEADER as u64));
        for part in &self.parts {
            end = end
                .filter(|end| *end == part.offset)
                .and_then(|end| end.checked_add(part.length));
        }
        let all = self.pages.checked_add(self.base_pages);
        // What a section can have.
        let fits = all.is_some_and(|pages| pages <= u64::from(u32::MAX));
        fits && end == Some(self.length) && (self.base.is_some() || self.base_pages == 0)
    }

    /// The part of that kind.
    #[must_use]
    pub fn part(&self, kind: PartKind) -> Option<Part> {
        let mut parts = self.parts.iter().copied();
        parts.find(|part| part.kind == kind as u32)
    }

    /// Clusters the pages make.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.pages.div_ceil(CLUSTER as u64)
    }
}

fn part_at(block: &[u8; HEADER], n: usize) -> Part {
    let at = PARTS_AT + n * PART;
    Part {
        kind: u32_at(block, at),
        offset: u64_at(block, at + 8),
        length: u64_at(block, at + 16),
        sum: u64_at(block, at + 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let part = |kind, offset, length| Part {
            kind,
            offset,
            length,
            sum: 77,
        };
        Header {
            length: 4096 + 3 * 4096 + 30,
            pages: 3,
            base_pages: 0,
            id: SnapshotId([7; 16]),
            base: None,
            seal: Some(Seal {
                inode: 5,
                modified_ns: 6,
            }),
            parts: vec![part(1, 4 * 4096, 10), part(9, 4 * 4096 + 10, 20)],
        }
    }

    #[test]
    fn header_comes_back_as_it_was() {
        let header = header();
        let block = header.encode();
        assert_eq!(Header::decode(&block, header.length), Ok(header));
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let block = header().encode();
        for bit in 0..HEADER * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad, header().length).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn other_lengths_and_versions_are_refused() {
        let header = header();
        let block = header.encode();
        assert!(matches!(
            Header::decode(&block, header.length - 1),
            Err(HeaderError::Length { .. })
        ));
        let mut newer = block;
        newer[VERSION_AT] = (VERSION + 1) as u8;
        let refused = Header::decode(&newer, header.length);
        assert_eq!(refused, Err(HeaderError::Newer(VERSION + 1)));
    }

    #[test]
    fn older_version_is_told_from_one_that_never_was() {
        let header = header();
        let of_version = |version: u8| {
            let mut block = header.encode();
            block[VERSION_AT] = version;
            let sum = checksum(&block[..SUM_AT]);
            put(&mut block, SUM_AT, &sum.to_le_bytes());
            Header::decode(&block, header.length)
        };
        assert_eq!(of_version(1), Err(HeaderError::Older(1)));
        assert_eq!(of_version(0), Err(HeaderError::NoVersion(0)));
    }

    #[test]
    fn header_that_makes_no_sense_is_refused() {
        let changes: [fn(&mut Header); 5] = [
            |h| h.parts[0].offset += 1,
            |h| h.parts[1].length = u64::MAX,
            |h| h.pages = u64::MAX / 4096,
            |h| h.base_pages = 5,
            |h| h.parts.clear(),
        ];
        for change in changes {
            let mut bad = header();
            change(&mut bad);
            let refused = Header::decode(&bad.encode(), bad.length);
            assert_eq!(refused, Err(HeaderError::Nonsense), "{bad:?}");
        }
    }
}
