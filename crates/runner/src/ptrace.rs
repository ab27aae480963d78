//! Making a process stop before instructions, by the CPU's debug registers (SDM volume 3, 18.2): ptrace(2) sets them, for a moment.

fn request(request: u32, pid: i32, address: usize, data: usize) -> std::io::Result<()> {
    // SAFETY: none of the requests used here takes a pointer.
    match unsafe { libc::ptrace(request as _, pid, address, data) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The requests that are used. A sandbox has to allow them.
pub const REQUESTS: [u64; 4] = [
    libc::PTRACE_SEIZE as u64,
    libc::PTRACE_INTERRUPT as u64,
    libc::PTRACE_POKEUSER as u64,
    libc::PTRACE_DETACH as u64,
];

/// Stops the thread `pid` before the instructions at these addresses from now on. It is called away from a system call, which it starts again.
pub fn watch(pid: i32, addresses: &[u64]) -> std::io::Result<()> {
    request(libc::PTRACE_SEIZE as _, pid, 0, 0)?;
    let result = request(libc::PTRACE_INTERRUPT as _, pid, 0, 0).and_then(|()| wait(pid)).and_then(|()| {
        let register = |number: usize| std::mem::offset_of!(libc::user, u_debugreg) + 8 * number;
        let set = |number, value: u64| request(libc::PTRACE_POKEUSER as _, pid, register(number), value as usize);
        set(7, 0)?;
        let mut enabled = 0;
        for (number, &address) in addresses.iter().take(crate::WATCHED).enumerate() {
            set(number, address)?;
            enabled |= 1 << (2 * number);
        }
        set(7, enabled)
    });
    request(libc::PTRACE_DETACH as _, pid, 0, 0).and(result)
}

/// Waits until it has stopped.
fn wait(pid: i32) -> std::io::Result<()> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the result.
        let result = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        let error = std::io::Error::last_os_error();
        match result {
            -1 if error.kind() == std::io::ErrorKind::Interrupted => {}
            -1 => return Err(error),
            _ if libc::WIFSTOPPED(status) => return Ok(()),
            _ => return Err(std::io::Error::other("it has ended")),
        }
    }
}
