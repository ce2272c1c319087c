"""The training loop: this file is the algorithm, from prompts to new weights. Read it first.

Each step: G responses to each prompt are generated and scored; groups become advantages; the training ranks compute old and reference
log-probabilities and take epochs × mini-batches of the policy loss; the new weights go to the engines. Synchronous: what is trained on was
sampled from the weights that training starts from. Not here: critics, reward models, multi-turn tools.
"""

import json
import time
from functools import partial

from megatron_aspo.config import Config, to_yaml
from megatron_aspo.data.batch import make_train_batch
from megatron_aspo.evaluation.accuracy import Evaluation, keep
from megatron_aspo.observe.health import rollout_health, staleness
from megatron_aspo.observe.metrics import count_updates, read_metrics, training_metrics
from megatron_aspo.observe.model_card import model_card
from megatron_aspo.observe.rollouts import write_rollouts
from megatron_aspo.runtime.run import Run, is_complete, open_run
from megatron_aspo.runtime.summary import print_summary


def train(config: Config) -> None:
    """Run the recipe from start, or from where it stopped, to end; prints a summary whose last line is one JSON object."""
    if is_complete(config):
        print(f"run {config.directory} is complete")
        updates = count_updates(read_metrics(config.directory / "metrics.jsonl"))
        places = {"run_dir": str(config.directory), "hf_model": str(config.export_directory)}
        print(json.dumps({"steps": config.steps, "updates": updates, **places}))
        return
    with open_run(config) as run:
        before = evaluate(run, 0) if run.start.step == 0 else run.evaluation(0)
        started = time.perf_counter()
        run.progress.begin()
        tokens = 0
        for step in range(run.start.step, config.steps):
            metrics = train_step(run, step)
            if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
                accuracy = evaluate(run, step + 1).accuracy
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
            run.progress.say("the evaluation before training asked other questions: it is left out of the comparison")
            before = None
        run.placement.to_training()
        card = model_card(to_yaml(config), before, after, run.metrics.last())
        run.export(card)
        print_summary(run, before, after, minutes, tokens, config.export_directory)


def train_step(run: Run, step: int) -> dict:
    """One pass through the loop; returns the step's figures."""
    started = time.perf_counter()
    algorithm = run.config.algorithm
    phase = partial(run.progress.phase, step)
    sampled_from = run.publisher.version
    first = run.rollouts.drawn
    collected = run.rollouts.collect(step, phase)
    run.ledger.append("drawn", step=step, first=first, count=len(collected.groups))
    if collected.missing:
        run.progress.say(
            f"step {step + 1}: {algorithm.resample_rounds} extra generations (algorithm.resample_rounds) left {collected.missing} groups "
            f"missing; the step trains on {len(collected.kept)}"
        )
    write_rollouts(run.directory / "rollouts" / f"step_{step}.parquet", collected.groups)
    batch = make_train_batch(collected.kept, algorithm.batch_order, run.trainers.world, overlong_filter=algorithm.overlong_filter)
    phase("training")
    run.placement.to_training()
    report = run.trainers.update(batch, step)
    used = [first + place for place, group in enumerate(collected.groups) if any(group is kept for kept in collected.kept)]
    run.ledger.append("trained", step=step, first=first, count=len(collected.groups), used=used, sampled_from=sampled_from)
    phase("publishing weights")
    publishing = time.perf_counter()
    # With nothing left to train on there was no update, and the weights are those that the engines had.
    changed = bool(report.gradient_norms)
    sent = run.placement.to_generating(version=step + 1 if changed else sampled_from, changed=changed)
    seconds = collected.seconds | report.seconds | {"publish": time.perf_counter() - publishing, "step": time.perf_counter() - started}
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
        "weights/bytes_sent": sent,
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }


def evaluate(run: Run, done: int) -> Evaluation | None:
    """Accuracy on the held-out prompts after `done` steps; None when the recipe asks for none."""
    options = run.config.evaluation
    if not options.draws:
        return None
    when = "before training" if not done else "after training" if done == run.config.steps else f"after step {done}"
    with run.progress.waiting(f"evaluation {when}") as phase:
        responses = run.evaluate(phase)
    result = keep(run.evaluation_path(done), responses)
    accuracy = result.accuracy
    run.trackers.log(done, {"evaluation/accuracy": accuracy.mean, "evaluation/standard_error": accuracy.standard_error})
    run.progress.say(f"held-out accuracy {when}: {accuracy} ({accuracy.prompts} prompts × {accuracy.draws} draws)")
    return result
