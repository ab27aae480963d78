set -e
python3 -I - <<'P'
import hashlib, json, zlib, math, re, struct, random, decimal, fractions, itertools, collections, datetime, base64
random.seed(20)
data = bytes(random.getrandbits(8) for _ in range(200000))
for name in ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b"):
    print(name, hashlib.new(name, data).hexdigest())
print("zlib", hashlib.sha256(zlib.compress(data + data[:5000] * 40, 6)).hexdigest(), zlib.crc32(data), zlib.adler32(data))
for f in (math.sin, math.cos, math.tan, math.exp, math.atan, math.sinh, math.erf, math.gamma, math.cbrt):
    print(f.__name__, [f(x / 7).hex() for x in range(1, 12)])
print([math.log(x).hex() for x in (0.1, 2, 1e300, 5e-324)], [math.pow(1.1, x).hex() for x in (3.3, -7.1, 100)])
print(decimal.Decimal(2).sqrt(decimal.Context(prec=120)))
print(sum((fractions.Fraction(1, n) for n in range(1, 200)), fractions.Fraction()))
print(2 ** 2000 % (10 ** 97 + 7), pow(3, 10 ** 40, 10 ** 50 + 151), math.isqrt(10 ** 301), math.factorial(300) % (2 ** 521 - 1))
print(struct.pack("<dfqH", 1 / 3, 1 / 3, -5, 65535).hex(), float("1e23"), repr(0.1 + 0.2), round(2.675, 2), 1e16 + 1)
words = re.findall(r"[a-z]{2,5}", base64.b64encode(data).decode())
print(len(words), collections.Counter(words).most_common(8))
print(json.dumps({"a": [1.5, None, True], "b": {"é": "\u2028"}}, sort_keys=True))
print(sorted(random.sample(range(10 ** 9), 12)), random.gauss(0, 1).hex(), [round(random.expovariate(1.5), 12) for _ in range(5)])
print(datetime.datetime(2026, 11, 20) + datetime.timedelta(days=10000, seconds=86399))
print(sum(1 for p in itertools.permutations(range(8)) if p[0] < p[-1]))

def queens(n, row=0, cols=0, d1=0, d2=0):
    return 1 if row == n else sum(
        queens(n, row + 1, cols | 1 << c, d1 | 1 << row + c, d2 | 1 << row - c + n)
        for c in range(n) if not (cols >> c & 1 or d1 >> row + c & 1 or d2 >> row - c + n & 1))
print("queens", queens(7))
try:
    [][1]
except IndexError as e:
    print("caught", e)
import threading, queue, subprocess, os, signal
q = queue.Queue()
ts = [threading.Thread(target=lambda i=i: q.put(sum(range(i * 1000)))) for i in range(8)]
[t.start() for t in ts]; [t.join() for t in ts]
print(sorted(q.get() for _ in ts))
print(subprocess.run(["tr", "a-z", "n-za-m"], input=b"guvf vf n grfg", stdout=subprocess.PIPE).stdout)
got = []
signal.signal(signal.SIGALRM, lambda *a: got.append(a[0]))
signal.setitimer(signal.ITIMER_REAL, 0.02)
while not got:
    signal.pause()
print("alarm", got)
P
