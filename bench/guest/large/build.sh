#!/bin/sh
# Prepares what the large rows work on, inside the user land as it is built: a configured source tree, a package repository with a small
# base system to install into, a git repository, videos, Java classes.
set -e
export PATH=/opt/bench/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root TMPDIR=/tmp
cd /opt/bench

# The C project: configured here, so that the row is the compiler and make alone.
mkdir large/gawk
tar -x -f source/gawk_*.orig.tar.* --strip-components=1 -C large/gawk
(cd large/gawk && ./configure -q --disable-nls --disable-mpfr --without-readline --disable-extensions CFLAGS=-O1 >/dev/null)
rm -rf source

# The repository's index.
(cd repository && for deb in *.deb; do
    dpkg-deb -f "$deb"
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$deb" "$(stat -c %s "$deb")" "$(sha256sum "$deb" | cut -d ' ' -f 1)"
done >Packages)

# The base system that the row installs into: the essential packages, apt, and what they need, with their part of dpkg's database.
base=$(dpkg-query -W -f '${Package} ${Essential} ${Priority}\n' | awk '$2 == "yes" || $3 == "required" || $1 == "apt" {print $1}')
while :; do
    more=$( (echo "$base" && dpkg-query -W -f '${Depends}\n${Pre-Depends}\n' $base | tr ',|' '\n\n' | sed 's/(.*//; s/:any//; s/ //g') | sort -u |
        while read -r name; do dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$name" 2>/dev/null || :; done |
        sed -n 's/^installed //p' | sort -u)
    [ "$more" != "$base" ] || break
    base=$more
done
mkdir -p "$TMPDIR/base/var/lib/dpkg/info" "$TMPDIR/base/var/lib/dpkg/updates"
for name in $base; do
    dpkg-query -L "$name"
    ls /var/lib/dpkg/info/"$name".* /var/lib/dpkg/info/"$name":* 2>/dev/null || :
done | grep -v '^/\.$\|diverted' | sort -u >"$TMPDIR/list"
# Paths of the time before /usr was merged lead through links.
(cd / && tar -c --no-recursion --ignore-failed-read -f - -T "$TMPDIR/list" bin sbin lib lib64 etc/passwd etc/group etc/shadow 2>/dev/null) |
    tar -x -C "$TMPDIR/base" --keep-directory-symlink 2>/dev/null || :
for link in bin sbin lib lib64; do
    rm -rf "${TMPDIR:?}/base/$link"
    ln -s "usr/$link" "$TMPDIR/base/$link"
done
awk -v base=" $(echo $base) " 'BEGIN {RS = ""; ORS = "\n\n"} {name = $2} index(base, " " name " ")' /var/lib/dpkg/status >"$TMPDIR/base/var/lib/dpkg/status"
: >"$TMPDIR/base/var/lib/dpkg/available"
cp /var/lib/dpkg/arch "$TMPDIR/base/var/lib/dpkg/" 2>/dev/null || :
mkdir -p "$TMPDIR/base/var/lib/apt/lists/partial" "$TMPDIR/base/var/cache/apt/archives/partial" "$TMPDIR/base/etc/apt" "$TMPDIR/base/tmp" \
    "$TMPDIR/base/dev" "$TMPDIR/base/proc" "$TMPDIR/base/var/log/apt"
rm -rf "$TMPDIR/base/etc/apt/sources.list" "$TMPDIR/base/etc/apt/sources.list.d"
echo 'deb [trusted=yes] file:/repository ./' >"$TMPDIR/base/etc/apt/sources.list"
tar -c -C "$TMPDIR/base" -f large/base.tar .
[ -x "$TMPDIR/base/usr/bin/dpkg" ]
rm -rf "$TMPDIR/base" "$TMPDIR/list"

# A git repository of 2,000 commits.
git init -q --bare -b main large/repository.git
python3 -I large/history.py | git -C large/repository.git fast-import --quiet
git -C large/repository.git repack -q -a -d --threads=1

# Videos, 352 x 288: raw, and AV1.
python3 -I large/video.py 60 >data/video.y4m
aomenc --quiet --cpu-used=8 --threads=1 --ivf -o data/video.ivf data/video.y4m

mkdir large/classes
javac -d large/classes large/Mixed.java
