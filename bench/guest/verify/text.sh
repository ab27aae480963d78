set -e
sed -E -n -f sh/text.sed data/text.txt | sha256sum
grep -E -c '(th|an).*[aeiou]{3}' data/text.txt
grep -o -E '[a-z]*ee[a-z]*' data/text.txt | sort | uniq -c | sort -rn | head -n 5
grep -P -c '(\w)\1\w+\1' data/text.txt
tr 'a-y' 'b-z' <data/text.txt | rev | fold -w 37 | md5sum
od -A x -t x4z -N 4096 data/bulk.bin | sha256sum
split -n 7 data/text.txt "$TMPDIR/p.$$." && cat "$TMPDIR"/p.$$.* | cmp - data/text.txt && rm "$TMPDIR"/p.$$.*
paste -d , data/log.txt data/log.txt | cut -c 1-200 | cksum
dd if=data/bulk.bin bs=4097 skip=3 count=500 status=none | sha1sum
