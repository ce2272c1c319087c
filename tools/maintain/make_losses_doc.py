#!/usr/bin/env python
"""Write the section "The family" of docs/losses.md from the signatures and docstrings of the built-in policy losses.

    python tools/maintain/make_losses_doc.py

A test holds the page current. The pictures are drawn by tools/plot/draw_losses.py.
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.losses import registry  # noqa: E402
from megatron_aspo.losses.declaration import Declaration  # noqa: E402

PAGE = ROOT / "docs" / "losses.md"
START, END = "## The family\n", "## A loss of your own\n"
HEADER = """Each loss is one file of [`builtin/`](../megatron_aspo/losses/builtin); this section is its docstring and its signature. An
option is a key of `algorithm`, such as `algorithm.clip_low`.
"""


def page(current: str) -> str:
    """Return the page with the section written again."""
    before, _, rest = current.partition(START)
    _, _, after = rest.partition(END)
    sections = "".join(_section(loss, before) for loss in registry.POLICY_LOSSES)
    return f"{before}{START}\n{_wrapped(HEADER)}\n\n{sections}{END}{after}"


def _section(loss: str, before: str) -> str:
    signature, declared = registry.signature(loss), registry.declaration(loss)
    picture = f"![gradient weight of {loss}](figures/losses/{loss}.svg)"
    blocks = [f"### `{loss}`", *map(_wrapped, signature.documentation.split("\n\n"))]
    if picture not in before:
        blocks.append(picture)
    blocks.append(_options(loss) if signature.options else "It has no options.")
    if declared.entropy_classes:
        blocks.append("It reads the [entropy classes](#entropy-classes).")
    if declared.aggregation != Declaration.aggregation:
        blocks.append(f"Under it the default of `aggregation` is `{declared.aggregation}`.")
    return "\n\n".join(blocks) + "\n\n"


def _options(loss: str) -> str:
    rows = [f"| `{name}` | {option.default} | {option.meaning} |" for name, option in registry.signature(loss).options.items()]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def _wrapped(block: str) -> str:
    """Return a paragraph in lines of the page's width; a formula, which is indented, as it is."""
    if block.startswith("    "):
        return block.rstrip()
    return textwrap.fill(" ".join(block.split()), 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
