//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes: `64M`, `1.5G`, `4096`, `2GiB`. Suffixes are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Why a size was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write a number with K, M, G or T, such as 512M")]
pub struct SizeError(String);

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let bad = || SizeError(text.to_owned());
        let upper = text.trim().to_ascii_uppercase();
        let body = upper
            .strip_suffix("IB")
            .or_else(|| upper.strip_suffix('B'))
            .unwrap_or(&upper);
        let (digits, shift) = match body.chars().last() {
            Some('K') => (&body[..body.len() - 1], 10),
            Some('M') => (&body[..body.len() - 1], 20),
            Some('G') => (&body[..body.len() - 1], 30),
            Some('T') => (&body[..body.len() - 1], 40),
            _ => (body, 0),
        };
        let plain = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number: f64 = if plain {
            digits.parse().map_err(|_| bad())?
        } else {
            return Err(bad());
        };
        let bytes = number
            * f64::from(1_u32 << (shift % 30))
            * if shift >= 30 { 1073741824.0 } else { 1.0 };
        if (1.0..9.0e18).contains(&bytes) {
            Ok(Self(bytes as u64))
        } else {
            Err(bad())
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift {
                let whole = self.0 as f64 / (1_u64 << shift) as f64;
                return if self.0.trailing_zeros() >= shift {
                    write!(f, "{whole} {unit}")
                } else {
                    write!(f, "{whole:.1} {unit}")
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("2GiB", 2 << 30),
            ("1t", 1 << 40),
            ("7kb", 7168),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "M",
            "-1",
            "1e9",
            "0",
            "12X",
            "1..2",
            "99999999T",
            "inf",
            "NaN",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn shown_as_people_write_them() {
        assert_eq!(Size(512 << 20).to_string(), "512 MiB");
        assert_eq!(Size(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Size(12).to_string(), "12 bytes");
    }
}
