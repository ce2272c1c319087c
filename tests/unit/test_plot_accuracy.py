"""The picture of the README: the files of a run that it reads, and its refusals."""

import json

import pytest

from tests.unit.test_packaging import ROOT, load_tool

TOOL, COLOURS = load_tool("plot_accuracy"), load_tool("colours")
COMMITTED = ROOT / "docs" / "figures" / "quickstart.svg"
ACCURACY = {0: (0.2, 0.04), 2: (0.5, 0.05), 10: (0.9, 0.02)}


@pytest.fixture
def run(tmp_path):
    """Make a run directory with three evaluations, one of them set aside by a resumed run, and ten steps."""
    directory = tmp_path / "run"
    (directory / "evaluations").mkdir(parents=True)
    for step, (mean, error) in ACCURACY.items():
        accuracy = {"mean": mean, "standard_error": error, "prompts": 20, "draws": 16}
        (directory / "evaluations" / f"step_{step}.json").write_text(json.dumps({"accuracy": accuracy, "answers": []}))
    (directory / "evaluations" / "step_4.json.superseded").write_text("{}")
    steps = [{"step": step, "reward/mean": step / 10} for step in range(10)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return directory


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plot_accuracy.py", *map(str, arguments)])
    TOOL.main()


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_draws_evaluations_and_metrics_in_order_of_steps(run, tmp_path, monkeypatch, capsys, ending):
    out = tmp_path / "figures" / f"x.{ending}"
    call(monkeypatch, run, "-o", out)
    drawn = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert drawn["accuracy"] == [[step, *values] for step, values in ACCURACY.items()]
    assert drawn["reward"] == [[step, step / 10] for step in range(10)]
    assert json.loads(out.with_suffix(".json").read_text()) == drawn
    assert out.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_the_picture_of_the_readme_is_drawn_from_the_committed_numbers(tmp_path):
    numbers = json.loads(COMMITTED.with_suffix(".json").read_text())
    TOOL.draw(numbers["accuracy"], numbers["reward"], tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == COMMITTED.read_bytes()


def test_every_colour_is_visible_on_light_and_dark_pages(run, tmp_path, monkeypatch):
    """Contrast by WCAG 2 with white and with #0d1117, the dark page of code hosts: at least 4.25. No colour has over 4.34 with both."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (COLOURS.GREY, COLOURS.BLUE, COLOURS.PURPLE, COLOURS.RED):
        for page in ("#ffffff", "#0d1117"):
            low, high = sorted([luminance(colour), luminance(page)])
            assert (high + 0.05) / (low + 0.05) >= 4.25, (colour, page)
    out = tmp_path / "x.svg"
    call(monkeypatch, run, "-o", out)
    assert "#ffffff" not in out.read_text()


def test_a_directory_that_is_no_run_and_another_format_are_refused(run, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        ((tmp_path, "-o", "x.svg"), "has no evaluations and no metrics.jsonl; name the directory of a run"),
        ((run, "-o", "x.pdf"), "x.pdf: the ending chooses the format; use .svg or .png"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        call(monkeypatch, run, "-o", tmp_path / "x.svg")
    assert "3 evaluations and 0 steps; at least one of each is needed" in capsys.readouterr().err
