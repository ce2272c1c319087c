"""`megatron-aspo eval`: generates, grades and reports, together or in separate processes."""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_aspo import __version__
from megatron_aspo.commands.eval_recipe import recipe_of, recipe_settings
from megatron_aspo.common.atomic import disk_errors
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.evaluation.parts import PartStore
from megatron_aspo.evaluation.plan import EvalPlan, EvalRecord, make_plan
from megatron_aspo.evaluation.problems import Problems, load_problems
from megatron_aspo.evaluation.report import GENERATED, PARTS, report
from megatron_aspo.evaluation.resources import with_cache
from megatron_aspo.evaluation.sampling import EngineResponder, Evaluator, Part, Responder, Sampling
from megatron_aspo.evaluation.target import Target, check_positions, engine_dtype, find_target, hugging_face, model_sha256, vocabulary
from megatron_aspo.hf.model import read_model
from megatron_aspo.rewards.service.rules import require_rules

if TYPE_CHECKING:
    from megatron_aspo.runtime.cluster import Cluster

_LOOSE = ("settings.engine", "settings.data.eval_path", "settings.data.reward_workers", "settings.data.reward_resource", "versions")
"""Key paths of the record in which a continuing process may differ."""


def run_eval(parsed: argparse.Namespace) -> int:
    """Evaluate `parsed.target`. Returns 1 if some parts cannot be graded yet. Raises UserError for mistakes that the user can correct."""
    if parsed.watch:
        from megatron_aspo.commands.watch import run_watch

        return run_watch(parsed)
    if parsed.once:
        raise UserError("--once is about --watch; add that, or leave it out")
    if parsed.protocol and parsed.recipe:
        raise UserError(f"--protocol {parsed.protocol} and --recipe {parsed.recipe} both say what is asked; give one of the two")
    if not parsed.out:
        raise UserError("an evaluation needs a directory to write; name it with --out")
    out = parsed.out.expanduser().absolute()
    # Grading needs no model, which may be on other machines only.
    elsewhere = parsed.stage == "grade" and not Path(parsed.target).expanduser().exists()
    target = Target() if elsewhere else find_target(parsed.target)
    recipe = None if parsed.protocol else recipe_of(target, parsed.recipe)
    plan = make_plan(parsed.protocol, recipe_settings(recipe) if recipe else None, parsed.data, parsed.overrides)
    if plan.server_rules and parsed.stage != "generate":
        require_rules(plan.settings.data, plan.server_rules, f"megatron-aspo grade-server --protocol {plan.protocol}{_limits(plan)}")
    with _owned(out, parsed.stage):
        missing = Evaluation(target, plan, out, parsed).run()
        if not missing:
            with disk_errors(out):
                (out / GENERATED).touch()
        if parsed.stage == "generate":
            return 0
        if missing:
            print(f"{missing} parts of {out / PARTS} are not generated yet; what is there is graded", file=sys.stderr)
            return 1
        report(out, plan, parsed.against)
    return 0


def _limits(plan: EvalPlan) -> str:
    """Return the words with which a server gets the rules that were changed from the protocol's."""
    return "".join(f" {key}={value}" for key, value in plan.changed.items() if key in plan.server_rules)


class Evaluation:
    """One evaluation in its directory; `run` completes it."""

    def __init__(self, target: Target, plan: EvalPlan, out: Path, parsed: argparse.Namespace):
        self._target, self._plan, self._settings, self._out = target, plan, plan.settings, out
        self._ray_address, self._model, self._accept_count = parsed.ray_address, parsed.model, parsed.accept_count
        self._generates, self._grades = parsed.stage != "grade", parsed.stage != "generate"

    def run(self) -> int:
        """Complete the stage and return the number of parts that are not generated."""
        settings = self._settings
        if not self._generates:
            problems = load_problems(settings, None, self._accept_count)
            self._check_data(problems)
            store = PartStore(self._out / PARTS, len(problems.prompts), settings.part_problems)
            self._grade(problems, store)
            return len(store.missing())
        with ExitStack() as stack:
            directory = None if self._target.endpoint else stack.enter_context(hugging_face(self._target, self._out / "model"))
            encoder = self._encoder(directory) if directory else None
            problems = load_problems(settings, encoder, self._accept_count)
            store = PartStore(self._out / PARTS, len(problems.prompts), settings.part_problems)
            self._agree(directory, problems)
            if store.missing():
                self._generate(directory, problems, store)
            elif self._grades:
                self._grade(problems, store)
        return len(store.missing())

    def _encoder(self, directory: Path) -> PromptEncoder:
        check_positions(directory, self._settings.max_model_len)
        self._tokenizer = load_tokenizer(directory)
        return PromptEncoder(self._tokenizer, vocabulary(directory), self._settings.data)

    def _agree(self, directory: Path | None, problems: Problems) -> None:
        """Record the model and problems, or check that they match the directory's record."""
        if directory:
            model = {"sha256": model_sha256(directory)}
            prompts = "".join(f"{list(prompt.token_ids)}\n" for prompt in problems.prompts)
            data = {"prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest()}
        else:
            model, data = {"endpoint": self._target.endpoint, "model": self._model}, {}
        values = {
            "protocol": self._plan.protocol,
            "changed": self._plan.changed,
            "settings": dataclasses.asdict(self._settings),
            "model": model,
            "data": data | {"sha256": problems.sha256, "problems": len(problems.prompts), "rows": problems.counts},
            "versions": {"megatron_aspo": __version__},
        }
        loose = _LOOSE if not self._settings.deterministic else _LOOSE[1:]
        EvalRecord(self._out).agree(values, loose)

    def _check_data(self, problems: Problems) -> None:
        """Check that the directory's responses belong to these problems, so that the result's record is true."""
        record = EvalRecord(self._out)
        if not record.read():
            raise UserError(f"{self._out} has no responses to grade; generate them first with --stage generate")
        values = {"protocol": self._plan.protocol, "settings": dataclasses.asdict(self._settings), "data": {"sha256": problems.sha256}}
        record.compare(values, values, _LOOSE)

    def _sampling(self) -> Sampling:
        s = self._settings
        return Sampling(s.samples, s.temperature, s.top_p, s.max_response_tokens, s.seed, tuple(s.stop))

    def _generate(self, directory: Path | None, problems: Problems, store: PartStore) -> None:
        """Generate the missing parts and, unless another process grades, grade all ungraded parts."""
        settings = self._settings
        with ExitStack() as stack:
            if directory or self._grades:
                cluster = stack.enter_context(_cluster(self._ray_address, settings, engines=directory is not None))
            rewards = stack.enter_context(_rewards(settings)) if self._grades else None
            if directory:
                _check_devices(settings, cluster)
                responder: Responder = stack.enter_context(self._engines(directory, cluster.device))
            else:
                from megatron_aspo.evaluation.endpoint import Endpoint

                at_once = settings.engine.max_running_requests
                responder = Endpoint(self._target.endpoint, self._model, problems.messages, at_once, settings.stop)
            missing = store.missing()
            evaluator = Evaluator(problems.prompts, self._sampling(), responder, rewards, _Recorder(store, len(missing), self._grades))
            if rewards:
                for part in store.ungraded():
                    evaluator.run([part], one_by_one=True)
            evaluator.run(missing, settings.deterministic)

    @contextmanager
    def _engines(self, directory: Path, device: str) -> Iterator[Responder]:
        from megatron_aspo.rollout.pool import EnginePool

        s, eos = self._settings, self._tokenizer.eos_token_id
        given, model = s.rollout(engine_dtype(directory)), read_model(directory)
        options = with_cache(model, given, s.engine.kv_cache_gib > 0, s.max_model_len, device, here=not self._ray_address)
        stop_ids = () if eos is None else (cast(int, eos),)
        engines = EnginePool(str(directory), options, s.max_model_len, device, s.seed, s.deterministic, stop_ids)
        try:
            started = time.monotonic()
            (info, *_) = engines.start()
            seconds = time.monotonic() - started
            what = f"{options.engines} × vLLM {info.vllm_version} on {info.device}, {options.dtype}"
            print(f"engines: {what}, key-value cache {options.kv_cache_gib:.3g} GiB; {seconds:.0f} s", flush=True)
            yield EngineResponder(engines, self._tokenizer)
        finally:
            engines.shutdown()

    def _grade(self, problems: Problems, store: PartStore) -> None:
        if not any(True for _ in store.ungraded()):
            return
        with _cluster(self._ray_address, self._settings, engines=False), _rewards(self._settings) as rewards:
            evaluator = Evaluator(problems.prompts, self._sampling(), None, rewards, _Recorder(store, 0, True))
            for part in store.ungraded():
                evaluator.run([part], one_by_one=True)


class _Recorder:
    """Writes parts and prints the progress."""

    def __init__(self, store: PartStore, parts: int, grades: bool):
        self._store, self._parts, self._grades, self._generated = store, parts, grades, 0

    def __call__(self, part: Part) -> None:
        self._store.write(part)
        graded = all(response.graded for response in part.responses)
        self._generated += not graded
        done = f"{sum(response.right for response in part.responses)} of {len(part.responses)} right" if graded else "generated"
        print(f"part {part.number}: problems {part.start} to {part.stop - 1}: {done}", flush=True)


@contextmanager
def _owned(out: Path, stage: str) -> Iterator[None]:
    """Hold the directory's lock for generating, or grading. Raises UserError while another process holds it."""
    with disk_errors(out), ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("generate", "grade") if stage == "all" else (stage,):
            lock = stack.enter_context((out / f"{name}.lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{out} is in use by another evaluation; wait until that ends, or choose another --out") from error
        locks = stack.pop_all()
    with locks:
        yield


@contextmanager
def _cluster(address: str, settings: EvalSettings, engines: bool) -> Iterator["Cluster"]:
    from megatron_aspo.runtime.cluster import open_cluster

    sizes = settings.rollout("float32").sizes if engines else None
    with contextlib.closing(open_cluster(address, settings.engine.engines + 1, sizes)) as cluster:
        yield cluster


def _check_devices(settings: EvalSettings, cluster: "Cluster") -> None:
    """Raise UserError for engines that Ray could never place: it would wait for ever."""
    engine = settings.engine
    needed = engine.engines * (engine.tensor_parallel if cluster.device == "cuda" else 1)
    if needed > cluster.slots:
        kind = "GPUs" if cluster.device == "cuda" else "CPUs"
        raise UserError(f"engine.engines={engine.engines} needs {needed} {kind}, and the Ray cluster has {cluster.slots}; lower it")


def _rewards(settings: EvalSettings):
    from megatron_aspo.rewards.pool import RewardPool

    return RewardPool(settings.task, settings.data, settings.data.reward_workers, settings.samples)
