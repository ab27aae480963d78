//! Exceptions (Intel SDM volume 3, chapter 6).

/// Exception and interrupt vectors with a fixed meaning.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;

    /// The short names of the exceptions, by vector; empty where there is none.
    pub const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF", "",
        "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
}

/// What a page fault reports: CR2 and the error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The linear address that faulted.
    pub address: u64,
    /// The error code (SDM volume 3, 4.7): bit 0 present, 1 write, 2 user, 3 reserved bit, 4 instruction fetch.
    pub code: u32,
}

/// An exception that an instruction raised. State is as before the instruction for faults; for traps (`#BP`, `#OF`, `#DB` after
/// single step) RIP is already behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// New CR2, for page faults.
    pub cr2: Option<u64>,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, cr2: None }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), cr2: None }
    }

    /// `#GP(code)`.
    pub const fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }

    /// `#UD`.
    pub const fn ud() -> Self {
        Self::plain(vector::UD)
    }
}

impl From<PageFault> for Exception {
    fn from(fault: PageFault) -> Self {
        Self { vector: vector::PF, error_code: Some(fault.code), cr2: Some(fault.address) }
    }
}
