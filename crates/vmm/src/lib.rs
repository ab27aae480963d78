//! One VM's life: build, run, stop.
//!
//! [`VmConfig`] says what the VM is made of; [`Vm::new`] opens and builds it all and confines the process; [`Vm::run`] runs it to its
//! end and returns the exit code. There is one VM per process: signals, terminal and sandbox are the process's own.
//!
//! * [`vm`]: the supervisor. Everything that happens is an event in one channel (`events`), handled on one thread.
//! * [`vcpu`]: one thread per vCPU, told what to do by the supervisor.
//! * [`board`] and [`pc`]: the machine as the supervisor sees it, and the PC in that shape.
//! * [`engine`]: which engine runs the guest.
//! * [`inputs`]: the user's files, opened, locked and checked. [`net`]: the guest's network. [`mod@share`]: directories it sees.
//! * [`serial`], [`console`], [`terminal`], [`signals`]: the console and the user's terminal. [`ports`]: named ports.
//! * [`instance`]: a VM that other commands find; [`control`]: what they ask of it; [`agent`]: is there one in the guest?
//! * [`gdb`]: the gdb stub. [`crash`], [`stats`]: reports. [`state`]: a stopped VM in a file. [`sandbox`]: Landlock and seccomp.
//! * [`doctor`]: what this host can do.
//!
//! What is not here: devices (crate `machine`, `virtio`), instructions (the engines), where images come from (`image`).

mod agent;
mod board;
mod config;
mod console;
mod control;
mod crash;
mod disks;
pub mod doctor;
mod engine;
mod error;
mod events;
mod gdb;
mod inputs;
mod instance;
mod net;
mod pc;
mod ports;
mod resident;
mod sandbox;
mod serial;
mod share;
mod signals;
mod state;
mod stats;
pub mod terminal;
mod vcpu;
mod vm;

pub use config::{
    DEFAULT_MEMORY, DiskConfig, EngineChoice, GdbAddress, MAX_CPUS, Optimization, SandboxMode, SerialMode, StatsFormat,
    TraceConfig, Vendor, VmConfig, WatchdogAction, parse_memory,
};
pub use error::Error;
pub use instance::Instance;
pub use machine::boot::unpack_kernel;
pub use net::{NetConfig, PortForward, SocketKind, UserNet};
pub use ports::{PortConfig, PortPlace};
pub use share::{GuestPlace, MAX_SHARES, ShareConfig, place_of, words as share_words};
pub use vm::{EXIT_CRASH, Vm};
