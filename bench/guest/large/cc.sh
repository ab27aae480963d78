# Compiles the C project by $1 jobs at once, and tries what comes out.
set -e
cd "$TMPDIR/gawk"
make -s -j "$1" -C support libsupport.a >/dev/null
make -s -j "$1" gawk >/dev/null
cat *.o support/*.o | sha256sum
./gawk 'BEGIN {for (i = 1; i < 20; i++) s = s i * i; print s, length(s)}'
