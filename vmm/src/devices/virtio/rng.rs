//! A source of random bytes (virtio 1.2, 5.4): the host's.

use std::borrow::Cow;
use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Request, VirtioDevice};

const KIND: u32 = 4;
/// Most bytes of one answer; a driver asks again.
const MOST: usize = 4096;

/// The source. It remembers nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    fn answer(&mut self, _queue: usize, mut request: Request<'_>) -> u32 {
        let mut bytes = [0; MOST];
        let wanted = request.to.available_bytes().min(MOST);
        let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        match request.to.write_all(&bytes[..got]) {
            Ok(()) => u32::try_from(got).expect("a few bytes"),
            Err(_) => 0,
        }
    }
}
