//! Fetching over HTTP: bounded, resumable, retried, with a progress bar on a terminal.
//!
//! Nothing here is trusted: what arrives is held to a size and a SHA-256 that come from the signed
//! index, or, for the index itself, to a bound and a signature.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::http::{Response, Uri, header};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport};
use ureq::{Agent, Body};

use crate::error::{Error, Result, redact};
use crate::mirror::check_url;
use crate::proxy::Proxies;

/// A SHA-256 hash.
pub type Hash = [u8; 32];

/// Whether to draw progress bars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Progress {
    /// On standard error if that is a terminal.
    #[default]
    Auto,
    /// Never.
    Quiet,
}

impl Progress {
    /// A bar over `total` bytes that is drawn or not as this says.
    fn bar(self, label: &str, total: u64) -> ProgressBar {
        let target = match self {
            Self::Auto if io::stderr().is_terminal() => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        let style = ProgressStyle::with_template("{msg:32!} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(label.to_owned())
    }

    /// One line on standard error, if progress is shown at all.
    pub(crate) fn note(self, line: &str) {
        if self == Self::Auto && io::stderr().is_terminal() {
            eprintln!("{line}");
        }
    }
}

/// How patient a [`Client`] is.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a connection to be made.
    pub connect: Duration,
    /// For the next bytes to arrive.
    pub read: Duration,
    /// Attempts in a row that bring nothing before giving up.
    pub attempts: u32,
    /// Pause after the first failed attempt; doubles with each.
    pub backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            read: Duration::from_secs(20),
            attempts: 4,
            backoff: Duration::from_millis(500),
        }
    }
}

/// A file to fetch whose content is known by hash.
#[derive(Debug)]
pub struct Download<'a> {
    /// Where from.
    pub url: &'a str,
    /// What the progress bar calls it.
    pub label: &'a str,
    /// Exact size in bytes.
    pub size: u64,
    /// Hash of the content.
    pub sha256: Hash,
    /// Where an unfinished download is kept, to be resumed.
    pub part: &'a Path,
    /// Where the finished file goes; same file system as `part`.
    pub dest: &'a Path,
}

/// How many files are fetched at a time.
const AT_ONCE: usize = 6;

/// One file's part of a bar that may be shared.
struct Meter<'a> {
    bar: &'a ProgressBar,
    shown: AtomicU64,
}

impl Meter<'_> {
    fn set_position(&self, position: u64) {
        let before = self.shown.swap(position, Ordering::Relaxed);
        if position < before {
            self.bar.set_position(self.bar.position().saturating_sub(before - position));
        } else {
            self.bar.inc(position - before);
        }
    }
}

/// An attempt that failed: for good, or so that another may succeed.
enum Failure {
    Final(Error),
    Passing(Error),
}

/// An HTTP client with the host's proxy settings.
#[derive(Debug)]
pub struct Client {
    proxies: Proxies,
    progress: Progress,
    patience: Patience,
}

impl Client {
    /// A client; no connection is made yet.
    pub fn new(proxies: Proxies, progress: Progress, patience: Patience) -> Self {
        Self { proxies, progress, patience }
    }

    /// Fetches a small file of unknown size into memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond `limit` bytes; otherwise as [`Client::download`].
    pub fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>> {
        self.retry(|| {
            let response = self.request(url, 0)?;
            if response.status().as_u16() != 200 {
                return Err(self.refused(url, response.status().as_u16()));
            }
            let mut data = Vec::new();
            response
                .into_body()
                .into_reader()
                .take(limit.saturating_add(1))
                .read_to_end(&mut data)
                .map_err(|e| Failure::Passing(network(url, &e)))?;
            if data.len() as u64 > limit {
                return Err(Failure::Final(too_large(url, limit)));
            }
            Ok((data, false))
        })
    }

    /// Fetches a file, from where an earlier download stopped, and puts it in place once its size and
    /// hash are right.
    ///
    /// # Errors
    /// [`Error::Network`], [`Error::NotFound`], [`Error::Http`] for what the network does;
    /// [`Error::TooLarge`] and [`Error::HashMismatch`] for wrong content, which is removed;
    /// [`Error::CacheFull`] and its like for the disk.
    pub fn download(&self, d: &Download<'_>) -> Result<()> {
        let bar = self.progress.bar(d.label, d.size);
        let done = self.download_with(d, &Meter { bar: &bar, shown: AtomicU64::new(0) });
        bar.finish_and_clear();
        done
    }

    /// As [`Client::download`] for many files, some at a time, with one bar for all; all are attempted to the first failure. What has
    /// arrived by then stays, and the next time is not fetched again.
    ///
    /// # Errors
    /// The first failure.
    pub fn download_all(&self, label: &str, all: &[Download<'_>]) -> Result<()> {
        let total = all.iter().map(|d| d.size).fold(0, u64::saturating_add);
        let bar = self.progress.bar(label, total);
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(all.len()) {
                scope.spawn(|| {
                    while let Some(d) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let done = self.download_with(d, &Meter { bar: &bar, shown: AtomicU64::new(0) });
                        if let Err(error) = done {
                            // The others stop after the file they are at.
                            next.store(all.len(), Ordering::Relaxed);
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        }
                    }
                });
            }
        });
        bar.finish_and_clear();
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn download_with(&self, d: &Download<'_>, bar: &Meter<'_>) -> Result<()> {
        let on_part = |op| move |e| Error::io(op, d.part, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(d.part)
            .map_err(on_part("open"))?;
        let mut have = file.metadata().map_err(on_part("read"))?.len();
        if have > d.size {
            file.set_len(0).map_err(on_part("truncate"))?;
            have = 0;
        }
        let mut resumed = have > 0;
        loop {
            self.retry(|| {
                let before = have;
                if have == d.size {
                    return Ok(((), false));
                }
                match self.fetch_rest(d, &mut file, &mut have, bar) {
                    Ok(()) => Ok(((), false)),
                    // Bytes that arrived count as progress: the next attempt goes on from there.
                    Err(Failure::Passing(_)) if have > before => Ok(((), true)),
                    Err(e) => Err(e),
                }
            })?;
            if hash_of(&mut file).map_err(on_part("read"))? == d.sha256 {
                break;
            }
            file.set_len(0).map_err(on_part("truncate"))?;
            have = 0;
            bar.set_position(0);
            // The front may be a leftover of another file; from the start it is the server's fault.
            if !std::mem::take(&mut resumed) {
                let _ = fs::remove_file(d.part);
                return Err(Error::HashMismatch { url: redact(d.url) });
            }
        }
        file.sync_all().map_err(on_part("write"))?;
        fs::rename(d.part, d.dest).map_err(|e| Error::io("rename", d.dest, e))
    }

    /// One request for what is missing, written to the end of `file`.
    fn fetch_rest(&self, d: &Download<'_>, file: &mut File, have: &mut u64, bar: &Meter<'_>) -> Result<(), Failure> {
        let disk = |e| Failure::Final(Error::io("write", d.part, e));
        let response = self.request(d.url, *have)?;
        match response.status().as_u16() {
            206 if *have > 0 && range_start(&response) == Some(*have) => {}
            200 => {
                file.set_len(0).map_err(disk)?;
                *have = 0;
            }
            206 | 416 => {
                file.set_len(0).map_err(disk)?;
                *have = 0;
                let reason = "the server answered another range than asked for";
                return Err(Failure::Passing(network(d.url, &reason)));
            }
            status => return Err(self.refused(d.url, status)),
        }
        file.seek(SeekFrom::Start(*have)).map_err(disk)?;
        bar.set_position(*have);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0u8; 128 << 10];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if *have < d.size => {
                    let reason = format!("connection closed after {have} of {} bytes", d.size);
                    return Err(Failure::Passing(network(d.url, &reason)));
                }
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) => return Err(Failure::Passing(network(d.url, &e))),
            };
            let total = have.saturating_add(n as u64);
            if total > d.size {
                drop(fs::remove_file(d.part));
                return Err(Failure::Final(too_large(d.url, d.size)));
            }
            file.write_all(buffer.get(..n).unwrap_or_default()).map_err(disk)?;
            *have = total;
            bar.set_position(total);
        }
    }

    /// Repeats `attempt` while it fails in passing, or succeeds saying "again" (`true`).
    fn retry<T>(&self, mut attempt: impl FnMut() -> Result<(T, bool), Failure>) -> Result<T> {
        let mut failures = 0;
        loop {
            match attempt() {
                Ok((value, false)) => return Ok(value),
                Ok((_, true)) => failures = 0,
                Err(Failure::Final(e)) => return Err(e),
                Err(Failure::Passing(e)) => {
                    failures += 1;
                    if failures >= self.patience.attempts {
                        return Err(e);
                    }
                    std::thread::sleep(self.patience.backoff * (1 << (failures - 1).min(6)));
                }
            }
        }
    }

    /// Sends a GET from byte `from` on and follows up to five redirects.
    fn request(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut target = url.to_owned();
        for _ in 0..=5 {
            let response = self.send(&target, from)?;
            if !response.status().is_redirection() || response.status().as_u16() == 304 {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).unwrap_or("");
            target = match location.strip_prefix('/') {
                Some(path) => format!("{}/{path}", origin(&target)),
                None => location.to_owned(),
            };
            check_url("redirect", &target).map_err(Failure::Final)?;
        }
        Err(Failure::Final(network(url, &"too many redirects")))
    }

    fn send(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let proxy = self.proxies.for_url(url).map_err(Failure::Final)?;
        let unusable = |reason| Failure::Final(Error::BadUrl { what: "URL", value: redact(url), reason });
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(self.patience.connect))
            .timeout_connect(Some(self.patience.connect))
            .timeout_per_read(Some(self.patience.read))
            .timeout_recv_response(Some(self.patience.read))
            .user_agent(concat!("tightrope/", env!("CARGO_PKG_VERSION")))
            // Hashes and ranges are of the file as it is.
            .accept_encoding("identity")
            .proxy(None);
        let mut uri: Uri = url.parse().map_err(|_| unusable("it is not a URL"))?;
        let mut headers = Vec::new();
        let mut absolute = false;
        match proxy {
            // Plain HTTP goes through a proxy by naming the whole URL to it: caches for package
            // archives allow CONNECT seldom and only to port 443.
            Some(proxy) if url.starts_with("http://") => {
                let host = uri.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
                let host = host.rsplit('@').next().unwrap_or("").to_owned();
                headers.push(("host", host));
                let proxy: Uri = proxy.parse().map_err(|_| unusable("bad proxy URL"))?;
                let user = proxy.authority().and_then(|a| a.as_str().rsplit_once('@'));
                if let Some((user, _)) = user {
                    let basic = format!("Basic {}", base64(percent_decode(user).as_bytes()));
                    headers.push(("proxy-authorization", basic));
                }
                uri = Uri::builder()
                    .scheme(proxy.scheme_str().unwrap_or("http"))
                    .authority(host_port(&proxy))
                    .path_and_query(format!("/{}", redact(url)))
                    .build()
                    .map_err(|_| unusable("it cannot be asked of a proxy"))?;
                absolute = true;
            }
            Some(proxy) => {
                let proxy = ureq::Proxy::new(&proxy).map_err(|_| unusable("bad proxy URL"))?;
                config = config.proxy(Some(proxy));
            }
            None => {}
        }
        let agent = match absolute {
            true => Agent::with_parts(
                config.build(),
                DefaultConnector::default().chain(AbsoluteForm),
                DefaultResolver::default(),
            ),
            false => config.build().into(),
        };
        let mut request = agent.get(uri);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        request.call().map_err(|e| Failure::Passing(network(url, &e)))
    }

    fn refused(&self, url: &str, status: u16) -> Failure {
        let url = redact(url);
        match status {
            404 | 410 => Failure::Final(Error::NotFound { url }),
            408 | 425 | 429 | 500.. => Failure::Passing(Error::Http { url, status }),
            _ => Failure::Final(Error::Http { url, status }),
        }
    }
}

/// Makes the request line that a proxy wants, `GET http://host/path`, out of `GET /http://host/path`:
/// ureq writes paths only.
#[derive(Debug)]
struct AbsoluteForm;

/// A connection to a proxy.
#[derive(Debug)]
struct ToProxy<T>(T);

impl<T: Transport> Connector<T> for AbsoluteForm {
    type Out = ToProxy<T>;

    fn connect(&self, _details: &ConnectionDetails<'_>, chained: Option<T>) -> Result<Option<ToProxy<T>>, ureq::Error> {
        Ok(chained.map(ToProxy))
    }
}

impl<T: Transport> Transport for ToProxy<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, mut amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        const LINE: &[u8] = b"GET /http://";
        if let Some(output) = self.0.buffers().output().get_mut(..amount)
            && output.starts_with(LINE)
        {
            output.copy_within(5.., 4);
            amount -= 1;
        }
        self.0.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.0.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}

fn network(url: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Network { url: redact(url), reason: reason.to_string().replace('\n', " ") }
}

fn too_large(url: &str, limit: u64) -> Error {
    Error::TooLarge { url: redact(url), limit }
}

/// `scheme://authority` of a URL.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |i| i + 3);
    let end = url.get(start..).and_then(|rest| rest.find('/')).map_or(url.len(), |i| start + i);
    url.get(..end).unwrap_or(url)
}

fn host_port(uri: &Uri) -> String {
    let authority = uri.authority().map_or("", |a| a.as_str());
    authority.rsplit('@').next().unwrap_or("").to_owned()
}

fn range_start(response: &Response<Body>) -> Option<u64> {
    let value = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// The SHA-256 of a whole file.
pub(crate) fn hash_of(file: &mut File) -> io::Result<Hash> {
    file.seek(SeekFrom::Start(0))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            n => hasher.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}

fn percent_decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.as_bytes().iter();
    while let Some(&b) = bytes.next() {
        let ahead = bytes.as_slice().get(..2).and_then(|h| std::str::from_utf8(h).ok());
        match (b, ahead.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(value)) => {
                out.push(value);
                bytes.nth(1);
            }
            _ => out.push(b),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn base64(data: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in data.chunks(3) {
        let word = chunk.iter().chain([0, 0].iter()).take(3).fold(0u32, |w, b| w << 8 | u32::from(*b));
        for i in 0..4 {
            let six = (word >> (18 - 6 * i)) & 63;
            out.push(if i <= chunk.len() { ALPHABET[six as usize] as char } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_and_percent_signs() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(percent_decode("u%3a:p%zz%4"), "u::p%zz%4");
    }

    #[test]
    fn origins() {
        assert_eq!(origin("http://h:1/a/b"), "http://h:1");
        assert_eq!(origin("http://h"), "http://h");
    }
}
