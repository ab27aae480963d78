set -e
d=$(mktemp -d "$TMPDIR/gzip.XXXXXX")
trap 'rm -rf "$d"' EXIT
for o in -1 -6 -9; do
    gzip -n $o -c data/text.txt >"$d/out.gz"
    echo "gzip $o $(sha256sum <"$d/out.gz")"
    gzip -dc "$d/out.gz" | cmp - data/text.txt
done
gzip -l "$d/out.gz" | tail -n 1 | tr -s ' ' | cut -d ' ' -f 1-4
