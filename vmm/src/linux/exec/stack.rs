//! The initial stack of a program, as the psABI for x86-64 (section 3.4.1) and Linux's
//! `create_elf_tables` have it. Pure: it makes the bytes.
//!
//! ```text
//! top      8 zero bytes
//!          file name (AT_EXECFN), environment strings, argument strings
//!          "x86_64", 16 random bytes, padding
//!          auxiliary vector
//!          environment pointers, 0
//!          argument pointers, 0
//! rsp ->   argc                                  16-byte aligned
//! ```

use crate::linux::Errno;

/// Longest argument or environment string, with its NUL (`MAX_ARG_STRLEN`).
pub const STRING_MAX: usize = 128 * 1024;

/// What a program always gets for its strings (`ARG_MAX`).
const ARG_MAX: u64 = 128 * 1024;

/// Most of the stack for strings, whatever its limit (three quarters of `_STK_LIM`).
const STRINGS_MAX: u64 = 6 << 20;

/// `AT_PLATFORM`.
const PLATFORM: &[u8] = b"x86_64\0";

/// Keys of the auxiliary vector (getauxval(3)).
#[expect(missing_docs, reason = "named as in elf.h")]
pub mod at {
    pub const NULL: u64 = 0;
    pub const PHDR: u64 = 3;
    pub const PHENT: u64 = 4;
    pub const PHNUM: u64 = 5;
    pub const PAGESZ: u64 = 6;
    pub const BASE: u64 = 7;
    pub const FLAGS: u64 = 8;
    pub const ENTRY: u64 = 9;
    pub const UID: u64 = 11;
    pub const EUID: u64 = 12;
    pub const GID: u64 = 13;
    pub const EGID: u64 = 14;
    pub const PLATFORM: u64 = 15;
    pub const HWCAP: u64 = 16;
    pub const CLKTCK: u64 = 17;
    pub const SECURE: u64 = 23;
    pub const RANDOM: u64 = 25;
    pub const HWCAP2: u64 = 26;
    pub const EXECFN: u64 = 31;
    pub const SYSINFO_EHDR: u64 = 33;
    pub const MINSIGSTKSZ: u64 = 51;
}

/// Where the random bytes of `AT_RANDOM` are, by an auxiliary vector.
pub(in crate::linux) fn random_at(auxv: &[u8]) -> Option<u64> {
    let words = auxv.as_chunks::<8>().0.as_chunks::<2>().0;
    let pairs = words.iter().map(|pair| pair.map(u64::from_le_bytes));
    let mut random = pairs.filter(|[key, _]| *key == at::RANDOM);
    random.next().map(|[_, value]| value)
}

/// A program's arguments and environment, without NULs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    /// Arguments.
    pub argv: Vec<Vec<u8>>,
    /// Environment.
    pub envp: Vec<Vec<u8>>,
}

/// Counts what strings and their pointers take, against a stack's limit.
#[derive(Clone, Copy, Debug)]
pub struct Budget(u64);

impl Budget {
    /// For a stack of at most `stack` bytes (`RLIMIT_STACK`).
    #[must_use]
    pub fn new(stack: u64) -> Self {
        Self((stack / 4).clamp(ARG_MAX, STRINGS_MAX))
    }

    /// Takes a string of `len` bytes without its NUL.
    ///
    /// # Errors
    /// `E2BIG`.
    pub fn take(&mut self, len: usize) -> Result<(), Errno> {
        if len >= STRING_MAX {
            return Err(Errno::TOOBIG);
        }
        let bytes = len as u64 + 1 + size_of::<u64>() as u64;
        self.0 = self.0.checked_sub(bytes).ok_or(Errno::TOOBIG)?;
        Ok(())
    }
}

impl Strings {
    /// Checks the lengths against a stack's limit.
    ///
    /// # Errors
    /// `E2BIG`.
    pub fn check(&self, stack: u64) -> Result<(), Errno> {
        let mut budget = Budget::new(stack);
        self.argv
            .iter()
            .chain(&self.envp)
            .try_for_each(|s| budget.take(s.len()))
    }
}

/// The finished stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitialStack {
    /// RSP at entry; `bytes` start here and end at the top.
    pub sp: u64,
    /// Content.
    pub bytes: Vec<u8>,
    /// The argument strings: first byte and end.
    pub args: (u64, u64),
    /// The environment strings: first byte and end.
    pub envs: (u64, u64),
    /// The auxiliary vector, `AT_NULL` included.
    pub auxv: Vec<u8>,
}

/// Lays out the stack that ends at `top` (a multiple of 16). `aux` is the auxiliary vector without
/// what points into the stack: `AT_RANDOM`, `AT_EXECFN`, `AT_PLATFORM` and `AT_NULL`.
#[must_use]
pub fn build(
    top: u64,
    strings: &Strings,
    execfn: &[u8],
    random: [u8; 16],
    aux: &[(u64, u64)],
) -> InitialStack {
    let mut area = Vec::new();
    let argv = push_strings(&mut area, &strings.argv);
    let args_end = area.len();
    let envp = push_strings(&mut area, &strings.envp);
    let envs_end = area.len();
    let name = push_string(&mut area, execfn);
    area.resize(area.len() + size_of::<u64>(), 0);
    let area_at = top - area.len() as u64;

    let platform_at = area_at - PLATFORM.len() as u64;
    let random_at = (platform_at - random.len() as u64) & !15;
    let aux = aux.iter().copied().chain([
        (at::RANDOM, random_at),
        (at::EXECFN, area_at + name),
        (at::PLATFORM, platform_at),
        (at::NULL, 0),
    ]);
    let auxv: Vec<u8> = aux
        .flat_map(|(key, value)| [key, value])
        .flat_map(u64::to_le_bytes)
        .collect();

    let pointers = 1 + argv.len() + 1 + envp.len() + 1;
    let sp = (random_at - auxv.len() as u64 - (pointers * size_of::<u64>()) as u64) & !15;
    let mut bytes = Vec::with_capacity((top - sp) as usize);
    let words = std::iter::once(argv.len() as u64)
        .chain(argv.iter().map(|offset| area_at + offset))
        .chain([0])
        .chain(envp.iter().map(|offset| area_at + offset))
        .chain([0]);
    bytes.extend(words.flat_map(u64::to_le_bytes));
    bytes.extend_from_slice(&auxv);
    bytes.resize((random_at - sp) as usize, 0);
    bytes.extend_from_slice(&random);
    bytes.resize((platform_at - sp) as usize, 0);
    bytes.extend_from_slice(PLATFORM);
    bytes.extend_from_slice(&area);
    InitialStack {
        sp,
        bytes,
        args: (area_at, area_at + args_end as u64),
        envs: (area_at + args_end as u64, area_at + envs_end as u64),
        auxv,
    }
}

/// Appends the strings and returns where each is.
fn push_strings(area: &mut Vec<u8>, strings: &[Vec<u8>]) -> Vec<u64> {
    strings.iter().map(|s| push_string(area, s)).collect()
}

fn push_string(area: &mut Vec<u8>, string: &[u8]) -> u64 {
    let at = area.len() as u64;
    area.extend_from_slice(string);
    area.push(0);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = 0x7f7f_ffff_f000;

    struct Decoded<'a>(&'a InitialStack);

    impl Decoded<'_> {
        fn word(&self, at: u64) -> u64 {
            let at = (at - self.0.sp) as usize;
            u64::from_le_bytes(self.0.bytes[at..at + 8].try_into().unwrap())
        }

        fn string(&self, at: u64) -> &[u8] {
            let rest = &self.0.bytes[(at - self.0.sp) as usize..];
            &rest[..rest.iter().position(|&b| b == 0).unwrap()]
        }

        /// The strings of a pointer list and the address after its null.
        fn list(&self, mut at: u64) -> (Vec<&[u8]>, u64) {
            let mut strings = Vec::new();
            while self.word(at) != 0 {
                strings.push(self.string(self.word(at)));
                at += 8;
            }
            (strings, at + 8)
        }

        fn auxv(&self, mut at: u64) -> Vec<(u64, u64)> {
            let mut all = Vec::new();
            while self.word(at) != 0 {
                all.push((self.word(at), self.word(at + 8)));
                at += 16;
            }
            all
        }
    }

    fn strings(argv: &[&str], envp: &[&str]) -> Strings {
        let own = |list: &[&str]| list.iter().map(|s| s.as_bytes().to_vec()).collect();
        Strings {
            argv: own(argv),
            envp: own(envp),
        }
    }

    #[test]
    fn arguments_of_any_number_decode_aligned() {
        for n in 0..9 {
            let argv: Vec<String> = (0..n).map(|i| "a".repeat(i * 3)).collect();
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            let given = strings(&argv, &["HOME=/root", "A="]);
            let stack = build(
                TOP,
                &given,
                b"/bin/x",
                [7; 16],
                &[(at::PAGESZ, 4096), (at::ENTRY, 0x1234)],
            );
            assert_eq!(stack.sp % 16, 0);
            assert_eq!(stack.sp + stack.bytes.len() as u64, TOP);
            let decoded = Decoded(&stack);
            assert_eq!(decoded.word(stack.sp), n as u64);
            let (got, next) = decoded.list(stack.sp + 8);
            assert_eq!(got, given.argv);
            let (got, next) = decoded.list(next);
            assert_eq!(got, given.envp);
            let auxv = decoded.auxv(next);
            let value = |key| auxv.iter().find(|&&(k, _)| k == key).unwrap().1;
            assert_eq!(value(at::PAGESZ), 4096);
            assert_eq!(decoded.string(value(at::EXECFN)), b"/bin/x");
            assert_eq!(decoded.string(value(at::PLATFORM)), b"x86_64");
            let random = (value(at::RANDOM) - stack.sp) as usize;
            assert_eq!(stack.bytes[random..random + 16], [7; 16]);
            assert_eq!(stack.auxv.len(), (auxv.len() + 1) * 16);
        }
    }

    #[test]
    fn string_ranges_are_contiguous() {
        let stack = build(TOP, &strings(&["ab", "c"], &["D=1"]), b"/x", [0; 16], &[]);
        assert_eq!(stack.args.1 - stack.args.0, 5);
        assert_eq!(stack.args.1, stack.envs.0);
        assert_eq!(stack.envs.1 - stack.envs.0, 4);
        assert_eq!(Decoded(&stack).string(stack.args.0), b"ab");
        assert_eq!(Decoded(&stack).string(stack.envs.0), b"D=1");
    }

    #[test]
    fn quarter_of_stack_is_the_limit() {
        let fits = Strings {
            argv: vec![vec![b'a'; 100_000]; 20],
            envp: Vec::new(),
        };
        assert_eq!(fits.check(8 << 20), Ok(()));
        let over = Strings {
            argv: vec![vec![b'a'; 100_000]; 21],
            envp: Vec::new(),
        };
        assert_eq!(over.check(8 << 20), Err(Errno::TOOBIG));
        assert_eq!(over.check(u64::MAX), Ok(()));
    }

    #[test]
    fn long_string_is_too_big() {
        let one = |len| Strings {
            argv: vec![vec![b'a'; len]],
            envp: Vec::new(),
        };
        assert_eq!(one(STRING_MAX - 1).check(8 << 20), Ok(()));
        assert_eq!(one(STRING_MAX).check(8 << 20), Err(Errno::TOOBIG));
    }

    #[test]
    fn many_empty_strings_count_their_pointers() {
        let many = Strings {
            argv: vec![Vec::new(); 300_000],
            envp: Vec::new(),
        };
        assert_eq!(many.check(8 << 20), Err(Errno::TOOBIG));
    }
}
