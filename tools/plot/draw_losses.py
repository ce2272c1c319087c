#!/usr/bin/env python
"""Draw the effect of a policy loss on a token: its gradient weight −(∂L/∂logp)/A against the ratio r, for A > 0 and for A < 0.

    python tools/plot/draw_losses.py                                # all of docs/figures/losses/
    python tools/plot/draw_losses.py my_losses:mine --out pictures  # a custom loss

The curves come from autograd on the losses themselves, with their default options. The background is transparent and the colours can be
read on a light page and on a dark one (colours.py).
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

sys.path.insert(0, str(Path(__file__).parent))

from colours import BLUE, GREY, RED

from megatron_aspo.losses import registry
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.policy import PolicyTokens
from megatron_aspo.losses.section import algorithm_options

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "figures" / "losses"
DRAWN = (*registry.POLICY_LOSSES, "examples.losses.sapo:sapo")
SIGNS = {1: ("A > 0", BLUE), -1: ("A < 0", RED)}
PPO_CLIP = {"color": GREY, "alpha": 0.45, "linewidth": 4}
STYLE = {
    # The same bytes in every run: no random ids, no dates, glyphs as outlines, no points dropped.
    "svg.hashsalt": "megatron_aspo",
    "svg.fonttype": "path",
    "path.simplify": False,
    "font.size": 11,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "figure.constrained_layout.wspace": 0.06,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def marks(name: str, sign: int, low_entropy: bool) -> dict[str, float]:
    """Return label → ratio at which the loss changes for tokens with this sign of A: the bounds 1 ± ε and the caps."""
    options = algorithm_options(policy_loss=name).policy_loss_options
    prefix = "" if low_entropy or "high_entropy_clip_low" not in options else "high_entropy_"
    found = {}
    if f"{prefix}clip_low" in options and (sign < 0 or name == "cispo"):  # cispo bounds the weight for both signs
        found["1 − ε"] = 1 - options[f"{prefix}clip_low"]
    if f"{prefix}clip_high" in options and (sign > 0 or name == "cispo"):
        found["1 + ε"] = 1 + options[f"{prefix}clip_high"]
    if "dual_clip_neg" in options and sign < 0:
        found["c"] = options["dual_clip_neg"]
    if "dual_clip_pos" in options and sign > 0:
        found["1/c"] = 1 / options["dual_clip_pos"]
    return {label: ratio for label, ratio in found.items() if ratio > 0}


def curve(name: str, sign: int, low_entropy: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return (ratio, gradient weight), float64 [points]: r from 0.1 to 10 (gspo: s, 0.999 to 1.001); points close to marks too."""
    ratio = np.linspace(0.999, 1.001, 102) if name == "gspo" else np.geomspace(0.1, 10, 102)
    sides = [at * (1 + side) for at in marks(name, sign, low_entropy).values() for side in (-1e-9, 1e-9)]
    ratio = np.sort(np.concatenate([ratio, sides]))
    n = len(ratio)
    old = torch.full((n,), -3.0, dtype=torch.float64)
    logprobs = (old + torch.from_numpy(np.log(ratio))).requires_grad_()
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.full_like(old, sign),
        entropy=torch.ones_like(old),
        low_entropy=torch.full((n,), low_entropy),
        mask=torch.ones(n, dtype=torch.bool),
        offsets=list(range(n + 1)),  # one token per response
    )
    (gradient,) = torch.autograd.grad(find_policy_loss(algorithm_options(policy_loss=name))(tokens).loss.sum(), logprobs)
    return ratio, (-gradient / sign).numpy() + 0.0  # no negative zeros


def draw(name: str, path: Path) -> None:
    """Draw one loss, as SVG."""
    classes = not registry.is_custom(name) and registry.declaration(name).entropy_classes
    lines = {"low-entropy tokens" if classes else name.rpartition(":")[2]: {"linewidth": 2}}
    if classes:
        lines["other tokens"] = {"linewidth": 2, "linestyle": (0, (3, 1.5))}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(6.0, 3.2), sharey=True, layout="constrained")
        legend = [Line2D([], [], color=GREY, label=label, **style) for label, style in lines.items()]
        if name not in ("ppo_clip", "gspo"):
            legend.append(Line2D([], [], label="ppo_clip", **PPO_CLIP))
        for panel, (sign, (title, colour)) in zip(panels, SIGNS.items(), strict=True):
            if name not in ("ppo_clip", "gspo"):
                panel.plot(*curve("ppo_clip", sign), **PPO_CLIP)
            for style, low_entropy in zip(lines.values(), (True, False), strict=False):
                panel.plot(*curve(name, sign, low_entropy), color=colour, **style)
            panel.set_title(title, color=colour, fontsize=12, loc="left")
            _axes(panel, name, sign)
        panels[0].set_ylabel("gradient weight")
        figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _axes(panel: plt.Axes, name: str, sign: int) -> None:
    if name == "gspo":
        panel.set(xlim=(0.999, 1.001), ylim=(0, 1.8), xlabel="s, geometric mean of r")
        ticks = {0.999: "0.999", 1.0: "1", 1.001: "1.001"}
        panel.set_yticks([0, 1])
    else:
        panel.set(xscale="log", xlim=(0.1, 10), ylim=(0, 5.4), xlabel="r = π / π_old")
        panel.set_yticks([0, 1, 2, 3])
        ticks = {0.1: "0.1", 0.3: "0.3", 1.0: "1", 3.0: "3", 10.0: "10"}
    panel.set_xticks(list(ticks), list(ticks.values()))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axhline(1, color=GREY, alpha=0.5, linewidth=0.8, zorder=0)
    both = {(label, x) for low_entropy in (True, False) for label, x in marks(name, sign, low_entropy).items()}
    for label, x in sorted(both, key=lambda mark: mark[1]):
        value = f"{x - 1:+.0e}".replace("e-0", "e−").replace("-", "−") if name == "gspo" else f"{x:.2g}"
        panel.axvline(x, color=GREY, linewidth=1, linestyle=":", zorder=0)
        # To the right of its line where it is the second of two bounds of a name, or the curve is to the left.
        right = label == "1/c" or any(other == label and x > smaller for other, smaller in both)
        text = f"{label[0]} {value[0]} {value[1:]}" if name == "gspo" else f"{label} = {value}"
        style = {"rotation": 90, "va": "top", "ha": "left" if right else "right", "fontsize": 10}
        panel.text(x, 1, f" {text} " if right else f"{text} ", transform=panel.get_xaxis_transform(), **style)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the gradient weight of policy losses against the ratio.")
    parser.add_argument(
        "losses", nargs="*", default=DRAWN, metavar="LOSS", help="names, or package.module:function; ours when none is given"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the pictures go, docs/figures/losses by default")
    parsed = parser.parse_args(arguments)
    sys.path.append(str(ROOT))  # the examples
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name in parsed.losses:
        path = parsed.out / f"{name.rpartition(':')[2]}.svg"
        draw(name, path)
        print(path)


if __name__ == "__main__":
    main()
