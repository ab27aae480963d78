set -e
d=$(mktemp -d "$TMPDIR/gcc.XXXXXX")
trap 'rm -rf "$d"' EXIT
for o in -O0 -O1 -O2 -O3 -Os '-O2 -g' '-O2 -mavx2 -mfma -ffp-contract=off'; do
    gcc $o -c -o "$d/sample.o" src/sample.c
    sha256sum <"$d/sample.o"
    gcc -o "$d/sample" "$d/sample.o" -lm
    "$d/sample"
done
gcc -O2 -S -o - src/generate.c | sha256sum
gcc -O2 -Wall -o "$d/arith" verify/arith.c -lm
"$d/arith"
gcc -O3 -mavx2 -o "$d/arith" verify/arith.c -lm
"$d/arith" | sha256sum
echo 'int main(void) { return undeclared; }' | gcc -x c - -o "$d/x" 2>&1 | head -n 3
(cd "$d" && objdump -d sample.o) | sha256sum
sh sh/make.sh
