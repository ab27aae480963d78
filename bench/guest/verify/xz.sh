set -e
d=$(mktemp -d "$TMPDIR/xz.XXXXXX")
trap 'rm -rf "$d"' EXIT
for o in -0 -2 '-6 --x86' '-3 -C sha256'; do
    head -c 2000000 data/text.txt >"$d/in"
    case $o in *x86*) cat bin/crypto bin/nothing >"$d/in"; o="--x86 --lzma2=preset=4" ;; esac
    xz -T1 -k -c $o "$d/in" >"$d/out.xz"
    echo "$o $(sha256sum <"$d/out.xz")"
    xz -t "$d/out.xz"
    xz -dc "$d/out.xz" | cmp - "$d/in"
done
head -c 30000 "$d/out.xz" >"$d/cut.xz"
xz -t "$d/cut.xz" 2>/dev/null || echo "truncated: refused"
