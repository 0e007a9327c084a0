//! Kernel guests: whole Linux kernels with page tables of their own (`vmm boot`).
//!
//! Not there yet. This is where they go: loading a kernel with the `linux-loader` crate, its memory
//! map and boot parameters, and the processor state it starts with. What they share with process
//! guests is elsewhere already: [`crate::hv`] for KVM, [`crate::memory`] for the pool.
