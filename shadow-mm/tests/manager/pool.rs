//! Random histories of the non-paged pool against a map of who has which page.

use std::collections::BTreeMap;

use proptest::prelude::*;
use shadow_mm::{NonPagedPool, PoolMode};

const WINDOW: u32 = 60;

/// Pages of the window with who has them, and what was backed.
#[derive(Default)]
struct Model {
    taken: BTreeMap<u32, u32>,
    backed: Vec<bool>,
    /// Pages that lie beside a guarded allocation, or were one: never anybody's again.
    gone: Vec<bool>,
}

impl Model {
    fn free(&self) -> Vec<bool> {
        let mut free = vec![true; WINDOW as usize];
        for (first, count) in &self.taken {
            (*first..first + count).for_each(|page| free[page as usize] = false);
        }
        let gone = free.iter_mut().zip(&self.gone);
        gone.for_each(|(free, gone)| *free &= !gone);
        free
    }

    fn longest(&self) -> usize {
        let runs = self.free();
        runs.split(|free| !free)
            .map(<[bool]>::len)
            .max()
            .unwrap_or(0)
    }
}

fn allocate(pool: &mut NonPagedPool, model: &mut Model, count: u32) {
    let before = pool.usage();
    match pool.allocate(count) {
        Ok(got) => {
            let range = got.pages.start as usize..got.pages.end as usize;
            assert_eq!(got.pages.len(), count as usize);
            let free = model.free();
            assert!(free[range.clone()].iter().all(|free| *free), "taken");
            let backed = |page: u32| got.unbacked.iter().any(|run| run.contains(&page));
            for page in got.pages.clone() {
                assert_eq!(backed(page), !model.backed[page as usize], "{page}");
                model.backed[page as usize] = true;
            }
            let guarded = before.free - pool.usage().free == count + 2;
            if guarded {
                for page in [range.start - 1, range.end] {
                    assert!(free[page] && !model.backed[page], "page {page} is no guard");
                    model.gone[page] = true;
                }
            }
            model.taken.insert(got.pages.start, count);
        }
        Err(_) => assert!(
            count == 0 || model.longest() < count as usize,
            "there was room"
        ),
    }
}

fn history(mode: PoolMode, steps: Vec<(bool, u32)>) {
    let mut pool = NonPagedPool::new(WINDOW, mode);
    let mut model = Model {
        backed: vec![false; WINDOW as usize],
        gone: vec![false; WINDOW as usize],
        ..Model::default()
    };
    for (allocates, number) in steps {
        if allocates {
            allocate(&mut pool, &mut model, number % 9);
        } else {
            let first = number % WINDOW;
            let free = pool.usage().free;
            assert_eq!(pool.free(first).ok(), model.taken.get(&first).copied());
            if let Some(count) = model.taken.remove(&first)
                && pool.usage().free == free
            {
                assert_eq!(mode, PoolMode::Special);
                (first..first + count).for_each(|page| model.gone[page as usize] = true);
            }
        }
        let free = model.free().iter().filter(|free| **free).count();
        assert_eq!(pool.usage().free as usize, free);
        let backed = model.backed.iter().filter(|backed| **backed).count();
        assert_eq!(pool.usage().backed as usize, backed);
    }
}

fn steps() -> impl Strategy<Value = Vec<(bool, u32)>> {
    // Where allocations start is mostly a high page: the pool is used from its end.
    prop::collection::vec((any::<bool>(), any::<u32>()), 1..120)
}

proptest! {
    #[test]
    fn plain_pool_never_gives_a_page_twice(steps in steps()) {
        history(PoolMode::Plain, steps);
    }

    #[test]
    fn special_pool_never_backs_a_guard(steps in steps()) {
        history(PoolMode::Special, steps);
    }
}
