"""A reward in a child process: the effects it may have on that process, and that nothing of it is left."""

import contextlib
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards import process as module
from megatron_aspo.rewards.process import RewardProcess, check_reward
from megatron_aspo.tasks.options import DataOptions

DOES = "tests.unit.user_rewards:does"
PROMPT = Prompt("train/1", (1, 2), "the words", 7, "dataset")
BACKTRACKING = "re.match(r'(a+)+$', 'a' * 40 + 'b')"
"""An expression that runs in C code, with the interpreter's lock held, for ages."""
LIMIT_S = 0.8


@contextlib.contextmanager
def reward_process(reward=DOES, directory=".", limit_s=30.0):
    process = RewardProcess("dataset", DataOptions(reward=reward, reward_timeout_s=limit_s, reward_failure_score=-2.5), str(directory))
    try:
        process.start()
        yield process
    finally:
        process.close()


def score(process, *responses):
    return list(process.score([(PROMPT, response) for response in responses]))


def alive(marker: str) -> list[int]:
    """Return the processes with `marker` in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(marker in part for part in process.cmdline()):
                found.append(process.pid)
    return found


def test_a_process_that_could_not_be_started_is_started_for_the_next_response(monkeypatch):
    def full(*words, **how):
        raise BlockingIOError("Resource temporarily unavailable")

    process = RewardProcess("dataset", DataOptions(reward=DOES), ".")
    try:
        with monkeypatch.context() as patch, pytest.raises(BlockingIOError):
            patch.setattr(subprocess, "Popen", full)
            process.start()
        assert [result.score for result in score(process, "22")] == [2.0]
    finally:
        process.close()


@pytest.mark.parametrize(
    "hang",
    ["time.sleep(99)", BACKTRACKING, "[signal.signal(n, signal.SIG_IGN) for n in (2, 14, 15)]; time.sleep(99)", "os.kill(os.getpid(), 19)"],
    ids=["sleeping", "in C code", "ignoring signals", "stopped"],
)
def test_only_the_response_on_which_the_reward_hangs_gets_the_failure_score(hang):
    with reward_process(limit_s=LIMIT_S) as process:
        started = time.monotonic()
        first, stuck, last = score(process, "1", hang, "333")
        assert LIMIT_S < time.monotonic() - started < 20 * LIMIT_S
        assert (stuck.score, stuck.reason, stuck.failure) == (-2.5, "timed out after 0.8 s", "timeout")
        assert stuck.details == {"failed": True}
        assert [(result.score, result.failure) for result in (first, last)] == [(1.0, ""), (3.0, "")]
        assert first.details["pid"] != last.details["pid"] and not psutil.pid_exists(first.details["pid"])
        # The replacement child scores the next batch.
        assert score(process, "22")[0].details["pid"] == last.details["pid"]


@pytest.mark.parametrize(
    ("crash", "reason"),
    [
        ("os._exit(0)", "ended its process (exit status 0) twice"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed its process (Segmentation fault) twice"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed its process (Killed) twice"),
        ("os.closerange(3, 65536)", "crashed its process (Killed) twice"),  # useless without its connection, so it is killed
    ],
)
def test_a_reward_that_ends_its_process_is_retried_once_and_then_fails(crash, reason):
    with reward_process() as process:
        results = score(process, "1", crash, "333")
    assert [result.score for result in results] == [1.0, -2.5, 3.0]
    assert (results[1].reason, results[1].failure) == (reason, "crash")


def test_a_reward_that_floods_its_worker_with_details_fails_on_that_response(monkeypatch):
    monkeypatch.setattr(module, "_MAX_ANSWER_BYTES", 1 << 20)
    with reward_process("tests.unit.user_rewards:details") as process:
        results = score(process, "x" * 10_000, "x" * 2_000_000, "333")
    assert [(result.score, result.failure) for result in results] == [(0.5, ""), (-2.5, "crash"), (0.5, "")]
    assert results[1].reason == "returned details of over 1 MiB twice" and results[1].details == {"failed": True}


def test_half_an_answer_is_no_answer():
    """The reward itself writes to the connection, up to where a process that is killed in the middle would get."""
    half = "[os.write(n, b'[1.0, ') for n in range(3, 64) if 'socket' in os.path.realpath(f'/proc/self/fd/{n}')]; os._exit(1)"
    with reward_process() as process:
        results = score(process, "1", half, "333")
    assert [(result.score, result.failure) for result in results] == [(1.0, ""), (-2.5, "crash"), (3.0, "")]


def test_one_crash_of_a_response_costs_nothing(tmp_path):
    """The directory is created by the first call and exists in the second."""
    first, second, third = (f"os.path.isdir('{tmp_path}/{n}') or (os.mkdir('{tmp_path}/{n}'), os._exit(1))" for n in "abc")
    with reward_process() as process:
        results = score(process, "1", first, second, "4444")
        results += score(process, third, "22")  # the first of a batch
    assert [result.score for result in results] == [1.0, len(first), len(second), 4.0, len(third), 2.0]
    assert not any(result.failure for result in results)


def test_the_processes_of_a_killed_reward_end_with_it():
    marker = f"{98.5 + time.monotonic() % 1}"
    commands = [f"subprocess.Popen(['sleep', '{marker}'], start_new_session={own}); time.sleep(99)" for own in (True, False)]
    with reward_process(limit_s=LIMIT_S) as process:
        assert [result.failure for result in score(process, *commands)] == ["timeout", "timeout"]
    time.sleep(0.1)
    assert not alive(marker)


@pytest.mark.parametrize(
    "response",
    [
        "print('x' * 5_000_000); print('y' * 5_000_000, file=sys.stderr)",
        "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)",
        "os.chdir('/'); sys.path.clear(); sys.argv.clear()",
        "np.random.seed(0); os.environ.clear(); sys.setrecursionlimit(100)",
    ],
    ids=["printing", "closing its output", "moving away", "setting what is global"],
)
def test_effects_of_a_reward_on_its_own_process_do_no_harm(response):
    with reward_process() as process:
        results = score(process, response, "print(1)" if "close" not in response else "22", "333")
        assert len({result.details["pid"] for result in results}) == 1
    assert [result.score for result in results][::2] == [len(response), 3.0] and not any(result.failure for result in results)


def test_a_value_that_is_no_score_is_the_users_error_and_not_a_failure():
    with reward_process() as process, pytest.raises(UserError, match=r"on prompt train/1 raised SystemExit: 3; a reward must not exit"):
        score(process, "1", "sys.exit(3)")
    with reward_process() as process, pytest.raises(UserError, match="on prompt train/1 raised EOFError"):
        score(process, "input()")
    with reward_process("tests.unit.user_rewards:length") as process:
        assert score(process, "four")[0].score == 4.0


def test_an_abandoned_batch_does_not_answer_for_the_next():
    with reward_process() as process:
        next(process.score([(PROMPT, "1"), (PROMPT, "22"), (PROMPT, "333")]))
        assert [result.score for result in score(process, "4444", "55555")] == [4.0, 5.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; time.sleep(99)", "cannot be loaded: importing it timed out after 1 s; correct its module"),
        ("import os; os._exit(0)", r"cannot be loaded: importing it ended its process \(exit status 0\)"),
        ("import os; os.kill(os.getpid(), 11)", r"cannot be loaded: importing it crashed its process \(Segmentation fault\)"),
        ("import sys; sys.exit(0)", "importing bad_reward raised SystemExit: 0"),
        ("f = 3", "is a int, expected a function"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_refused_before_a_run_starts(tmp_path, monkeypatch, code, message):
    if "sleep" in code:  # the others take the time that a busy machine needs
        monkeypatch.setattr(module, "LOAD_TIMEOUT_S", 1.0)
    (tmp_path / "bad_reward.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.reward=bad_reward:f.*{message}"):
        check_reward("dataset", DataOptions(reward="bad_reward:f"))


def test_a_reward_finds_the_files_of_the_runs_working_directory(tmp_path):
    (tmp_path / "table.txt").write_text("12345")
    with reward_process(directory=tmp_path) as process:
        response = "assert open('table.txt').read() == '12345'"
        assert score(process, response)[0].score == len(response)
    assert Path.cwd() != tmp_path


def test_a_fault_of_the_reward_costs_one_response_if_the_option_allows_it():
    options = DataOptions(reward=DOES, reward_on_error="score", reward_failure_score=-2.5)
    process = RewardProcess("dataset", options, ".")
    try:
        process.start()
        results = score(process, "1", "1 / 0", "sys.exit(3)", "333")
    finally:
        process.close()
    assert [(result.score, result.failure) for result in results] == [(1.0, ""), (-2.5, "error"), (-2.5, "error"), (3.0, "")]
    assert results[1].reason == "raised ZeroDivisionError: division by zero; correct the function"
    assert results[1].details == {"failed": True} and results[0].details["pid"] == results[3].details["pid"]


def test_leaked_memory_costs_no_response_and_one_that_needs_too_much_fails():
    options = DataOptions(reward=DOES, reward_memory_gib=1.0, reward_failure_score=-2.5)
    leak = "globals().setdefault('kept', []).append(bytearray(350 << 20))"
    process = RewardProcess("dataset", options, ".")
    try:
        process.start()
        results = score(process, leak, leak, leak + " ", "bytearray(2 << 30)", "22")
    finally:
        process.close()
    assert [result.failure for result in results] == ["", "", "", "crash", ""]
    assert results[0].details["pid"] == results[1].details["pid"] != results[2].details["pid"]
    assert (results[3].score, results[3].reason) == (-2.5, "got no more memory twice")


def test_an_async_reward_is_awaited_and_its_loop_is_reused(tmp_path):
    module_text = (
        "import asyncio\nloops = set()\nasync def score(prompt, response, ground_truth, extra):\n"
        "    await asyncio.sleep(0.01)\n    loops.add(id(asyncio.get_running_loop()))\n    return len(response) / len(loops)\n"
    )
    (tmp_path / "later.py").write_text(module_text)
    with reward_process("later:score", directory=tmp_path) as process:
        assert [result.score for result in score(process, "1", "22", "333")] == [1.0, 2.0, 3.0]
