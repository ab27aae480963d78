//! Random programs.
//!
//! Every instruction form that iced-x86 knows for 64-bit mode and that the engine translates is a template; operands are random, with a
//! preference for what is special in the translator (R9, R10, R11, RSP, high bytes) and for addresses that hit.

use std::collections::HashMap;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic,
    OpAccess, OpCodeOperandKind as K, OpKind, Register,
};

use crate::layout::{LAYOUTS, Layout, PAGE};
use crate::program::{Item, Program};
use crate::rng::Rng;
use crate::state::{Role, data_pointer};

/// What kinds of instructions to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Integer,
    Vector,
    X87,
    Text,
    Stack,
    /// Ends in an exception at level 3.
    Sensitive,
}

struct Template {
    code: Code,
    operands: Vec<K>,
    lock: bool,
}

/// All templates.
pub struct Generator {
    /// By kind, then by mnemonic.
    groups: HashMap<Kind, Vec<Vec<Template>>>,
    /// Mnemonics that make up most of real code: index into the integer groups.
    common: Vec<usize>,
    factory: InstructionInfoFactory,
}

/// What is known of the registers while a program is written.
struct Draft<'a> {
    layout: Layout,
    user: bool,
    pointer: u16,
    /// Those of them that are multiples of 32.
    aligned: u16,
    small: u16,
    stack_good: bool,
    /// Pointers may lead to the page that is mapped twice.
    alias: bool,
    /// Must not be written.
    reserved: u16,
    rng: &'a mut Rng,
}

fn supported(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FXSR
        | F::MMX
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::SSE
        | F::SSE2
        | F::CLFSH => true,
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::AES => std::is_x86_feature_detected!("aes"),
        F::AVX => std::is_x86_feature_detected!("avx"),
        F::AVX2 => std::is_x86_feature_detected!("avx2"),
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::CMPXCHG16B => std::is_x86_feature_detected!("cmpxchg16b"),
        F::F16C => std::is_x86_feature_detected!("f16c"),
        F::FMA => std::is_x86_feature_detected!("fma"),
        F::GFNI => std::is_x86_feature_detected!("gfni"),
        F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        F::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        F::POPCNT => std::is_x86_feature_detected!("popcnt"),
        F::PREFETCHW => true, // a hint, or a NOP
        F::SHA => std::is_x86_feature_detected!("sha"),
        F::SSE3 => std::is_x86_feature_detected!("sse3"),
        F::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        F::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        F::VAES => std::is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => std::is_x86_feature_detected!("vpclmulqdq"),
        F::FSGSBASE => true, // the native side needs it anyway
        _ => false,
    }
}

/// Not used: answers differ by design (time, identification, system registers, host addresses in x87 environments), or there
/// are extra generators for it (branches, flags).
fn excluded(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Syscall
            | M::Sysenter
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Les
            | M::Lds
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Hlt
            | M::Cli
            | M::Sti
            | M::Fstsw
            | M::Fstcw
            | M::Finit
            | M::Fclex
            | M::Fdisi
            | M::Fndisi
            | M::Feni
            | M::Fneni
            | M::Fsetpm
            | M::Fnsetpm
            | M::Frstpm
            | M::Fstdw
            | M::Fnstdw
            | M::Fstsg
            | M::Fnstsg
            | M::Bound
            | M::Arpl
            | M::Loadall
            | M::Montmul
    ) || matches!(
        code,
        Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Mov_Sreg_r64m16
            | Code::Popw_FS
            | Code::Popw_GS
            | Code::Popq_FS
            | Code::Popq_GS
            | Code::Popd_FS
            | Code::Popd_GS
    )
}

fn kind_of(code: Code) -> Kind {
    use CpuidFeature as F;
    use Mnemonic as M;
    let mut probe = Instruction::default();
    probe.set_code(code);
    if probe.is_string_instruction() {
        return Kind::Text;
    }
    if matches!(code.mnemonic(), M::Push | M::Pop | M::Leave | M::Enter | M::Pushf | M::Pushfq) {
        return Kind::Stack;
    }
    let features = code.cpuid_features();
    if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX)) {
        return Kind::X87;
    }
    let vector = |f: &F| {
        !matches!(
            f,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::ADX
                | F::BMI1
                | F::BMI2
                | F::CMPXCHG16B
                | F::LZCNT
                | F::MOVBE
                | F::POPCNT
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::PREFETCHW
                | F::FSGSBASE
                | F::CLFSH
        )
    };
    if features.iter().any(vector) { Kind::Vector } else { Kind::Integer }
}

impl Generator {
    pub fn new() -> Self {
        let mut by_mnemonic: Vec<(Kind, Mnemonic, Vec<Template>)> = Vec::new();
        for code in Code::values() {
            let info = code.op_code();
            let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            if code == Code::INVALID
                || !info.mode64()
                || !info.is_instruction()
                || !encoding
                || code.flow_control() != FlowControl::Next
                || code.is_privileged()
                || excluded(code)
                || !code.cpuid_features().iter().all(|&f| supported(f))
            {
                continue;
            }
            let operands: Vec<K> = (0..info.op_count()).map(|i| info.op_kind(i)).collect();
            let template = Template { code, operands, lock: info.can_use_lock_prefix() };
            let kind = kind_of(code);
            match by_mnemonic.iter_mut().find(|(k, m, _)| *k == kind && *m == code.mnemonic()) {
                Some((_, _, list)) => list.push(template),
                None => by_mnemonic.push((kind, code.mnemonic(), vec![template])),
            }
        }
        use Mnemonic as M;
        let often = [
            M::Mov,
            M::Add,
            M::Sub,
            M::Cmp,
            M::Test,
            M::And,
            M::Or,
            M::Xor,
            M::Lea,
            M::Movzx,
            M::Movsx,
            M::Movsxd,
            M::Inc,
            M::Dec,
            M::Shl,
            M::Shr,
            M::Sar,
            M::Rol,
            M::Ror,
            M::Rcl,
            M::Rcr,
            M::Adc,
            M::Sbb,
            M::Bt,
            M::Bts,
            M::Btr,
            M::Btc,
            M::Imul,
            M::Mul,
            M::Xchg,
            M::Cmpxchg,
            M::Xadd,
            M::Shld,
            M::Shrd,
            M::Neg,
            M::Not,
            M::Cmove,
            M::Cmovl,
            M::Cmovae,
            M::Sete,
            M::Setg,
            M::Setb,
            M::Bsf,
            M::Bsr,
        ];
        let mut groups: HashMap<Kind, Vec<Vec<Template>>> = HashMap::new();
        let mut common = Vec::new();
        for (kind, mnemonic, list) in by_mnemonic {
            let group = groups.entry(kind).or_default();
            if kind == Kind::Integer && often.contains(&mnemonic) {
                common.push(group.len());
            }
            group.push(list);
        }
        let sensitive = [
            Code::Cli,
            Code::Sti,
            Code::Hlt,
            Code::In_AL_DX,
            Code::In_EAX_imm8,
            Code::Out_DX_AL,
            Code::Out_DX_EAX,
            Code::Insb_m8_DX,
            Code::Outsd_DX_m32,
            Code::Mov_r64_cr,
            Code::Mov_cr_r64,
            Code::Mov_r64_dr,
            Code::Rdmsr,
            Code::Wrmsr,
            Code::Clts,
            Code::Wbinvd,
            Code::Invd,
            Code::Invlpg_m,
            Code::Lgdt_m1664,
            Code::Lidt_m1664,
            Code::Lldt_rm16,
            Code::Ltr_rm16,
            Code::Lmsw_rm16,
            Code::Swapgs,
            Code::Int_imm8,
            Code::Int3,
            Code::Ud2,
        ]
        .map(|code| {
            let info = code.op_code();
            let operands = (0..info.op_count()).map(|i| info.op_kind(i)).collect();
            vec![Template { code, operands, lock: false }]
        });
        groups.insert(Kind::Sensitive, sensitive.into());
        Self { groups, common, factory: InstructionInfoFactory::new() }
    }

    /// How many instruction forms there are.
    pub fn forms(&self) -> usize {
        self.groups.values().flatten().map(Vec::len).sum()
    }

    /// A program of 1 to about 30 instructions.
    pub fn program(&mut self, rng: &mut Rng, layout: Layout, user: bool) -> (Program, [Role; 16], bool) {
        let mut roles = [Role::Any; 16];
        for role in &mut roles {
            *role = match rng.below(10) {
                0 | 1 => Role::Pointer,
                2 | 3 => Role::Aligned,
                4 | 5 => Role::Small,
                _ => Role::Any,
            };
        }
        // RDI and RSI serve string instructions.
        if rng.chance(70) {
            roles[6] = Role::Pointer;
            roles[7] = Role::Pointer;
        }
        if rng.chance(40) {
            roles[1] = Role::Small;
        }
        roles[4] = if rng.chance(95) { Role::Stack } else { Role::Pointer };
        let alias = rng.chance(20);
        let mask = |wanted: Role| (0..16).fold(0_u16, |m, i| m | u16::from(roles[i] == wanted) << i);
        let mut draft = Draft {
            layout,
            user,
            pointer: mask(Role::Pointer) | mask(Role::Aligned),
            aligned: mask(Role::Aligned),
            small: mask(Role::Small),
            stack_good: true,
            alias,
            reserved: 0,
            rng,
        };
        let mut program = Program { straight: true, ..Program::default() };
        let wanted = match draft.rng.below(10) {
            0 | 1 => 1 + draft.rng.below(3),
            2..=6 => 3 + draft.rng.below(10),
            _ => 10 + draft.rng.below(20),
        } as usize;
        let branchy = draft.rng.chance(45);
        while program.items.len() < wanted {
            if layout == LAYOUTS[0] && draft.rng.chance(1) {
                program.straight = false;
                self.modify(&mut draft, &mut program.items);
            } else if branchy && draft.rng.chance(22) {
                program.straight = false;
                self.branch(&mut draft, &mut program.items);
            } else {
                self.plain(&mut draft, &mut program.items);
            }
        }
        (program, roles, alias)
    }

    /// One instruction without a jump, and what it needs to make sense.
    fn plain(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let code_free = draft.pointer & !draft.reserved & !(1 << 4);
        if code_free.count_ones() < 2 && draft.rng.chance(40) {
            let to = draft.any_register();
            if draft.reserved & (1 << to) == 0 && to != 4 {
                let address = data_pointer(draft.rng, draft.layout, draft.alias);
                let ins = if draft.rng.chance(50) {
                    Instruction::with2(Code::Mov_r64_imm64, gpr(to, 8), address).unwrap()
                } else {
                    Instruction::with2(Code::Lea_r64_m, gpr(to, 8), rip_relative(address)).unwrap()
                };
                draft.pointer |= 1 << to;
                draft.small &= !(1 << to);
                items.push(Item::new(ins));
                return;
            }
        }
        if !draft.stack_good && draft.rng.chance(30) && draft.reserved & (1 << 4) == 0 {
            let address = draft.layout.stack + 2 * PAGE - 0x100 + draft.rng.below(64) * 8;
            items.push(Item::new(Instruction::with2(Code::Lea_r64_m, Register::RSP, rip_relative(address)).unwrap()));
            draft.stack_good = true;
            return;
        }
        if draft.rng.chance(1) {
            // Flags from memory, but none that trap.
            let flags = draft.rng.below(0x1000) as i32 & 0xcd5 | 2 | if draft.user { 0x200 } else { 0 };
            items.push(Item::new(Instruction::with1(Code::Pushq_imm32, flags).unwrap()));
            items.push(Item::new(Instruction::with(Code::Popfq)));
            return;
        }
        if draft.rng.chance(4) && draft.reserved & (1 << 1) == 0 {
            // A sensible count for what comes.
            let count = draft.rng.below(40) as u32;
            items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count).unwrap()));
            draft.pointer &= !2;
            draft.small |= 2;
            return;
        }
        loop {
            if let Some(item) = self.attempt(draft) {
                items.push(item);
                return;
            }
        }
    }

    fn attempt(&mut self, draft: &mut Draft<'_>) -> Option<Item> {
        let kind = match draft.rng.below(1000) {
            0..=569 => Kind::Integer,
            570..=819 => Kind::Vector,
            820..=879 => Kind::X87,
            880..=919 => Kind::Text,
            920..=994 => Kind::Stack,
            _ if draft.user => Kind::Sensitive,
            _ => Kind::Integer,
        };
        let group = &self.groups[&kind];
        let list = if kind == Kind::Integer && draft.rng.chance(70) {
            &group[draft.rng.pick(&self.common)]
        } else {
            &group[draft.rng.below(group.len() as u64) as usize]
        };
        let template = &list[draft.rng.below(list.len() as u64) as usize];
        let code = template.code;
        if !draft.user
            && (matches!(code.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Pushfd)
                || template.operands.contains(&K::seg_reg))
        {
            return None; // shows the level
        }
        // The CPU's fast string moves take no notice of overlaps that only physical addresses show; the engine does.
        let movs = matches!(code.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq);
        if draft.alias && movs && kind == Kind::Text {
            return None;
        }
        if matches!(code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && draft.rng.chance(60) {
            return None; // mostly ends in #DE
        }
        let ins = build(template, draft)?;
        let prefixes = random_prefixes(draft, &ins);
        // What it writes.
        let mut written = 0_u16;
        for used in self.factory.info(&ins).used_registers() {
            let full = used.register().full_register();
            if full.is_gpr()
                && !matches!(
                    used.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                )
            {
                written |= 1 << full.number();
            }
        }
        if kind == Kind::Stack {
            written &= !(1 << 4);
        }
        if written & draft.reserved != 0
            || (written & draft.pointer != 0 && !ins.is_string_instruction() && draft.rng.chance(80))
            || (written & (1 << 4) != 0 && draft.rng.chance(85))
        {
            return None;
        }
        if !prefixes.is_empty() && draft.reserved != 0 {
            return None; // might make another instruction of it
        }
        if !ins.is_string_instruction() {
            draft.pointer &= !written;
        }
        draft.small &= !written;
        if written & (1 << 4) != 0 || matches!(code.mnemonic(), Mnemonic::Leave) {
            draft.stack_good = false;
        }
        let mut item = Item::new(ins);
        item.prefixes = prefixes;
        Some(item)
    }

    /// Some plain instructions.
    fn few(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>, most: u64) {
        for _ in 0..draft.rng.below(most + 1) {
            self.plain(draft, items);
        }
    }

    /// A structure with jumps.
    fn branch(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        match draft.rng.below(14) {
            0..=4 => self.skip(draft, items),
            5..=7 => self.repeat(draft, items),
            8 | 9 => self.call(draft, items),
            10 => self.indirect(draft, items),
            11 => self.strange_return(draft, items),
            12 => self.wild(draft, items),
            _ => self.call_indirect(draft, items),
        }
    }

    /// A conditional or unconditional jump forwards.
    fn skip(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let code = match draft.rng.below(24) {
            0 => Code::Jmp_rel8_64,
            1 => Code::Jmp_rel32_64,
            2 => Code::Jrcxz_rel8_64,
            3 => Code::Jecxz_rel8_64,
            4 => Code::Loop_rel8_64_RCX,
            5 => Code::Loope_rel8_64_ECX,
            6 => Code::Loopne_rel8_64_RCX,
            _ => jcc(draft.rng),
        };
        if draft.reserved & 2 != 0 && matches!(code.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne) {
            return;
        }
        if matches!(code.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne) {
            draft.pointer &= !2;
            draft.small &= !2;
        }
        let (pointer, small, good) = (draft.pointer, draft.small, draft.stack_good);
        let at = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 4);
        for item in &mut items[at + 1..] {
            item.weight = 0;
        }
        items[at] = Item::to(Instruction::with_branch(code, 0).unwrap(), items.len());
        draft.pointer &= pointer;
        draft.small &= small;
        draft.stack_good &= good;
    }

    /// A loop with a counter of its own.
    fn repeat(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let looping = draft.rng.chance(25);
        let counter = if looping { 1 } else { draft.rng.pick(&[9, 10, 11, 3, 14, 8, 9, 10]) };
        if draft.reserved & (1 << counter) != 0 {
            return;
        }
        let most = if draft.rng.chance(20) { 150 } else { 12 };
        let times = 1 + draft.rng.below(most) as u32;
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(counter, 4), times).unwrap()));
        draft.reserved |= 1 << counter;
        draft.pointer &= !(1 << counter);
        draft.small |= 1 << counter;
        let top = items.len();
        self.few(draft, items, 5);
        if draft.rng.chance(15) && items.len() < 20 {
            self.skip(draft, items);
        }
        if items.len() == top {
            self.plain(draft, items);
        }
        if looping {
            let code = draft.rng.pick(&[Code::Loop_rel8_64_RCX, Code::Loop_rel8_64_ECX]);
            items.push(Item::to(Instruction::with_branch(code, 0).unwrap(), top));
        } else {
            let down = match draft.rng.below(4) {
                0 => Instruction::with1(Code::Dec_rm64, gpr(counter, 8)).unwrap(),
                1 => Instruction::with1(Code::Dec_rm32, gpr(counter, 4)).unwrap(),
                2 => Instruction::with2(Code::Sub_rm64_imm8, gpr(counter, 8), 1).unwrap(),
                _ => Instruction::with2(Code::Add_rm32_imm8, gpr(counter, 4), -1).unwrap(),
            };
            items.push(Item::new(down));
            let code = draft.rng.pick(&[Code::Jne_rel8_64, Code::Jne_rel32_64]);
            items.push(Item::to(Instruction::with_branch(code, 0).unwrap(), top));
        }
        for item in &mut items[top..] {
            item.weight *= times;
        }
        draft.reserved &= !(1 << counter);
    }

    /// A loop that stores into the immediate operand of an instruction that comes later in it.
    fn modify(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let counter = draft.rng.pick(&[9, 10, 11, 14, 8, 15]);
        if draft.reserved & (1 << counter) != 0 {
            return;
        }
        let times = 1 + draft.rng.below(6) as u32;
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(counter, 4), times).unwrap()));
        draft.reserved |= 1 << counter;
        draft.pointer &= !(1 << counter);
        let top = items.len();
        let store = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 3);
        // mov r32, imm32 without REX: the immediate begins at the second byte.
        let to = draft.rng.pick(&[0, 1, 2, 3, 5, 6, 7]);
        let target = items.len();
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(to, 4), 0x1234_5678_u32).unwrap()));
        draft.pointer &= !(1 << to);
        draft.small &= !(1 << to);
        let place = rip_relative(0);
        let ins = match draft.rng.below(4) {
            0 => Instruction::with2(Code::Mov_rm8_imm8, place, draft.rng.next() as u8 as u32).unwrap(),
            1 => Instruction::with2(Code::Mov_rm32_r32, place, gpr(counter, 4)).unwrap(),
            2 => Instruction::with2(Code::Add_rm32_imm8, place, 3).unwrap(),
            _ => Instruction::with2(Code::Xadd_rm8_r8, place, gpr(draft.rng.pick(&[0, 2, 3]), 1)).unwrap(),
        };
        items[store] = Item { addend: 1, ..Item::to(ins, target) };
        items.push(Item::new(Instruction::with1(Code::Dec_rm32, gpr(counter, 4)).unwrap()));
        items.push(Item::to(Instruction::with_branch(Code::Jne_rel32_64, 0).unwrap(), top));
        for item in &mut items[top..] {
            item.weight *= times;
        }
        draft.reserved &= !(1 << counter);
    }

    /// A call of a function that lies behind, and its return.
    fn call(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let at = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 2);
        let over = items.len();
        items.push(Item::new(Instruction::default()));
        items[at] = Item::to(Instruction::with_branch(Code::Call_rel32_64, 0).unwrap(), items.len());
        self.function(draft, items);
        items[over] = Item::to(Instruction::with_branch(Code::Jmp_rel32_64, 0).unwrap(), items.len());
    }

    fn function(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        draft.reserved |= 1 << 4;
        let frame = draft.rng.chance(30);
        if frame {
            let saved = draft.any_register();
            items.push(Item::new(Instruction::with1(Code::Push_r64, gpr(saved, 8)).unwrap()));
            let body = items.len();
            self.few(draft, items, 3);
            // What touches the stack pointer would unbalance it.
            for i in (body..items.len()).rev() {
                if stack_instruction(&items[i].ins) {
                    items.remove(i);
                }
            }
            let restored = if draft.rng.chance(80) { saved } else { draft.any_register() };
            if restored != 4 {
                items.push(Item::new(Instruction::with1(Code::Pop_r64, gpr(restored, 8)).unwrap()));
                draft.pointer &= !(1 << restored);
                draft.small &= !(1 << restored);
            } else {
                items.push(Item::new(Instruction::with2(Code::Add_rm64_imm8, Register::RSP, 8).unwrap()));
            }
        } else if draft.rng.chance(50) {
            self.plain(draft, items);
            if let Some(item) = items.last()
                && stack_instruction(&item.ins)
            {
                items.pop();
            }
        }
        draft.reserved &= !(1 << 4);
        if draft.rng.chance(20) {
            let bytes = draft.rng.below(4) as u32 * 8;
            items.push(Item::new(Instruction::with1(Code::Retnq_imm16, bytes).unwrap()));
        } else {
            items.push(Item::new(Instruction::with(Code::Retnq)));
        }
    }

    /// `lea r, target; jmp r` and the like.
    fn indirect(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        let lea = items.len();
        items.push(Item::new(Instruction::default()));
        if draft.rng.chance(60) {
            items.push(Item::new(Instruction::with1(Code::Jmp_rm64, gpr(register, 8)).unwrap()));
        } else {
            let place = MemoryOperand::with_base_displ_size(Register::RSP, -8 - 8 * draft.rng.below(3) as i64, 1);
            items.push(Item::new(Instruction::with2(Code::Mov_rm64_r64, place, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with1(Code::Jmp_rm64, place).unwrap()));
        }
        let behind = items.len();
        self.few(draft, items, 2);
        for item in &mut items[behind..] {
            item.weight = 0;
        }
        items[lea] =
            Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
    }

    fn call_indirect(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        let lea = items.len();
        items.push(Item::new(Instruction::default()));
        if draft.rng.chance(50) {
            items.push(Item::new(Instruction::with1(Code::Call_rm64, gpr(register, 8)).unwrap()));
        } else {
            let place = MemoryOperand::with_base_displ_size(Register::RSP, -16 * (1 + draft.rng.below(3) as i64), 1);
            items.push(Item::new(Instruction::with2(Code::Mov_rm64_r64, place, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with1(Code::Call_rm64, place).unwrap()));
        }
        let over = items.len();
        items.push(Item::new(Instruction::default()));
        items[lea] =
            Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
        self.function(draft, items);
        items[over] = Item::to(Instruction::with_branch(Code::Jmp_rel8_64, 0).unwrap(), items.len());
    }

    /// A call whose return address is thrown away, or a return without a call.
    fn strange_return(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        if draft.rng.chance(50) {
            // call next; pop
            let at = items.len();
            items.push(Item::to(Instruction::with_branch(Code::Call_rel32_64, 0).unwrap(), at + 1));
            if draft.rng.chance(50) {
                items.push(Item::new(Instruction::with1(Code::Pop_r64, gpr(register, 8)).unwrap()));
            } else {
                items.push(Item::new(Instruction::with2(Code::Add_rm64_imm8, Register::RSP, 8).unwrap()));
            }
        } else {
            let lea = items.len();
            items.push(Item::new(Instruction::default()));
            items.push(Item::new(Instruction::with1(Code::Push_r64, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with(Code::Retnq)));
            let behind = items.len();
            self.few(draft, items, 2);
            for item in &mut items[behind..] {
                item.weight = 0;
            }
            items[lea] =
                Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
        }
        draft.pointer &= !(1 << register);
        draft.small &= !(1 << register);
    }

    /// Jumps that lead nowhere.
    fn wild(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        if draft.rng.chance(60) {
            return;
        }
        let register = draft.any_register();
        items.push(Item::new(match draft.rng.below(4) {
            0 => Instruction::with1(Code::Jmp_rm64, gpr(register, 8)).unwrap(),
            1 => Instruction::with1(Code::Call_rm64, gpr(register, 8)).unwrap(),
            2 => Instruction::with(Code::Retnq),
            _ => Instruction::with1(Code::Call_rm64, draft.memory(8)).unwrap(),
        }));
    }
}

fn stack_instruction(ins: &Instruction) -> bool {
    ins.is_stack_instruction()
}

fn jcc(rng: &mut Rng) -> Code {
    let short = rng.chance(50);
    let codes = if short {
        [
            Code::Jo_rel8_64,
            Code::Jno_rel8_64,
            Code::Jb_rel8_64,
            Code::Jae_rel8_64,
            Code::Je_rel8_64,
            Code::Jne_rel8_64,
            Code::Jbe_rel8_64,
            Code::Ja_rel8_64,
            Code::Js_rel8_64,
            Code::Jns_rel8_64,
            Code::Jp_rel8_64,
            Code::Jnp_rel8_64,
            Code::Jl_rel8_64,
            Code::Jge_rel8_64,
            Code::Jle_rel8_64,
            Code::Jg_rel8_64,
        ]
    } else {
        [
            Code::Jo_rel32_64,
            Code::Jno_rel32_64,
            Code::Jb_rel32_64,
            Code::Jae_rel32_64,
            Code::Je_rel32_64,
            Code::Jne_rel32_64,
            Code::Jbe_rel32_64,
            Code::Ja_rel32_64,
            Code::Js_rel32_64,
            Code::Jns_rel32_64,
            Code::Jp_rel32_64,
            Code::Jnp_rel32_64,
            Code::Jl_rel32_64,
            Code::Jge_rel32_64,
            Code::Jle_rel32_64,
            Code::Jg_rel32_64,
        ]
    };
    rng.pick(&codes)
}

/// Redundant prefixes, now and then.
fn random_prefixes(draft: &mut Draft<'_>, ins: &Instruction) -> Vec<u8> {
    if !draft.rng.chance(4) || ins.has_lock_prefix() {
        return Vec::new();
    }
    let prefix = draft.rng.pick(&[0x2e, 0x36, 0x3e, 0x26, 0x66, 0x40, 0x48, 0x66]);
    let vex = ins.code().encoding() == EncodingKind::VEX;
    // Before a VEX prefix 66 and REX are #UD; before others 66 may make another instruction of it, and REX counts only directly
    // before the opcode, which a string of legacy prefixes need not be.
    match prefix {
        0x66 | 0x40 | 0x48 if vex => Vec::new(),
        0x66 if ins.code().op_code().mandatory_prefix() != iced_x86::MandatoryPrefix::None || immediate_grows(ins) => {
            Vec::new()
        }
        0x66 if kind_of(ins.code()) != Kind::Integer => Vec::new(),
        0x40 | 0x48 => Vec::new(),
        _ => vec![prefix],
    }
}

/// With 66h the length of the immediate would change and the rest be taken for code.
fn immediate_grows(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|i| {
        matches!(
            ins.op_kind(i),
            OpKind::Immediate16 | OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64
        )
    }) || ins.memory_displ_size() == 8 && ins.memory_base() == Register::None
        || matches!(ins.op0_kind(), OpKind::Memory) && ins.memory_size().size() == 0
}

/// The general register with this number and size; numbers 4 to 7 of size 1 are SPL to DIL.
pub fn gpr(number: usize, size: usize) -> Register {
    let n = number as u32;
    match size {
        8 => Register::RAX + n,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ if n < 4 => Register::AL + n,
        _ => Register::SPL + (n - 4),
    }
}

fn rip_relative(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(Register::RIP, address as i64, 8)
}

impl Draft<'_> {
    fn any_register(&mut self) -> usize {
        match self.rng.below(10) {
            0..=3 => self.rng.pick(&[9, 10, 11]),
            4 if self.rng.chance(60) => 4,
            _ => self.rng.below(16) as usize,
        }
    }

    /// A register that may be overwritten.
    fn free_register(&mut self) -> Option<usize> {
        let register = self.any_register();
        // RSI and RDI would lead string instructions into the code: the CPU notices between elements, the engine between pieces.
        let free = !matches!(register, 4 | 6 | 7) && self.reserved & (1 << register) == 0;
        if free {
            self.pointer &= !(1 << register);
            self.small &= !(1 << register);
        }
        free.then_some(register)
    }

    fn member(&mut self, mask: u16) -> Option<usize> {
        if mask == 0 {
            return None;
        }
        let nth = self.rng.below(u64::from(mask.count_ones())) as usize;
        (0..16).filter(|i| mask & (1 << i) != 0).nth(nth)
    }

    fn register(&mut self, size: usize) -> Register {
        if size == 1 && self.rng.chance(25) {
            return self.rng.pick(&[Register::AH, Register::CH, Register::DH, Register::BH]);
        }
        let n = self.any_register();
        gpr(n, size)
    }

    fn displacement(&mut self) -> i64 {
        match self.rng.below(8) {
            0..=2 => 0,
            3 | 4 => self.rng.range(-32, 96),
            5 => self.rng.range(-128, 127),
            6 => self.rng.range(-300, 700),
            _ => self.rng.range(-64, 64) * 8,
        }
    }

    /// A memory operand for an access of about `size` bytes.
    fn memory(&mut self, size: usize) -> MemoryOperand {
        let low = self.layout.data < 1 << 32;
        if size >= 16 && self.rng.chance(80) {
            // Most of these want alignment.
            let disp = self.rng.range(-4, 6) * 32;
            if let Some(base) = self.member(self.aligned & self.pointer & !(1 << 4)) {
                let size = if disp == 0 { 0 } else { 8 };
                return MemoryOperand::new(gpr(base, 8), Register::None, 1, disp, size, false, Register::None);
            }
            let address = data_pointer(self.rng, self.layout, self.alias) as i64 & !31;
            return MemoryOperand::new(Register::RIP, Register::None, 1, address, 8, false, Register::None);
        }
        let mut disp = self.displacement();
        let segment = match self.rng.below(60) {
            0 => Register::DS,
            1 => Register::CS,
            2 => Register::SS,
            3 => Register::ES,
            _ => Register::None,
        };
        let fit = |disp: i64, rng: &mut Rng| -> u32 {
            if disp == 0 && rng.chance(70) {
                0
            } else if (-128..128).contains(&disp) && rng.chance(85) {
                1
            } else {
                8
            }
        };
        let narrow = low && self.rng.chance(12);
        let width = if narrow { 4 } else { 8 };
        match self.rng.below(100) {
            0..=13 => {
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                let base = if narrow { Register::EIP } else { Register::RIP };
                MemoryOperand::new(base, Register::None, 1, address, 8, false, segment)
            }
            14..=16 if low => {
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                MemoryOperand::new(
                    Register::None,
                    Register::None,
                    1,
                    address,
                    if narrow { 4 } else { 8 },
                    false,
                    segment,
                )
            }
            17..=26 => {
                let d = self.rng.range(-16, 16) * 8;
                let index = if self.rng.chance(20) { self.member(self.small & !(1 << 4)) } else { None };
                let index = index.map_or(Register::None, |i| gpr(i, width));
                let scale = if index == Register::None { 1 } else { self.rng.pick(&[1, 2, 4, 8]) };
                MemoryOperand::new(gpr(4, width), index, scale, d, fit(d, self.rng), false, segment)
            }
            27..=31 => {
                let segment = self.rng.pick(&[Register::FS, Register::GS]);
                let d = self.rng.range(-64, 128);
                match self.member(self.small & !(1 << 4)) {
                    Some(base) if self.rng.chance(60) => {
                        MemoryOperand::new(gpr(base, 8), Register::None, 1, d, fit(d, self.rng), false, segment)
                    }
                    Some(index) if self.rng.chance(50) => {
                        let scale = self.rng.pick(&[1, 2, 4, 8]);
                        MemoryOperand::new(Register::None, gpr(index, 8), scale, d, 8, false, segment)
                    }
                    _ => MemoryOperand::new(Register::None, Register::None, 1, d, 8, false, segment),
                }
            }
            32 => {
                let base = self.any_register();
                let index = self.rng.below(16) as usize;
                let index = if index == 4 { Register::None } else { gpr(index, width) };
                let scale = if index == Register::None { 1 } else { self.rng.pick(&[1, 2, 4, 8]) };
                MemoryOperand::new(gpr(base, width), index, scale, disp, fit(disp, self.rng), false, segment)
            }
            33..=35 if low => {
                // Index without base.
                let Some(index) = self.member(self.small & !(1 << 4)) else { return self.memory(size) };
                let scale = self.rng.pick(&[1, 2, 4, 8]);
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                MemoryOperand::new(Register::None, gpr(index, width), scale, address, 8, false, segment)
            }
            _ => {
                let Some(base) = self.member(self.pointer & !(1 << 4)) else {
                    let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                    return MemoryOperand::new(Register::RIP, Register::None, 1, address, 8, false, segment);
                };
                let index = if self.rng.chance(30) { self.member(self.small & !(1 << 4)) } else { None };
                let (index, scale) = match index {
                    Some(index) => (gpr(index, width), self.rng.pick(&[1, 2, 4, 8])),
                    None => (Register::None, 1),
                };
                if size >= 16 && self.rng.chance(50) {
                    disp &= !31; // some want alignment
                }
                MemoryOperand::new(gpr(base, width), index, scale, disp, fit(disp, self.rng), false, segment)
            }
        }
    }

    fn immediate8(&mut self) -> u32 {
        match self.rng.below(4) {
            0 => self.rng.below(8) as u32,
            1 => self.rng.below(66) as u32,
            _ => self.rng.next() as u32 & 0xff,
        }
    }
}

fn set_memory(ins: &mut Instruction, memory: &MemoryOperand) {
    ins.set_memory_base(memory.base);
    ins.set_memory_index(memory.index);
    ins.set_memory_index_scale(memory.scale);
    ins.set_memory_displacement64(memory.displacement as u64);
    ins.set_memory_displ_size(memory.displ_size);
    ins.set_segment_prefix(memory.segment_prefix);
}

/// Builds an instruction from its template.
fn build(template: &Template, draft: &mut Draft<'_>) -> Option<Instruction> {
    let code = template.code;
    let mut ins = Instruction::default();
    ins.set_code(code);
    let mut memory = false;
    let as_memory = draft.rng.chance(60);
    for (i, &kind) in template.operands.iter().enumerate() {
        let i = i as u32;
        let mut register = None;
        let mut wants_memory = false;
        let mut immediate = None;
        let either = |register: Register, wants: &mut bool| {
            *wants = as_memory;
            (!as_memory).then_some(register)
        };
        match kind {
            K::mem | K::mem_mib => wants_memory = true,
            K::mem_offs => {
                if draft.layout.data >= 1 << 32 && draft.rng.chance(30) {
                    return None;
                }
                ins.set_op_kind(i, OpKind::Memory);
                ins.set_memory_displ_size(8);
                ins.set_memory_displacement64(data_pointer(draft.rng, draft.layout, draft.alias));
                if draft.rng.chance(10) {
                    ins.set_segment_prefix(draft.rng.pick(&[Register::FS, Register::GS]));
                    ins.set_memory_displacement64(draft.rng.below(256));
                }
                memory = true;
                continue;
            }
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
                let mut operand = draft.memory(8);
                if !operand.base.is_gpr64() {
                    return None;
                }
                let index = draft.rng.below(16) as u32;
                operand.index = if wide { Register::YMM0 + index } else { Register::XMM0 + index };
                operand.scale = draft.rng.pick(&[1, 2, 4, 8]);
                ins.set_op_kind(i, OpKind::Memory);
                set_memory(&mut ins, &operand);
                memory = true;
                continue;
            }
            K::r8_or_mem => register = either(draft.register(1), &mut wants_memory),
            K::r16_or_mem => register = either(draft.register(2), &mut wants_memory),
            K::r32_or_mem => register = either(draft.register(4), &mut wants_memory),
            K::r64_or_mem => register = either(draft.register(8), &mut wants_memory),
            K::mm_or_mem => register = either(Register::MM0 + draft.rng.below(8) as u32, &mut wants_memory),
            K::xmm_or_mem => register = either(Register::XMM0 + draft.rng.below(16) as u32, &mut wants_memory),
            K::ymm_or_mem => register = either(Register::YMM0 + draft.rng.below(16) as u32, &mut wants_memory),
            K::r8_reg | K::r8_opcode => register = Some(draft.register(1)),
            K::r16_reg | K::r16_rm | K::r16_opcode => register = Some(draft.register(2)),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => register = Some(draft.register(4)),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => register = Some(draft.register(8)),
            K::seg_reg => register = Some(Register::ES + draft.rng.below(6) as u32),
            K::mm_reg | K::mm_rm => register = Some(Register::MM0 + draft.rng.below(8) as u32),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register = Some(Register::XMM0 + draft.rng.below(16) as u32);
            }
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register = Some(Register::YMM0 + draft.rng.below(16) as u32);
            }
            K::cr_reg => register = Some(draft.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4])),
            K::dr_reg => register = Some(draft.rng.pick(&[Register::DR0, Register::DR6, Register::DR7])),
            K::fs => register = Some(Register::FS),
            K::gs => register = Some(Register::GS),
            K::al => register = Some(Register::AL),
            K::cl => register = Some(Register::CL),
            K::ax => register = Some(Register::AX),
            K::dx => register = Some(Register::DX),
            K::eax => register = Some(Register::EAX),
            K::rax => register = Some(Register::RAX),
            K::st0 => register = Some(Register::ST0),
            K::sti_opcode => register = Some(Register::ST0 + draft.rng.below(8) as u32),
            K::imm8 => {
                let mut value = draft.immediate8();
                if code == Code::Int_imm8 && value == 0x80 {
                    value = 0x81; // a system call of the host
                }
                if code.mnemonic() == Mnemonic::Enter {
                    value &= 3;
                }
                let kind = if i > 0 && ins.op_kind(i - 1) == OpKind::Immediate16 {
                    OpKind::Immediate8_2nd
                } else {
                    OpKind::Immediate8
                };
                immediate = Some((kind, u64::from(value)));
            }
            K::imm8_const_1 => immediate = Some((OpKind::Immediate8, 1)),
            K::imm8sex16 => immediate = Some((OpKind::Immediate8to16, draft.immediate8() as i8 as u64)),
            K::imm8sex32 => immediate = Some((OpKind::Immediate8to32, draft.immediate8() as i8 as u64)),
            K::imm8sex64 => immediate = Some((OpKind::Immediate8to64, draft.immediate8() as i8 as u64)),
            K::imm16 => {
                let value = draft.rng.interesting() & 0xffff;
                let value = if code.mnemonic() == Mnemonic::Enter { value & 0x78 } else { value };
                immediate = Some((OpKind::Immediate16, value));
            }
            K::imm32 => immediate = Some((OpKind::Immediate32, draft.rng.interesting() & 0xffff_ffff)),
            K::imm32sex64 => immediate = Some((OpKind::Immediate32to64, draft.rng.interesting() as i32 as u64)),
            K::imm64 => immediate = Some((OpKind::Immediate64, draft.rng.interesting())),
            K::seg_rSI | K::es_rDI | K::seg_rDI => {
                let narrow = draft.layout.data < 1 << 32 && draft.rng.chance(15);
                // All operands of one instruction have the same address size.
                let narrow = match (i, ins.op_kind(0)) {
                    (0, _) => narrow,
                    (_, OpKind::MemorySegEDI | OpKind::MemorySegESI | OpKind::MemoryESEDI) => true,
                    (_, OpKind::MemorySegRDI | OpKind::MemorySegRSI | OpKind::MemoryESRDI) => false,
                    _ => narrow,
                };
                let op = match (kind, narrow) {
                    (K::seg_rSI, false) => OpKind::MemorySegRSI,
                    (K::seg_rSI, true) => OpKind::MemorySegESI,
                    (K::es_rDI, false) => OpKind::MemoryESRDI,
                    (K::es_rDI, true) => OpKind::MemoryESEDI,
                    (_, false) => OpKind::MemorySegRDI,
                    (_, true) => OpKind::MemorySegEDI,
                };
                ins.set_op_kind(i, op);
                continue;
            }
            K::seg_rBX_al => {
                ins.set_op_kind(i, OpKind::Memory);
                ins.set_memory_base(Register::RBX);
                ins.set_memory_index(Register::AL);
                continue;
            }
            _ => return None,
        }
        if wants_memory {
            let operand = draft.memory(code.op_code().memory_size().size());
            ins.set_op_kind(i, OpKind::Memory);
            set_memory(&mut ins, &operand);
            memory = true;
        } else if let Some(register) = register {
            ins.set_op_kind(i, OpKind::Register);
            ins.set_op_register(i, register);
        } else if let Some((kind, value)) = immediate {
            ins.set_op_kind(i, kind);
            match kind {
                OpKind::Immediate8_2nd => ins.set_immediate8_2nd(value as u8),
                OpKind::Immediate64 => ins.set_immediate64(value),
                OpKind::Immediate8 => ins.set_immediate8(value as u8),
                OpKind::Immediate16 => ins.set_immediate16(value as u16),
                OpKind::Immediate32 => ins.set_immediate32(value as u32),
                OpKind::Immediate8to16 => ins.set_immediate8to16(value as i16),
                OpKind::Immediate8to32 => ins.set_immediate8to32(value as i32),
                OpKind::Immediate8to64 => ins.set_immediate8to64(value as i64),
                _ => ins.set_immediate32to64(value as i64),
            }
        }
    }
    if ins.is_string_instruction() {
        match draft.rng.below(10) {
            // Repeated ones need a count that ends.
            0..=4 if draft.small & 2 != 0 => ins.set_has_rep_prefix(true),
            5 | 6 if draft.small & 2 != 0 => ins.set_has_repne_prefix(true),
            _ => {}
        }
        if draft.rng.chance(5) && matches!(ins.op_kind(1), OpKind::MemorySegRSI) {
            ins.set_segment_prefix(draft.rng.pick(&[Register::FS, Register::GS]));
        }
    }
    if template.lock && memory && ins.op0_kind() == OpKind::Memory && draft.rng.chance(20) {
        ins.set_has_lock_prefix(true);
    }
    Some(ins)
}
