"""The one file that adapts vLLM. It is loaded inside vLLM's worker processes only, through `worker_extension_cls`.

Written for vLLM 0.32.0. What is adapted, why, and when it can go:

- A weight-transfer back end of our own, registered through vLLM's public factory: its built-in ones all need CUDA. Goes when vLLM has one
  for gloo.
- Re-packing a tied output head after an update, on CPU. Linear layers keep their weights inside a packed oneDNN handle (`cpu_linear`).
  vLLM's layerwise reload packs again every layer that received a tensor, but a tied `lm_head` receives none: it shares the embedding's
  parameter, and would go on computing logits with the packed copy of its old weights, without any error. Goes when vLLM re-packs it.
- A count of what arrived. vLLM's reload only logs a warning about a layer that was sent nothing and keeps its old weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_aspo.rollout.engine_settings import TRANSFER_BACKEND
from megatron_aspo.weights.exchange import WeightReceiver
from megatron_aspo.weights.group import StatelessGroup, stateless_group
from megatron_aspo.weights.schedule import Schedule, TransferSpec, where_of


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """How an engine's workers join the group of the transfer."""

    host: str
    port: int
    engine: int
    """Its number among the engines."""
    spec: dict[str, Any]
    """A TransferSpec's `as_dict`."""
    timeout_s: float


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucket: of which version, the first of it or not, and whether it is verified."""

    version: int
    first: bool
    verify: bool


class BucketTransferEngine(WeightTransferEngine[JoinInfo, BucketInfo]):
    """Receives this worker's part of the weights; vLLM's loaders take it out of tensors of whole Hugging Face shape."""

    init_info_cls = JoinInfo
    update_info_cls = BucketInfo

    def __init__(self, config, vllm_config, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: StatelessGroup | None = None
        self._receiver: WeightReceiver | None = None
        self._expected: set[str] = set()
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group; returns when all its ranks are there."""
        self.shutdown()
        spec = TransferSpec.from_dict(init_info.spec)
        rank = spec.training.world + init_info.engine * spec.engines.tensor + self.parallel_config.rank
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        where = init_info.host, init_info.port
        self._group = stateless_group(*where, rank, spec.world, init_info.timeout_s, backend, names=spec.name)
        self._receiver = WeightReceiver(Schedule(spec, rank, where_of(self._group.places)), self._group, self.device)

    def start_weight_update(self) -> None:
        """Make the model's layers ready to be loaded."""
        if self._group is None:
            raise RuntimeError("weights cannot be received before the engine is connected to the trainer: call connect() first")
        # Shared parameters appear once, under their first name: a tied head is not expected.
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded = set()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketInfo) -> None:
        """Receive one bucket and load it."""
        if update_info.first:
            self._receiver.begin(update_info.version, update_info.verify)
        self._loaded |= set(self.model.load_weights(self._receiver.receive()))

    def finish_weight_update(self) -> None:
        """Bring the loaded layers into the form the kernels use."""
        missing = sorted(self._expected - self._loaded)
        if missing:
            raise RuntimeError(f"the weight update left {len(missing)} of {len(self._expected)} parameters as they were: {missing[:5]}")
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_heads_again(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = self._receiver = None


class WorkerExtension:
    """Empty: naming it in `worker_extension_cls` makes every vLLM worker import this module, and with it the registration below."""


@torch.no_grad()
def _pack_heads_again(model: torch.nn.Module) -> None:
    """Re-pack every layer that has a packed linear and still holds its weight: embeddings and heads, tied or not."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, BucketTransferEngine)
