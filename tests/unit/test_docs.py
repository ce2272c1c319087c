"""The manual: its links resolve, its commands are accepted, its options and metrics exist, and its generated pages are current."""

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

import megatron_aspo
from megatron_aspo import cli
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config, to_yaml
from megatron_aspo.losses.registry import builtin_options
from tests.unit.test_packaging import ROOT, load_tool

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/listings/README.md", ROOT / "docker/README.md", ROOT / "tools/README.md"]
)
QUICKSTART = ROOT / "examples/recipes/quickstart.yaml"
TAKES_OVERRIDES = {"tools/prove/torture.py", "tools/quickstart.sh"}


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    mark: str
    """The HTML comment on the line above, if any."""
    body: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            above = lines[start - 1].strip() if start else ""
            mark = above if above.startswith("<!--") else ""
            yield Fence(page, start + 1, lines[start].strip()[3:], mark, "\n".join(lines[start + 1 : number]))
            start = None


@cache
def prose(page: Path) -> str:
    """Return the page without its fenced and indented code."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    \S.*$", "", text, flags=re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    text = prose(page)
    if page.name == "option_names.md":  # the first two columns of its tables are other projects' names
        text = re.sub(r"^\|[^|\n]*\|[^|\n]*\|", "|", text, flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def anchors(page: Path) -> set[str]:
    """Return the fragments that a code host gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(name for name in numbered if name not in found))
    return found


def option_keys() -> set[str]:
    """Keys of a recipe, with the options of every built-in loss."""
    return {*flat(yaml.safe_load(to_yaml(Config())), ""), *(f"algorithm.{name}" for name in builtin_options())}


def flat(values: dict, prefix: str) -> Iterator[str]:
    """Yield the key path of each option; an empty mapping is an option itself."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@cache
def metric_names() -> set[str]:
    return set(load_tool("metric_names").metric_names())


ALL_FENCES = [fence for page in PAGES for fence in fences(page) if fence.language == "bash"]
RUN = [fence for fence in ALL_FENCES if fence.mark == "<!-- run -->"]


def test_the_readme_fits_on_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_what_a_reader_who_changes_the_algorithm_reads_is_at_most_1500_lines():
    page = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| \[`([\w./]+)`\]\(\.\./megatron_aspo/\1\) \| (\d+) \|", page, re.MULTILINE)
    lines = {file: len((ROOT / "megatron_aspo" / file).read_text().splitlines()) for file, _ in table}
    assert {"train.py", "trainer/update.py", "losses/objective.py", "losses/builtin/aspo.py"} <= lines.keys()
    assert sum(lines.values()) <= 1500 and lines["train.py"] <= 110
    assert {file: (int(stated), lines[file]) for file, stated in table if abs(int(stated) - lines[file]) > 20} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_option_and_metric_that_a_page_names_exists(page):
    options = option_keys() | {key.rpartition(".")[0] for key in option_keys()}
    sections = {key.partition(".")[0] for key in options if "." in key}
    metrics = metric_names()
    stems = {name.rpartition("/")[0] for name in metrics}
    wrong = []
    for code in inline_code(page):
        for word in re.split(r"[\s=]", code):
            if re.fullmatch(r"(tools|docs|examples|tests)/[\w./-]*", word) and not (ROOT / word).exists():
                wrong.append(word)
            key = re.fullmatch(r"(\w+)\.([a-z]\w*)", word)
            is_file = word.endswith((".py", ".md", ".json", ".jsonl", ".yaml", ".sh"))
            if key and key[1] in sections and not is_file and word not in options:
                wrong.append(word)
        prefixes = "|".join(sorted({name.partition("/")[0] for name in metrics if "/" in name}))
        if re.fullmatch(rf"({prefixes})/[a-z][\w/]+", code) and code not in metrics | stems:
            wrong.append(code)
    assert not wrong


def test_the_pages_of_options_and_metrics_are_current():
    for name, tool in (("configuration", "make_configuration_doc"), ("metrics", "make_metrics_doc")):
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert text == load_tool(tool).page(), f"run .venv/bin/python tools/maintain/{tool}.py"


def test_every_option_has_a_row_with_a_meaning():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| (.+) \|$", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE))
    assert rows.keys() == option_keys() and all(len(meaning) > 10 for meaning in rows.values())


def test_every_metric_that_whole_runs_are_tested_for_has_a_row():
    """The list of tests/e2e/test_train.py is compared with the metrics of real runs, so it does not depend on this page's tool."""
    module = ast.parse((ROOT / "tests/e2e/test_train.py").read_text())
    (health,) = (ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign) and node.targets[0].id == "HEALTH")
    rows = set(re.findall(r"^\| `([\w/]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    assert len(health) > 30 and set(health) <= rows


@pytest.mark.parametrize("fence", ALL_FENCES, ids=str)
def test_every_command_is_accepted_or_marked(fence, monkeypatch):
    assert not fence.mark or re.fullmatch(r"<!-- (run|not run: .+) -->", fence.mark)
    if fence.mark.startswith("<!-- not run"):
        return
    monkeypatch.setattr(cli, "_guarded", lambda command, parsed: 0)
    for words in fence.commands:
        check_command(words)


def check_command(words: list[str]) -> None:
    """Fail unless the command exists, it knows its flags, and its overrides are valid for a recipe."""
    while re.match(r"[A-Z][A-Z0-9_]*=", words[0]):  # variables of this command
        words = words[1:]
    program, *arguments = words
    if program.endswith("megatron-aspo"):
        with pytest.raises(SystemExit) as ended, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            cli.main(arguments)
        assert ended.value.code == 0, words
        if arguments[0] in ("train", "plan", "verify-sync"):
            check_overrides(arguments[1], arguments[2:])
        return
    if program in ("bash", "python", ".venv/bin/python"):
        program, *arguments = arguments
    assert program == "pytest" or (ROOT / program).is_file(), f"{words}: no such command; correct it, or mark the fence as not run"
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if program.endswith(".py"):
        assert flags <= flags_of(ROOT / program) | {"--help"}, words
    if program in ("pytest", "tools/test.sh"):
        assert flags <= {"-m", "-k"}, words
        assert all((ROOT / argument.partition("::")[0]).exists() for argument in arguments if argument.startswith("tests/")), words
    if re.fullmatch(r"examples/run_[\w.]+\.sh", program):
        assert flags <= {"--dry-run"}, words
        check_overrides(program.replace("run_", "recipes/").replace(".sh", ".yaml"), arguments)
    if program in TAKES_OVERRIDES:
        check_overrides(next((word for word in arguments if word.endswith(".yaml")), "RECIPE"), arguments)


def flags_of(tool: Path) -> set[str]:
    """Return the flags that a tool gives its argument parser, read from its source: importing some tools takes seconds."""
    calls = [node for node in ast.walk(ast.parse(tool.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {word.value for call in added for word in call.args if isinstance(word, ast.Constant)}


@pytest.mark.parametrize(
    "line",
    [
        "megatron-aspo train RECIPE trainer.tensor_paralel=2",
        "megatron-aspo train RECIPE --restart auto",
        "megatron-aspo fly RECIPE",
        "python tools/no_such_tool.py",
        "megatron-aspo plan-sync examples/models/qwen2.5-1.5b --trian tensor=2",
        "bash tools/test.sh tests/unit/test_no_such.py",
        "curl example.org",
        "NNODES=2 bash examples/run_aspo_qwen3_8b_code.sh --resume",
        "NNODES=2 bash examples/run_aspo_qwen3_8b_code.sh optimizer.rl=1e-6",
    ],
)
def test_a_wrong_command_in_a_page_would_be_noticed(line, monkeypatch):
    monkeypatch.setattr(cli, "_guarded", lambda command, parsed: 0)
    with pytest.raises((AssertionError, UserError)):
        check_command(shlex.split(line))


def check_overrides(recipe: str, words: list[str]) -> None:
    """Load the recipe, or the quickstart's for a placeholder, with all key.path=value words."""
    path = QUICKSTART if recipe in ("RECIPE", "mine.yaml") else ROOT / recipe
    load_config(path, [word for word in words if re.match(r"[a-z_.]+=", word)])


def test_commands_that_are_marked_to_run_do():
    """All at once, because each spends most of its time importing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = []
    for fence in RUN:
        for words in fence.commands:
            program = [sys.executable, "-m", "megatron_aspo"] if words[0].endswith("megatron-aspo") else [sys.executable]
            started.append((f"{fence}: {words}", subprocess.Popen([*program, *words[1:]], cwd=ROOT, env=environment, **pipes)))
    assert len(started) >= 3
    failed = {name: errors for name, process in started for errors in process.communicate(timeout=120)[1:] if process.returncode}
    assert not failed


def test_the_forms_require_the_contents_of_a_report_and_list_the_steps_of_integration():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    required = [part["attributes"]["label"] for part in form["body"] if part.get("validations", {}).get("required")]
    assert {"Output of `megatron-aspo plan RECIPE --json`", "The run's config.yaml", "Versions"} <= set(required)
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == megatron_aspo.__version__


UPWARD = {
    "rewards/child.py imports tasks/",
}


def test_a_room_imports_only_rooms_below_it():
    package = ROOT / "megatron_aspo"
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \|$", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    rooms = {path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")} - {"__init__", "__main__"}
    assert sorted(listed) == sorted(rooms)
    upward = set()
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own not in rooms:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # imports for a type checker only do not count
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for other in (module.split(".")[1] for module in modules if module.startswith("megatron_aspo.")):
                if listed.index(other) < listed.index(own):
                    upward.add(f"{path.relative_to(package)} imports {other}{'/' if (package / other).is_dir() else '.py'}")
    assert upward == UPWARD


def test_every_tool_is_listed():
    listed = set(re.findall(r"\]\(([\w./-]+)\)", (ROOT / "tools/README.md").read_text()))
    files = subprocess.run(["git", "ls-files", "tools"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tools = {file.removeprefix("tools/") for file in files if Path(file).parts[1] not in ("README.md", "locks")}
    assert {tool if "gpu_sections" not in tool else "prove/gpu_sections" for tool in tools} == {name.rstrip("/") for name in listed}


def marks_of(source: str, test: str) -> set[str]:
    """Return the markers that every case of a test has: its own and its file's, without those of single cases."""
    module = ast.parse(source)
    assigned = [node for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == test)
    marks = [element for node in assigned for element in getattr(node.value, "elts", [node.value])] + function.decorator_list
    return {match[1] for mark in marks if (match := re.match(r"pytest\.mark\.(\w+)", ast.unparse(mark)))}


def test_every_claim_names_tests_and_tools_that_exist_and_run_or_says_why_not():
    rows = re.findall(r"^\| (?!claim|---)(.+?) \| (.+?) \| ?(.*?) ?\|$", (ROOT / "docs" / "claims.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for claim, holders, reason in rows:
        named = re.findall(r"`([^`]+)`", holders)
        assert named, claim
        for holder in named + [name for name in re.findall(r"`([^`]+)`", reason) if "::" in name]:
            path, _, test = holder.partition("::")
            if not test:
                assert (ROOT / path).is_file() and reason, claim  # a tool is not in .ci/run
                continue
            source = (ROOT / "tests" / path).read_text(encoding="utf-8")
            assert f"def {test}(" in source, holder
            left_out = {"gpu", "nightly"} & marks_of(source, test)
            assert not left_out or (reason and holder in named), f"{holder} is not in .ci/run: give the reason in its row"


def test_markers_are_read_from_functions_and_files_but_not_from_single_cases():
    source = "pytestmark = [pytest.mark.long, pytest.mark.gpu]\n\n@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.a)])\n"
    assert marks_of(source + "def test_it(x): ...", "test_it") == {"long", "gpu", "parametrize"}
    assert marks_of("pytestmark = pytest.mark.long\n\n@pytest.mark.nightly\ndef test_it(): ...", "test_it") == {"long", "nightly"}


def test_continuous_integration_leaves_out_nightly_and_gpu_tests_alone():
    """The three scripts' choices; a misspelt marker in them would choose wrong tests."""
    assert 'tools/test.sh -m "not gpu and not nightly"' in (ROOT / ".ci/run").read_text()
    script = (ROOT / "tools/test.sh").read_text()
    markers = set(re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    chosen = re.findall(r'-m "([^"]+)"', script)
    assert len(chosen) >= 3 and {name for choice in chosen for name in choice.replace("not ", "").split(" and ")} == markers
