//! Users and groups, from `/etc/passwd` and `/etc/group` themselves: a static program cannot ask the name service.

use std::path::PathBuf;

/// As whom a program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: PathBuf,
    pub shell: String,
}

/// Finds `USER`, `UID`, `USER:GROUP` or `UID:GID`; empty for root.
pub fn find(wanted: &str) -> Result<User, String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    find_in(wanted, &read("/etc/passwd"), &read("/etc/group"))
}

fn find_in(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 7 && (fields[0] == name || number.is_some() && fields[2].parse().ok() == number)
    });
    let mut user = match (entry, number) {
        (Some(fields), _) => User {
            name: fields[0].into(),
            uid: fields[2].parse().map_err(|_| format!("user {name}: /etc/passwd has no number for it"))?,
            gid: fields[3].parse().map_err(|_| format!("user {name}: /etc/passwd has no group for it"))?,
            groups: Vec::new(),
            home: fields[5].into(),
            shell: fields[6].into(),
        },
        (None, Some(uid)) => User {
            name: if uid == 0 { "root".into() } else { name.into() },
            uid,
            gid: uid,
            groups: Vec::new(),
            home: if uid == 0 { "/root" } else { "/" }.into(),
            shell: "/bin/sh".into(),
        },
        (None, None) => return Err(format!("there is no user {name} in the guest")),
    };
    let groups: Vec<Vec<&str>> =
        group.lines().map(|line| line.split(':').collect()).filter(|fields: &Vec<_>| fields.len() >= 4).collect();
    if let Some(wanted) = group_name {
        let number: Option<u32> = wanted.parse().ok();
        let found = groups.iter().find(|fields| fields[0] == wanted).and_then(|fields| fields[2].parse().ok());
        user.gid = found.or(number).ok_or_else(|| format!("there is no group {wanted} in the guest"))?;
        user.groups = vec![user.gid];
    } else {
        user.groups = vec![user.gid];
        for fields in groups {
            if fields[3].split(',').any(|member| member == user.name)
                && let Ok(gid) = fields[2].parse()
                && !user.groups.contains(&gid)
            {
                user.groups.push(gid);
            }
        }
    }
    if user.shell.is_empty() {
        user.shell = "/bin/sh".into();
    }
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1001:Ann:/home/ann:\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\nwheel:x:10:bob,ann\nbad:x\n";

    #[test]
    fn users_and_groups() {
        let find = |wanted| find_in(wanted, PASSWD, GROUP);
        let root = find("").unwrap();
        assert_eq!((root.uid, root.name.as_str(), root.shell.as_str()), (0, "root", "/bin/bash"));
        let ann = find("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups.as_slice()), (1000, 1001, &[1001, 10][..]));
        assert_eq!((ann.home.to_str(), ann.shell.as_str()), (Some("/home/ann"), "/bin/sh"));
        assert_eq!(find("1000").unwrap(), ann);
        let other = find("ann:wheel").unwrap();
        assert_eq!((other.gid, other.groups.as_slice()), (10, &[10][..]));
        assert_eq!(find("77:88").map(|u| (u.uid, u.gid)), Ok((77, 88)));
        assert_eq!(find_in("", "", "").unwrap().home, PathBuf::from("/root"));
        for bad in ["eve", "ann:nobody", "x:1"] {
            assert!(find(bad).is_err(), "{bad}");
        }
    }
}
