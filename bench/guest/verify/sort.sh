set -e
sort data/text.txt | sha256sum
sort -r -k 3 data/text.txt | sha256sum
sort -n -k 9,9 -k 10,10 data/log.txt | sha256sum
sort -t ' ' -k 7,7V -k 10,10nr -u data/log.txt | sha256sum
sort -S 1M --parallel=1 -R --random-source=data/bulk.bin data/log.txt | sha256sum
tr -s ' ,' '\n\n' <data/text.txt | sort | uniq -c | sort -rn | head -n 20
cut -d ' ' -f 1 data/log.txt | sort -u | wc -l
sort data/log.txt >"$TMPDIR/a.$$"
tac data/log.txt | sort | comm -3 - "$TMPDIR/a.$$" | wc -l
rm -f "$TMPDIR/a.$$"
