"""The diagnostic figure of docs/losses.md: its input, and that the committed one is drawn from the committed numbers."""

import json

import pytest

from tests.unit.test_packaging import ROOT, load_tool

TOOL = load_tool("plot_weights")
COMMITTED = ROOT / "docs" / "figures" / "weights_by_sign.svg"


def run(directory, loss: str, steps: list[dict]):
    directory.mkdir()
    (directory / "config.yaml").write_text(f"algorithm: {{policy_loss: {loss}}}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return directory


def figures(step: int, values: tuple[float, ...]) -> dict:
    names = ("weight/positive", "weight/negative", "ratio/positive", "ratio/negative")
    return {"step": step, "reward/mean": 0.5, **{f"train/{name}": value for name, value in zip(names, values)}}


def test_steps_without_an_update_are_left_out_and_the_means_are_printed(tmp_path, monkeypatch, capsys):
    steps = [figures(0, (1.5, 0.5, 2.0, 0.75)), {"step": 1, "reward/mean": 1.0}, figures(2, (0.5, 1.5, 4.0, 0.25))]
    one, two = run(tmp_path / "one", "aspo", steps), run(tmp_path / "two", "no_is", steps[:1])
    out = tmp_path / "figures" / "x.svg"
    monkeypatch.setattr("sys.argv", ["plot_weights.py", str(one), str(two), "--out", str(out)])
    TOOL.main()
    means = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {"weight/positive": 1.0, "weight/negative": 1.0, "ratio/positive": 3.0, "ratio/negative": 0.5, "reward": 0.5}
    assert means["aspo"] == expected and means["no_is"]["ratio/positive"] == 2.0
    drawn = json.loads(out.with_suffix(".json").read_text())
    assert drawn["aspo"]["step"] == [1, 3] and drawn["aspo"]["weight/positive"] == [1.5, 0.5]
    assert "<svg" in out.read_text()


def test_two_runs_of_one_loss_are_refused(tmp_path, monkeypatch, capsys):
    runs = [str(run(tmp_path / name, "aspo", [figures(0, (1, 1, 1, 1))])) for name in "ab"]
    monkeypatch.setattr("sys.argv", ["plot_weights.py", *runs, "--out", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit):
        TOOL.main()
    assert "a second run of aspo" in capsys.readouterr().err


def test_the_committed_figure_is_drawn_from_the_committed_numbers(tmp_path):
    runs = json.loads(COMMITTED.with_suffix(".json").read_text())
    assert list(runs) == ["aspo", "ppo_clip", "no_is"]
    TOOL.draw(runs, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == COMMITTED.read_bytes()
