use std::sync::Arc;

use super::address::{Address, Family};
use super::names::Name;
use super::socket::{Connect, Maker, Socket, World};
use crate::linux::Errno;
use crate::linux::fd::pipe::MAX_PIPES;
use crate::linux::file::Ready;
use crate::linux::sched::Sched;

fn world() -> World {
    World {
        sched: Arc::new(Sched::default()),
        room: Arc::default(),
        names: Arc::default(),
    }
}

fn name() -> Name {
    Name::Abstract(b"x".to_vec())
}

fn socket(world: &World) -> Arc<Socket> {
    Socket::new(world, Family::Unix, Maker::default())
}

/// A socket that listens under [`name`].
fn listener(world: &World, backlog: usize) -> Arc<Socket> {
    let listener = socket(world);
    let bind = || {
        world.names.bind(name(), &listener)?;
        Ok((name(), Address::Abstract(b"x".to_vec())))
    };
    listener.bind(bind).unwrap();
    listener.listen(backlog).unwrap();
    listener
}

fn text(socket: &Socket) -> Result<Vec<u8>, Errno> {
    let mut buf = [0; 16];
    let input = socket.stream()?.input;
    let n = input.map_or(Ok(0), |end| end.pipe().read_some(&mut buf))?;
    Ok(buf[..n].to_vec())
}

fn put(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    let output = socket.stream()?.output;
    output.ok_or(Errno::PIPE)?.pipe().write_some(bytes)
}

#[test]
fn both_directions_of_a_pair_are_apart() {
    let [a, b] = Socket::pair(&world(), Maker::default()).unwrap();
    assert_eq!((put(&a, b"to b"), put(&b, b"to a")), (Ok(4), Ok(4)));
    assert_eq!(
        (text(&a), text(&b)),
        (Ok(b"to a".to_vec()), Ok(b"to b".to_vec()))
    );
    assert_eq!(a.readiness(), Ready::OUT | Ready::WRNORM);
}

#[test]
fn closed_peer_gives_end_of_file_and_hangup() {
    let [a, b] = Socket::pair(&world(), Maker::default()).unwrap();
    drop(b);
    assert_eq!(text(&a), Ok(Vec::new()));
    assert_eq!(put(&a, b"x"), Err(Errno::PIPE));
    assert!(
        a.readiness()
            .contains(Ready::HUP | Ready::IN | Ready::RDHUP | Ready::OUT)
    );
}

#[test]
fn connection_is_made_before_it_is_accepted() {
    let world = world();
    let listener = listener(&world, 5);
    assert_eq!(listener.readiness(), Ready::empty());
    let client = socket(&world);
    let made = client.connect(&world, &listener, Address::Unnamed);
    assert_eq!(made, Ok(Connect::Done));
    assert_eq!(put(&client, b"early"), Ok(5));
    assert!(listener.readiness().contains(Ready::IN));
    let server = listener.accept().unwrap();
    assert_eq!(text(&server), Ok(b"early".to_vec()));
    assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN);
    let again = client.connect(&world, &listener, Address::Unnamed);
    assert_eq!(again, Err(Errno::ISCONN));
}

#[test]
fn full_queue_makes_the_next_one_wait() {
    let world = world();
    let listener = listener(&world, 1);
    let first = socket(&world).connect(&world, &listener, Address::Unnamed);
    assert_eq!(first, Ok(Connect::Done));
    let second = socket(&world).connect(&world, &listener, Address::Unnamed);
    assert_eq!(second, Ok(Connect::Full(listener.key)));
    drop(listener.accept().unwrap());
    let third = socket(&world).connect(&world, &listener, Address::Unnamed);
    assert_eq!(third, Ok(Connect::Done));
}

#[test]
fn connection_that_is_not_accepted_ends_with_its_listener() {
    let world = world();
    let listener = listener(&world, 5);
    let client = socket(&world);
    let made = client.connect(&world, &listener, Address::Unnamed);
    assert_eq!(made, Ok(Connect::Done));
    drop(listener);
    assert!(world.names.find(&name()).is_none());
    assert_eq!(text(&client), Ok(Vec::new()));
}

#[test]
fn name_is_free_again_when_its_socket_is_gone() {
    let world = world();
    let first = listener(&world, 5);
    let second = socket(&world);
    assert_eq!(world.names.bind(name(), &second), Err(Errno::ADDRINUSE));
    drop(first);
    assert_eq!(world.names.bind(name(), &second), Ok(()));
}

#[test]
fn port_of_all_addresses_meets_that_of_one() {
    let world = world();
    let (all, one) = ([0, 0, 0, 0].into(), [127, 0, 0, 1].into());
    let (first, second) = (socket(&world), socket(&world));
    assert_eq!(world.names.bind(Name::Tcp(all, 80), &first), Ok(()));
    let taken = world.names.bind(Name::Tcp(one, 80), &second);
    assert_eq!(taken, Err(Errno::ADDRINUSE));
    assert_eq!(world.names.bind(Name::Tcp(one, 81), &second), Ok(()));
    let found = world.names.find(&Name::Tcp(one, 80));
    assert!(found.is_some_and(|found| Arc::ptr_eq(&found, &first)));
    assert!(world.names.find(&Name::Tcp(all, 81)).is_none());
}

#[test]
fn connections_are_bounded_by_the_machines_pipes() {
    let world = world();
    let listener = listener(&world, usize::MAX);
    let mut clients = Vec::new();
    let refused = loop {
        let client = socket(&world);
        match client.connect(&world, &listener, Address::Unnamed) {
            Ok(Connect::Done) => clients.push(client),
            other => break other,
        }
        if clients.len().is_multiple_of(1000) {
            listener
                .accept()
                .map(|server| clients.push(server))
                .unwrap();
        }
    };
    assert!(clients.len() <= MAX_PIPES / 2 + 1000, "{refused:?}");
}
