set -e
dash sh/loop.sh
dash sh/spawn.sh
bash -c 'declare -A a; for ((i = 0; i < 3000; i++)); do a[$((i * 7919 % 613))]+=$i; done; for k in $(printf "%s\n" "${!a[@]}" | sort -n | head -n 9); do echo "$k ${a[$k]}"; done | md5sum
  x=$(for i in {1..40}; do (echo $i & wait); done); echo $x; trap "echo trapped" USR1; kill -USR1 $$; [[ abc =~ ^a(.)c$ ]] && echo ${BASH_REMATCH[1]}'
seq 1 2000 | while read -r n; do echo $((n * n)); done | md5sum
seq 1 300 | xargs -n 1 -P 4 sh -c 'echo $(($0 * 3))' | sort -n | md5sum
(ulimit -c 0; sh -c 'kill -SEGV $$') >/dev/null 2>&1 || echo "status $?"
timeout 0.2 sleep 5 || echo "status $?"
mkfifo "$TMPDIR/f.$$"
seq 1 20000 >"$TMPDIR/f.$$" &
md5sum <"$TMPDIR/f.$$"
wait
rm "$TMPDIR/f.$$"
