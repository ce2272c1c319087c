"""The one file that adapts vLLM. It is loaded in an engine's process, and in vLLM's worker processes through `worker_extension_cls`.

Written for vLLM 0.32.0. Each adaptation, its reason, and when it can go:

- A custom weight-transfer back end, registered through vLLM's public factory: its built-in ones all need CUDA, and send what a worker
  does not need. It can go when vLLM has one for gloo that takes parts of tensors.
- Re-packing a tied output head after an update, on CPU. Linear layers keep their weights inside a packed oneDNN handle (`cpu_linear`).
  vLLM's layerwise reload re-packs every layer that received a tensor, but a tied `lm_head` receives none: it shares the embedding's
  parameter, and would silently go on computing logits with the packed copy of its old weights. It can go when vLLM re-packs it.
- Re-packing experts after an update, on CPU: vLLM packs them when it starts and never again, while its kernel silently goes on reading
  the packed weights. It can go when vLLM re-packs them.
- A copy of what vLLM's reload keeps of a bucket until the rest of a layer arrives: by then the sender has reused the bucket's memory.
- A count of what arrived. vLLM's reload only logs a warning about a layer that received nothing, and keeps its old weights; it does not
  notice a layer that received a part.
- Forking the engine core, on CPU. vLLM always spawns it there, so that each engine imports vLLM twice: 5 s of its start, and memory that a
  forked process shares. It can go when vLLM leaves the choice to VLLM_WORKER_MULTIPROC_METHOD on CPU.
- Linear layers that keep their weights, for engines that are to be read (`EngineSpec.readable`): packing cannot be undone.
"""

import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.v1.engine import utils as engine_utils

from megatron_aspo.common.host_memory import release_freed_memory
from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.rollout.engine_layout import EngineHoldings
from megatron_aspo.rollout.engine_memory import EngineMemory
from megatron_aspo.rollout.engine_settings import READABLE, TRANSFER_BACKEND
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import WeightReceiver
from megatron_aspo.sync.group import StatelessGroup, stateless_group
from megatron_aspo.sync.messages import sha256_of
from megatron_aspo.weights.layout import Box, format_box, slices


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """How the workers of an engine join the group of the transfer."""

    host: str
    port: int
    own_host: str | None
    """As `stateless_group`'s."""
    engine: int
    """The engine's number."""
    spec: dict[str, Any]
    """`TransferSpec.as_dict`."""
    timeout_s: float


@dataclass
class VersionInfo(WeightTransferUpdateInfo):
    """A version of the weights that is about to be sent."""

    version: int
    verify: bool


class PieceTransferEngine(WeightTransferEngine[JoinInfo, VersionInfo]):
    """Receives this worker's part of the weights; vLLM's loaders slice it out of tensors of whole Hugging Face shape."""

    init_info_cls = JoinInfo
    update_info_cls = VersionInfo

    def __init__(self, config, vllm_config, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: StatelessGroup | None = None
        self._receiver: WeightReceiver | None = None
        self._memory: EngineMemory | None = None
        self._spec: TransferSpec | None = None
        self._expected: set[str] = set()
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group; return once all its ranks are there and agree on the transfer."""
        self.shutdown()
        spec = TransferSpec.from_dict(init_info.spec)
        worker = init_info.engine * spec.engines.tensor + self.parallel_config.rank
        rank = spec.training.world + worker
        backend = "nccl" if self.device.type == "cuda" and not spec.colocated else "gloo"
        address, own_host = (init_info.host, init_info.port), init_info.own_host
        common = init_info.timeout_s, backend, own_host, spec.rank_name, spec.terms()
        self._group = stateless_group(*address, rank, spec.world, *common)
        self._receiver = WeightReceiver(spec.schedule(rank, self._group.hosts), self._group, self.device)
        self._memory, self._spec = EngineMemory(EngineHoldings(spec.architecture, spec.dims, spec.engines), worker), spec

    def start_weight_update(self) -> None:
        """Prepare the model's layers to be loaded."""
        if self._group is None:
            raise RuntimeError("weights cannot be received before the engine is connected to the trainer: call connect() first")
        with self._leaving_on_failure():
            # Shared parameters appear once, under their first name: a tied head is not expected.
            self._expected = {name for name, _ in self.model.named_parameters()}
            self._loaded = set()
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: VersionInfo) -> None:
        """Receive and load bucket after bucket."""
        with self._leaving_on_failure():
            self._receiver.begin_version(update_info.version, update_info.verify)
            while self._receiver.buckets_left:
                with self._receiver.next_bucket() as tensors:
                    self._loaded |= set(self.model.load_weights(tensors))
                    self._copy_unfinished()

    def finish_weight_update(self) -> None:
        """Convert the loaded layers to the layout of the kernels; in a verified update, compare what can be read back with what arrived."""
        missing = sorted(self._expected - self._loaded)
        if missing:
            raise RuntimeError(f"the weight update left {len(missing)} of {len(self._expected)} parameters as they were: {missing[:5]}")
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            # Padding rows of a vocabulary are never sent.
            if info.can_load() and 0 < info.load_numel < info.load_numel_total and not isinstance(layer, VocabParallelEmbedding):
                raise RuntimeError(f"the weight update brought {info.load_numel} of {info.load_numel_total} elements of {name}")
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_experts(self.model)
            _repack_heads(self.model)
            release_freed_memory()  # tensors of whole layers, which generation does not need
        for tensor, box, received in self._receiver.digests:
            kept = self._stored(tensor, box)
            if kept is not None and sha256_of(kept) != received:
                raise RuntimeError(f"{tensor} {format_box(box)} was received whole, but the model's parameter holds something else")

    def stored_digests(self) -> list[tuple[str, Box, str]]:
        """Return (tensor, box, SHA-256) of everything that this worker holds and that can be read."""
        found = []
        for tensor in sorted(self._receiver.tensor_names):
            box = self._memory.own_box(tensor)
            kept = self._stored(tensor, box)
            if kept is not None:
                found.append((tensor, box, sha256_of(kept).hex()))
        return found

    def received_digests(self) -> list[tuple[str, Box, str]]:
        """Return (tensor, box, SHA-256) of everything received with the last version, if that was verified."""
        return [(tensor, box, received.hex()) for tensor, box, received in self._receiver.digests]

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = self._receiver = None

    def _copy_unfinished(self) -> None:
        """Copy what layers that wait for more buckets have kept of this one: its memory is the sender's again afterwards."""
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and not value.is_meta and self._receiver.is_borrowed(value):
                        call.arguments[name] = value.clone()

    @contextmanager
    def _leaving_on_failure(self) -> Iterator[None]:
        """On any exception, leave the group, so that the ranks that wait for this one fail at once instead of after their timeout."""
        try:
            yield
        except BaseException:
            self.shutdown()
            raise

    def _stored(self, tensor: str, box: Box) -> Tensor | None:
        """Return the values of a box in the model's memory; None where only its kernel can read them."""
        stored = self._memory.locate(tensor, box)
        if stored.expert is not None and not (_KEEP_READABLE and self.device.type == "cpu"):
            return None  # experts have the layout of their kernel
        values = self.model.get_parameter(stored.parameter).data
        if stored.expert is None:
            # On CPUs with AMX vLLM keeps biases in float32, which holds every number of the narrower type.
            return values[slices(stored.box)].to(torch_dtype(self._spec.dtype)) if values.numel() else None
        experts = self.model.get_submodule(stored.parameter.rpartition(".")[0])
        return _unpacked(values[stored.expert], experts.quant_method.moe_kernel.fused_experts.isa)[slices(stored.box)]


class WorkerExtension:
    """Naming it in `worker_extension_cls` makes every vLLM worker import this module, and have these methods."""

    def stored_digests(self) -> list[tuple[str, Box, str]]:
        return self.weight_transfer_engine.stored_digests()

    def received_digests(self) -> list[tuple[str, Box, str]]:
        return self.weight_transfer_engine.received_digests()


_PR_SET_NAME = 15
_not_inherited: list[int] = []
"""File descriptors that a forked engine core closes."""


@contextmanager
def forked_engine_core() -> Iterator[None]:
    """Make vLLM's front end fork its engine core. CPU only, in a process that has not computed with OpenMP threads yet.

    The engine core closes the descriptors that this process had open before, except the standard streams: if it kept a copy of an actor's
    connection to Ray, Ray would not notice the actor's death.
    """
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401 - what the engine core would import

    own = engine_utils.get_mp_context
    engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    # The descriptor of the listing itself is closed already.
    _not_inherited[:] = [n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and os.path.lexists(f"/proc/self/fd/{n}")]
    try:
        yield
    finally:
        _not_inherited.clear()
        engine_utils.get_mp_context = own


def _become_engine_core() -> None:
    if not _not_inherited:  # another fork
        return
    for number in _not_inherited:
        with contextlib.suppress(OSError):
            os.close(number)
    _not_inherited.clear()
    # For ps and top. vLLM's own renaming fails in a fork of a Ray actor, whose command line Ray has overwritten.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"EngineCore")


os.register_at_fork(after_in_child=_become_engine_core)


@torch.no_grad()
def _repack_heads(model: torch.nn.Module) -> None:
    """Re-pack embeddings and heads, tied or not; vLLM itself re-packs the other layers."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def _repack_experts(model: torch.nn.Module) -> None:
    """Re-pack the experts of a CPU engine for their kernel."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """Return an expert's weights as they were before vLLM's CPU kernel for `isa` packed them, which permutes their elements.

    The permutation is learnt by packing the indices themselves, digit by digit, because the weights' type would round large numbers.
    """
    base = 256  # bfloat16 represents all integers up to it
    index = torch.arange(packed.numel()).view(1, *packed.shape)
    comes_from = torch.zeros_like(index)
    for power in (1, base, base**2, base**3):
        comes_from += power * _custom_ops.cpu_prepack_moe_weight((index // power % base).to(packed.dtype), isa).long()
    unpacked = torch.empty_like(packed)
    unpacked.view(-1)[comes_from.view(-1)] = packed.reshape(-1)
    return unpacked


_KEEP_READABLE = bool(os.environ.get(READABLE))
if _KEEP_READABLE:
    _custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = lambda *_: False

WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, PieceTransferEngine)
