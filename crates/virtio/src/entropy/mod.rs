//! virtio-rng (virtio 1.3, 5.4): randomness from the host's `getrandom`.
//!
//! Requests are served inline, on the vCPU thread that notifies: the host answers without waiting, and each request yields at
//! most [`MAX_REQUEST`] bytes however large its buffer is.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceState, Interrupt, VirtioDevice};
use crate::queue::{Chain, Virtqueue};
use crate::runner::{Doorbell, Inline, Job, StopFlag};

/// Most bytes given to one request. The driver asks again if it wants more.
pub const MAX_REQUEST: usize = 4096;

/// Saved state of [`Entropy`]: it has none beyond its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {}

/// Fills its argument with random bytes; `false` when the host has none.
type Source = fn(&mut [u8]) -> bool;

struct EntropyJob {
    queue: Virtqueue,
    source: Source,
}

impl Job for EntropyJob {
    fn run(&mut self, stop: &StopFlag) {
        let source = self.source;
        self.queue.serve(stop, |chain| fill(chain, source));
    }

    fn failed(&mut self) {
        self.queue.fail(&"the entropy device failed");
    }
}

fn fill(chain: &mut Chain<'_>, source: Source) -> u32 {
    let mut data = [0; MAX_REQUEST];
    let Some(data) = data.get_mut(..MAX_REQUEST.min(chain.writable.len() as usize)) else { return 0 };
    if source(data) { chain.writable.write(data) as u32 } else { 0 }
}

fn host_randomness(data: &mut [u8]) -> bool {
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: `rest` is valid for writes of its length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

/// A virtio source of randomness.
pub struct Entropy {
    runner: Inline<EntropyJob>,
    source: Source,
}

impl Default for Entropy {
    fn default() -> Self {
        Self { runner: Inline::default(), source: host_randomness }
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _features: u64, _interrupt: Arc<dyn Interrupt>) {}

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.runner.start(EntropyJob { queue, source: self.source });
        self.runner.doorbell()
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        if index != 0 {
            return None;
        }
        self.runner.stop().map(|job| job.queue)
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Entropy(EntropyState {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        match state {
            DeviceState::Entropy(EntropyState {}) => Ok(()),
            _ => Err("it is not of an entropy device".into()),
        }
    }
}
