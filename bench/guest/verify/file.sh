# Metadata operations, a file system inside a file, tar.
set -e
d=$(mktemp -d "$TMPDIR/file.XXXXXX")
trap 'rm -rf "$d"' EXIT
mkdir "$d/t"
i=0
while [ $i -lt 200 ]; do
    mkdir -p "$d/t/$((i % 7))/$((i % 5))"
    head -c $((i * 37)) data/bulk.bin >"$d/t/$((i % 7))/$((i % 5))/$i"
    i=$((i + 1))
done
ln "$d/t/0/0/0" "$d/t/hard"
ln -s ../t/hard "$d/t/soft"
chmod 640 "$d/t/hard"
truncate -s 1M "$d/t/sparse"
find "$d/t" -printf '%P %y %s %m %n %l\n' | sed -E '/ d /s/ [0-9]+ / - /; / d /s/ [0-9]+ $/ - /' | sort | sha256sum
tar -C "$d/t" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf "$d/t.tar" .
sha256sum <"$d/t.tar"
mkdir "$d/u"
tar -C "$d/u" -xpf "$d/t.tar"
diff -r "$d/t" "$d/u" && echo "trees equal"
truncate -s 8M "$d/img"
mkfs.ext4 -q -F -U 01234567-89ab-cdef-0123-456789abcdef -E hash_seed=01234567-89ab-cdef-0123-456789abcdef,root_owner=0:0 -d "$d/u" "$d/img"
e2fsck -fn "$d/img" 2>/dev/null | sed -n 's/^.*: \([0-9]*\/[0-9]* files\).*/\1/p'
debugfs -R 'ls -p /3/1' "$d/img" 2>/dev/null | cut -d / -f 6 | sort | tr '\n' ' '
python3 - "$d" <<'P'
import mmap, os, sys
p = os.path.join(sys.argv[1], "map")
with open(p, "w+b") as f:
    f.truncate(1 << 20)
    with mmap.mmap(f.fileno(), 0) as m:
        for i in range(0, 1 << 20, 4099):
            m[i] = i & 255
        m.flush()
    f.seek(0)
    print(sum(f.read()), os.pread(f.fileno(), 4, 4099 * 3), os.fstat(f.fileno()).st_size)
P
