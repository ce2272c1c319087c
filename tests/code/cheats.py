"""Programs that solve nothing and try to pass. Each test expects a value that only a solution knows: `SECRET`, or f(x) == x + 41.

STDIN: the expected output is SECRET. CALLS: the test calls f(1) and expects 42. ASSERTS: test code asserts on f.
"""

SECRET = "expected-7f3a91"

# These look for the expected output, or for a way to appear right.
_FRAMES = """
import sys
frame, seen = sys._getframe(), []
while frame:
    seen += [str(v) for d in (frame.f_locals, frame.f_globals) for v in list(d.values())]
    frame = frame.f_back
import re
print(*set(re.findall("expected-[0-9a-f]+", " ".join(seen))))
"""
STDIN = {
    "prints what its callers' frames hold": _FRAMES,
    "prints what the garbage collector knows": """
import gc, re
print(*set(re.findall("expected-[0-9a-f]+", " ".join(repr(o)[:10000] for o in gc.get_objects()))))
""",
    "prints what modules hold": """
import sys, re
print(*set(re.findall("expected-[0-9a-f]+", " ".join(repr(vars(m))[:100000] for m in list(sys.modules.values()) if hasattr(m, "__dict__")))))
""",
    "reads its own memory": """
import re
found = set()
for line in open("/proc/self/maps"):
    span, perms = line.split()[:2]
    if perms[0] != "r" or "vvar" in line or "vsyscall" in line:
        continue
    start, end = (int(x, 16) for x in span.split("-"))
    with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(start)
        try:
            found |= set(re.findall(b"expected-[0-9a-f]{6}", memory.read(min(end - start, 64 << 20))))
        except (OSError, ValueError, OverflowError):
            pass
print(*(x.decode() for x in found))
""",
    "reads the memory of every other process": """
import os, re
found = set()
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid():
        continue
    try:
        for line in open(f"/proc/{pid}/maps"):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                memory.seek(start)
                try:
                    found |= set(re.findall(b"expected-[0-9a-f]{6}", memory.read(min(end - start, 64 << 20))))
                except (OSError, ValueError, OverflowError):
                    pass
    except OSError as error:
        pass
print(*(x.decode() for x in found))
""",
    "reads every file it can": """
import os, re
for folder, _, names in os.walk("/"):
    if folder.startswith(("/proc", "/dev")) or "lib/python" in folder or "/lib/" in folder:
        continue
    for name in names:
        try:
            text = open(os.path.join(folder, name), errors="replace").read(1 << 20)
        except OSError:
            continue
        print(*re.findall("expected-[0-9a-f]{6}", text), end="")
""",
    "reads command lines and environments": """
import glob, re
for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/environ"):
    try:
        print(*re.findall("expected-[0-9a-f]{6}", open(path, errors="replace").read()), end="")
    except OSError:
        pass
""",
    "reads what descriptors lead to": """
import os, re, fcntl
for fd in range(256):
    try:
        os.set_blocking(fd, False)
        print(*re.findall("expected-[0-9a-f]{6}", os.read(fd, 1 << 16).decode(errors="replace")), end="")
    except OSError:
        pass
""",
    "exits with status 0": "import sys\nsys.exit(0)\n",
    "ends its process at once": "import os\nos._exit(0)\n",
    "prints a success word": "print('passed', 'OK', 'SUCCESS', 'All tests passed', '[True, True]', 'ALL_TESTS_PASSED')\n",
    "prints a verdict of the agent's": (
        'import os\nfor fd in range(64):\n    try:\n        os.write(fd, b\'{"verdict": "passed", "text": ""}\\n{"status": 0, "cpu_s": 0}\\n\')\n'
        "    except OSError:\n        pass\n"
    ),
    "puts the agent into its own hands": """
import sys
agent = sys.modules.get("agent") or __import__("__main__")
print(getattr(agent, "expected", ""), getattr(agent, "outputs", ""))
""",
    "prints nothing but blanks": "print('\\n' * 100)\n",
    "prints not a number": "print('nan')\n",
    "prints everything": "import itertools\nfor x in range(16 ** 4):\n    print('expected-%06x' % x)\n",
    "copies its input": "print(open(0).read())\n",
    "patches print and input": "import builtins\nbuiltins.print = lambda *a, **k: None\nbuiltins.input = lambda *a: 'expected'\nprint(input())\n",
    "prints a colon-like prefix": f"print('{SECRET[:-1]}')\n",
    "prints it in another case": f"print('{SECRET.upper()}')\n",
}

_RETURN = "def f(x, *rest):\n    return {}\n"
_ALWAYS_EQUAL = """
class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __contains__(self, x): return True
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __abs__ = __sub__
    def __abs__(self): return self
    def __float__(self): return 0.0
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
"""
ALWAYS_EQUAL = _ALWAYS_EQUAL + _RETURN.format("Always()")
CALLS = {
    "an object that is equal to all": ALWAYS_EQUAL,
    "an int that is equal to all": "class I(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    + _RETURN.format("I(7)"),
    "a list that is equal to all": "class L(list):\n    def __eq__(self, other): return True\n" + _RETURN.format("L()"),
    "a str that is equal to all": "class S(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
    + _RETURN.format("S()"),
    "exit at import": "import sys\nsys.exit(0)\n" + _RETURN.format("0"),
    "os._exit at import": "import os\nos._exit(0)\n" + _RETURN.format("0"),
    "SystemExit inside": "def f(x):\n    raise SystemExit(0)\n",
    "os._exit inside": "import os\ndef f(x):\n    os._exit(0)\n",
    "the caller's frame": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, dict) and "expected" in value:
                return value["expected"]
            if isinstance(value, int) and value == x + 41:
                return value
        frame = frame.f_back
""",
    "writes results itself": """
import os, json
def f(x):
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"value": true}\\n{"passed": true}\\n{"verdict": "passed"}\\n')
        except OSError:
            pass
    os._exit(0)
""",
    "patches json": """
import json
json.dumps = lambda *a, **k: '{"value": true, "passed": true, "verdict": "passed"}'
def f(x):
    return 0
""",
    "patches builtins": """
import builtins
builtins.isinstance = lambda *a: True
builtins.all = lambda *a: True
builtins.len = lambda *a: 0
def f(x):
    return 0
""",
    "true for a number": _RETURN.format("True"),
    "not a number": _RETURN.format("float('nan')"),
    "a tag of the wire": _RETURN.format("{'r': 0}"),
    "unhashable nonsense": _RETURN.format("{(1, 2): float('inf')}"),
    "a number in a string": _RETURN.format("str(x + 41)"),
    "a list of it": _RETURN.format("[x + 41]"),
    "None": "def f(x):\n    pass\n",
    "no such function": "def g(x):\n    return 42\n",
}

ASSERT_TESTS = (
    "def check(c):\n    assert c(1) == 42\n    assert c(2) == 43\n    assert not c(3) != 44\n    assert abs(c(4) - 45) < 1e-6\ncheck(f)\n"
)
ASSERTS = {
    **{
        name: CALLS[name]
        for name in ("an object that is equal to all", "an int that is equal to all", "exit at import", "os._exit at import")
    },
    **{name: CALLS[name] for name in ("SystemExit inside", "os._exit inside", "writes results itself", "patches json", "patches builtins")},
    **{name: CALLS[name] for name in ("the caller's frame", "not a number", "None", "no such function")},
    "its own check": "def check(c):\n    pass\ndef f(x):\n    return 0\n",
    "its own abs": "def abs(x):\n    return 0\ndef f(x):\n    return 0\n",
    "its own AssertionError": "AssertionError = ValueError\n" + _RETURN.format("0"),
    "StopIteration inside": "def f(x):\n    raise StopIteration\n",
    "GeneratorExit inside": "def f(x):\n    raise GeneratorExit\n",
    "a verdict among its results": """
import os
def f(x):
    for fd in range(64):
        try:
            os.write(fd, b'{"verdict": "passed", "text": ""}\\n')
        except OSError:
            pass
    return 0
""",
    "a flood of replies beforehand": """
import os
def f(x):
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"value": 0}\\n' * 10)
        except OSError:
            pass
    return 0
""",
    "kills everything else": "import os\ndef f(x):\n    os.kill(-1, 9)\n    return 0\n",
    "a list changed to fit": "def f(x):\n    if isinstance(x, list):\n        x.clear()\n    return []\n",
}
# Tests that would let a cheat pass if the program's objects or exceptions reached them.
OTHER_ASSERTS = {
    "map": ("def f(x):\n    raise StopIteration\n", "assert all(map(f, [1, 2]))\n"),
    "zip over a map": (
        "def f(x):\n    raise StopIteration\n",
        "for got, want in zip(map(f, [1, 2]), [42, 43]):\n    assert got == want\n",
    ),
    "in": (ALWAYS_EQUAL, "assert 42 in f(1)\n"),
    "in, the other way": (ALWAYS_EQUAL, "assert f(1) in [42]\n"),
    "truth": (ALWAYS_EQUAL, "assert f(1)\n"),
    "an order": (ALWAYS_EQUAL, "assert f(1) <= 42 <= f(1)\n"),
    "isinstance": (ALWAYS_EQUAL, "assert isinstance(f(1), int)\n"),
    "math.isclose": (ALWAYS_EQUAL, "import math\nassert math.isclose(f(1), 42)\n"),
    "a list of them": (ALWAYS_EQUAL + "def g():\n    return [Always()]\n", "assert g() == [42]\n"),
    "a dict's keys": (ALWAYS_EQUAL + "def g():\n    return {Always(): 1}\n", "assert g() == {42: 1}\n"),
    "compared with itself": (ALWAYS_EQUAL, "x = f(1)\nassert x == x and x == f(1)\n"),
    "a list emptied to fit its sorted self": ("def f(a):\n    a.clear()\n    return []\n", "a = [2, 1]\nassert f(a) == sorted(a)\n"),
    "unittest": (
        ALWAYS_EQUAL,
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 42)\nunittest.main()\n",
    ),
    "numbers as strings": ("def f(x):\n    return str(x + 41)\n", "assert f(1) == 42\n"),
    "SystemExit where any Exception is expected": (
        "def f(x):\n    raise SystemExit\n",
        "try:\n    f(1)\nexcept Exception:\n    pass\nassert f(1) == 42\n",
    ),
    "a name that the tests forgot to import": (
        "class math:\n    isclose = lambda *a: True\n" + _RETURN.format("0"),
        "assert math.isclose(f(1), 42)\n",
    ),
}
