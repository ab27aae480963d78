# A fresh copy of the configured tree, with its times, or make would configure again.
rm -rf "$TMPDIR/gawk"
cp -a large/gawk "$TMPDIR/gawk"
