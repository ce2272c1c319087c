"""Real vLLM engines on CPU, as Ray actors, updated over a real gloo group. The oracle is a transformers float32 forward."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.network import reserved_port
from megatron_aspo.data.records import Generation, Prompt
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.engine import EngineError, EngineInfo, Request
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import WeightSender
from megatron_aspo.sync.group import stateless_group
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.weights.layout import ModelDims, ParallelSizes, slices
from tests.models import perturbed, save_tiny

pytestmark = pytest.mark.long
TOLERANCE = 1e-4
BUCKET_BYTES = 200_000
PROMPT = tuple(20 + (7 * position) % 480 for position in range(170))
"""Longer than a block of the prefix cache (32 tokens on CPU), so that it is cached."""


def options(engines: int, tensor_parallel: int = 1) -> RolloutOptions:
    return RolloutOptions(
        engines=engines,
        tensor_parallel=tensor_parallel,
        dtype="float32",
        max_running_requests=8,
        threads=tensor_parallel,
        start_timeout_s=240,
    )


def requests(label: str, count: int, max_tokens: int = 24, temperature: float = 1.0) -> list[Request]:
    """Return prompts of 150 to 200 tokens that differ from their first token on; seeds 0, 1, ..."""
    return [
        Request(
            f"{label}-{i}",
            tuple((i * 31 + 20 + 7 * position) % 480 + 20 for position in range(150 + 7 * i % 50)),
            i,
            max_tokens,
            temperature,
        )
        for i in range(count)
    ]


def logprobs_of(model: PreTrainedModel, state: dict[str, torch.Tensor], request: Request, generation: Generation) -> np.ndarray:
    """Return transformers' logprobs of the sampled tokens under the weights `state`, float32 [response length]."""
    model.load_state_dict(state, strict=False)
    ids = torch.tensor([[*request.prompt_ids, *generation.token_ids.tolist()]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / request.temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0].numpy()


@dataclass
class Rig:
    """Engines, their model, and the sender of its weights."""

    pool: EnginePool
    infos: list[EngineInfo]
    model: PreTrainedModel
    state: dict[str, torch.Tensor]
    """The current weights of the engines."""
    architecture: str
    dims: ModelDims
    engines: EngineSizes
    version: int = 0
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=2))

    def connect(self, dims: ModelDims) -> None:
        """Become the only training rank of a model of these sizes."""
        spec = TransferSpec(self.architecture, dims, ParallelSizes(), self.engines, "float32", BUCKET_BYTES)
        with reserved_port("127.0.0.1") as port:
            pending = self.pool.connect("127.0.0.1", port, spec, timeout_s=30)
            group = stateless_group("127.0.0.1", port, 0, spec.world, timeout_s=30, names=spec.rank_name, terms=spec.terms())
        self.sender = WeightSender(spec.schedule(0, group.hosts), group, torch.device("cpu"))
        pending.result(60)

    def update(self, state: dict[str, torch.Tensor]) -> None:
        self.version += 1
        pending = self.pool.receive_weights(self.version, verify=self.version % 2 == 0)
        self.sender.send_version(lambda name, box: state[name][slices(box)], self.version, self.version % 2 == 0)
        pending.result(60)
        self.state = state

    def error(self, request: Request, generation: Generation) -> float:
        """Return the largest difference of a logprob from the oracle under the current weights."""
        return float(np.abs(generation.logprobs - logprobs_of(self.model, self.state, request, generation)).max())

    def in_background(self, function: Callable, *arguments) -> Future:
        return self.thread.submit(function, *arguments)


def start(model: PreTrainedModel, directory: Path, pool_options: RolloutOptions, **settings) -> Rig:
    pool = EnginePool(str(directory), pool_options, max_model_len=1024, **settings)
    infos = pool.start()
    engines = EngineSizes(pool_options.tensor_parallel, engines=pool_options.engines)
    rig = Rig(pool, infos, model, perturbed(model, seed=0, scale=0), *read_sizes(directory), engines)
    rig.connect(rig.dims)
    return rig


def leftovers(infos: list[EngineInfo]) -> list[str]:
    """Return the processes and shared memory of these engines that still exist."""
    found = []
    for info in infos:
        found += [segment for segment in info.remains.segments if os.path.exists(f"/dev/shm/{segment}")]
        for known in info.remains.processes:
            try:
                process = psutil.Process(known.pid)
                if process.create_time() == known.created and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()) or str(known.pid))
            except psutil.NoSuchProcess:
                continue
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def deterministic(pool: EnginePool) -> Iterator[None]:
    pool.deterministic = True
    yield
    pool.deterministic = False


@pytest.fixture(scope="module")
def tied(ray_cluster, tmp_path_factory) -> Iterator[Rig]:
    """Two engines with a tied model; its only end-of-sequence id is rare."""
    directory = tmp_path_factory.mktemp("tied")
    rig = start(save_tiny("qwen2", directory, tied=True, eos_token_ids=[2]), directory, options(engines=2))
    yield rig
    rig.pool.shutdown()


STOPS = set(range(2, 30))
"""End-of-sequence ids in the untied model's generation config."""
TOKENIZER_STOPS = set(range(400, 420))


@pytest.fixture(scope="module")
def untied(ray_cluster, tmp_path_factory) -> Iterator[Rig]:
    """One engine of two tensor-parallel workers with an untied model, whose generation config would change the sampling."""
    directory = tmp_path_factory.mktemp("untied")
    model = save_tiny("llama", directory, tied=False, seed=1, eos_token_ids=sorted(STOPS))
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    model.generation_config.save_pretrained(directory)
    rig = start(model, directory, options(engines=1, tensor_parallel=2), stop_token_ids=sorted(TOKENIZER_STOPS))
    yield rig
    rig.pool.shutdown()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_transformers_forward_at_the_requests_temperature(tied, temperature):
    asked = requests(f"forward-{temperature}", 8, temperature=temperature)
    for request, generation in zip(asked, tied.pool.generate(asked, group_size=2), strict=True):
        assert generation.logprobs.shape == generation.token_ids.shape
        assert tied.error(request, generation) < TOLERANCE


def test_after_an_update_a_cached_prompt_is_answered_by_the_new_weights(tied):
    for round_number in (1, 2):
        before = tied.state
        # Enough requests to fill both engines, so that the prompt is in the cache of each.
        cached = [Request(f"cached-{round_number}-{i}", PROMPT, i, 8, 1.0) for i in range(4)]
        tied.pool.generate(cached)
        tied.update(perturbed(tied.model, seed=round_number))
        asked = [Request(f"fresh-{round_number}-{i}", PROMPT, i, 24, 1.0) for i in range(4)]
        generations = tied.pool.generate(asked)
        assert tied.pool.versions() == [tied.version, tied.version]
        for request, generation in zip(asked, generations, strict=True):
            assert tied.error(request, generation) < TOLERANCE
            stale = logprobs_of(tied.model, before, request, generation)
            assert np.abs(generation.logprobs - stale).max() > 0.05  # the two sets of weights are distinguishable
            assert [(span.version, span.start, span.stop) for span in generation.versions] == [(tied.version, 0, len(generation.token_ids))]


def test_a_running_response_continues_under_the_new_weights_and_records_where(tied):
    old_state, old_version = tied.state, tied.version
    # More than run at once, so that some are running whenever the update comes, however fast the machine is.
    asked = requests("across", 48, max_tokens=300)
    running = tied.in_background(tied.pool.generate, asked)
    assert wait_until(lambda: sum(state["unfinished"] for state in tied.pool.health()) >= 8, 20)
    time.sleep(0.5)
    tied.update(perturbed(tied.model, seed=11))
    crossing = 0
    for request, generation in zip(asked, running.result(60), strict=True):
        old = logprobs_of(tied.model, old_state, request, generation)
        new = logprobs_of(tied.model, tied.state, request, generation)
        assert generation.versions[0].start == 0
        assert generation.versions[-1].stop == len(generation.token_ids)
        for span in generation.versions:
            truth = {old_version: old, tied.version: new}[span.version]
            assert np.abs(generation.logprobs - truth)[span.start : span.stop].max() < TOLERANCE
        crossing += [span.version for span in generation.versions] == [old_version, tied.version]
    assert crossing >= 2


def test_more_prompt_tokens_than_one_step_computes_are_answered(tied):
    asked = [Request(f"long-{i}", tuple((i * 31 + 7 * position) % 480 + 20 for position in range(700)), i, 4, 1.0) for i in range(16)]
    for request, generation in zip(asked, tied.pool.generate(asked), strict=True):
        assert tied.error(request, generation) < TOLERANCE


def test_a_seed_reproduces_its_response_and_another_seed_gives_another(tied):
    first, again = (tied.pool.generate([Request(f"seed-{n}-{i}", PROMPT, 5, 32, 1.0) for i in range(2)]) for n in range(2))
    for generation in (*first, *again):
        np.testing.assert_array_equal(generation.token_ids, first[0].token_ids)
        np.testing.assert_allclose(generation.logprobs, first[0].logprobs, atol=1e-4)
    other = tied.pool.generate([Request("seed-other", PROMPT, 6, 32, 1.0)])[0]
    assert not np.array_equal(other.token_ids, first[0].token_ids)


def test_deterministic_generation_is_reproducible_bit_for_bit(tied):
    runs = []
    for run in range(2):
        asked = [Request(f"repeat-{run}-{i}", r.prompt_ids, r.seed, 16, 1.0) for i, r in enumerate(requests("", 12))]
        with deterministic(tied.pool):
            runs.append(tied.pool.generate(asked, group_size=3))
        # The contents of the caches differ from run to run.
        tied.pool.generate([Request(f"between-{run}", asked[0].prompt_ids, 9, 4, 1.0)])
    for one, two in zip(*runs, strict=True):
        np.testing.assert_array_equal(one.token_ids, two.token_ids)
        np.testing.assert_array_equal(one.logprobs.view(np.int32), two.logprobs.view(np.int32))


def test_deterministic_generation_distributes_requests_independently_of_load(tied):
    def unfinished() -> list[int]:
        return [state["unfinished"] for state in tied.pool.health()]

    tied.pool.pause()
    others = tied.in_background(tied.pool.generate, requests("others", 6, max_tokens=2), 6)
    assert wait_until(lambda: unfinished() == [6, 0], 20)
    with deterministic(tied.pool):
        ours = tied.in_background(tied.pool.generate, requests("ours", 12, max_tokens=2), 3)
        # By load, the first two groups would both go to engine 1.
        assert wait_until(lambda: unfinished() == [12, 6], 20), unfinished()
    tied.pool.resume()
    assert [len(others.result(30)), len(ours.result(30))] == [6, 12]


@pytest.mark.parametrize(("halt", "go"), [("pause", "resume"), ("sleep", "wake")])
@pytest.mark.parametrize("fixed_share", [False, True])
def test_nothing_is_generated_between_halting_and_resuming(tied, halt, go, fixed_share):
    with deterministic(tied.pool) if fixed_share else nullcontext():
        getattr(tied.pool, halt)()
        running = tied.in_background(tied.pool.generate, requests(f"{halt}-{fixed_share}", 4, max_tokens=2))
        time.sleep(1.0)
        assert not running.done()
        getattr(tied.pool, go)()
        assert [len(generation.token_ids) for generation in running.result(30)] == [2] * 4


def test_a_half_awake_engine_sleeps_and_wakes_completely(tied):
    """This happens when another engine is lost between the two halves."""
    for _ in range(2):
        tied.pool.sleep()
    tied.pool.wake(("weights",))
    tied.pool.sleep()
    assert [state["held_by"] for state in tied.pool.health()] == [["sleep"]] * tied.pool.size
    running = tied.in_background(tied.pool.generate, requests("half awake", 4, max_tokens=2))
    tied.pool.wake(("kv_cache",))  # what was awake before sleeps again
    time.sleep(1.0)
    assert not running.done()
    for _ in range(2):
        tied.pool.wake(("weights",))
    assert [len(generation.token_ids) for generation in running.result(30)] == [2] * 4
    assert [state["held_by"] for state in tied.pool.health()] == [[]] * tied.pool.size


class HaltedAtFirstResponse:
    """A reward pool in which the first response is scored while the engines are halted in the middle of others."""

    def __init__(self, rewards: RewardPool, engines: EnginePool):
        self.rewards, self.engines = rewards, engines
        self.unfinished = None
        self.take_losses = rewards.take_losses

    def submit(self, prompt: Prompt, response: str) -> Future:
        if self.unfinished is not None:
            return self.rewards.submit(prompt, response)
        self.engines.pause()
        self.unfinished = sum(state["unfinished"] for state in self.engines.health())
        future = self.rewards.submit(prompt, response)
        self.first = future.result(60)
        self.engines.resume()
        return future


class Prompts:
    def prompt(self, number: int) -> Prompt:
        return Prompt(f"train/{number}", PROMPT, "words", 0, "dataset")


class Tokens:
    def decode(self, token_ids, skip_special_tokens):
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize("fixed_share", [False, True])
def test_a_response_is_scored_while_others_are_generated(tied, fixed_share):
    """One group on one engine, more than run at once there: when the first are finished, others wait. The workers are real too."""
    rollout = RolloutOptions(prompts_per_step=1, responses_per_prompt=12, max_response_tokens=48)
    reward = DataOptions(reward="tests.unit.user_rewards:length")
    with RewardPool("dataset", reward, workers=2) as rewards, deterministic(tied.pool) if fixed_share else nullcontext():
        watched = HaltedAtFirstResponse(rewards, tied.pool)
        rollouts = Rollouts(Prompts(), tied.pool, watched, Tokens(), rollout, AlgorithmOptions(group_filter="none"), fixed_share, print)
        (group,) = rollouts.collect(0, lambda phase: None).groups
    assert watched.unfinished >= 4 and watched.first.score > 0
    for sample in group.samples:
        assert sample.text == " ".join(map(str, sample.generation.token_ids)) and sample.reward == len(sample.text)


def test_an_exception_in_a_callback_cancels_the_running_requests(tied):
    def refuse(position: int, generation: Generation) -> None:
        raise UserError("the reward is broken")

    for fixed_share in (False, True):
        with deterministic(tied.pool) if fixed_share else nullcontext(), pytest.raises(UserError, match="the reward is broken"):
            short_and_long = [*requests(f"short-{fixed_share}", 1, max_tokens=2), *requests(f"long-{fixed_share}", 7, max_tokens=800)]
            tied.pool.generate(short_and_long, 1, refuse)
        assert wait_until(lambda: not any(state["unfinished"] for state in tied.pool.health()), 20)


def test_an_update_does_not_end_a_pause(tied):
    tied.pool.pause()
    running = tied.in_background(tied.pool.generate, requests("held", 2, max_tokens=2))
    tied.update(perturbed(tied.model, seed=21))
    time.sleep(0.5)
    assert not running.done()
    tied.pool.resume()
    assert [generation.versions[0].version for generation in running.result(30)] == [tied.version] * 2


def test_a_logprob_that_is_not_finite_is_an_error_that_names_the_request(tied):
    good = tied.state
    tied.update(good | {"model.norm.weight": torch.full_like(good["model.norm.weight"], float("nan"))})
    with pytest.raises(EngineError, match="request poisoned-7"):
        tied.pool.generate([Request("poisoned-7", PROMPT, 0, 4, 1.0)])
    tied.update(good)
    request = Request("cured", PROMPT, 0, 4, 1.0)
    assert tied.error(request, tied.pool.generate([request])[0]) < TOLERANCE


def test_a_request_that_cannot_fit_is_refused_by_name(tied):
    with pytest.raises(ValueError, match="request too-long: 170 prompt tokens"):
        tied.pool.generate([Request("too-long", PROMPT, 0, 1024 - len(PROMPT) + 1, 1.0)])


def test_tensor_parallel_workers_of_an_untied_model_follow_updates(untied):
    for seed in (None, 1, 2):
        if seed is not None:
            untied.update(perturbed(untied.model, seed=seed))
        asked = requests(f"untied-{seed}", 6)
        for request, generation in zip(asked, untied.pool.generate(asked), strict=True):
            assert untied.error(request, generation) < TOLERANCE
    assert untied.pool.versions() == [2]


def test_responses_end_with_an_end_token_unless_truncated_and_sampling_ignores_the_generation_config(untied):
    asked = [Request(f"stop-{i}", PROMPT, i, 40, 1.0) for i in range(16)]
    generations = untied.pool.generate(asked)
    stops = STOPS | TOKENIZER_STOPS
    last = [int(generation.token_ids[-1]) for generation in generations if generation.finish_reason == "stop"]
    assert set(last) & STOPS
    assert set(last) & TOKENIZER_STOPS
    for generation in generations:
        assert not stops & set(generation.token_ids[:-1].tolist())
        if generation.finish_reason == "stop":
            assert int(generation.token_ids[-1]) in stops
        else:
            assert generation.finish_reason == "length"
            assert len(generation.token_ids) == 40
    # The config's top_k = 1 would make every first token the same.
    assert len({int(generation.token_ids[0]) for generation in generations}) > 8


def test_an_update_without_a_tensor_is_an_error_and_the_engine_stops_generating(untied):
    untied.connect(replace(untied.dims, layers=1))
    with pytest.raises(EngineError, match=r"as they were: \['model.layers.1.[a-z_]+.weight'"):
        untied.update(untied.state)
    with pytest.raises(EngineError, match="mixture of weights"):
        untied.pool.generate(requests("spoiled", 1))


def test_shutting_down_leaves_no_process_and_no_shared_memory(untied):
    assert any("VLLM" in name or "python" in name for name in leftovers(untied.infos))
    assert any(info.remains.segments for info in untied.infos)  # tensor-parallel workers communicate through shared memory
    untied.pool.shutdown()
    assert leftovers(untied.infos) == []


def test_a_missing_model_is_a_user_error(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"engine 0 did not start: .*/nowhere holds no config.json"):
        EnginePool(str(tmp_path / "nowhere"), options(engines=1), max_model_len=256).start()


def test_the_last_output_of_a_dying_engine_core_reaches_the_user(ray_cluster, tmp_path):
    save_tiny("qwen2", tmp_path, tied=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"engine 0 did not start: .*[Ss]afetensor.*;"):
        EnginePool(str(tmp_path), options(engines=1), max_model_len=256).start()
    shutil.rmtree(tmp_path)


# The tests below kill the engines of `tied`.


def test_a_dead_engine_core_ends_generation_with_an_error_and_its_actor(tied):
    asked = requests("killed-core", 8, max_tokens=800)
    running = tied.in_background(tied.pool.generate, asked)
    assert wait_until(lambda: sum(state["unfinished"] for state in tied.pool.health()) == len(asked), 20)
    victim = tied.infos[1]
    core = next(p.pid for p in victim.remains.processes if psutil.Process(p.pid).name() == "EngineCore")
    os.kill(core, signal.SIGKILL)
    with pytest.raises(EngineError, match="engine 1 died"):
        running.result(20)
    assert wait_until(lambda: not psutil.pid_exists(victim.pid), 10)
    with pytest.raises(EngineError, match="engine 1 died"):
        tied.pool.health()


def test_a_killed_actor_ends_generation_and_takes_its_processes_with_it(tied):
    victim = tied.infos[0]
    # One group goes to the least loaded engine, the first of equals; not all of it ends within half a second.
    running = tied.in_background(tied.pool.generate, [Request(f"killed-actor {i}", PROMPT, i, 800, 1.0) for i in range(8)], 8)
    time.sleep(0.5)
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="engine 0 died"):
        running.result(20)
    # Ray ends the process group of a dead worker.
    assert wait_until(lambda: not any(psutil.pid_exists(known.pid) for known in victim.remains.processes), 10)
    tied.pool.shutdown()
    assert leftovers(tied.infos) == []
