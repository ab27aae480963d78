//! The serial console's two directions between the guest and the outside.
//!
//! * [`Output`]: what the guest writes, buffered, so that a slow or stopped terminal does not hold up a vCPU for long.
//! * [`Escape`]: the key commands behind Ctrl-A.
//! * [`Input`]: where bytes for the guest go, paced by the room in the UART's FIFO.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of output kept for a reader that is slower than the guest.
const CAPACITY: usize = 1 << 20;
/// How long a vCPU waits, once, for a reader that has stopped reading.
const PATIENCE: Duration = Duration::from_millis(500);

/// What the keys typed mean.
pub(crate) const HELP: &str = "\
Ctrl-A X  quit: the guest is switched off at once
Ctrl-A C  show counters (Ctrl-A S too)
Ctrl-A A  send Ctrl-A to the guest
Ctrl-A H  this help";

/// What one key typed amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// Nothing yet.
    Nothing,
    /// This byte goes to the guest.
    Byte(u8),
    /// Quit.
    Quit,
    /// Show the help.
    Help,
    /// Show the counters.
    Stats,
}

/// Finds the key commands in what is typed.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    pending: bool,
}

impl Escape {
    /// Ctrl-A.
    const PREFIX: u8 = 0x01;

    /// Takes one byte typed.
    pub(crate) fn key(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.pending) {
            self.pending = byte == Self::PREFIX;
            return if self.pending { Key::Nothing } else { Key::Byte(byte) };
        }
        match byte {
            b'x' | b'X' | 0x18 => Key::Quit,
            b'h' | b'H' | b'?' => Key::Help,
            b'c' | b'C' | b's' | b'S' => Key::Stats,
            b'a' | b'A' | Self::PREFIX => Key::Byte(Self::PREFIX),
            _ => Key::Help,
        }
    }
}

/// The guest's end of console input.
pub(crate) trait Input: Send + Sync {
    /// Gives the guest as many of these bytes as its UART has room for now; returns how many that were.
    fn offer(&self, bytes: &[u8]) -> usize;
    /// Waits until there may be room again, or the time is over.
    fn wait_for_room(&self, at_most: Duration);
}

/// Gives all bytes to the guest, waiting for room. Returns early when `give_up` says so.
pub(crate) fn feed(input: &dyn Input, mut bytes: &[u8], give_up: &dyn Fn() -> bool) {
    while !bytes.is_empty() && !give_up() {
        let taken = input.offer(bytes).min(bytes.len());
        bytes = bytes.get(taken..).unwrap_or_default();
        if !bytes.is_empty() && taken == 0 {
            input.wait_for_room(Duration::from_millis(20));
        }
    }
}

#[derive(Default)]
struct State {
    buffer: VecDeque<u8>,
    /// Bytes taken out of the buffer that the writer has not finished writing.
    in_flight: usize,
    /// The reader did not read in time: do not wait for it again before it does.
    stalled: bool,
    dropped: u64,
    broken: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    filled: Condvar,
    drained: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's console output. Clones are the same stream.
#[derive(Clone)]
pub(crate) struct Output {
    shared: Arc<Shared>,
    watch: Arc<Mutex<Option<Watch>>>,
}

/// Looks for a marker at the start of a line. What may be its beginning is held back, so that what is to be said about it can be
/// said before it is shown.
struct Watch {
    marker: Vec<u8>,
    /// Bytes of the marker seen, and not yet passed on.
    matched: usize,
    line_start: bool,
    found: Box<dyn FnOnce() + Send>,
}

impl Output {
    /// Output to `sink`, written by a thread of its own. `broken` is called once when the sink takes no more.
    pub(crate) fn start(mut sink: Box<dyn Write + Send>, broken: Box<dyn FnOnce() + Send>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let output = Self { shared: shared.clone(), watch: Arc::default() };
        std::thread::Builder::new().name("console-out".into()).spawn(move || {
            loop {
                let mut state = shared.lock();
                while state.buffer.is_empty() {
                    state = shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                let mut chunk: Vec<u8> = std::mem::take(&mut state.buffer).into();
                if state.dropped > 0 {
                    chunk.extend_from_slice(format!("\r\n[{} bytes of output lost]\r\n", state.dropped).as_bytes());
                    state.dropped = 0;
                }
                state.in_flight = chunk.len();
                drop(state);
                let result = sink.write_all(&chunk).and_then(|()| sink.flush());
                let mut state = shared.lock();
                state.in_flight = 0;
                state.stalled = false;
                state.broken = result.is_err();
                shared.drained.notify_all();
                if state.broken {
                    state.buffer.clear();
                    drop(state);
                    broken();
                    return;
                }
            }
        })?;
        Ok(output)
    }

    /// Calls `found` once, when the guest has written `marker` at the start of a line and before it is passed on.
    pub(crate) fn watch_for(&self, marker: &str, found: Box<dyn FnOnce() + Send>) {
        if !marker.is_empty() {
            *self.watch.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(Watch { marker: marker.as_bytes().to_vec(), matched: 0, line_start: true, found });
        }
    }

    /// Takes what the guest wrote.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let mut slot = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(watch) = slot.as_mut() else {
            drop(slot);
            self.pass_on(bytes);
            return;
        };
        let mut ready = Vec::with_capacity(bytes.len() + watch.matched);
        for (at, &byte) in bytes.iter().enumerate() {
            let wanted = watch.marker.get(watch.matched) == Some(&byte);
            if wanted && (watch.matched > 0 || watch.line_start) {
                watch.matched += 1;
                if watch.matched == watch.marker.len() {
                    let rest = bytes.get(at + 1..).unwrap_or_default();
                    let Some(watch) = slot.take() else { return };
                    drop(slot);
                    self.pass_on(&ready);
                    (watch.found)();
                    self.pass_on(&watch.marker);
                    self.pass_on(rest);
                    return;
                }
                continue;
            }
            ready.extend_from_slice(watch.marker.get(..watch.matched).unwrap_or_default());
            ready.push(byte);
            watch.matched = 0;
            watch.line_start = byte == b'\n' || byte == b'\r';
        }
        drop(slot);
        self.pass_on(&ready);
    }

    fn pass_on(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut state = self.shared.lock();
        if state.broken {
            return;
        }
        if state.buffer.len() + bytes.len() > CAPACITY {
            let deadline = Instant::now() + PATIENCE;
            while !state.stalled && !state.broken && state.buffer.len() + bytes.len() > CAPACITY {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    state.stalled = true;
                    break;
                }
                state = self.shared.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.buffer.len() + bytes.len() > CAPACITY {
                state.dropped += bytes.len() as u64;
                return;
            }
        }
        let sleeping = state.buffer.is_empty();
        state.buffer.extend(bytes);
        drop(state);
        if sleeping {
            self.shared.filled.notify_one();
        }
    }

    /// Waits until everything is written, or the time is over.
    pub(crate) fn flush(&self, at_most: Duration) {
        let deadline = Instant::now() + at_most;
        let mut state = self.shared.lock();
        while !state.broken && (!state.buffer.is_empty() || state.in_flight > 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.shared.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Output::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        bytes.iter().map(|&b| escape.key(b)).filter(|k| *k != Key::Nothing).collect()
    }

    #[test]
    fn key_commands() {
        assert_eq!(keys(b"ab"), [Key::Byte(b'a'), Key::Byte(b'b')]);
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01a\x01\x01x"), [Key::Byte(1), Key::Byte(1), Key::Byte(b'x')]);
        assert_eq!(keys(b"\x01hx\x01C\x01s"), [Key::Help, Key::Byte(b'x'), Key::Stats, Key::Stats]);
        assert_eq!(keys(b"\x01q"), [Key::Help]);
    }

    /// A UART with room for a few bytes, whose guest reads one each time somebody waits.
    struct SmallFifo {
        fifo: Mutex<VecDeque<u8>>,
        read: Mutex<Vec<u8>>,
        overruns: AtomicUsize,
    }

    impl Input for SmallFifo {
        fn offer(&self, bytes: &[u8]) -> usize {
            let mut fifo = self.fifo.lock().unwrap();
            let taken = bytes.len().min(4 - fifo.len());
            fifo.extend(&bytes[..taken]);
            if fifo.len() > 4 {
                self.overruns.fetch_add(1, Ordering::SeqCst);
            }
            taken
        }

        fn wait_for_room(&self, _: Duration) {
            let byte = self.fifo.lock().unwrap().pop_front();
            self.read.lock().unwrap().extend(byte);
        }
    }

    #[test]
    fn input_is_paced() {
        let uart = SmallFifo { fifo: Mutex::default(), read: Mutex::default(), overruns: AtomicUsize::new(0) };
        let text = b"the quick brown fox jumps over the lazy dog";
        feed(&uart, text, &|| false);
        let mut all = uart.read.lock().unwrap().clone();
        all.extend(uart.fifo.lock().unwrap().iter());
        assert_eq!(all, text);
        assert_eq!(uart.overruns.load(Ordering::SeqCst), 0);
        feed(&uart, text, &|| true);
    }

    struct Sink(mpsc::Sender<Vec<u8>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_and_the_marker_is_found() {
        let (to, from) = mpsc::channel();
        let output = Output::start(Box::new(Sink(to)), Box::new(|| ())).unwrap();
        let (found_to, found) = mpsc::channel();
        output.watch_for("ready:", Box::new(move || found_to.send(()).unwrap()));
        for byte in b"already: \nreaready: \nready" {
            output.write(&[*byte]);
        }
        output.flush(Duration::from_secs(5));
        assert!(found.try_recv().is_err());
        let mut all: Vec<u8> = from.try_iter().flatten().collect();
        assert_eq!(all, b"already: \nreaready: \n"); // the beginning is held back
        output.write(b": 1\nready: 2");
        assert!(found.try_recv().is_ok());
        output.flush(Duration::from_secs(5));
        all.extend(from.try_iter().flatten());
        assert_eq!(all, b"already: \nreaready: \nready: 1\nready: 2");
        // Both after a false start and in one piece.
        let (found_to, found) = mpsc::channel();
        output.watch_for("ready:", Box::new(move || found_to.send(()).unwrap()));
        output.write(b"\nrea\nready:");
        assert!(found.try_recv().is_ok());
        output.flush(Duration::from_secs(5));
        assert_eq!(from.try_iter().flatten().collect::<Vec<u8>>(), b"\nrea\nready:");
    }

    /// Blocks until told to go on.
    struct Stuck(mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.recv();
            self.1.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stopped_reader_holds_the_guest_up_only_once() {
        let (go, wait) = mpsc::channel();
        let read = Arc::new(Mutex::new(Vec::new()));
        let output = Output::start(Box::new(Stuck(wait, read.clone())), Box::new(|| ())).unwrap();
        let start = Instant::now();
        for _ in 0..40 {
            output.write(&[b'x'; CAPACITY / 16]);
        }
        assert!(start.elapsed() < PATIENCE * 12, "{:?}", start.elapsed());
        drop(go);
        output.flush(Duration::from_secs(5));
        output.write(b"end");
        output.flush(Duration::from_secs(5));
        let text = String::from_utf8(read.lock().unwrap().clone()).unwrap();
        assert!(text.contains("bytes of output lost") && text.ends_with("end"), "{}", text.len());
    }

    #[test]
    fn a_broken_sink_is_told_once_and_blocks_nobody() {
        let (to, from) = mpsc::channel();
        drop(from);
        let (told_to, told) = mpsc::channel();
        let output = Output::start(Box::new(Sink(to)), Box::new(move || told_to.send(()).unwrap())).unwrap();
        output.write(b"x");
        told.recv_timeout(Duration::from_secs(5)).unwrap();
        output.write(&[0; CAPACITY * 2]);
        output.flush(Duration::from_secs(5));
    }
}
