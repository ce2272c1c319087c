"""Evaluations of a run on its held-out prompts: before, during and after training."""

from typing import TYPE_CHECKING

from megatron_aspo.evaluation.accuracy import Evaluation, write_evaluation

if TYPE_CHECKING:
    from megatron_aspo.runtime.run import Run


def evaluate(run: "Run", done: int) -> Evaluation | None:
    """Return the accuracy on the held-out prompts after `done` steps; None when the recipe has no evaluation."""
    options = run.config.evaluation
    if not options.draws:
        return None
    when = "before training" if not done else "after training" if done == run.config.steps else f"after step {done}"
    with run.progress.waiting(f"evaluation {when}") as phase:
        responses = run.evaluate(phase)
    result = write_evaluation(run.evaluation_path(done), responses)
    accuracy = result.accuracy
    run.trackers.log(done, {"evaluation/accuracy": accuracy.mean, "evaluation/standard_error": accuracy.standard_error})
    run.progress.log(f"held-out accuracy {when}: {accuracy} ({accuracy.prompts} prompts × {accuracy.draws} draws)")
    return result
