# Installs packages from a local repository, all by apt-get and dpkg; prints what is installed then.
set -e
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
unshare --mount --propagation unchanged sh -c '
mount --bind /dev "$TMPDIR/base/dev"
chroot "$TMPDIR/base" sh -c "apt-get -q update && apt-get -q -y --no-install-recommends install jq less lua5.4 rsync tcl8.6 tmux tree vim-tiny xmlstarlet"' \
    >"$TMPDIR/apt.out" 2>&1 </dev/null || { tail -n 20 "$TMPDIR/apt.out" >&2; exit 1; }
chroot "$TMPDIR/base" dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\n'
echo '{"a": [1, 2, {"b": 3}]}' | chroot "$TMPDIR/base" jq -c '.a[2].b + .a[0]'
echo 'puts [expr {2 ** 100}]' | chroot "$TMPDIR/base" tclsh8.6
(cd "$TMPDIR/base" && find usr -type f | sort | sha256sum)
