"""Dictionaries, calls, comprehensions, a sort, string work: what an interpreter does all day."""


class Point:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def moved(self, dx, dy):
        return Point(self.x + dx, self.y + dy)


def ackermann_like(n, depth):
    return n if depth == 0 else ackermann_like((n * 31 + depth) % 1009, depth - 1)


def main():
    counts = {}
    x = 12345
    for _ in range(60000):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
        key = x % 3001
        counts[key] = counts.get(key, 0) + 1
    print(len(counts), max(counts.values()))

    p = Point(0, 0)
    for i in range(40000):
        p = p.moved(i & 7, -(i & 3))
    print(p.x, p.y)

    print(sum(ackermann_like(i, 40) for i in range(1200)))

    words = sorted((f"{(i * 7919) % 20011:05d}-{i % 13}" for i in range(30000)), key=lambda w: (w[-1], w))
    print(words[0], words[15000], words[-1])
    text = " ".join(words[:5000])
    print(len(text.split("-")), text.upper().count("7-1"), hash(tuple(range(100))) != 0)
    print(sum(1.0 / (i * i) for i in range(1, 30000)))


main()
