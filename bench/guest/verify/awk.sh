set -e
for a in mawk gawk 'busybox awk'; do
    $a -f sh/log.awk data/log.txt
    # Debian's busybox has no floating-point functions.
    [ "$a" = 'busybox awk' ] || $a 'BEGIN { for (i = 1; i < 30000; i++) { s += sqrt(i) * sin(i); t += log(i) / i }; printf "%.15g %.15g\n", s, t;
        x = "a"; for (i = 0; i < 12; i++) x = x x; print length(x); n = split("one,two,three", w, ","); print n, w[3];
        print substr("hello", 2, 3), index("guest", "es"), toupper("shout"), 2 ^ 31, int(-3.7), 7 % 3 }'
    $a '{ gsub(/[0-9]+/, "#"); c[$0]++ } END { for (k in c) print c[k], k }' data/log.txt | sort | sha256sum
done
gawk 'BEGIN { print strtonum("0x1F"), and(12, 10), lshift(3, 5), gensub(/(b+)/, "<\\1>", "g", "abbbcb"); PROCINFO["sorted_in"] = "@ind_num_asc"; a[10]; a[9]; a[2]; for (k in a) printf "%s ", k; print "" }'
