//! The host's time-stamp counter: reading it, and its frequency.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The host's TSC now.
#[inline]
pub fn read() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 CPU and has no effect but its result.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in kHz: from CPUID where it tells (hypervisor timing leaf, or leaf 0x15 with a known crystal),
/// otherwise measured once against the monotonic clock, which takes 50 ms.
pub fn khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| told().unwrap_or_else(|| measure(Duration::from_millis(50))))
}

fn told() -> Option<u32> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(1).ecx & 1 << 31 != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        // Agreed with a measurement, coarsely: some hypervisors leave rubbish there.
        if khz != 0 && khz.abs_diff(measure(Duration::from_millis(4))) < khz / 50 {
            return Some(khz);
        }
    }
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            return u32::try_from(hz / 1000).ok();
        }
    }
    None
}

/// CLOCK_MONOTONIC_RAW in nanoseconds: not slewed by NTP.
fn raw_nanos() -> Option<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the result.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut now) };
    (result == 0).then(|| now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

fn measure(time: Duration) -> u32 {
    // A pair of readings close together: the narrowest of a few.
    let sample = || {
        (0..8)
            .filter_map(|_| {
                let before = read();
                let nanos = raw_nanos()?;
                let after = read();
                Some((after - before, before + (after - before) / 2, nanos))
            })
            .min()
            .map_or((0, 1), |(_, tsc, nanos)| (tsc, nanos))
    };
    let start = Instant::now();
    let (tsc0, nanos0) = sample();
    while start.elapsed() < time {
        std::thread::sleep(time / 4);
    }
    let (tsc1, nanos1) = sample();
    let khz = u128::from(tsc1.wrapping_sub(tsc0)) * 1_000_000 / u128::from(nanos1.saturating_sub(nanos0).max(1));
    u32::try_from(khz).unwrap_or(u32::MAX)
}

/// A TSC difference to nanoseconds, as kvmclock scales it: `(mul, shift)` with `ns = ((tsc << shift) * mul) >> 32` (a negative shift is
/// to the right).
pub fn scale(khz: u32) -> (u32, i8) {
    let mut hz = u64::from(khz.max(1)) * 1000;
    let mut shift = 0i8;
    // mul = 10^9 * 2^32 / hz must fit in 32 bits, and use them well.
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    let mul = (1_000_000_000u128 << 32) / u128::from(hz);
    (u32::try_from(mul).unwrap_or(u32::MAX), shift)
}

/// Applies [`scale`]'s result.
pub fn to_nanos(tsc: u64, (mul, shift): (u32, i8)) -> u64 {
    let wide = u128::from(tsc);
    let wide = if shift >= 0 { wide << shift } else { wide >> -shift };
    ((wide * u128::from(mul)) >> 32) as u64
}

static ORIGIN: AtomicU64 = AtomicU64::new(0);

/// The host TSC at which this process's virtual machine started its clock; the first call starts it.
pub fn origin() -> u64 {
    match ORIGIN.load(Ordering::Relaxed) {
        0 => {
            let now = read().max(1);
            ORIGIN.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).map_or_else(|there| there, |_| now)
        }
        origin => origin,
    }
}

/// Nanoseconds since [`origin`], as a guest with a TSC of `khz` computes them.
pub fn clock(khz: u32) -> u64 {
    to_nanos(read().wrapping_sub(origin()), scale(khz))
}

/// Makes [`clock`] go on from `nanoseconds`. The origin of a machine that was started elsewhere may lie before this host's.
pub fn set_clock(khz: u32, nanoseconds: u64) {
    let (mul, shift) = scale(khz);
    let ticks = (u128::from(nanoseconds) << 32) / u128::from(mul.max(1));
    let ticks = if shift >= 0 { ticks >> shift } else { ticks << -shift };
    ORIGIN.store(read().wrapping_sub(ticks as u64).max(1), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales() {
        for khz in [800_000, 1_000_000, 1_000_001, 2_299_998, 5_000_000] {
            let s = scale(khz);
            let nanos = to_nanos(u64::from(khz) * 1000 * 3600, s);
            assert!(nanos.abs_diff(3600 * 1_000_000_000) < 200_000, "{khz}: {nanos} {s:?}");
        }
    }

    #[test]
    fn clock_goes_on() {
        let khz = khz();
        for start in [1_000_000_000, 86_400_000_000_000, 30 * 86_400_000_000_000] {
            set_clock(khz, start);
            let now = clock(khz);
            assert!(now.wrapping_sub(start) < 1_000_000_000 || start.wrapping_sub(now) < 1_000, "{start} {now}");
        }
    }

    #[test]
    fn told_and_measured_agree() {
        let (told, measured) = (khz(), measure(Duration::from_millis(50)));
        assert!(told.abs_diff(measured) < told / 200, "{told} {measured}");
    }
}
