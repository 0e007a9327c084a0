//! What lives inside the virtual machine besides the guest's own programs: the ring-0 *monitor*,
//! and the layout it shares with the VMM ([`abi`]).
//!
//! The monitor is entry stubs, an IDT, a GDT, a TSS per virtual CPU, one `enter` routine (touch a
//! list of page-table words, load CR3, return to ring 3), and nothing else: policy never moves into
//! it. On a software KVM each of its instructions is emulated, so it is small and plain.

pub mod abi;
pub mod descriptors;
pub mod monitor;
