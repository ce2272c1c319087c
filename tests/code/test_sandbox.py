"""The sandbox itself: options, refusals, modules, no leaks."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import build
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import CallTest, StdinTest
from megatron_aspo.rewards.sandbox import cgroup, launcher, sandbox as sandbox_module, syscalls
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.sandbox.sandbox import Sandbox, SandboxError, parse_report

ONE = [StdinTest("", "1")]


def refused(options: SandboxOptions) -> str:
    with pytest.raises(UserError) as error:
        SandboxPool(options, Limits())
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can read; pytest's own directories are closed."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_running_without_a_sandbox_requires_accepting_the_risk():
    assert "accept_risk: true" in refused(SandboxOptions(kind="none"))


def test_without_a_sandbox_programs_are_still_graded_and_killed():
    options = CodeOptions(SandboxOptions(kind="none", accept_risk=True), Limits(cpu_s=1, wall_s=3))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with Grader(options) as grader:
        assert grader.grade("print(1)", ONE).passed
        assert grader.grade("while True:\n    pass\n", ONE).kind == "time limit"
        assert grader.grade("def f(x):\n    return x\n", [CallTest("f", [1], 1)]).passed
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_missing_program_or_module_is_named_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install bubblewrap" in refused(SandboxOptions())
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    old.chmod(0o755)
    assert "0.4.1" in refused(SandboxOptions())


def test_a_missing_binding_is_named(monkeypatch, sandboxed):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    syscalls.load_pyseccomp.cache_clear()
    assert "pip install pyseccomp" in refused(SandboxOptions())


def test_a_machine_without_user_namespaces_is_named(monkeypatch, sandboxed, open_directory):
    fake = open_directory / "bwrap"
    fake.write_text(
        "#!/bin/sh\ncase $1 in --version) echo bubblewrap 0.8.0 ;; *) echo 'bwrap: No permissions to create new namespace' >&2; exit 1 ;; esac\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(launcher, "find_bubblewrap", lambda: str(fake))
    message = refused(SandboxOptions())
    assert "No permissions" in message and "kernel.unprivileged_userns_clone" in message


IN_A_CONTAINER = """
from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import StdinTest
try:
    with Grader(CodeOptions()) as grader:
        print(grader.grade("print(int(input()) + 1)", [StdinTest("1", "2")]).passed)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ([], "True"),
        (["--ro-bind", "/dev/null", "/proc/version"], "hides parts of /proc"),  # as in docker, podman and Kubernetes
        (["--disable-userns"], "bubblewrap needs user namespaces"),
    ],
    ids=["open", "masked /proc", "no user namespaces"],
)
def test_the_sandbox_works_in_a_container_without_root_or_names_what_the_container_lacks(sandboxed, container, message):
    """The container is one of bubblewrap's, with a user that is not root."""
    outer = ["bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000", "--unshare-pid", "--dev-bind", "/", "/", "--proc", "/proc"]
    command = [*outer, *container, sys.executable, "-c", IN_A_CONTAINER]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and message in done.stdout, done.stdout + done.stderr
    assert message == "True" or "grade-server" in done.stdout


def test_promised_modules_are_available_and_checked(sandboxed):
    with Grader(CodeOptions(SandboxOptions(modules=["numpy"]))) as grader:
        assert grader.grade("import numpy as np\nprint(np.arange(4).sum())\n", [StdinTest("", "6")]).passed
        assert grader.grade("def f(x):\n    import numpy\n    return numpy.array(x) * 2\n", [CallTest("f", [[1, 2]], [2, 4])]).passed
        assert grader.grade("import torch\n", ONE).reason.startswith("ModuleNotFoundError")
    assert "nowhere_at_all" in refused(SandboxOptions(modules=["nowhere_at_all"]))
    assert "pandas_like" in refused(SandboxOptions(modules=["numpy", "pandas_like"]))


def test_a_module_that_cannot_be_imported_inside_is_refused(sandboxed, tmp_path, monkeypatch):
    package = tmp_path / "needs_more"
    package.mkdir()
    (package / "__init__.py").write_text("import psutil\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "needs_more cannot be imported" in refused(SandboxOptions(modules=["needs_more"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_s": 0}, r"data\.code\.total_s=0\.0 must be greater than 0"),
        ({"max_tests": -1}, r"data\.code\.max_tests=-1 must be 0, for all tests, or more; raise it"),
        ({"max_program_kb": 0}, r"data\.code\.max_program_kb=0 must be greater than 0"),
        ({"limits": {"cpu_s": 9, "wall_s": 3}}, r"data\.code\.limits\.wall_s=3 is below cpu_s=9; raise it"),
        ({"limits": {"memory_mb": 0}}, r"data\.code\.limits\.memory_mb=0 must be greater than 0"),
        ({"sandbox": {"kind": "docker"}}, r"data\.code\.sandbox\.kind=docker is not known; valid: bubblewrap, none"),
    ],
    ids=str,
)
def test_options_out_of_bounds_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Grader(build(CodeOptions, change))


def test_a_long_program_fails_without_running_and_all_tests_share_a_time_limit(sandboxed):
    with Grader(CodeOptions(limits=Limits(cpu_s=2, wall_s=5), total_s=2.0, max_program_kb=1)) as grader:
        assert grader.grade("#" * 2000 + "\nprint(1)", ONE).tests_run == 0
        verdict = grader.grade("import time\ntime.sleep(0.4)\nprint(1)\n", ONE * 50)
        assert verdict.kind == "time limit" and 1 < verdict.tests_run < 8, verdict


def test_a_waiting_sandbox_that_dies_is_replaced(sandboxed):
    with Grader(CodeOptions()) as grader:
        for sandbox in grader._pool._waiting:
            sandbox._process.kill()
        assert grader.grade("print(1)", ONE).passed


def test_hundreds_of_verdicts_leave_nothing_behind(sandboxed):
    process = psutil.Process()
    with Grader(CodeOptions(SandboxOptions(pool=1))) as grader:
        grader.grade("print(1)", ONE)
        descriptors, memory = process.num_fds(), process.memory_info().rss
        assert all(grader.grade("print(1)", ONE * 3).passed for _ in range(100))
        assert process.num_fds() == descriptors
        assert process.memory_info().rss - memory < 20 << 20
    assert [child for child in process.children(recursive=True) if child.name() in ("bwrap", "sh", "nsenter")] == []


def test_a_sandbox_killed_during_its_start_leaves_nothing_behind(sandboxed):
    started = time.time()
    made = launcher.Launcher(SandboxOptions(), Limits())
    for number in range(60):
        sandbox = Sandbox(made, Limits())
        time.sleep(number * 0.0005)
        sandbox.kill()
    made.close()
    left = [process for process in psutil.process_iter(["name", "create_time", "ppid"]) if process.info["name"] == "bwrap"]
    assert [process for process in left if process.info["ppid"] == 1 and process.info["create_time"] >= started - 1] == []


def test_sandboxes_die_with_their_worker(sandboxed):
    code = (
        "import sys, time\nfrom megatron_aspo.rewards.code.grader import Grader\nfrom megatron_aspo.rewards.code.options import CodeOptions\n"
        "from megatron_aspo.rewards.code.schemas import StdinTest\ngrader = Grader(CodeOptions())\nprint('ready', flush=True)\n"
        "grader.grade('while True: pass', [StdinTest('', '')])\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    family = psutil.Process(worker.pid).children(recursive=True)
    assert family
    worker.kill()
    worker.wait()
    worker.stdout.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    if parents := cgroup.find_parents():  # the next worker removes leftover control groups
        assert not [path for parent in parents for path in parent.glob(f"megatron_aspo-*-{worker.pid}-*")]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[" * 4000,
        b"1",
        b"null",
        b"{}",
        b'{"status": 0}',
        b'{"status": "0", "cpu_s": 0.1}',
        b'{"status": 0, "cpu_s": NaN}',
        b"\xff",
        b'{"status": -99, "cpu_s": 0.1}',
        b'{"status": 0, "cpu_s": true}',
        b'{"status": true, "cpu_s": 0.1}',
        b"9" * 4000,
    ],
)
def test_the_report_of_an_agent_that_was_taken_over_is_rejected(line):
    assert parse_report(b'{"status": -9, "cpu_s": 0.5}') == {"status": -9, "cpu_s": 0.5}
    with pytest.raises(EOFError):
        parse_report(line)


def test_control_groups_of_version_2_are_tried_in_the_own_group_and_its_parent(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/app.slice/worker.scope\n")
    root = Path("/sys/fs/cgroup")
    group = root / "user.slice/app.slice/worker.scope"
    assert cgroup._candidates(own, root) == [[group], [group.parent]]
    own.write_text("4:memory:/a\n8:pids:/\n0::/\n")
    assert cgroup._candidates(own, root)[0] == [root / "memory/a", root / "pids"]


def test_only_groups_of_the_own_pid_namespace_are_removed_and_process_0_is_never_killed(tmp_path, monkeypatch):
    namespace, dead, killed = os.stat("/proc/self/ns/pid").st_ino, 2**22 + 1, []
    names = [f"megatron_aspo-{namespace}-{dead}-0", f"megatron_aspo-{namespace}-{os.getpid()}-0", f"megatron_aspo-{namespace + 1}-{dead}-0"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("0\n77\n")
    monkeypatch.setattr(cgroup.os, "kill", lambda process, number: killed.append(process))
    monkeypatch.setattr(cgroup, "_remove", lambda path: killed.append(path.name))
    cgroup._remove_stale([tmp_path])
    assert killed == [77, names[0]]


def test_programs_do_not_have_the_user_id_of_root(sandboxed):
    with Grader(CodeOptions()) as grader:
        sandbox = grader._pool.take()
        processes = psutil.Process(sandbox._process.pid).children(recursive=True)
        users = {process.uids().effective for process in processes}
        sandbox.kill()
    assert processes and 0 not in users and (os.geteuid() == 0 or users == {os.geteuid()})


def test_a_sandbox_inherits_no_descriptor_of_the_machine(sandboxed):
    look = (
        "import os, sys\nfor p in filter(str.isdigit, os.listdir('/proc')):\n    try:\n        names = os.listdir(f'/proc/{p}/fd')\n"
        "    except OSError:\n        continue\n    for n in names:\n        try:\n            print(p, n, os.readlink(f'/proc/{p}/fd/{n}'))\n"
        "        except OSError:\n            pass\n"
    )
    pool = SandboxPool(SandboxOptions(), Limits())
    try:
        sandbox = pool.take()
        sandbox.load({"program": look})
        lines = sandbox.run("stdin", b"", 10.0).output.decode().splitlines()
        outside = psutil.Process(sandbox._process.pid).children(recursive=True)
        lines += [
            f"{process.pid} {path.name} {os.readlink(path)}" for process in outside for path in Path(f"/proc/{process.pid}/fd").iterdir()
        ]
        sandbox.kill()
    finally:
        pool.close()
    assert len(lines) > 6 and not [
        line for line in lines if ":" in line and not line.split(" ")[2].startswith(("pipe:", "socket:", "anon_inode:"))
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root stages files")
def test_files_below_mnt_are_seen_by_a_sandbox_that_root_starts(sandboxed, tmp_path):
    directory = Path(tempfile.mkdtemp(dir="/mnt"))
    try:
        directory.chmod(0o755)
        (directory / "data").write_text("1")
        with Grader(CodeOptions(SandboxOptions(paths=[str(directory)]))) as grader:
            assert grader.grade(f"print(open('{directory}/data').read())", ONE).passed
    finally:
        shutil.rmtree(directory)


def test_a_sandbox_that_does_not_start_is_ended_with_its_inner_process(monkeypatch, sandboxed):
    monkeypatch.setattr(sandbox_module, "_START_S", 0.2)
    made = launcher.Launcher(SandboxOptions(), Limits())
    monkeypatch.setattr(launcher, "_PROGRAM", ("-c", "import time; time.sleep(600)"))
    sandbox = Sandbox(made, Limits())
    started = time.monotonic()
    with pytest.raises(SandboxError, match="no answer within"):
        sandbox.wait_until_ready()
    assert time.monotonic() - started < 5 and sandbox._process.returncode is not None
    sandbox.kill()
    made.close()


def test_a_pipe_held_open_by_another_process_does_not_block_ending_a_sandbox(monkeypatch, sandboxed, open_directory):
    fake = open_directory / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: broken' >&2\nsleep 20 <&- >/dev/null &\nexec <&-\nexec sleep 20\n")
    fake.chmod(0o755)
    monkeypatch.setattr(launcher, "find_bubblewrap", lambda: str(fake))
    monkeypatch.setattr(sandbox_module, "_START_S", 0.5)
    monkeypatch.setattr(sandbox_module, "_END_S", 0.2)
    made = launcher.Launcher(SandboxOptions(), Limits())
    sandbox = Sandbox(made, Limits())
    started = time.monotonic()
    with pytest.raises(SandboxError, match="bwrap: broken"):
        sandbox.wait_until_ready()
    assert time.monotonic() - started < 5
    sandbox.kill()
    made.close()


def test_without_a_sandbox_a_program_in_its_own_session_is_killed_too(tmp_path):
    note = str(tmp_path / "pid")
    daemon = "    os.setsid()\n    if os.fork() == 0:\n        open({0!r}, 'w').write(str(os.getpid()))\n        time.sleep(600)\n    os._exit(0)\n"
    code = f"import os, time\nif os.fork() == 0:\n{daemon.format(note)}os.wait()\ntime.sleep(600)\n"
    with Grader(CodeOptions(SandboxOptions(kind="none", accept_risk=True), Limits(cpu_s=1, wall_s=2))) as grader:
        assert grader.grade(code, ONE).kind == "time limit"
    number = int(Path(note).read_text())
    assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("release", "version"),
    [("5.14.0-362.el9.x86_64", (5, 14)), ("6.1-rc3", (6, 1)), ("4.18.0", (4, 18)), ("5.4.0-1-azure", (5, 4)), ("odd", (0, 0))],
)
def test_the_kernel_version_is_parsed(release, version):
    assert launcher.kernel_version(release) == version


def test_an_old_kernel_without_control_groups_is_named(monkeypatch, sandboxed):
    monkeypatch.setattr(launcher, "kernel_version", lambda release: (5, 10))
    monkeypatch.setattr(cgroup, "find_parents", lambda: [])
    message = refused(SandboxOptions())
    assert os.uname().release in message and "5.14" in message


@pytest.mark.parametrize(("program", "package"), [("unshare", "util-linux"), ("ldd", "libc-bin")])
def test_a_missing_program_is_named_with_its_package(monkeypatch, sandboxed, tmp_path, program, package):
    if program == "unshare" and os.geteuid() != 0:
        pytest.skip("only root needs it")
    for directory in os.defpath.split(":"):
        for path in Path(directory).iterdir():
            if path.name != program and not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused(SandboxOptions())
    assert program in message and package in message
