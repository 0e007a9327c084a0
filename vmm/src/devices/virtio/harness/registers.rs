//! What a driver may set, and a device without state.

use super::super::rng::Rng;
use super::{Buffer, Driver};

#[test]
fn random_bytes_differ() {
    let mut driver = Driver::new(Box::new(Rng)).start(0);
    let (one, length) = driver.request(&[Buffer::In(64)]);
    let (two, _) = driver.request(&[Buffer::In(64)]);
    assert_eq!((length, one.len()), (64, 64));
    assert_ne!(one, two);
    let (_, length) = driver.request(&[Buffer::In(10_000)]);
    assert!(length <= 10_000);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let driver = Driver::new(Box::new(Rng));
    driver.set(0x70, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1 | 1 << 31);
    driver.set(0x70, 11);
    assert_eq!(driver.get(0x70), 3);
    // DRIVER_OK without FEATURES_OK.
    driver.set(0x70, 7);
    assert_eq!(driver.get(0x70), 3);
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
}
