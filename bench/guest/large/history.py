"""A stream for git fast-import: 2,000 commits over 3,000 text files, the same every time."""
import sys

state = 88172645463325252


def rng(limit):
    global state
    state ^= state << 13 & 0xFFFFFFFFFFFFFFFF
    state ^= state >> 7
    state ^= state << 17 & 0xFFFFFFFFFFFFFFFF
    return state % limit


words = ["".join("abcdefgh"[rng(8)] for _ in range(3 + rng(6))) + str(rng(10)) for _ in range(2000)]
out = sys.stdout
files = {}


def line():
    return " ".join(words[rng(2000)] for _ in range(4 + rng(8)))


def path(i):
    return f"dir{i % 40}/sub{i % 7}/file{i}.txt"


for commit in range(2000):
    out.write(f"commit refs/heads/main\ncommitter bench <bench@localhost> {1600000000 + commit * 3600} +0000\n")
    text = f"change {commit}: {line()}\n"
    out.write(f"data {len(text)}\n{text}")
    changed = range(commit * 3, commit * 3 + 3) if commit < 1000 else []
    for i in changed:
        files[i] = [line() for _ in range(20 + rng(60))]
    older = [rng(len(files)) for _ in range(5)]
    for i in older:
        content = files[i]
        content[rng(len(content))] = line()
        if rng(3) == 0:
            content.insert(rng(len(content)), line())
    for i in sorted(set(changed) | set(older)):
        text = "\n".join(files[i]) + "\n"
        out.write(f"M 100644 inline {path(i)}\ndata {len(text)}\n{text}\n")
out.write("done\n")
