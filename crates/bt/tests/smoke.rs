//! Small pieces of kernel-mode code under the engine, ended by HLT.

use std::sync::Arc;

use bt::{BtEngine, Options};
use cpu::Nothing;
use cpu::cpuid::CpuidModel;
use cpu::{CpuState, Engine, Exit};
use iced_x86::code_asm::*;
use memory::GuestRam;

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;

/// Runs code at [`CODE`] in an identity-mapped guest until HLT; returns the state and the RAM.
fn run(build: impl FnOnce(&mut CodeAssembler)) -> (CpuState, GuestRam) {
    let ram = GuestRam::new(64 << 20).unwrap();
    let mut pml4 = [0_u8; 4096];
    pml4[..8].copy_from_slice(&0x2003_u64.to_le_bytes());
    assert!(ram.write(0x1000, &pml4));
    let mut pdpt = [0_u8; 4096];
    pdpt[..8].copy_from_slice(&0x83_u64.to_le_bytes());
    assert!(ram.write(0x2000, &pdpt));
    let mut asm = CodeAssembler::new(64).unwrap();
    build(&mut asm);
    asm.hlt().unwrap();
    assert!(ram.write(CODE, &asm.assemble(CODE).unwrap()));
    let engine = BtEngine::new(ram.clone(), Options::new(Arc::new(CpuidModel::new(1, 1_000_000)))).unwrap();
    let mut vcpu = engine.create_vcpu(Nothing::setup()).unwrap();
    let mut state = CpuState::default();
    state.enter_long_mode(0x1000, 0x10, 0x18);
    state.rip = CODE;
    state.gpr = [0; 16];
    state.gpr[4] = STACK;
    vcpu.set_state(&state);
    let exit = vcpu.run();
    assert_eq!(exit, Exit::Stuck);
    (vcpu.state(), ram)
}

#[test]
fn arithmetic_and_loop() {
    let (state, _) = run(|a| {
        let mut top = a.create_label();
        a.mov(rcx, 1000_u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jne(top).unwrap();
    });
    assert_eq!(state.gpr[0], 500_500);
}

#[test]
fn memory_stack_and_calls() {
    let (state, ram) = run(|a| {
        let mut function = a.create_label();
        let mut go = a.create_label();
        a.jmp(go).unwrap();
        a.set_label(&mut function).unwrap();
        a.push(r10).unwrap();
        a.lea(r10, qword_ptr(r9 + rax * 2 + 1)).unwrap();
        a.mov(rax, r10).unwrap();
        a.pop(r10).unwrap();
        a.ret().unwrap();
        a.set_label(&mut go).unwrap();
        a.mov(r10, 7_u64).unwrap();
        a.mov(r9, 100_u64).unwrap();
        a.mov(rax, 5_u64).unwrap();
        a.call(function).unwrap();
        a.mov(r11, DATA).unwrap();
        a.mov(qword_ptr(r11 + 8), rax).unwrap();
        a.add(qword_ptr(r11 + 8), r10).unwrap();
        a.mov(rbx, rsp).unwrap();
        a.mov(rdi, r11).unwrap();
        a.mov(byte_ptr(rdi + 3), bh).unwrap();
        a.call(function).unwrap();
    });
    assert_eq!(state.gpr[10], 7);
    assert_eq!(state.gpr[0], 100 + 2 * 111 + 1);
    assert_eq!(state.gpr[4], STACK);
    let mut data = [0; 16];
    assert!(ram.read(DATA, &mut data));
    assert_eq!(u64::from_le_bytes(data[8..].try_into().unwrap()), 118);
    assert_eq!(data[3], (STACK >> 8) as u8);
}
