//! Objects that several records share, by number.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::Damaged;

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        $(
            $(#[$doc])*
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
            )]
            pub struct $name(pub(in crate::linux) u32);
        )*
    };
}

numbers! {
    /// An address space.
    SpaceIx,
    /// An open file description.
    DescriptionIx,
    /// An open file.
    FileIx,
    /// A pipe.
    PipeIx,
    /// A socket.
    SocketIx,
    /// An inode in memory.
    InodeIx,
}

/// Objects in the order they were first seen.
#[derive(Debug)]
pub(super) struct Seen<T: ?Sized> {
    numbers: HashMap<usize, u32>,
    all: Vec<Arc<T>>,
    done: usize,
}

impl<T: ?Sized> Default for Seen<T> {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            all: Vec::new(),
            done: 0,
        }
    }
}

fn address<T: ?Sized>(item: &Arc<T>) -> usize {
    Arc::as_ptr(item).cast::<()>() as usize
}

impl<T: ?Sized> Seen<T> {
    /// The number of an object. It is kept, so that nothing else gets its address.
    pub(super) fn number(&mut self, item: &Arc<T>) -> u32 {
        let next = self.all.len() as u32;
        let number = *self.numbers.entry(address(item)).or_insert(next);
        if number == next {
            self.all.push(Arc::clone(item));
        }
        number
    }

    /// The number of an object that was seen.
    pub(super) fn find(&self, item: &Arc<T>) -> Option<u32> {
        self.numbers.get(&address(item)).copied()
    }

    /// The next object that was not given out here yet.
    pub(super) fn next(&mut self) -> Option<Arc<T>> {
        let item = self.all.get(self.done).cloned()?;
        self.done += 1;
        Some(item)
    }

    /// All of them.
    pub(super) fn all(&self) -> &[Arc<T>] {
        &self.all
    }
}

/// Objects made again, in the order of their numbers.
#[derive(Debug)]
pub(super) struct Made<T> {
    what: &'static str,
    all: Vec<T>,
}

impl<T> Made<T> {
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            all: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, item: T) {
        self.all.push(item);
    }

    /// The object with a number.
    pub(super) fn get(&self, number: u32) -> Result<&T, Damaged> {
        let found = usize::try_from(number).ok().and_then(|n| self.all.get(n));
        found.ok_or(Damaged(self.what))
    }

    /// All of them.
    pub(super) fn all(&self) -> &[T] {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_object_keeps_its_number() {
        let (a, b) = (Arc::new(1), Arc::new(1));
        let mut seen = Seen::default();
        assert_eq!((seen.number(&a), seen.number(&b)), (0, 1));
        assert_eq!((seen.number(&a), seen.find(&b)), (0, Some(1)));
        assert_eq!(seen.find(&Arc::new(1)), None);
        assert!(Arc::ptr_eq(&seen.next().unwrap(), &a));
        assert!(Arc::ptr_eq(&seen.next().unwrap(), &b));
        assert!(seen.next().is_none());
    }

    #[test]
    fn number_without_an_object_is_damage() {
        let mut made = Made::new("no such thing");
        made.push('a');
        assert_eq!(made.get(0), Ok(&'a'));
        assert_eq!(made.get(1), Err(Damaged("no such thing")));
    }
}
