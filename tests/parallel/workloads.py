"""Workloads that the pool's processes run. Each function is collective: (rank, path at which the ranks meet, …) on every rank."""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_aspo.data.batch import TrainBatch


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return the values of a tensor on any device."""
    return tensor.detach().cpu().numpy()


def arrays(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: array(tensor) for name, tensor in tensors}


def on_device(trainer, values: np.ndarray) -> torch.Tensor:
    """Return a tensor on the trainer's device."""
    return torch.from_numpy(values).to(trainer.device.torch_device)


def one_step(rank: int, meeting: str, settings, batch: TrainBatch, old: np.ndarray, reference: np.ndarray | None, advantages: np.ndarray):
    """Return gradients and weights (Hugging Face names) and the tally of one optimizer step over the batch; rank 0's result counts."""
    with _trainer(rank, meeting, settings) as trainer:
        from megatron_aspo.trainer.optimizer import set_learning_rate  # after rank.py, which prepares Megatron-Core
        from megatron_aspo.trainer.update import Scores

        scored, _ = trainer.updater.score(trainer.model, batch, np.arange(batch.samples))
        per_token = np.repeat(advantages, np.diff(batch.response_offsets)).astype(np.float32)
        scores = Scores(*(None if values is None else on_device(trainer, values) for values in (old, reference, per_token)))
        set_learning_rate(trainer.optimizer, settings.optimizer, step=0)
        tally = trainer.updater.accumulate_gradients(batch, np.arange(batch.samples), scores)
        metas = trainer.tensor_metas("float32")
        gradients = None
        if not settings.trainer.distributed_optimizer:
            gradients = arrays(trainer.whole_tensors(metas, lambda parameter: parameter.main_grad))
        gradient_dtypes = {parameter.main_grad.dtype for parameter in trainer.model.parameters()}
        _, norm = trainer.updater.apply_gradients()
        weights = arrays(trainer.whole_tensors(metas))
        last = trainer.parallel.is_last_stage
        return {
            "logprobs": array(scored) if last else None,
            "gradients": gradients,
            "gradient dtypes": gradient_dtypes,
            "weights": weights,
            "norm": norm,
            "tally": trainer.updater.sum_over_replicas(tally) if last else None,
        }


def kept_for_backward(rank: int, meeting: str, settings, batch: TrainBatch) -> int:
    """Return the bytes of activations that the model's forward pass keeps for backward; the whole batch in one micro-batch."""
    with _trainer(rank, meeting, settings) as trainer:
        weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
        kept, readings = {}, []

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        trainer.model.register_forward_hook(lambda *_: readings.append(sum(kept[key] for key in kept.keys() - weights)))
        samples = np.arange(batch.samples)
        scores = trainer.updater.prepare(batch)[0]
        readings.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.updater.accumulate_gradients(batch, samples, scores)
        (reading,) = readings
        return reading


def described(rank: int, meeting: str, settings) -> dict[str, str]:
    with _trainer(rank, meeting, settings) as trainer:
        return trainer.describe()


def offloaded(rank: int, meeting: str, settings, batch: TrainBatch) -> dict:
    """Take two rollout steps; return the offloaded tensors that each pass had in memory, and those left when they are over."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from megatron_aspo.trainer.model import chunks
    from megatron_aspo.trainer.optimizer_state import state_tensors

    with _trainer(rank, meeting, settings) as trainer:
        held = {
            "reference": lambda: list(trainer.reference.parameters()),
            "optimizer": lambda: list(state_tensors(trainer.optimizer)),
        }
        outside = {name: {t.data_ptr() for t in tensors()} for name, tensors in held.items()}
        seen: dict[str, list] = {}

        def note(name: str) -> None:
            uses[name] = [(t.data_ptr() in outside[name], StorageWeakRef(t.untyped_storage())) for t in held[name]()]

        chunks(trainer.reference)[0].register_forward_pre_hook(lambda *_: note("reference"))
        step = trainer.optimizer.step

        def noting():
            note("optimizer")
            return step()

        trainer.optimizer.step = noting
        for number in range(2):
            uses: dict[str, list] = {}
            trainer.update(batch, number)
            for name, tensors in uses.items():
                seen[name] = seen.get(name, []) + tensors
        return {
            name: {
                "tensors": len(tensors()),
                "bytes": sum(t.nbytes for t in tensors()),
                "moved": sum(not stayed for stayed, _ in seen[name]),
                "left": sum(not storage.expired() for _, storage in seen[name]),
                "home again": {t.data_ptr() for t in tensors()} == outside[name],
            }
            for name, tensors in held.items()
        }


def most_moments_on_the_device(rank: int, meeting: str, settings) -> int:
    """Return the largest number of parameters whose moments were on the device at one time while the trainer was built."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from megatron_aspo.trainer import optimizer_state

    create, made, alive = optimizer_state._create_state, [], [0]

    def noting(adam, group, parameter):
        new, state = not adam.state[parameter], create(adam, group, parameter)
        if new:
            made.append(StorageWeakRef(state["exp_avg"].untyped_storage()))
            alive.append(sum(not storage.expired() for storage in made))
        return state

    optimizer_state._create_state = noting
    try:
        with _trainer(rank, meeting, settings):
            return max(alive)
    finally:
        optimizer_state._create_state = create


def _offloaded_tensors(trainer) -> list[torch.Tensor]:
    from megatron_aspo.trainer.optimizer_state import state_tensors

    options = trainer.settings.trainer
    state = state_tensors(trainer.optimizer) if options.offload_optimizer else ()
    return [*state, *(trainer.reference.parameters() if options.offload_reference else ())]


@contextmanager
def _trainer(rank: int, meeting: str, settings):
    from megatron_aspo.trainer.rank import TrainerRank

    local_rank = rank % max(1, torch.cuda.device_count())
    trainer = TrainerRank(settings, rank, dist.FileStore(meeting, settings.sizes.world), local_rank)
    try:
        yield trainer
    finally:
        trainer.close()


def logits(rank: int, meeting: str, settings, sequences: list[list[int]]) -> np.ndarray:
    """Return this rank's columns of the logits of packed sequences, [tokens, rows of the output matrix]; one pipeline stage."""
    from megatron_aspo.trainer.attention import causal_params

    with _trainer(rank, meeting, settings) as trainer, torch.no_grad():
        lengths = [len(sequence) for sequence in sequences]
        hidden = trainer.model(
            input_ids=on_device(trainer, np.array([[token for sequence in sequences for token in sequence]])),
            position_ids=on_device(trainer, np.array([[i for n in lengths for i in range(n)]])),
            attention_mask=None,
            packed_seq_params=causal_params(lengths, trainer.device.torch_device),
        )
        return array(hidden[:, 0] @ trainer.model.output_weight().T)


def export(rank: int, meeting: str, settings, directory: Path, dtype: str) -> None:
    """Write the weights just loaded."""
    from megatron_aspo.checkpoint.hf_export import write_export

    with _trainer(rank, meeting, settings) as trainer:
        write_export(directory, trainer, dtype)


def vocab_parallel_logprobs(rank: int, meeting: str, world: int, hidden, weight, targets, upstream, vocab: int):
    """Return values and gradients of this rank, with the vocabulary sharded over all ranks."""
    from megatron_aspo.trainer.logprobs import logprobs

    dist.init_process_group("gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    rows = weight.shape[0] // world
    hidden = torch.from_numpy(hidden).requires_grad_()
    mine = torch.from_numpy(weight[rank * rows : (rank + 1) * rows].copy()).requires_grad_()
    values = logprobs(hidden, mine, torch.from_numpy(targets), 0.8, dist.group.WORLD, vocab=vocab, chunk_tokens=4)
    torch.autograd.backward(values, [torch.from_numpy(u) for u in upstream])
    dist.destroy_process_group()
    return values[0].detach().numpy(), values[1].detach().numpy(), hidden.grad.numpy(), mine.grad.numpy()


def train_once(rank: int, meeting: str, settings, batch: TrainBatch, step: int = 0) -> tuple:
    """Run one whole `update`: scores, epochs × mini-batches; return the report of the last rank and the weights of rank 0."""
    with _trainer(rank, meeting, settings) as trainer:
        report = trainer.update(batch, step)
        weights = arrays(trainer.whole_tensors(trainer.tensor_metas("float32")))
        return report, weights


def train_and_park(rank: int, meeting: str, settings, batch: TrainBatch, parked: bool) -> dict:
    """Take two updates, between which all device memory is offloaded and reloaded, or not."""
    with _trainer(rank, meeting, settings) as trainer:
        trainer.update(batch, step=0)
        parameters = list(trainer.model.parameters())
        sizes = [parameter.untyped_storage().nbytes() for parameter in parameters]
        offloaded = _offloaded_tensors(trainer)
        in_host_memory = [tensor.data_ptr() for tensor in offloaded]
        if parked:
            trainer.offload("optimizer")
            gradients = sum(parameter.main_grad.untyped_storage().nbytes() for parameter in parameters)
            trainer.offload("weights")
            left = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
            assert [tensor.data_ptr() for tensor in offloaded] == in_host_memory
            trainer.reload()
            assert (gradients, left) == (0, 0)
        assert [parameter.untyped_storage().nbytes() for parameter in parameters] == sizes
        trainer.update(batch, step=1)
        return arrays(trainer.whole_tensors(trainer.tensor_metas("float32")))


def card_memory(rank: int, meeting: str, settings, batch: TrainBatch) -> dict[str, int]:
    """Return the bytes of the whole card in use by any process: in training, offloaded, and reloaded; and the bytes that were offloaded."""

    def taken() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    with _trainer(rank, meeting, settings) as trainer:
        trainer.update(batch, step=0)
        found = {"training": taken()}
        for part in ("optimizer", "weights"):
            trainer.offload(part)
        found["parked"] = taken()
        found["moved"] = sum(nbytes for storage in trainer._offloaded.values() for _, nbytes, _ in storage._offloaded)
        trainer.reload()
        trainer.update(batch, step=1)
        found["back"] = taken()
        return found


def prepare(rank: int, meeting: str, settings, batch: TrainBatch, scale: float) -> dict:
    """Return the step's constants, with the model's weights `scale` times the reference's; the last rank's result counts."""
    with _trainer(rank, meeting, settings) as trainer:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(scale)
        scores, mismatch, tally = trainer.updater.prepare(batch)
        held = {name: None if t is None else array(t) for name, t in vars(scores).items()}
        return held | {"mismatch": mismatch, "tally": tally}


def count_threads(rank: int, meeting: str) -> int:
    """Return the number of threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def send_weights(rank: int, meeting: str, settings, port: int, spec, versions: list[int]) -> list[int]:
    """Send the weights just loaded to the receivers at `port`, once for each version; return the bytes of each time."""
    with _trainer(rank, meeting, settings) as trainer:
        trainer.connect("127.0.0.1", port, spec)
        return [trainer.publish(version, verify=True) for version in versions]
