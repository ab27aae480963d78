# Everyday operations on a repository of 2,000 commits and 3,000 files.
set -e
d=$TMPDIR/large.git.work
rm -rf "$d"
export HOME=$TMPDIR GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000'
export GIT_AUTHOR_NAME=bench GIT_AUTHOR_EMAIL=bench@localhost GIT_COMMITTER_NAME=bench GIT_COMMITTER_EMAIL=bench@localhost
git -c safe.directory='*' clone -q --no-local large/repository.git "$d"
cd "$d"
git config pack.threads 1
git config index.threads 1
git log --oneline | sha256sum
git log -p -n 300 | sha256sum
git diff --stat HEAD~1000 HEAD | tail -n 1
git checkout -q HEAD~1000
git status --short | wc -l
git checkout -q main
for file in $(git ls-files | awk 'NR % 300 == 7'); do git blame -s "$file"; done | sha256sum
git grep -c 'e[a-f]*1' | sha256sum
git rev-list --objects --all | wc -l
find . -path ./.git -prune -o -name '*7.txt' -print | sort | while read -r file; do echo changed >>"$file"; done
git commit -q -a -m 'one more'
git rebase -q --onto HEAD~3 HEAD~1
git log -n 1 --format=%H
git repack -q -a -d -f --window=4 --threads=1
git fsck --no-progress
cd / && rm -rf "$d"
