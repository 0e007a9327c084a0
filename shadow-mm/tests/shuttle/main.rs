//! The lock protocol as a model: the real manager under every interleaving a scheduler can think of.
//!
//! The locks are made of `shuttle`'s semaphores and every look at a page table is a scheduling point, so
//! `shuttle` decides which thread goes on at each of them. A schedule that fails is printed
//! and can be replayed. After each schedule the invariant checker runs, what the guests should see is
//! compared, and after the last space is gone every frame must be home.
//!
//! `SHUTTLE_ITERATIONS` sets how many schedules each scenario is given (few by default).
//!
//! What it is not: exhaustive, and it knows no weak memory: every atomic is sequentially consistent.

mod cow;
mod exit;
mod files;
mod forks;
mod guest;
mod keep;
mod paging;
mod platform;
mod range;
mod share;
mod stored;
mod thaw;
mod unread;

use shadow_mm::ForkMode;
use shuttle::Runner;
use shuttle::scheduler::{PctScheduler, RandomScheduler};

/// Schedules of each kind for each scenario.
const FEW: usize = 200;
/// How many times a schedule of the second kind changes its mind.
const DEPTH: usize = 3;

/// Runs a scenario under random schedules, and under schedules that let one thread run as far as it
/// can but for a few changes.
fn schedules(scenario: fn()) {
    let asked = std::env::var("SHUTTLE_ITERATIONS").ok();
    let iterations = asked.and_then(|n| n.parse().ok()).unwrap_or(FEW);
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        guest::MODE.set(mode);
        Runner::new(RandomScheduler::new(iterations), config.clone()).run(scenario);
        Runner::new(PctScheduler::new(DEPTH, iterations), config.clone()).run(scenario);
    }
}
