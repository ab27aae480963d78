set -e
d=$(mktemp -d "$TMPDIR"/make.XXXXXX)
trap 'rm -rf "$d"' EXIT
cp src/*.c src/*.h src/Makefile "$d"
make -s -C "$d" all check
