//! What saved device states have in common.

/// A saved state that cannot be: it is damaged, or belongs to a machine built otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved state of {device} does not fit: {why}")]
pub struct StateError {
    /// Which device.
    pub device: String,
    /// What is wrong with its state.
    pub why: String,
}

impl StateError {
    /// The state of `device` is refused because of `why`.
    pub fn new(device: impl Into<String>, why: impl Into<String>) -> Self {
        Self { device: device.into(), why: why.into() }
    }
}

/// Locks a mutex. A panic of another thread while it held the lock does not make device state unusable: all of it is plain data that
/// is valid after every statement.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
