set -e
d=$(mktemp -d "$TMPDIR/bzip2.XXXXXX")
trap 'rm -rf "$d"' EXIT
head -c 2000000 data/text.txt >"$d/in"
for o in -1 -9; do
    bzip2 $o -c "$d/in" >"$d/out.bz2"
    echo "bzip2 $o $(sha256sum <"$d/out.bz2")"
    bzip2 -dc "$d/out.bz2" | cmp - "$d/in"
done
