"""Correct programs. PAIRS reads n and n lines of two integers, and prints the sum of each line; OTHER has its own tests."""

PAIRS_INPUT = "3\n1 2\n3 4\n5 6\n"
PAIRS_OUTPUT = "3\n7\n11\n"

# Idioms that public graders reject or that are common in their data sets.
PAIRS = {
    "input() in a loop": "for _ in range(int(input())):\n    a, b = map(int, input().split())\n    print(a + b)\n",
    "sys.stdin.buffer.read": """
import sys
data = list(map(int, sys.stdin.buffer.read().split()))
for i in range(data[0]):
    print(data[1 + 2 * i] + data[2 + 2 * i])
""",
    "sys.stdin.buffer.readline in a loop": """
import sys
rl = sys.stdin.buffer.readline
for _ in range(int(rl())):
    print(sum(map(int, rl().split())))
""",
    "input is sys.stdin.buffer.readline": """
import sys
input = sys.stdin.buffer.readline
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "input is sys.stdin.readline": """
import sys
input = sys.stdin.readline
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "sys.stdin.buffer.readlines": """
import sys
lines = sys.stdin.buffer.readlines()
for line in lines[1:]:
    print(sum(map(int, line.split())))
""",
    "for line in sys.stdin": """
import sys
for number, line in enumerate(sys.stdin):
    if number:
        print(sum(map(int, line.split())))
""",
    "readline then read": """
import sys
n = int(sys.stdin.readline())
rest = list(map(int, sys.stdin.read().split()))
for i in range(n):
    print(rest[2 * i] + rest[2 * i + 1])
""",
    "input() then sys.stdin.read": """
import sys
n = int(input())
rest = list(map(int, sys.stdin.read().split()))
print("\\n".join(str(rest[2 * i] + rest[2 * i + 1]) for i in range(n)))
""",
    "os.read": """
import os
data = list(map(int, os.read(0, 1 << 20).split()))
for i in range(data[0]):
    print(data[1 + 2 * i] + data[2 + 2 * i])
""",
    "io.BytesIO over os.read": """
import io, os
input = io.BytesIO(os.read(0, os.fstat(0).st_size or 1 << 16)).readline
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "open(0)": "lines = open(0).read().splitlines()\nfor line in lines[1:]:\n    print(sum(map(int, line.split())))\n",
    "open(0, 'rb')": "_, *lines = open(0, 'rb')\nfor line in lines:\n    print(sum(map(int, line.split())))\n",
    "open('/dev/stdin')": "with open('/dev/stdin') as f:\n    next(f)\n    for line in f:\n        print(sum(map(int, line.split())))\n",
    "sys.stdout.buffer.write": """
import sys
for line in sys.stdin.buffer.readlines()[1:]:
    sys.stdout.buffer.write(b"%d\\n" % sum(map(int, line.split())))
""",
    "os.write": """
import os
lines = os.read(0, 1 << 16).split(b"\\n")[1:]
os.write(1, b"\\n".join(str(sum(map(int, line.split()))).encode() for line in lines if line))
""",
    "main guard last": """
def main():
    for _ in range(int(input())):
        print(sum(map(int, input().split())))

if __name__ == "__main__":
    main()
""",
    "main guard not last": """
def main():
    for _ in range(int(input())):
        print(add(*map(int, input().split())))

if __name__ == "__main__":
    from operator import add
    main()
    done = True

assert done
""",
    "global at top level": """
global total
total = 0
def add(a, b):
    global total
    total = a + b
for _ in range(int(input())):
    add(*map(int, input().split()))
    print(total)
""",
    "lru_cache": """
from functools import lru_cache
@lru_cache(None)
def f(a, b):
    return b if a == 0 else 1 + f(a - 1, b)
for _ in range(int(input())):
    print(f(*map(int, input().split())))
""",
    "a threading main": """
import sys, threading
sys.setrecursionlimit(1 << 20)
threading.stack_size(1 << 26)
def main():
    for _ in range(int(input())):
        print(sum(map(int, input().split())))
thread = threading.Thread(target=main)
thread.start()
thread.join()
""",
    "exit(0) at the end": "for _ in range(int(input())):\n    print(sum(map(int, input().split())))\nexit(0)\nprint('never')\n",
    "sys.exit in main": """
import sys
def main():
    for _ in range(int(input())):
        print(sum(map(int, input().split())))
    sys.exit()
main()
""",
    "try-import": """
try:
    import gmpy2_that_nobody_has as fast
except ImportError:
    fast = None
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "late import": "n = int(input())\nimport sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))\n",
    "trailing blanks": "for _ in range(int(input())):\n    print(sum(map(int, input().split())), end='  \\n')\nprint()\n",
    "dataclasses": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass(order=True, slots=True)
class Pair:
    a: int
    b: int
    def sum(self) -> int:
        return self.a + self.b
pairs: list[Pair] = [Pair(*map(int, input().split())) for _ in range(int(input()))]
print(*(p.sum() for p in pairs), sep="\\n")
""",
    "names never imported": """
def solve() -> List[int]:
    counts = defaultdict(deque)
    for i in range(int(input())):
        counts[i].append(sum(map(int, input().split())))
    return [counts[i][0] + math.floor(0) for i in sorted(counts)]
print(*solve(), sep="\\n")
""",
    "fileinput": "import fileinput\nfor line in fileinput.input():\n    if ' ' in line:\n        print(sum(map(int, line.split())))\n",
    "walrus until the end": """
import sys
sys.stdin.readline()
while line := sys.stdin.readline():
    print(sum(map(int, line.split())))
""",
    "EOFError ends it": """
input()
try:
    while True:
        print(sum(map(int, input().split())))
except EOFError:
    pass
""",
    "iter with a sentinel": """
import sys
for line in list(iter(sys.stdin.readline, ""))[1:]:
    print(sum(map(int, line.split())))
""",
    "match statement": """
for _ in range(int(input())):
    match list(map(int, input().split())):
        case [a, b]:
            print(a + b)
""",
    "exec of its own source": """
source = "for _ in range(int(input())):\\n    print(sum(map(int, input().split())))"
exec(compile(source, "inner", "exec"))
""",
    "an async main": """
import asyncio
async def main():
    for _ in range(int(input())):
        await asyncio.sleep(0)
        print(sum(map(int, input().split())))
asyncio.run(main())
""",
    "a process pool": """
from multiprocessing import Pool
def add(pair):
    return sum(pair)
if __name__ == "__main__":
    pairs = [tuple(map(int, input().split())) for _ in range(int(input()))]
    with Pool(2) as pool:
        print(*pool.map(add, pairs), sep="\\n")
""",
    "os.fork": """
import os, sys
pairs = [tuple(map(int, input().split())) for _ in range(int(input()))]
for pair in pairs:
    pid = os.fork()
    if pid == 0:
        print(sum(pair), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
""",
    "a thread pool": """
from concurrent.futures import ThreadPoolExecutor
pairs = [tuple(map(int, input().split())) for _ in range(int(input()))]
with ThreadPoolExecutor() as pool:
    print(*pool.map(sum, pairs), sep="\\n")
""",
    "a queue between threads": """
import queue, threading
q = queue.Queue()
def work():
    while (pair := q.get()) is not None:
        print(sum(pair))
thread = threading.Thread(target=work)
thread.start()
for _ in range(int(input())):
    q.put(tuple(map(int, input().split())))
q.put(None)
""",
    "print at exit": """
import atexit
out = []
atexit.register(lambda: print("\\n".join(out)))
for _ in range(int(input())):
    out.append(str(sum(map(int, input().split()))))
""",
    "print redirected and given back": """
import contextlib, io
buffer = io.StringIO()
with contextlib.redirect_stdout(buffer):
    for _ in range(int(input())):
        print(sum(map(int, input().split())))
print(buffer.getvalue(), end="")
""",
    "reads all, writes late, on stderr too": """
import sys
data = sys.stdin.read().split()
print("debugging", data, file=sys.stderr)
it = iter(map(int, data[1:]))
sys.stdout.write("".join(f"{a + b}\\n" for a, b in zip(it, it)))
""",
    "a temporary file": """
import tempfile
with tempfile.TemporaryFile("w+") as file:
    for _ in range(int(input())):
        print(sum(map(int, input().split())), file=file)
    file.seek(0)
    print(file.read(), end="")
""",
    "its own __file__ and argv": """
import sys, os
assert os.path.basename(__file__) == os.path.basename(sys.argv[0]) and open(__file__).read().startswith("\\nimport sys, os")
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "pickle of its own class": """
import pickle
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
for _ in range(int(input())):
    pair = pickle.loads(pickle.dumps(Pair(*map(int, input().split()))))
    print(pair.a + pair.b)
""",
    "a metaclass and descriptors": """
class Adder(type):
    def __call__(cls, a, b): return a + b
class Add(metaclass=Adder): pass
for _ in range(int(input())):
    print(Add(*map(int, input().split())))
""",
    "a line-buffered writer on a duplicate": """
import os
out = os.fdopen(os.dup(1), "w", buffering=1)
for _ in range(int(input())):
    print(sum(map(int, input().split())), file=out)
""",
    "a destructor prints": """
class Out(list):
    def __del__(self):
        print(*self, sep="\\n")
out = Out(sum(map(int, input().split())) for _ in range(int(input())))
""",
    "a writer that nobody flushes": """
out = open("/dev/stdout", "w")
for _ in range(int(input())):
    print(sum(map(int, input().split())), file=out)
""",
    "a writer that nobody flushes before exit": """
import sys
out = open(1, "w", closefd=False)
for _ in range(int(input())):
    print(sum(map(int, input().split())), file=out)
sys.exit(0)
""",
    "standard output replaced at the end": """
import io, sys
for _ in range(int(input())):
    print(sum(map(int, input().split())))
sys.stdout = io.StringIO()
""",
    "standard output closed at the end": """
import sys
for _ in range(int(input())):
    print(sum(map(int, input().split())))
sys.stdout.close()
""",
    "fast output of its own": """
import io, os, sys
class FastIO(io.IOBase):
    def __init__(self, fd):
        self.fd, self.buffer = fd, io.BytesIO()
    def write(self, text):
        return self.buffer.write(text.encode())
    def flush(self):
        os.write(self.fd, self.buffer.getvalue())
        self.buffer = io.BytesIO()
sys.stdout = FastIO(1)
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    "a signal handler of its own": """
import signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.001)
signal.pause()
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
}

OTHER = {
    "recursion 100,000 deep": (
        "import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(f(int(input())))\n",
        "100000\n",
        "100000",
    ),
    "recursion 10,000 deep through C": (
        "import sys, functools\nsys.setrecursionlimit(10 ** 6)\n@functools.lru_cache(None)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n"
        "print(f(10000))\n",
        "",
        "10000",
    ),
    "1 MB in and out": ("import sys\nsys.stdout.write(sys.stdin.read()[::-1])\n", "ab" * 500_000, "ba" * 500_000),
    "a factorial of 3,000 digits": ("import math\nprint(math.factorial(1000))\n", "", str(__import__("math").factorial(1000))),
    "integers beyond the limit of str": (
        "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(7 ** 20000)))\n",
        "",
        "16902",
    ),
    "numbers equal as decimals": ("print('6', '1e3', '-0.50')\n", "", "6.0 1000 -.5"),
    "Unicode": ("print(input()[::-1])\n", "añ€😀\n", "😀€ña"),
    "input that it never reads": ("print(1)\n", "x" * 1_000_000, "1"),
    "no final newline in the input": ("print(input() + input())\n", "a\nb", "ab"),
    "Windows line ends": ("print(*[int(x) for x in open(0).read().split()])\n", "1\r\n2\r\n", "1 2"),
    "memory of 300 MB": ("x = bytearray(300 << 20)\nprint(len(x) >> 20)\n", "", "300"),
    "a second of CPU": ("import time\nwhile time.process_time() < 0.5:\n    pass\nprint('ok')\n", "", "ok"),
    "stderr of 1 MB": ("import sys\nsys.stderr.write('x' * 1_000_000)\nprint('ok')\n", "", "ok"),
    "the same order of a set each time": ("print(*{'a', 'b', 'c', 'd'} ^ set('a'))\n", "", None),
    "random with a seed": ("import random\nrandom.seed(1)\nprint(random.randint(1, 100))\n", "", "18"),
    "localtime and decimals": ("import decimal, time\ntime.localtime()\nprint(decimal.Decimal('0.1') * 3)\n", "", "0.3"),
}
