"""A grader for the tests of this folder. Without bubblewrap they are skipped, or fail if REQUIRE_SANDBOX is set, as in .ci/run."""

import os
from collections.abc import Callable, Iterator

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code.grader import Grader
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.schemas import StdinTest
from megatron_aspo.rewards.code.verdict import Verdict
from megatron_aspo.rewards.sandbox import cgroup
from megatron_aspo.rewards.sandbox.launcher import find_bubblewrap
from megatron_aspo.rewards.sandbox.options import Limits

STRICT = Limits(cpu_s=1, wall_s=1.5, memory_mb=256, processes=16, file_mb=4, output_mb=1)


@pytest.fixture(scope="session")
def sandboxed() -> None:
    """Skip the test if there is no bubblewrap."""
    try:
        find_bubblewrap()
    except UserError as error:
        if os.environ.get("REQUIRE_SANDBOX"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def grader(sandboxed) -> Iterator[Grader]:
    with Grader(CodeOptions(limits=Limits(cpu_s=5, wall_s=20))) as grader:
        yield grader


@pytest.fixture(scope="module")
def strict_grader(sandboxed) -> Iterator[Grader]:
    """A grader whose limits a hostile program reaches soon."""
    with Grader(CodeOptions(limits=STRICT)) as grader:
        yield grader


@pytest.fixture(scope="module")
def groupless_grader(sandboxed) -> Iterator[Grader]:
    """Like `strict_grader`, on a machine where no control groups can be created."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "find_parents", lambda: [])
        with Grader(CodeOptions(limits=STRICT)) as grader:
            yield grader


@pytest.fixture
def run(grader) -> Callable[[str, str, str], Verdict]:
    """Grade a program by one test: (program, input, expected output) → verdict."""
    return lambda program, given, expected: grader.grade(program, [StdinTest(given, expected)])
