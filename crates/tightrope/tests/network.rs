//! The network of the default guest, through the whole command. All servers and clients are on the host's loopback interface.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use common::{PROMPT, Session, done, emulated, left_out, power_off, run, tightrope};
use sha2::{Digest, Sha256};

/// A server of one page, for as many clients as come; returns its port.
fn web_server(address: &str, page: Vec<u8>) -> u16 {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    let page = std::sync::Arc::new(page);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, page) = (client.unwrap(), page.clone());
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = client.read(&mut request);
                let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
                let _ = client.write_all(head.as_bytes());
                let _ = client.write_all(&page);
            });
        }
    });
    port
}

/// A name server that knows one name, the gateway's address; returns its port.
fn name_server(name: &'static str) -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut question) {
            let mut encoded: Vec<u8> =
                name.split('.').flat_map(|l| [&[l.len() as u8], l.as_bytes()].concat()).collect();
            encoded.push(0);
            let mut answer = question[..len].to_vec();
            let known = answer[12..].starts_with(&encoded);
            let is_a = answer.get(12 + encoded.len() + 1) == Some(&1);
            answer[2] |= 0x80;
            answer[3] = if known { 0x80 } else { 0x83 };
            if known && is_a {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0, 2, 2]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    port
}

/// A port that nobody has at the moment.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn boot(args: &[&str]) -> Session {
    let mut session = Session::start(run(args));
    session.expect(PROMPT);
    session
}

#[test]
fn the_guest_reaches_out() {
    // A hundred megabytes; an emulated machine takes minutes for as much, most of them to make and to add it up.
    let megabytes = if emulated() { 5 } else { 100_u32 };
    let page: Vec<u8> = (0..megabytes << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sum: String = Sha256::digest(&page).iter().map(|byte| format!("{byte:02x}")).collect();
    let big = web_server("127.0.0.1:0", page);
    let six = web_server("[::1]:0", b"by IPv6".to_vec());
    let names = name_server("www.example");
    let mut session = boot(&["--net", &format!("user,dns=127.0.0.1:{names}")]);
    done(&mut session, "network wait && ifconfig eth0 | grep -q addr:10.0.2.15");
    // By a name that the host's name server knows, and by ours.
    done(&mut session, &format!("wget -q -O - http://www.example:{big}/ | sha256sum | grep {sum}"));
    done(&mut session, &format!("wget -q -O - http://host:{big}/ | head -c 10 | wc -c | grep 10"));
    done(&mut session, "! nslookup no.example");
    done(&mut session, "ping -c 2 host.tightrope.internal");
    done(&mut session, &format!("nslookup www.example 10.0.2.2:{names} | grep 10.0.2.2"));
    done(&mut session, "until ifconfig eth0 | grep -q fd74:6967:6874; do usleep 100000; done");
    // The address is tried out first.
    done(&mut session, "until ping -c 1 -W 1 fd74:6967:6874::2; do :; done");
    done(&mut session, &format!("wget -q -O - 'http://[fd74:6967:6874::2]:{six}/' | grep 'by IPv6'"));
    // Who listens by IPv4 alone is reached by either of the host's addresses: its name has both.
    done(&mut session, &format!("wget -q -O - 'http://[fd74:6967:6874::2]:{big}/' | head -c 10 | wc -c | grep 10"));
    // Nobody there: told at once.
    done(&mut session, &format!("! wget -q -O - -T 20 http://host:{}/", free_port()));
    power_off(session);
}

/// A command without a shell finds its network there from the start; the agent asks for it.
#[test]
fn a_command_reaches_out() {
    let port = web_server("127.0.0.1:0", b"at once\n".to_vec());
    let script =
        format!("wget -q -O - http://host:{port}/ && ifconfig lo | grep -c UP && cat /etc/resolv.conf && network wait");
    let done = common::finish(run(&["--", "sh", "-c", &script]), b"");
    assert_eq!(done.code(), Some(0), "{done:?}");
    assert_eq!(done.out, "at once\n1\nsearch tightrope.internal\nnameserver 10.0.2.3\n", "{done:?}");
    let done = common::finish(run(&["--net=none", "--", "sh", "-c", "ping -c 1 127.0.0.1"]), b"");
    assert_eq!(done.code(), Some(0), "{done:?}");
}

fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(common::LIMIT))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

#[test]
fn the_guest_is_reached() {
    let (web, names) = (free_port(), free_port());
    let (web_arg, names_arg) = (format!("{web}:80"), format!("127.0.0.1:{names}:5353/udp"));
    let ours = web_server("127.0.0.1:0", b"not for the guest".to_vec());
    // Isolation lets nothing out and the forwarded ports in.
    let mut session = boot(&["--net", "user,isolated", "-p", &web_arg, "-p", &names_arg]);
    done(&mut session, "network wait && mkdir /www && echo from-the-guest >/www/index.html && httpd -h /www");
    assert!(get(web).unwrap().ends_with("from-the-guest\n"));
    // No program of BusyBox listens by UDP: the guest's kernel counts what came for nobody.
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"for nobody", ("127.0.0.1", names)).unwrap();
    let count = "awk '/^Udp:/ {n = $3} END {exit n < 1}' /proc/net/snmp";
    done(&mut session, &format!("until {count}; do usleep 100000; done"));
    done(&mut session, &format!("! wget -q -O - -T 20 http://10.0.2.2:{ours}/"));
    done(&mut session, "! wget -q -O - -T 20 http://192.0.2.1/");
    // The ports belong to the guest as long as it runs, and are free at once when it has ended.
    assert!(TcpListener::bind(("127.0.0.1", web)).is_err());
    power_off(session);
    drop(TcpListener::bind(("127.0.0.1", web)).unwrap());
    drop(UdpSocket::bind(("127.0.0.1", names)).unwrap());
}

#[test]
fn after_a_reboot_the_network_is_there_again() {
    let port = web_server("127.0.0.1:0", b"still here".to_vec());
    let mut session = boot(&[]);
    done(&mut session, "network wait");
    session.send(b"reboot -f\n");
    session.expect("Restarting system");
    session.expect(PROMPT);
    done(&mut session, &format!("network wait && wget -q -O - http://host:{port}/ | grep 'still here'"));
    power_off(session);
}

#[test]
fn no_network() {
    let mut session = boot(&["--net", "none"]);
    done(&mut session, "[ \"$(ls /sys/class/net)\" = lo ]");
    power_off(session);
}

#[test]
fn two_guests_on_one_cable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cable").display().to_string();
    let mut first = boot(&["--net", &format!("socket:{path},listen")]);
    let mut second = boot(&["--net", &format!("socket:{path}")]);
    let up = |host: u8| {
        // Again and again: the guest's own DHCP client starts by taking addresses away.
        format!("until ifconfig eth0 192.168.9.{host} up && ping -c 1 -W 1 192.168.9.1; do usleep 100000; done")
    };
    done(&mut first, "until pidof udhcpc; do usleep 100000; done; sleep 1; ifconfig eth0 192.168.9.1 up");
    done(&mut first, "mkdir /www && head -c 3000000 /dev/zero >/www/zeros && httpd -h /www");
    done(&mut second, &up(2));
    done(&mut second, "wget -q -O - http://192.168.9.1/zeros | wc -c | grep 3000000");
    // When one goes, the other's cable is pulled, and the line is free for a third.
    power_off(second);
    let mut third = boot(&["--net", &format!("socket:{path}")]);
    done(&mut third, &up(3));
    first.send(b"poweroff -f\n");
    assert_eq!(first.finish().code(), Some(0));
    done(&mut third, "until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 100000; done");
    let finished = power_off(third);
    assert!(finished.err.contains("the network's host side has ended"), "{}", finished.err);
}

/// A TAP device, in a network namespace of the test's own. Hosts that let no one make namespaces are left out.
#[test]
fn a_tap_device() {
    let make = "ip tuntap add tapt mode tap && ip addr add 10.9.9.1/24 dev tapt && ip link set tapt up";
    let can = Command::new("unshare").args(["-Urn", "sh", "-c", make]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        left_out("this user makes no TAP devices in a network namespace");
        return;
    }
    let mut command = Command::new("unshare");
    let program = env!("CARGO_BIN_EXE_tightrope");
    let script = format!("{make} && exec {program} run --engine {} --net tap:tapt", common::engine());
    command.args(["-Urn", "sh", "-c", &script]).env("XDG_CONFIG_HOME", "/nonexistent");
    let mut session = Session::start(command);
    session.expect(PROMPT);
    // Again and again: the guest's own DHCP client starts by taking addresses away.
    done(&mut session, "until ifconfig eth0 10.9.9.2 up && ping -c 1 -W 1 -s 1400 10.9.9.1; do usleep 100000; done");
    power_off(session);
}

/// A network server that dies takes the network along and nothing else.
#[test]
fn the_network_server_dies() {
    let mut session = boot(&[]);
    done(&mut session, "network wait");
    let children = format!("/proc/{0}/task/{0}/children", session.id());
    let children = std::fs::read_to_string(children).unwrap();
    let is_server = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("network-server"))
    };
    let server: i32 = children.split_whitespace().find(is_server).unwrap().parse().unwrap();
    let server = rustix::process::Pid::from_raw(server).unwrap();
    rustix::process::kill_process(server, rustix::process::Signal::KILL).unwrap();
    done(&mut session, "until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 100000; done");
    let finished = power_off(session);
    assert!(finished.err.contains("the network's host side has ended"), "{}", finished.err);
}

#[test]
fn the_network_server_is_not_for_use_by_hand() {
    let finished = common::finish(tightrope(&["network-server"]), b"");
    assert_eq!(finished.code(), Some(1));
    assert_eq!(finished.err.lines().count(), 1, "{}", finished.err);
}
