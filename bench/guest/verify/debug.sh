# Hardware breakpoints by ptrace, single steps, alignment checks.
gcc -O1 -no-pie -o "$TMPDIR/debug" verify/debug.c && "$TMPDIR/debug"
