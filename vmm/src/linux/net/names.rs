//! Which socket has which name.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::socket::Socket;
use crate::linux::Errno;
use crate::locks::{Mutex, rank};

/// First port that is given to who asks for any (ip(7), `ip_local_port_range`).
const FIRST_FREE_PORT: u16 = 32_768;
/// Abstract names that are given to who asks for any have this many digits.
const AUTOBIND_DIGITS: usize = 5;

/// A name of a socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Name {
    /// A socket's inode: device and number.
    Inode(u64, u64),
    /// An abstract name.
    Abstract(Vec<u8>),
    /// A TCP port of an address.
    Tcp(IpAddr, u16),
}

/// The names of a machine.
#[derive(Debug, Default)]
pub struct Names {
    bound: Mutex<rank::SocketNames, BTreeMap<Name, Weak<Socket>>>,
}

impl Names {
    /// Gives a socket a name; it has it as long as it lives.
    ///
    /// # Errors
    /// `EADDRINUSE`.
    pub(super) fn bind(&self, name: Name, socket: &Arc<Socket>) -> Result<(), Errno> {
        let mut bound = self.bound.lock();
        let free = match &name {
            Name::Tcp(ip, port) => port_is_free(&bound, *ip, *port),
            Name::Inode(..) | Name::Abstract(_) => !has(&bound, &name),
        };
        if !free {
            return Err(Errno::ADDRINUSE);
        }
        bound.insert(name, Arc::downgrade(socket));
        Ok(())
    }

    /// Gives a socket a port of an address that nobody has.
    ///
    /// # Errors
    /// `EADDRINUSE` when none is left.
    pub(super) fn bind_any_port(&self, ip: IpAddr, socket: &Arc<Socket>) -> Result<u16, Errno> {
        let mut bound = self.bound.lock();
        let port = (FIRST_FREE_PORT..=u16::MAX).find(|port| port_is_free(&bound, ip, *port));
        let port = port.ok_or(Errno::ADDRINUSE)?;
        bound.insert(Name::Tcp(ip, port), Arc::downgrade(socket));
        Ok(port)
    }

    /// Gives a socket an abstract name that nobody has.
    ///
    /// # Errors
    /// `ENOSPC` when none is left.
    pub(super) fn bind_any_abstract(&self, socket: &Arc<Socket>) -> Result<Vec<u8>, Errno> {
        let mut bound = self.bound.lock();
        let limit = 16_u32.pow(AUTOBIND_DIGITS as u32);
        let names = (0..limit).map(|n| format!("{n:05x}").into_bytes());
        let free = |name: &Vec<u8>| !has(&bound, &Name::Abstract(name.clone()));
        let name = names.into_iter().find(free).ok_or(Errno::NOSPC)?;
        bound.insert(Name::Abstract(name.clone()), Arc::downgrade(socket));
        Ok(name)
    }

    /// The socket with a name; a port also by the addresses that stand for all.
    pub(super) fn find(&self, name: &Name) -> Option<Arc<Socket>> {
        let bound = self.bound.lock();
        let live = |name: &Name| bound.get(name).and_then(Weak::upgrade);
        let Name::Tcp(ip, port) = name else {
            return live(name);
        };
        let (all4, all6) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into());
        let all = if ip.is_ipv4() {
            vec![all4, all6]
        } else {
            vec![all6]
        };
        live(name).or_else(|| all.into_iter().find_map(|ip| live(&Name::Tcp(ip, *port))))
    }

    /// A socket is gone, and with it its name.
    pub(super) fn forget(&self, name: &Name) {
        let mut bound = self.bound.lock();
        if bound
            .get(name)
            .is_some_and(|socket| socket.strong_count() == 0)
        {
            bound.remove(name);
        }
    }
}

type Bound = BTreeMap<Name, Weak<Socket>>;

fn has(bound: &Bound, name: &Name) -> bool {
    bound
        .get(name)
        .is_some_and(|socket| socket.strong_count() > 0)
}

/// A port of an address that stands for all is one of every address.
fn port_is_free(bound: &Bound, ip: IpAddr, port: u16) -> bool {
    let lowest = Name::Tcp(Ipv4Addr::UNSPECIFIED.into(), 0);
    let same_kind = |other: &IpAddr| other.is_ipv4() == ip.is_ipv4();
    !bound.range(lowest..).any(|(name, socket)| match name {
        Name::Tcp(other, taken) => {
            let meets = *other == ip || other.is_unspecified() || ip.is_unspecified();
            *taken == port && same_kind(other) && meets && socket.strong_count() > 0
        }
        Name::Inode(..) | Name::Abstract(_) => false,
    })
}
