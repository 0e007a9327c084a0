//! Socket addresses: `struct sockaddr_un`, `sockaddr_in`, `sockaddr_in6` (unix(7), ip(7), ipv6(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::linux::Errno;

pub(super) const AF_UNSPEC: u16 = 0;
pub(super) const AF_UNIX: u16 = 1;
pub(super) const AF_INET: u16 = 2;
pub(super) const AF_INET6: u16 = 10;

/// Longest address: `struct sockaddr_storage`.
pub(super) const MAX: usize = 128;
/// Bytes of `sun_path`.
const SUN_PATH: usize = 108;
const SOCKADDR_IN: usize = 16;
/// The least length of a `sockaddr_in6`: without its scope.
const SOCKADDR_IN6_MIN: usize = 24;

/// What a socket's addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Family {
    /// `AF_UNIX`.
    Unix,
    /// `AF_INET`.
    Inet,
    /// `AF_INET6`.
    Inet6,
}

impl Family {
    /// By its number.
    pub(super) fn new(number: i32) -> Result<Self, Errno> {
        match u16::try_from(number) {
            Ok(AF_UNIX) => Ok(Self::Unix),
            Ok(AF_INET) => Ok(Self::Inet),
            Ok(AF_INET6) => Ok(Self::Inet6),
            _ => Err(Errno::AFNOSUPPORT),
        }
    }

    pub(super) fn number(self) -> u16 {
        match self {
            Self::Unix => AF_UNIX,
            Self::Inet => AF_INET,
            Self::Inet6 => AF_INET6,
        }
    }
}

/// The address of one side of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Address {
    /// `AF_UNIX` without a name.
    Unnamed,
    /// A name in the tree.
    Path(Vec<u8>),
    /// An abstract name, without its leading zero byte.
    Abstract(Vec<u8>),
    /// An Internet address and port.
    Inet(IpAddr, u16),
}

impl Address {
    /// The address a socket of a family has before it is bound.
    pub(super) fn none(family: Family) -> Self {
        match family {
            Family::Unix => Self::Unnamed,
            Family::Inet => Self::Inet(Ipv4Addr::UNSPECIFIED.into(), 0),
            Family::Inet6 => Self::Inet(Ipv6Addr::UNSPECIFIED.into(), 0),
        }
    }

    /// From the bytes the guest gave, for a socket of a family.
    pub(super) fn parse(family: Family, raw: &[u8]) -> Result<Self, Errno> {
        let Some((number, rest)) = raw.split_first_chunk::<2>() else {
            return Err(Errno::INVAL);
        };
        let number = u16::from_ne_bytes(*number);
        match family {
            Family::Unix if number == AF_UNIX => parse_unix(rest),
            Family::Unix => Err(Errno::INVAL),
            Family::Inet | Family::Inet6 if number == AF_INET => parse_inet(family, raw),
            Family::Inet6 if number == AF_INET6 => parse_inet6(raw),
            Family::Inet | Family::Inet6 => Err(Errno::AFNOSUPPORT),
        }
    }

    /// The bytes the guest gets, for a socket of a family.
    pub(super) fn bytes(&self, family: Family) -> Vec<u8> {
        let mut out = family.number().to_ne_bytes().to_vec();
        match self {
            Self::Unnamed => {}
            Self::Path(path) => {
                out.extend_from_slice(path);
                out.push(0);
            }
            Self::Abstract(name) => {
                out.push(0);
                out.extend_from_slice(name);
            }
            Self::Inet(ip, port) => {
                out.extend_from_slice(&port.to_be_bytes());
                match (family, ip) {
                    (Family::Inet6, ip) => {
                        let ip = match ip {
                            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                            IpAddr::V6(ip) => *ip,
                        };
                        out.extend_from_slice(&[0; 4]);
                        out.extend_from_slice(&ip.octets());
                        out.extend_from_slice(&[0; 4]);
                    }
                    (Family::Unix | Family::Inet, IpAddr::V4(ip)) => {
                        out.extend_from_slice(&ip.octets());
                        out.resize(SOCKADDR_IN, 0);
                    }
                    (Family::Unix | Family::Inet, IpAddr::V6(_)) => out.resize(SOCKADDR_IN, 0),
                }
            }
        }
        out
    }
}

fn parse_unix(name: &[u8]) -> Result<Address, Errno> {
    match name {
        [] => Ok(Address::Unnamed),
        name if name.len() > SUN_PATH => Err(Errno::INVAL),
        [0, name @ ..] => Ok(Address::Abstract(name.to_vec())),
        path => {
            let end = path.iter().position(|&b| b == 0).unwrap_or(path.len());
            Ok(Address::Path(path[..end].to_vec()))
        }
    }
}

fn port(raw: &[u8]) -> u16 {
    u16::from_be_bytes([raw[2], raw[3]])
}

fn parse_inet(family: Family, raw: &[u8]) -> Result<Address, Errno> {
    if raw.len() < SOCKADDR_IN {
        return Err(Errno::INVAL);
    }
    if family == Family::Inet6 {
        return Err(Errno::AFNOSUPPORT);
    }
    let ip = Ipv4Addr::new(raw[4], raw[5], raw[6], raw[7]);
    Ok(Address::Inet(ip.into(), port(raw)))
}

fn parse_inet6(raw: &[u8]) -> Result<Address, Errno> {
    if raw.len() < SOCKADDR_IN6_MIN {
        return Err(Errno::INVAL);
    }
    let mut octets = [0; 16];
    octets.copy_from_slice(&raw[8..24]);
    let ip = Ipv6Addr::from(octets);
    let ip = ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4);
    Ok(Address::Inet(ip, port(raw)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_there_and_back() {
        let cases = [
            (Family::Unix, Address::Unnamed),
            (Family::Unix, Address::Path(b"/tmp/s".to_vec())),
            (Family::Unix, Address::Abstract(b"a\0b".to_vec())),
            (Family::Inet, Address::Inet([127, 0, 0, 1].into(), 80)),
            (
                Family::Inet6,
                Address::Inet(Ipv6Addr::LOCALHOST.into(), 443),
            ),
            (Family::Inet6, Address::Inet([127, 0, 0, 1].into(), 1)),
        ];
        for (family, address) in cases {
            let raw = address.bytes(family);
            assert_eq!(Address::parse(family, &raw), Ok(address), "{raw:?}");
        }
    }

    #[test]
    fn short_and_foreign_addresses_are_refused() {
        assert_eq!(Address::parse(Family::Unix, &[1]), Err(Errno::INVAL));
        assert_eq!(Address::parse(Family::Unix, &[2, 0, 0]), Err(Errno::INVAL));
        assert_eq!(
            Address::parse(Family::Inet, &[2, 0, 0, 80]),
            Err(Errno::INVAL)
        );
        assert_eq!(
            Address::parse(Family::Inet, &[1, 0, 0, 80]),
            Err(Errno::AFNOSUPPORT)
        );
        let long = [&[1, 0][..], &[b'x'; SUN_PATH + 1]].concat();
        assert_eq!(Address::parse(Family::Unix, &long), Err(Errno::INVAL));
    }

    #[test]
    fn sockaddr_in6_has_its_size() {
        let raw = Address::none(Family::Inet6).bytes(Family::Inet6);
        assert_eq!(raw.len(), 28);
    }
}
