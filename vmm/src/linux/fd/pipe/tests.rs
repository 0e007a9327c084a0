use std::sync::Arc;

use super::*;
use crate::linux::file::File;

fn pair() -> (Arc<End>, Arc<End>) {
    Pipe::pair(&Arc::new(Sched::default()), &Arc::default()).unwrap()
}

#[test]
fn written_bytes_come_out_in_order() {
    let (r, w) = pair();
    assert_eq!(w.pipe().write_some(b"hello "), Ok(6));
    assert_eq!(w.pipe().write_some(b"world"), Ok(5));
    let mut buf = [0; 8];
    assert_eq!(r.pipe().read_some(&mut buf), Ok(8));
    assert_eq!(&buf, b"hello wo");
    assert_eq!(r.pipe().read_some(&mut buf), Ok(3));
    assert_eq!(r.pipe().read_some(&mut buf), Err(Errno::AGAIN));
}

#[test]
fn last_writer_gone_gives_rest_then_end_of_file() {
    let (r, w) = pair();
    assert_eq!(w.pipe().write_some(b"x"), Ok(1));
    drop(w);
    assert_eq!(
        r.pipe().read_ready(),
        Ready::IN | Ready::RDNORM | Ready::HUP
    );
    let mut buf = [0; 8];
    assert_eq!(r.pipe().read_some(&mut buf), Ok(1));
    assert_eq!(r.pipe().read_some(&mut buf), Ok(0));
    assert_eq!(r.pipe().read_ready(), Ready::HUP);
}

#[test]
fn last_reader_gone_gives_epipe_and_pollerr() {
    let (r, w) = pair();
    drop(r);
    assert_eq!(w.pipe().write_some(b"x"), Err(Errno::PIPE));
    assert_eq!(
        w.pipe().write_ready(),
        Ready::OUT | Ready::WRNORM | Ready::ERR
    );
}

#[test]
fn small_write_is_all_or_nothing_and_large_is_partial() {
    let (r, w) = pair();
    assert_eq!(
        w.pipe().write_some(&vec![1; DEFAULT_CAPACITY - 10]),
        Ok(DEFAULT_CAPACITY - 10)
    );
    assert_eq!(w.pipe().write_some(&[2; 11]), Err(Errno::AGAIN));
    assert_eq!(w.pipe().write_ready(), Ready::empty());
    assert_eq!(w.pipe().write_some(&[2; PIPE_BUF + 1]), Ok(10));
    assert_eq!(w.pipe().write_some(&[2; 1]), Err(Errno::AGAIN));
    let mut buf = [0; PIPE_BUF];
    assert_eq!(r.pipe().read_some(&mut buf), Ok(PIPE_BUF));
    assert_eq!(w.pipe().write_ready(), Ready::OUT | Ready::WRNORM);
}

#[test]
fn pipes_of_a_machine_share_a_bounded_room() {
    let (sched, room) = (Arc::new(Sched::default()), Arc::default());
    let mut pipes = Vec::new();
    while let Ok(pair) = Pipe::pair(&sched, &room) {
        pipes.push(pair);
    }
    assert_eq!(pipes.len(), MAX_PIPES);
    assert_eq!(pipes[0].0.pipe().capacity(), DEFAULT_CAPACITY);
    assert_eq!(pipes[MAX_PIPES - 1].0.pipe().capacity(), PIPE_BUF);
    assert_eq!(
        pipes[0].0.pipe().set_capacity(MAX_CAPACITY),
        Err(Errno::PERM)
    );
    assert!(room.used().1 <= SOFT_ROOM + MAX_PIPES * PIPE_BUF);
    pipes.clear();
    assert_eq!(room.used(), (0, 0));
}

#[test]
fn capacity_is_rounded_and_bounded() {
    let (_r, w) = pair();
    assert_eq!(w.pipe().set_capacity(1), Ok(4096));
    assert_eq!(w.pipe().set_capacity(5000), Ok(8192));
    assert_eq!(w.pipe().write_some(&[0; 8192]), Ok(8192));
    assert_eq!(w.pipe().set_capacity(4096), Err(Errno::BUSY));
    assert_eq!(w.pipe().set_capacity(MAX_CAPACITY + 1), Err(Errno::PERM));
}

#[test]
fn writing_moves_the_readers_edge() {
    let (r, w) = pair();
    let before = r.edges();
    assert_eq!(w.pipe().write_some(b"a"), Ok(1));
    assert_ne!(r.edges(), before);
}
