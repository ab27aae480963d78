use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::Bytes;

fn worker(client: &Client) -> Worker {
    Worker::new(client.descriptors().map(|fd| fd.try_clone_to_owned().unwrap())).unwrap()
}

/// Every request of several posters is answered once, by several threads, with what belongs to it; sleeping and looking.
#[test]
fn many_requests() {
    let client = Arc::new(Client::new().unwrap());
    let served = Arc::new(AtomicUsize::new(0));
    let server = Arc::new(worker(&client));
    for _ in 0..4 {
        let (server, served) = (server.clone(), served.clone());
        std::thread::spawn(move || {
            server.run(|request, answer| {
                served.fetch_add(1, Ordering::Relaxed);
                assert_eq!(answer.len(), 100);
                for (to, from) in answer.iter_mut().zip(request) {
                    *to = !from;
                }
                request.len()
            })
        });
    }
    let (mut sent, mut got, mut free) = (0usize, 0usize, u64::MAX >> (64 - SLOTS));
    let mut contents = [0u64; SLOTS];
    let mut patience = Patience::new(Duration::from_micros(50));
    while got < 20_000 {
        while free != 0 && sent < 20_000 {
            let slot = free.trailing_zeros() as usize;
            free &= !(1 << slot);
            contents[slot] = sent as u64;
            client.request(slot, 8).unwrap().write_slice(&(sent as u64).to_le_bytes(), 0).unwrap();
            client.post(slot, 8, 100);
            sent += 1;
            if sent % 1000 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if !client.any_done() && !client.looking(|| patience.look(|| client.any_done())) && !client.any_done() {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(client.done_event(), rustix::event::PollFlags::IN)];
            let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1), "{sent} sent, {got} answered");
            client.quiet();
        }
        let done = client.take_done();
        assert_eq!(done & free, 0);
        for slot in (0..SLOTS).filter(|slot| done & 1 << slot != 0) {
            assert_eq!(client.answer_len(slot), 8);
            let mut answer = [0; 8];
            client.answer(slot, 8).unwrap().read_slice(&mut answer, 0).unwrap();
            assert_eq!(!u64::from_le_bytes(answer), contents[slot]);
            got += 1;
        }
        free |= done;
    }
    assert_eq!(served.load(Ordering::Relaxed), 20_000);
}

#[test]
fn bounds() {
    let client = Client::new().unwrap();
    assert!(client.request(SLOTS, 1).is_none() && client.request(0, AREA + 1).is_none());
    assert!(client.answer(SLOTS - 1, AREA).is_some());
    client.post(SLOTS, 1, 1);
    assert!(!client.any_done() && client.take_done() == 0 && client.answer_len(99) == 0);
    // The server can neither shorten the memory under the monitor nor be given another.
    let file = client.descriptors()[0].try_clone_to_owned().unwrap();
    assert!(rustix::fs::ftruncate(&file, 0).is_err());
    let other = rustix::fs::memfd_create(c"x", MemfdFlags::CLOEXEC).unwrap();
    let mut descriptors = client.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
    descriptors[0] = other;
    assert!(Worker::new(descriptors).is_err());
}
