"""The metrics of one step, by the names in `metrics.jsonl`: one flat line from all that the loop has in hand."""

from typing import TYPE_CHECKING, Any

from megatron_aspo.observe.health import rollout_health, staleness
from megatron_aspo.observe.metrics import training_metrics
from megatron_aspo.trainer.settings import UpdateReport

if TYPE_CHECKING:
    from megatron_aspo.rollout.collector import Collected


def step_metrics(
    step: int, collected: "Collected", report: UpdateReport, sampled_from: int, bytes_sent: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the metrics of a step, in the order in which they are written.

    sampled_from: version of the engines' weights at the start of the step; bytes_sent: by the transfer of the new weights; seconds: of the
    phases that neither `collected` nor `report` has timed.
    """
    seconds = collected.seconds | report.seconds | seconds
    return {
        "step": step,
        **rollout_health(collected.groups),
        "reward/worker_restarts": collected.worker_restarts,
        "groups/dropped": len(collected.groups) - len(collected.kept),
        "groups/resampled": collected.resampled,
        "groups/missing": collected.missing,
        **training_metrics(report),
        "staleness/mean": staleness(collected.groups, sampled_from),
        "tokens/generated": collected.tokens,
        "tokens/trained": report.tokens,
        "tokens/generated_per_s": collected.tokens / seconds["generate"],
        "tokens/trained_per_s": report.tokens / seconds["update"],
        "weights/bytes_sent": bytes_sent,
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }
