set -e
d=$(mktemp -d "$TMPDIR"/git.XXXXXX)
trap 'rm -rf "$d"' EXIT
export HOME=$d GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000'
export GIT_AUTHOR_NAME=bench GIT_AUTHOR_EMAIL=bench@localhost GIT_COMMITTER_NAME=bench GIT_COMMITTER_EMAIL=bench@localhost
git init -q -b main "$d/r"
cd "$d/r"
split -l 600 -a 3 /opt/bench/data/log.txt part.
git add .
git commit -q -m first
n=1
for i in aaa aab aac aad; do
    sed -i "s/GET/HEAD/;${n}d" part.$i
    n=$((n + 7))
    git commit -q -a -m "change $i"
done
git log --stat --format='%H %s' | cat
git diff HEAD~4 | sha256sum
git repack -a -d -q --threads=1
git fsck --strict --no-progress
git count-objects -v | grep -v size
