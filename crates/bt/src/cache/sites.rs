//! What translated code names by number.

use super::Place;
use crate::emit::{Access, LinkKind};
use crate::table::Table;

/// An instruction at which the dispatcher is entered.
#[derive(Clone, Copy)]
pub struct ExitSite {
    pub place: Place,
    /// It uses x87 or SSE state.
    pub fpu: bool,
}

/// A memory access with a slow path.
#[derive(Clone, Copy)]
pub struct AccessSite {
    pub access: Access,
    /// Its instruction.
    pub place: Place,
    pub user: bool,
}

/// The place that a check stub was called from.
#[derive(Clone, Copy)]
pub struct CallSite {
    /// Position in the code cache behind the call. Ascending.
    pub position: u32,
    /// Number of its access.
    pub access: u32,
}

/// A cross-page jump target.
#[derive(Clone, Copy)]
pub struct Slot {
    pub target: Place,
    pub kind: LinkKind,
    /// Host address of the code that asks the dispatcher.
    pub thunk: u64,
}

/// What translated code names by number. Read without the cache's lock; what is in it stays until the cache is flushed.
pub struct Sites {
    pub exits: Table<ExitSite>,
    pub accesses: Table<AccessSite>,
    pub calls: Table<CallSite>,
    pub slots: Table<Slot>,
}

impl Sites {
    /// The access whose check stub was called with the return address at `position`.
    pub fn called_from(&self, position: u32) -> Option<u32> {
        let (mut low, mut high) = (0, self.calls.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let site = self.calls.get(middle)?;
            match site.position.cmp(&position) {
                std::cmp::Ordering::Equal => return Some(site.access),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }
}
