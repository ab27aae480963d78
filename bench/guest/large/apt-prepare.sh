# The base system in memory, with the repository in it.
rm -rf "$TMPDIR/base"
mkdir "$TMPDIR/base"
tar -x -f large/base.tar -C "$TMPDIR/base"
cp -r repository "$TMPDIR/base/repository"
