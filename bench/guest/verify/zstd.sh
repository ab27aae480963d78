set -e
d=$(mktemp -d "$TMPDIR/zstd.XXXXXX")
trap 'rm -rf "$d"' EXIT
for o in -1 -3 -9 '-15 --long' --ultra\ -20; do
    head -c 3000000 data/text.txt >"$d/in"
    zstd -q --single-thread $o -f -o "$d/out.zst" "$d/in"
    echo "$o $(sha256sum <"$d/out.zst")"
    zstd -q -t "$d/out.zst"
    zstd -q -dc "$d/out.zst" | cmp - "$d/in"
done
zstd -q --single-thread -3 -c data/bulk.bin | zstd -dc -q | cmp - data/bulk.bin && echo same
