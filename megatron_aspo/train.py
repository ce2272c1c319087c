"""The training loop: this file is the algorithm, from prompts to new weights. Read it first.

Each step: G responses to each prompt are generated and scored; groups become advantages; the training ranks compute old and reference
log-probabilities and take epochs × mini-batches of the policy loss; the new weights go to the engines. Synchronous: what is trained on was
sampled from the weights that training starts from. Not here: critics, reward models, multi-turn tools.
"""

import time

from megatron_aspo.config import Config
from megatron_aspo.data.batch import make_train_batch
from megatron_aspo.data.records import Group
from megatron_aspo.evaluation.accuracy import Accuracy, accuracy
from megatron_aspo.observe.health import rollout_health, staleness
from megatron_aspo.observe.metrics import training_metrics
from megatron_aspo.observe.rollouts import write_rollouts
from megatron_aspo.observe.summary import Evaluation, print_summary
from megatron_aspo.runtime.run import Run, open_run


def train(config: Config) -> None:
    """Run the recipe from start to end; prints a summary whose last line is one JSON object."""
    with open_run(config) as run:
        before = evaluate(run, "before training")
        started = time.perf_counter()
        run.progress.begin()
        tokens = 0
        for step in range(config.steps):
            metrics = train_step(run, step)
            if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
                result = evaluate(run, f"after step {step + 1}")
                metrics |= {"evaluation/accuracy": result.accuracy.mean, "evaluation/standard_error": result.accuracy.standard_error}
            run.metrics.write(metrics)
            run.progress.step(step, metrics)
            tokens += metrics["tokens/generated"]
        minutes = (time.perf_counter() - started) / 60
        checkpoint = run.directory / "checkpoints" / f"step_{config.steps}" / "huggingface"
        run.trainers.export(checkpoint, config.trainer.dtype)
        after = evaluate(run, "after training")
        print_summary(run, before, after, minutes, tokens, checkpoint)


def train_step(run: Run, step: int) -> dict:
    """One pass through the loop; returns the step's figures."""
    started = time.perf_counter()
    algorithm = run.config.algorithm
    run.progress.phase(step, "generating")
    sampled_from = run.publisher.version
    collected = run.rollouts.collect(step)
    if collected.missing:
        run.progress.say(
            f"step {step + 1}: {algorithm.resample_rounds} extra generations (algorithm.resample_rounds) left {collected.missing} groups "
            f"missing; the step trains on {len(collected.kept)}"
        )
    write_rollouts(run.directory / "rollouts" / f"step_{step}.parquet", collected.groups)
    batch = make_train_batch(collected.kept, algorithm.batch_order, run.trainers.world, overlong_filter=algorithm.overlong_filter)
    run.progress.phase(step, "training")
    report = run.trainers.update(batch, step)
    run.progress.phase(step, "publishing weights")
    publishing = time.perf_counter()
    # With nothing left to train on there was no update, and the engines have these weights already.
    sent = run.publisher.publish(version=step + 1) if report.gradient_norms else 0
    seconds = collected.seconds | report.seconds | {"publish": time.perf_counter() - publishing, "step": time.perf_counter() - started}
    return {
        "step": step,
        **rollout_health(collected.groups),
        "groups/dropped": len(collected.groups) - len(collected.kept),
        "groups/resampled": collected.resampled,
        "groups/missing": collected.missing,
        **training_metrics(report),
        "staleness/mean": staleness(collected.groups, sampled_from),
        "tokens/generated": collected.tokens,
        "tokens/trained": report.tokens,
        "tokens/generated_per_s": collected.tokens / seconds["generate"],
        "tokens/trained_per_s": report.tokens / seconds["update"],
        "weights/bytes_sent": sent,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }


def evaluate(run: Run, when: str) -> Evaluation | None:
    """Accuracy on the held-out prompts; None when the recipe asks for none."""
    options = run.config.evaluation
    if not options.draws:
        return None
    with run.progress.waiting(f"evaluation {when}"):
        groups: list[Group] = run.rollouts.evaluate(options.draws, options.temperature).groups
    result: Accuracy = accuracy(groups)
    run.progress.say(f"held-out accuracy {when}: {result} ({result.prompts} prompts × {result.draws} draws)")
    return Evaluation(result, groups)
