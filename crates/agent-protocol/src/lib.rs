//! What the host and the agent inside a guest say to each other: `docs/agent.md` is the description, this crate its code.
//!
//! * [`frame`]: lengths and kinds. * [`message`]: what frames mean. * [`archive`]: trees of files as a stream, and their confined unpacking.
//!
//! Both ends use it, and neither trusts the other: all sizes are bounded, and what does not fit the rules is an error, never a panic.

#![forbid(unsafe_code)]

pub mod archive;
pub mod frame;
pub mod message;

pub use frame::{Decoder, FrameError, MAX_BODY};
pub use message::{Exec, Exit, FromGuest, FromHost};

/// The protocol's version, which both ends say first. A change that the other end would misunderstand raises it.
pub const VERSION: u16 = 1;
/// The vsock port on which the agent listens, and that of the host at which it says that it is there. Below 1024: only root may
/// take it in a Linux guest, so no other program plays the agent.
pub const PORT: u32 = 1023;
/// Bytes of input for a program that may be on the way, before the agent says that they were taken.
pub const STDIN_WINDOW: usize = 256 << 10;

/// The text without the numbers that Rust adds to what the host says, as in "No space left on device (os error 28)".
pub fn without_numbers(text: &str) -> String {
    let mut pieces = text.split(" (os error ");
    let mut all = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        match piece.split_once(')') {
            Some((number, rest)) if number.parse::<i32>().is_ok() => all.push_str(rest),
            _ => all.extend([" (os error ", piece]),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_errors_are_left_out() {
        let error = std::io::Error::from_raw_os_error(28);
        assert!(error.to_string().contains("(os error 28)"), "{error}");
        assert_eq!(without_numbers(&format!("a.img: {error}: b ({error})")).find("os error"), None);
        assert_eq!(without_numbers("a: no (os error 2): b (os error 13); c"), "a: no: b; c");
        for same in ["", "a (os error", "a (os error x) b", "a (os error 7"] {
            assert_eq!(without_numbers(same), same);
        }
    }
}
