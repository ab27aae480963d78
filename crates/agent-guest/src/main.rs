//! The agent: a small program inside a guest that does what the host asks for over vsock. `docs/agent.md` says what and how.
//!
//! It is process 1 ([`init`]), or a service of a system that has its own process 1 ([`serve`]); [`install`] puts it into such a system
//! from the initramfs without writing to its disk. Each connection has a process of its own ([`session`]), which runs one program
//! ([`exec`]) or copies one tree ([`files`]); so what goes wrong in one harms no other.
//!
//! Linked statically, so that it runs in any Linux guest: it reads `/etc/passwd` itself ([`users`]).

mod dhcp;
mod exec;
mod files;
mod init;
mod install;
mod modules;
mod network;
mod ports;
mod power;
mod serve;
mod session;
mod shares;
mod system;
mod users;

use std::process::exit;

fn main() {
    let args: Vec<_> = std::env::args_os().collect();
    let first = args.get(1).and_then(|arg| arg.to_str());
    if std::process::id() == 1 {
        init::run(args.get(1..).unwrap_or_default());
    }
    let done = match (first, args.get(2)) {
        (Some("daemon"), None) => serve::daemon(),
        (Some("install"), Some(root)) => install::install(root.as_ref()),
        _ => Err(std::io::Error::other("usage: tightrope-agent daemon, or: tightrope-agent install ROOT")),
    };
    if let Err(error) = done {
        complain(&error.to_string());
        exit(1);
    }
}

/// One line on the guest's console about what did not work.
fn complain(why: &str) {
    eprintln!("tightrope-agent: {}", agent_protocol::without_numbers(why));
}
