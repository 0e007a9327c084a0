//! The manager's verbs, a subject in each file. One program, so that the manager is compiled for them once.

mod basics;
#[path = "../common/mod.rs"]
mod common;
mod edges;
mod fault_injection;
mod frozen;
mod frozen_sections;
mod keep;
mod keep_sections;
mod paging;
mod pool;
mod quotas;
mod races;
mod rebase;
mod reset;
mod room;
mod sections;
mod shared_memory;
mod sharing;
mod stored_injection;
mod threads;
mod unread_sections;
