//! Where code, data and stack lie: the same linear addresses in the guest and in this process.

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Code slots; a program is put into one of them.
pub const SLOTS: u64 = 48;
/// Bytes of a slot.
pub const SLOT: u64 = 2 * PAGE;
/// Where programs end: within reach of a jump, out of reach of 32-bit bit offsets.
pub const EXIT: u64 = 0x6f00_7000_0000;
/// The page with the native side's registers. Absent in the guest.
pub const CONTEXT: u64 = 0x6f00_e000_0000;

/// A set of linear addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub code: u64,
    pub data: u64,
    pub stack: u64,
}

/// Below 4 GiB with writable code, and far above with code to read only.
pub const LAYOUTS: [Layout; 2] = [
    Layout { code: 0x2000_0000, data: 0x2100_0000, stack: 0x2200_0000 },
    Layout { code: 0x6f00_0000_0000, data: 0x6f00_0100_0000, stack: 0x6f00_0200_0000 },
];

/// What may be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    Write,
    Read,
    Absent,
}

/// A page of the data or stack area: which backing page, and what may be done with it.
pub type Page = (usize, Right);

/// The page of the data area that is the same memory as page 1.
pub const ALIAS: u64 = 10;

/// The data area, page by page: two pages, a hole, one page, one to read only, one page, holes, the second once more, a hole.
pub const DATA: [Page; 12] = [
    (0, Right::Write),
    (1, Right::Write),
    (0, Right::Absent),
    (2, Right::Write),
    (3, Right::Read),
    (4, Right::Write),
    (0, Right::Absent),
    (0, Right::Absent),
    (0, Right::Absent),
    (0, Right::Absent),
    (1, Right::Write),
    (0, Right::Absent),
];

/// The stack area.
pub const STACK: [Page; 4] = [(0, Right::Absent), (5, Right::Write), (6, Right::Write), (0, Right::Absent)];

/// Backing pages of data and stack.
pub const BACKING: usize = 7;

/// Contents of all backing pages.
pub type Memory = [[u8; PAGE as usize]; BACKING];
