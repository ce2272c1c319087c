"""The training loop: this file is the algorithm, from prompts to new weights. Read it first.

Each step: collect G scored responses to each prompt → make a batch of the groups that are trained on → update the policy (old and reference
log-probabilities, then epochs × mini-batches of the policy loss) → publish the new weights to the engines → record the metrics.
Synchronous: a step trains on responses sampled from the weights that it starts from. Not here: critics, reward models, multi-turn tools.
"""

import time

from megatron_aspo.config import Config, to_yaml
from megatron_aspo.data.batch import TrainBatch, make_train_batch
from megatron_aspo.observe.model_card import model_card
from megatron_aspo.observe.rollouts import write_rollouts
from megatron_aspo.observe.step_metrics import step_metrics
from megatron_aspo.rollout.collector import Collected
from megatron_aspo.runtime.evaluate import evaluate
from megatron_aspo.runtime.run import Run, is_complete, open_run
from megatron_aspo.runtime.summary import print_complete, print_summary
from megatron_aspo.trainer.settings import UpdateReport


def train(config: Config) -> None:
    """Run the recipe from start, or from where it stopped, to end; print a summary whose last line is one JSON object."""
    if is_complete(config):
        print_complete(config)
        return
    with open_run(config) as run:
        before = evaluate(run, 0) if run.start.step == 0 else run.evaluation(0)
        started, tokens = time.perf_counter(), 0
        run.progress.begin()
        for step in range(run.start.step, config.steps):
            metrics = train_step(run, step)
            due = config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps
            if due and (during := evaluate(run, step + 1)):
                accuracy = during.accuracy
                metrics |= {"evaluation/accuracy": accuracy.mean, "evaluation/standard_error": accuracy.standard_error}
            run.record(metrics)
            run.progress.step(step, metrics)
            tokens += metrics["tokens/generated"]
            run.report_checkpoint()
            run.save_if_due(step + 1)
        minutes = (time.perf_counter() - started) / 60
        run.report_checkpoint(wait=True)
        after = evaluate(run, config.steps)
        if before and after and not before.same_questions(after):
            run.progress.log("the evaluation before training asked other questions: it is left out of the comparison")
            before = None
        run.placement.to_training()
        run.export(model_card(to_yaml(config), before, after, run.metrics.last()))
        print_summary(run, before, after, minutes, tokens, config.export_directory)


def train_step(run: Run, step: int) -> dict:
    """Take one step of the algorithm; return its metrics."""
    started = time.perf_counter()
    sampled_from = run.publisher.version
    collected = collect(run, step)
    batch = make_batch(run, collected)
    report = update(run, batch, step)
    run.ledger.append("trained", step=step, **collected.prompts(), used=collected.used(), sampled_from=sampled_from)
    publishing = time.perf_counter()
    sent = publish(run, step, changed=bool(report.gradient_norms))
    seconds = {"publish": time.perf_counter() - publishing, "step": time.perf_counter() - started}
    return step_metrics(step, collected, report, sampled_from, sent, seconds)


def collect(run: Run, step: int) -> Collected:
    """Have the engines respond to the next prompts and the rewards score every response."""
    collected = run.rollouts.collect(step, lambda phase: run.progress.phase(step, phase))
    run.ledger.append("drawn", step=step, **collected.prompts())
    if collected.missing:
        rounds = run.config.algorithm.resample_rounds
        run.progress.log(
            f"step {step + 1}: {rounds} extra generations (algorithm.resample_rounds) left {collected.missing} groups "
            f"missing; the step trains on {len(collected.kept)}"
        )
    write_rollouts(run.directory / "rollouts" / f"step_{step}.parquet", collected.groups)
    return collected


def make_batch(run: Run, collected: Collected) -> TrainBatch:
    """Put the groups that are trained on into one flat batch."""
    algorithm = run.config.algorithm
    return make_train_batch(collected.kept, algorithm.batch_order, run.trainers.world, overlong_filter=algorithm.overlong_filter)


def update(run: Run, batch: TrainBatch, step: int) -> UpdateReport:
    """Train on the batch: trainer/update.py, on every training rank."""
    run.progress.phase(step, "training")
    run.placement.to_training()
    return run.trainers.update(batch, step)


def publish(run: Run, step: int, changed: bool) -> int:
    """Bring the engines to the new weights; return the bytes sent. Not changed, with nothing left to train on: they have them already."""
    run.progress.phase(step, "publishing weights")
    return run.placement.to_generating(version=step + 1 if changed else run.publisher.version, changed=changed)
