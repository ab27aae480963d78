//! The requests of ptrace(2) that are used, for a process that has stopped.

/// Lets it run; it stops before every system call, which is not done.
pub const SYSEMU: libc::c_int = 31;
/// Lets it run.
pub const CONT: libc::c_int = libc::PTRACE_CONT as libc::c_int;
/// How a stop at a system call is told (PTRACE_O_TRACESYSGOOD).
pub const SYSTEM_CALL: i32 = libc::SIGTRAP | 0x80;

/// The note type of XSAVE's area.
const NT_X86_XSTATE: usize = 0x202;
/// Largest area that is taken: AMX's tiles make it 11 KiB.
const LARGEST: usize = 64 << 10;

/// # Safety
/// `data` is what the request wants.
unsafe fn request(request: libc::c_int, pid: i32, address: usize, data: usize) -> Result<(), String> {
    // SAFETY: the caller's.
    let result = unsafe { libc::ptrace(request as _, pid, address, data) };
    if result == -1 {
        Err(format!("a program's process has gone: {}", std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

pub fn set_options(pid: i32) -> Result<(), String> {
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
    // SAFETY: options are passed by value.
    unsafe { request(libc::PTRACE_SETOPTIONS as _, pid, 0, options as usize) }
}

pub fn resume(pid: i32, how: libc::c_int) -> Result<(), String> {
    // SAFETY: no data: no signal is delivered.
    unsafe { request(how, pid, 0, 0) }
}

pub fn registers(pid: i32) -> Result<libc::user_regs_struct, String> {
    // SAFETY: plain numbers, which the request fills in.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        request(libc::PTRACE_GETREGS as _, pid, 0, &raw mut registers as usize)?;
        Ok(registers)
    }
}

pub fn set_registers(pid: i32, registers: &libc::user_regs_struct) -> Result<(), String> {
    // SAFETY: read only.
    unsafe { request(libc::PTRACE_SETREGS as _, pid, 0, &raw const *registers as usize) }
}

pub fn signal(pid: i32) -> Result<libc::siginfo_t, String> {
    // SAFETY: plain data, which the request fills in.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        request(libc::PTRACE_GETSIGINFO as _, pid, 0, &raw mut info as usize)?;
        Ok(info)
    }
}

/// Stops the process before the instructions at these addresses, by the CPU's debug registers (SDM volume 3, 18.2).
pub fn watch(pid: i32, addresses: &[u64]) -> Result<(), String> {
    let register = |number: usize| std::mem::offset_of!(libc::user, u_debugreg) + 8 * number;
    let set = |number, value: u64| {
        // SAFETY: the value is passed as such.
        unsafe { request(libc::PTRACE_POKEUSER as _, pid, register(number), value as usize) }
    };
    set(7, 0)?;
    let mut enabled = 0;
    for (number, &address) in addresses.iter().take(crate::WATCHED).enumerate() {
        set(number, address)?;
        enabled |= 1 << (2 * number);
    }
    set(7, enabled)
}

/// The area of the process, as long as this kernel makes it.
pub fn extended(pid: i32) -> Result<Vec<u8>, String> {
    let mut area = vec![0; LARGEST];
    let length = get_extended(pid, &mut area)?;
    if length < 832 {
        return Err("the host's CPU has no AVX".into());
    }
    area.truncate(length);
    Ok(area)
}

/// Fills the area; returns how much of it.
pub fn get_extended(pid: i32, area: &mut [u8]) -> Result<usize, String> {
    let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    // SAFETY: the vector describes `area`, and is written.
    unsafe { request(libc::PTRACE_GETREGSET as _, pid, NT_X86_XSTATE, &raw mut vector as usize)? };
    Ok(vector.iov_len)
}

pub fn set_extended(pid: i32, area: &[u8]) -> Result<(), String> {
    let mut vector = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    // SAFETY: the vector describes `area`, which is only read.
    unsafe { request(libc::PTRACE_SETREGSET as _, pid, NT_X86_XSTATE, &raw mut vector as usize) }
}
