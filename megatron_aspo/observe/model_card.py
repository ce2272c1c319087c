"""The README.md of an exported model: what it is and how it was trained."""

from pathlib import Path

import yaml

from megatron_aspo import __version__
from megatron_aspo.evaluation.accuracy import Evaluation

_CARD = """---
library_name: transformers
{base}tags:
- reinforcement-learning
- megatron_aspo
---

# {name}

{origin} trained for {steps} steps with `{loss}` on the task `{task}` by megatron_aspo {version}.

## Held-out accuracy

{accuracies}

## The last step

{metrics}

## Recipe

```yaml
{recipe}```

## SHA-256 of every tensor

Of its bytes, row-major and little-endian; a checkpoint of the same step lists them in its `manifest.json`.

```
{{hashes}}
```
"""


def model_card(recipe: str, before: Evaluation | None, after: Evaluation | None, metrics: dict) -> str:
    """Return Markdown with `{hashes}` in the position of the tensors' hashes. recipe: the resolved one, as YAML; metrics: those of the last
    step, may be empty."""
    values = yaml.safe_load(recipe)
    local = Path(values["model"]).expanduser().exists()
    shown = {"before training": before, "after training": after}
    rows = [f"- {when}: {e.accuracy} ({e.accuracy.prompts} prompts × {e.accuracy.draws} draws)" for when, e in shown.items() if e]
    figures = [f"- {name}: {value:g}" for name, value in metrics.items() if isinstance(value, int | float)]
    return _CARD.format(
        base="" if local else f"base_model: {values['model']}\n",
        name=values["name"],
        origin=Path(values["model"]).name if local else values["model"],
        steps=values["steps"],
        loss=values["algorithm"]["policy_loss"],
        task=values["task"],
        version=__version__,
        accuracies="\n".join(rows) or "Not measured.",
        metrics="\n".join(figures) or "No step was done.",
        recipe=recipe,
    )
