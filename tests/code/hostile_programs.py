"""Hostile programs. Those of CONTAINED try something that must fail, and print "contained" if it did; those of STOPPED must be stopped.

MARK stands for a word that is new in each run: it must not be found outside afterwards.
"""

CONTAINED = {
    "reads the machine's users": "PATHS = ['/etc/passwd', '/etc/shadow', '/etc/hostname', '/proc/1/root/etc/passwd', '/proc/2/root/etc/passwd']\n",
    "lists homes and mounts": "import os, sys\nPATHS = ['/home', '/mnt', '/var', '/opt', '/sys', '/run', '/work', '/etc', '/oldroot', '/newroot']\n"
    # If the interpreter is the system's, nothing else is there.
    "if os.path.isdir('/usr/bin') and ['/usr/bin/' + name for name in os.listdir('/usr/bin')] != [os.path.realpath(sys.executable)]:\n"
    "    PATHS.append('/usr/bin')\n",
    "reads keys of the worker": "PATHS = ['/root/.ssh', '/root/.aws', '/root/.netrc', '/root/.cache', '/root/.bash_history']\n",
    "reads kernel memory": "PATHS = ['/dev/mem', '/dev/kmem', '/dev/port', '/proc/kcore', '/proc/kmsg', '/dev/sda', '/dev/vda', '/dev/fuse', '/dev/kvm']\n",
}
_OPEN_ALL = """
import os
def reach(path):
    try:
        fd = os.open(path, os.O_RDONLY)
        os.listdir(path) if os.path.isdir(path) else os.read(fd, 1)
        return True
    except OSError:
        return False
reached = [path for path in PATHS if reach(path)]
print(reached or "contained")
"""
CONTAINED = {name: paths + _OPEN_ALL for name, paths in CONTAINED.items()}

_TRY = """
import ctypes, errno, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def fails(call):
    try:
        result = call()
    except (OSError, ValueError, AttributeError):
        return True
    return isinstance(result, int) and result == -1
def report(**attempts):
    print([name for name, call in attempts.items() if not fails(call)] or "contained")
"""
_ATTEMPTS = {
    "writes outside its own directories": """
def write(path):
    with open(path + "MARK", "w") as file:
        file.write("escaped")
report(**{p: (lambda p=p: write(p)) for p in ("/", "/root/", "/etc/", "/usr/", "/proc/", "/dev/", "/agent/", "/var/tmp/", "/home/", sys.prefix + "/lib/")})
""",
    "changes the interpreter": "report(a=lambda: open(os.__file__, 'a'), b=lambda: os.remove(os.__file__), c=lambda: os.chmod(sys.executable, 0o777))",
    "sees the worker's environment": """
print([name for name in os.environ if name not in ("HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONHASHSEED", "TMPDIR", "PWD",
    "LC_CTYPE")] or "contained")
""",
    "reads other processes' environments": """
import glob
found = []
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        found += [line for line in open(path, "rb").read().split(b"\\0") if b"SECRET_OF_THE_WORKER" in line]
    except OSError:
        pass
print(found or "contained")
""",
    "sees other sandboxes": """
processes = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
print("contained" if len(processes) == 3 and not os.listdir("/dev/shm") and os.listdir("/tmp") == ["program.py"] else processes)
""",
    "listens": """
def listen(family, address):
    s = socket.socket(family)
    s.bind(address)
    s.listen()
report(v4=lambda: listen(socket.AF_INET, ("0.0.0.0", 18080)), v6=lambda: listen(socket.AF_INET6, ("::", 18080)))
""",
    "connects": """
report(lo=lambda: socket.create_connection(("127.0.0.1", 22), 1), dns=lambda: socket.getaddrinfo("example.com", 80),
       udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), raw=lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
       packet=lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), netlink=lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
       vsock=lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM), alg=lambda: socket.socket(38, socket.SOCK_SEQPACKET))
""",
    "connects to the machine's Unix sockets": """
def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
report(**{p: (lambda p=p: connect(p)) for p in ("/var/run/docker.sock", "/run/systemd/private", "\\0/tmp/.X11-unix/X0", "\\0MARK", "/tmp/ray")})
""",
    "traces the agent": """
report(attach=lambda: libc.ptrace(16, os.getppid(), 0, 0), seize=lambda: libc.ptrace(0x4206, os.getppid(), 0, 0), me=lambda: libc.ptrace(0, 0, 0, 0))
""",
    "reads and writes the agent's memory": """
report(read=lambda: libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0), write=lambda: libc.process_vm_writev(os.getppid(), None, 0, None, 0, 0))
""",
    "makes namespaces": """
report(**{name: (lambda f=flag: libc.unshare(f)) for name, flag in dict(user=0x10000000, mount=0x20000, net=0x40000000, pid=0x20000000, ipc=0x8000000,
       uts=0x4000000, cgroup=0x2000000).items()})
""",
    "clones into a user namespace": """
report(clone=lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), clone3=lambda: libc.syscall(435, ctypes.create_string_buffer(88), 88),
       setns=lambda: libc.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0))
""",
    "mounts and changes the root": """
report(mount=lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0), umount=lambda: libc.umount2(b"/proc", 2), chroot=lambda: os.chroot("/tmp"),
       pivot=lambda: libc.syscall(155, b"/tmp", b"/tmp"), fsopen=lambda: libc.syscall(430, b"tmpfs", 0), remount=lambda: libc.mount(0, b"/", 0, 32, 0))
""",
    "becomes root": """
report(setuid=lambda: os.setuid(0), setgid=lambda: os.setgid(0), groups=lambda: os.setgroups([0]), caps=lambda: libc.capset(None, None),
       nice=lambda: os.nice(-5), host=lambda: socket.sethostname("MARK"), dumpable=lambda: os.chown("/tmp", 0, 0))
""",
    "finds programs that run as root": """
found = [os.path.join(d, n) for d, _, ns in os.walk("/") if not d.startswith("/proc") for n in ns
         if not os.path.islink(p := os.path.join(d, n)) and os.stat(p).st_mode & 0o6000]
print(found or "contained")
""",
    "makes device files": "import stat\nreport(sda=lambda: os.mknod('/tmp/sda', 0o666 | stat.S_IFBLK, os.makedev(8, 0)), null=lambda: os.mknod('/tmp/n', 0o666 | stat.S_IFCHR, 259))",
    "calls dangerous parts of the kernel": """
calls = dict(bpf=321, perf=298, userfaultfd=323, io_uring=425, keyctl=250, add_key=248, request_key=249, fanotify=300, kexec=246, init_module=175,
             finit_module=313, open_by_handle_at=304, kcmp=312, pidfd_getfd=438, process_madvise=440, memfd_secret=447, quotactl=179, acct=163, iopl=172,
             reboot=169, swapon=167, syslog=103, personality=135, modify_ldt=154, settimeofday=164, mbind=237, vmsplice=278)
report(**{name: (lambda n=n: libc.syscall(n, 0, 0, 0, 0, 0, 0)) for name, n in calls.items()})
""",
    "changes the kernel's settings": """
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
report(**{p: (lambda p=p: write(p, "1")) for p in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches",
       "/proc/sys/kernel/hostname", "/proc/self/oom_score_adj", "/proc/self/uid_map", "/sys/power/state", "/proc/sys/user/max_user_namespaces")})
""",
    "follows links out": """
os.symlink("/etc/passwd", "/tmp/link")
os.symlink("/proc/1/root", "/tmp/root")
os.symlink("/proc/1/cwd/../../..", "/tmp/up")
report(link=lambda: open("/tmp/link"), root=lambda: open("/tmp/root/etc/passwd"), up=lambda: open("/tmp/up/etc/passwd"),
       hard=lambda: os.link("/proc/self/exe", "/tmp/hard"), dots=lambda: open("/tmp/" + "../" * 30 + "etc/passwd"))
""",
    "looks for descriptors of others": """
found = []
for pid in ("1", "2", "self"):
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("/") and not target.startswith(("/dev/null", "/proc/", "/dev/urandom")):
                found.append(target)
    except OSError:
        pass
print(found or "contained")
""",
    "leaves shared memory": """
from multiprocessing import shared_memory
block = shared_memory.SharedMemory("MARK", create=True, size=1000)
report(shmget=lambda: libc.shmget(0x1234, 1000, 0o1666), semget=lambda: libc.semget(0x1234, 1, 0o1666), msgget=lambda: libc.msgget(0x1234, 0o1666),
       mq=lambda: libc.syscall(240, b"MARK", 0o102, 0o666, None), memfd=lambda: os.memfd_create("MARK"))
os._exit(0) if sys.stdout.flush() else os._exit(0)
""",
    "locks memory": "report(mlockall=lambda: libc.mlockall(3), mlock=lambda: libc.mlock(ctypes.create_string_buffer(4096), 4096))",
    "raises its own limits": """
import resource
report(**{n: (lambda n=n: resource.setrlimit(getattr(resource, n), (-1, -1))) for n in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE",
       "RLIMIT_NOFILE", "RLIMIT_STACK", "RLIMIT_CORE")})
""",
    "types into the terminal": """
import fcntl
report(tiocsti=lambda: fcntl.ioctl(0, 0x5412, b"x"), high=lambda: libc.ioctl(0, ctypes.c_ulong(0x100005412), b"x"), tty=lambda: open("/dev/tty", "w"))
""",
    "signals the first process": "os.kill(1, 9)\nos.kill(1, 19)\nos.kill(1, 15)\nprint('contained')",
    "runs programs of the machine": """
import subprocess
report(sh=lambda: subprocess.run(["/bin/sh", "-c", "id"]), ls=lambda: subprocess.run(["ls"]), system=lambda: os.system("id") and -1,
       gcc=lambda: subprocess.run(["gcc"]))
""",
    "uses another architecture's calls": """
import mmap
pid = os.fork()
if pid == 0:
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20; int 0x80 (32-bit getpid); ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
    os._exit(0)
status = os.waitpid(pid, 0)[1]
print("contained" if os.WIFSIGNALED(status) else status)
""",
}
CONTAINED |= {name: _TRY + attempts for name, attempts in _ATTEMPTS.items()}

_ANY = ("time limit", "memory limit", "runtime error", "output limit", "wrong answer")
STOPPED = {
    "a fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n", ("time limit",)),
    "a fork bomb of sessions": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0:\n            os.setsid()\n    except OSError:\n        pass\n",
        ("time limit",),
    ),
    "a thread bomb": ("import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()\n", _ANY),
    "processes that start as fast as they end": (
        "import os\nwhile True:\n    try:\n        if os.fork():\n            os._exit(0)\n    except OSError:\n        pass\n",
        _ANY,
    ),
    "a memory bomb": ("x = []\nwhile True:\n    x.append(bytearray(10 << 20))\n", ("memory limit",)),
    "a memory bomb of many processes": (
        "import os\nfor _ in range(8):\n    os.fork()\nx = bytearray(b'x' * (200 << 20))\nimport time\ntime.sleep(9)\n",
        ("memory limit", "time limit", "runtime error"),
    ),
    "a memory bomb that catches MemoryError": (
        "x = []\nwhile True:\n    try:\n        x.append(bytearray(1 << 20))\n    except MemoryError:\n        pass\n",
        # Its address space ends before its memory does, but for what the look at the memory counts twice where there are no control groups.
        ("time limit", "memory limit"),
    ),
    "shared anonymous memory": (
        "import mmap\nx = []\nwhile True:\n    m = mmap.mmap(-1, 64 << 20)\n    m.write(b'x' * (64 << 20))\n    x.append(m)\n",
        _ANY,
    ),
    "endless output": ("while True:\n    print('x' * 1000)\n", ("output limit",)),
    "endless output on stderr": ("import sys\nwhile True:\n    sys.stderr.write('x' * 1000)\n", ("time limit",)),
    "output with no line end": ("import os\nwhile True:\n    os.write(1, b'x' * 65536)\n", ("output limit",)),
    "an endless loop": ("while True:\n    pass\n", ("time limit",)),
    "endless sleep": ("import time\ntime.sleep(1000)\n", ("time limit",)),
    "waits for input that never comes": ("import threading\nthreading.Event().wait()\n", ("time limit",)),
    "ignores all signals": (
        "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n"
        "    pass\n",
        ("time limit",),
    ),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n", ("time limit",)),
    "stops the agent": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\n", ("time limit",)),
    "kills the agent": ("import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(9)\n", ("runtime error",)),
    "kills the first process's group": ("import os, time\nos.killpg(1, 9)\ntime.sleep(9)\n", ("runtime error",)),
    "overwrites the agent's memory": (
        "import os, time\nfor line in open(f'/proc/{os.getppid()}/maps'):\n    span, perms = line.split()[:2]\n    start, end = (int(x, 16) for x in span.split('-'))\n"
        "    if perms[:2] == 'rw':\n        try:\n            with open(f'/proc/{os.getppid()}/mem', 'r+b', 0) as m:\n                m.seek(start)\n"
        "                m.write(b'\\0' * (end - start))\n        except OSError:\n            pass\nprint('x')\n",
        _ANY,
    ),
    "kills everything": ("import os\nos.kill(-1, 9)\nimport time\ntime.sleep(9)\n", ("runtime error",)),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)\n", ("runtime error",)),
    "forks twice into a new session and holds its output": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\nprint('started')\n",
        ("wrong answer",),
    ),
    "holds its output open and ends": (
        "import os, time\nif os.fork() == 0:\n    while True:\n        print('x', flush=True)\n        time.sleep(0.01)\nos._exit(0)\n",
        ("wrong answer",),
    ),
    "a huge power": ("print(9 ** 9 ** 9)\n", ("time limit", "memory limit")),
    "a huge integer as text": ("import sys\nsys.set_int_max_str_digits(0)\nprint(str(7 ** 10 ** 8))\n", ("time limit", "memory limit")),
    "a huge integer in a constant": ("x = 1 << (1 << 40)\n", ("memory limit", "runtime error")),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f():\n    f()\nf()\n", _ANY),
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6):\n    x = [x]\nrepr(x)\n",
        _ANY,
    ),
    "a source of deep brackets": ("x = " + "(" * 50_000 + ")" * 50_000 + "\n", ("runtime error", "memory limit")),
    "a source of many operators": ("x = 1" + "+1" * 100_000 + "\n", _ANY),
    "a literal of 1 GB": ("x = 'x' * (1 << 30)\nprint(x)\n", ("memory limit",)),
    "a literal of 1 GB, folded": ("print(len(('x' * 4096) * (1 << 18)))\n", ("memory limit",)),
    "a source that grows when it is compiled": ("exec('x = [' + '1,' * (1 << 25) + ']')\n", _ANY),
    "all descriptors": ("import os\nx = []\nwhile True:\n    x.append(os.open('/dev/null', os.O_RDONLY))\n", ("runtime error",)),
    "all descriptors, as sockets": ("import socket\nx = []\nwhile True:\n    x.append(socket.socketpair())\n", ("runtime error",)),
    "pipes full of data": (
        "import fcntl, os\nx = []\nwhile True:\n    r, w = os.pipe()\n    os.set_blocking(w, False)\n    try:\n        fcntl.fcntl(w, 1031, 1 << 20)\n"
        "    except OSError:\n        pass\n    os.write(w, b'x' * (1 << 20))\n    x.append(r)\n",
        _ANY,
    ),
    "all inodes": (
        "import os\nn = 0\nwhile True:\n    os.close(os.open(f'/tmp/{n}', os.O_CREAT | os.O_WRONLY))\n    n += 1\n",
        ("time limit", "memory limit", "runtime error"),
    ),
    "deep directories": ("import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')\n", ("time limit", "memory limit", "runtime error")),
    "a full disk": ("f = open('/tmp/x', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))\n", ("runtime error",)),
    "a disk full of files": (
        "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20))\n    n += 1\n",
        ("runtime error",),
    ),
    "full shared memory": (
        "n = 0\nwhile True:\n    open(f'/dev/shm/{n}', 'wb').write(b'x' * (1 << 20))\n    n += 1\n",
        ("runtime error",),
    ),
    "a sparse file": ("f = open('/tmp/x', 'wb')\nf.truncate(1 << 40)\n", ("runtime error",)),
    "a compression bomb": (
        "import zlib\nd = zlib.compressobj(9)\nblob = b''.join(d.compress(bytes(1 << 20)) for _ in range(400)) + d.flush()\nx = zlib.decompress(blob)\nprint(len(x))\n",
        ("memory limit", "time limit"),
    ),
    "a regular expression that never ends": ("import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')\n", ("time limit",)),
    "a crash": ("import ctypes\nctypes.string_at(0)\n", ("runtime error",)),
    "an abort": ("import os\nos.abort()\n", ("runtime error",)),
    "a handler that never lets go": (
        "import signal, atexit\ndef forever(*a):\n    while True:\n        pass\natexit.register(forever)\n",
        ("time limit",),
    ),
    "a thread that never ends": ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n", ("time limit",)),
    "a destructor that goes on": ("class X:\n    def __del__(self):\n        while True:\n            pass\nx = X()\n", ("time limit",)),
    "an interpreter in an interpreter": (
        "import subprocess, sys\nwhile True:\n    subprocess.Popen([sys.executable, '-S', '-c', 'while True: pass'])\n",
        _ANY,
    ),
    "bytes that are no text": ("import os\nos.write(1, bytes(range(256)) * 100)\n", ("wrong answer",)),
}
CALLED = {
    "a result of 20 MB": ("def f():\n    return 'x' * (20 << 20)\n", ("output limit", "memory limit")),
    "a result nested deeply": (
        "def f():\n    x = []\n    for _ in range(10 ** 5):\n        x = [x]\n    return x\n",
        ("runtime error", "wrong answer"),
    ),
    "a result that contains itself": ("def f():\n    x = []\n    x.append(x)\n    return x\n", ("runtime error",)),
    "keys that all collide": ("def f():\n    return {n * (2 ** 61 - 1): 0 for n in range(3000)}\n", ("wrong answer", "time limit")),
    "a huge integer": ("def f():\n    return 1 << 20_000_000\n", ("wrong answer", "output limit")),
    "a lazy result that never ends": ("def f():\n    while True:\n        yield 1\n", ("wrong answer",)),
    "an error that explains itself for ever": (
        "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\ndef f():\n    raise E\n",
        ("time limit",),
    ),
    "JSON of its own": (
        "import os\ndef f():\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'[' * 500_000)\n        except OSError:\n            pass\n"
        "    os._exit(0)\n",
        ("wrong answer", "runtime error"),
    ),
    "replies without end": (
        "import os\ndef f():\n    while True:\n        for fd in range(3, 10):\n            try:\n                os.write(fd, b'{\"value\": 0}\\n' * 5000)\n"
        "            except OSError:\n                pass\n",
        ("output limit", "time limit"),
    ),
    "a reply without end": (
        "import os\ndef f():\n    while True:\n        for fd in range(3, 10):\n            try:\n                os.write(fd, b'[' * 60000)\n"
        "            except OSError:\n                pass\n",
        ("output limit", "time limit"),
    ),
    "digits of its own": (
        "import os\ndef f():\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'{\"value\": ' + b'9' * 900_000 + b'}\\n')\n"
        "        except OSError:\n            pass\n    os._exit(0)\n",
        ("wrong answer", "runtime error"),
    ),
}
