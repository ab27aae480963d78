set -e
sh sh/git.sh
