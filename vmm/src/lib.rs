//! Samepage's monitor: many KVM microVMs of one merge domain.
//!
//! # The problem
//! The engine shares pages inside one process. So the VMs that may share live in one monitor, and
//! the monitor must be what a process per VM would be (several monitors can be in one process;
//! they share nothing of this crate):
//! a guest that crashes, spins, floods or lies must not hurt its neighbours, and a VM that ends
//! must leave nothing behind, at any moment of its life, however it ends.
//!
//! # What is guaranteed
//! - A VM is `Running`, `Paused` or nothing: a start that fails leaves the VM as it was, and
//!   [`VmState::Ended`] is published when its threads are joined, its devices are gone and its
//!   memory was handed over.
//! - Every VM ends for exactly one [`EndReason`], the first that was found.
//! - A panic in a vCPU thread or a device queue ends that VM and no other.
//! - No thread polls but the guard, whose looks are as rare as the memory that is left allows: a
//!   halted vCPU sleeps in KVM, a paused one at its gate.
//! - A domain keeps within its memory: guests are held and a VM is ended before the kernel would
//!   kill the monitor.
//! - What a guest says is checked where it enters. What a user says is checked by
//!   [`VmConfig::validate`], and errors name the field and the value.
//! - Dropping the [`Monitor`] stops every VM and joins every thread.
//!
//! # Modules
//! | module | holds | kind |
//! |---|---|---|
//! | [`monitor`] | [`Monitor`]: the VMs of one domain | thin |
//! | `vm` | the record of one VM; every change of its state | locks |
//! | [`state`] | states, end reasons, legal steps | pure |
//! | `reaper` | takes ended VMs down | thread |
//! | `guard` | keeps the domain within its memory | thread, pure policy |
//! | [`admission`] | whether a VM may start | pure |
//! | `roster` | the list of VMs | locks |
//! | `machine` | a running VM: assembly and teardown, in order | mechanism |
//! | `plug` | the configuration's devices, plugged into a machine | mechanism |
//! | `drives` | the files of a machine's drives, until they are closed | mechanism |
//! | [`start`] | the files of a configuration, loaded | files |
//! | `metered` | a kernel or initrd, loaded as its VM may take memory | files |
//! | `host_file` | files of the host, opened without side effects | files |
//! | [`config`], [`id`] | the Firecracker config file; names | pure |
//! | [`ksm`] | kernel KSM: whether it is there, what it tells | files |
//! | [`info`], [`error`] | what is told about VMs and errors | pure |
//! | [`console`] | output ring, readers, input | locks |
//! | [`rate_limiter`] | token buckets | pure |
//! | [`memory`] | address space layout; RAM over one host mapping | pure, unsafe |
//! | [`boot`] | kernel, initrd, command line, tables in guest memory | pure |
//! | `kvm` | VM, vCPU set-up and threads, gate and kick, exits | system calls, unsafe |
//! | `device` | port-mapped devices | state |
//! | [`bus`] | MMIO address to device | pure |
//! | [`events`] | the event loop | thread |
//! | [`virtio`] | virtio-mmio transport, queues, block, network, entropy, vsock and balloon devices | state |
//! | [`probe`] | whether KVM can be used, asked before there is a monitor | system calls |
//! | [`pageload`] | the embedded bare-metal guest | bytes |
//! | `panics` | text of a caught panic | pure |
//!
//! # Threads
//! | thread | number | does | ends |
//! |---|---|---|---|
//! | `v<n>:<vm>` | one for each vCPU | runs the guest, serves its register accesses | with its VM |
//! | `events` | one | serves device queues | with the monitor |
//! | `reaper` | one | takes ended VMs down | with the monitor |
//! | `guard` | one | looks at memory, ends VMs when it runs out | first of the monitor |
//! | `discard` | one | gives up what guests give back | with the monitor and its VMs |
//! | the merge worker | one | see `dedup` | with the monitor's engine |
//! | callers | any | requests to [`Monitor`] | |
//!
//! # Locks
//! Total order, outermost first; a thread may skip locks but never go back:
//! 1. the *list of VMs* (`roster`): short; never held over a request to a VM, except to have
//!    it forgotten.
//! 2. the *cell* of a VM (`Vm::cell`): its state and its machine. Not held while vCPUs come to stand
//!    still: one may be in the kernel for long. Its *configuration* (`Vm::config`) is a leaf, read with
//!    or without the cell, and replaced under it.
//! 3. the *gate* of a VM (`kvm::gate`).
//! 4. the *kick* of a vCPU (`kvm::run_page`): leaf, around one store.
//! 5. *devices*: a virtio device's registers, then the device, then a balloon's handle or one of its
//!    lanes (see [`virtio`]); the serial port;
//!    the keyboard controller; CMOS; the report port. A thread that holds one takes none of 1 to 4.
//! 6. the *console's input* (its lock is released before the serial port's is taken), then the
//!    *console's log*: leaves. Tasks that wait for output are woken after it was released, but with
//!    the serial port's held: their wakers must not wait.
//!
//! The guard's `ACTING` is taken before all of these and held while VMs end; the claims of starts
//! (`Monitor::claims`) are taken before 1, as is the lock of a start that reserves memory
//! (`guard::room`). The gauge's count is a leaf, which the engine also takes, and so are the
//! guard's bell, the list of guarded domains, and the list of queues that were put off.
//!
//! The event loop is waited for (to remove a subscriber) with none of these held.

#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod admission;
pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
mod device;
mod drives;
pub mod error;
pub mod events;
#[cfg(test)]
#[path = "../../tests/fuzz/seeds.rs"]
mod fuzz_seeds;
mod guard;
mod host_file;
pub mod id;
pub mod info;
pub mod ksm;
mod kvm;
mod machine;
pub mod memory;
mod metered;
pub mod monitor;
pub mod pageload;
mod panics;
mod plug;
pub mod probe;
pub mod rate_limiter;
mod reaper;
mod roster;
pub mod start;
pub mod state;
pub mod virtio;
mod vm;

pub use config::VmConfig;
pub use console::{Console, ConsoleRead, ConsoleReader};
pub use error::{ErrorKind, MonitorError};
pub use guard::gauge::Limit;
pub use id::{MergeDomain, VmId};
pub use info::{GuestReport, KsmProcess, MemoryInfo, VmInfo, WriteLatency, WriteProbe};
pub use ksm::{KsmPlace, KsmStats};
pub use monitor::Monitor;
pub use state::{EndReason, VmState};
