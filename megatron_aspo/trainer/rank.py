"""One training rank: its share of the model, of the optimizer and of every weight transfer. The algorithm of a step is in update.py.

Every public method is collective: all ranks call it with the same arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.trainer import device as devices, megatron_adapter

megatron_adapter.prepare()  # before anything else imports Megatron-Core

from megatron_aspo.common.host_memory import release_freed_memory
from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.tensor_files import TensorReader
from megatron_aspo.hf.tensor_meta import TensorMeta
from megatron_aspo.hf.transfer import Gather, assemble, load
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import LocalTensors, WeightSender
from megatron_aspo.sync.group import stateless_group
from megatron_aspo.trainer import parallel as parallel_states
from megatron_aspo.trainer.forward_backward import ForwardBackward
from megatron_aspo.trainer.layers import check_layers, choose_layer_spec, flash_attention
from megatron_aspo.trainer.logprobs import kernels
from megatron_aspo.trainer.model import build_model, chunks, transformer_config
from megatron_aspo.trainer.offload import HostMemory, OffloadedStorage
from megatron_aspo.trainer.optimizer import build_optimizer, fused_adam, wrap_model
from megatron_aspo.trainer.optimizer_state import optimizer_slabs, state_tensors
from megatron_aspo.trainer.settings import RankSettings, UpdateReport
from megatron_aspo.trainer.transformer_engine import free_fp8_weights
from megatron_aspo.trainer.update import Models, Updater
from megatron_aspo.weights.families import layout, replica_layouts

megatron_adapter.prepare()  # again, for the modules imported since


class TrainerRank:
    def __init__(self, settings: RankSettings, rank: int, store: dist.Store, local_rank: int = 0):
        """Join the other ranks, which meet at `store`, build this rank's share of the model and fill it. Collective."""
        self.settings = settings
        options = settings.trainer
        self.device = devices.select_device(local_rank)
        if settings.deterministic:
            self.device.use_deterministic_kernels()
        self.hf: HFModel = read_model(settings.model_directory)
        settings.check_model(self.hf.dims)
        self.dtype = getattr(torch, options.dtype)
        self.layer_spec = choose_layer_spec(options, self.device)
        check_layers(options, self.layer_spec, self.hf.dims.experts)
        kernels(self.device.torch_device)  # now, if something is missing
        self.parallel = parallel_states.initialize(rank, settings.sizes, store, self.device, options.timeout_s, settings.seed)
        self.stored_layouts = replica_layouts(self.hf.architecture, self.hf.dims, settings.sizes, self.layer_spec)
        self.layout = layout(self.hf.architecture, self.hf.dims, settings.sizes, self.parallel.at, self.layer_spec)

        self._config = transformer_config(
            self.hf, self.parallel, self.device, self.dtype, self.layer_spec, options, deterministic=settings.deterministic
        )
        self.model = self._build()
        self.reference = self._build() if settings.algorithm.has_kl else None
        if self.reference is not None:
            self.reference.requires_grad_(False)
        reference_on_host = self.reference.parameters() if options.offload_reference and self.reference is not None else ()
        reference_memory = HostMemory(reference_on_host, self.device, constant=True)
        gradients = options.distributed_optimizer, options.gradient_dtype
        self._wrapped = [wrap_model(chunk, self._config, *gradients) for chunk in chunks(self.model)]
        self.optimizer = build_optimizer(self._wrapped, self._config, settings.optimizer, self.dtype, options.distributed_optimizer)
        # Before anything else reads the state, which creates all of it on the device.
        optimizer_memory = HostMemory(state_tensors(self.optimizer) if options.offload_optimizer else (), self.device)
        self._fill_main_weights()
        release_freed_memory()  # copies of the files
        models = Models(self.model, self._wrapped, self.reference, reference_memory, self.optimizer, optimizer_memory)
        passes = ForwardBackward(settings, self.hf, self.parallel, self.device.torch_device, self.layer_spec)
        self.updater = Updater(settings, self.parallel, self.device.torch_device, models, passes)
        self._sender: WeightSender | None = None
        self._offloaded: dict[str, OffloadedStorage] = {}

    def describe(self) -> dict[str, str]:
        """Return what was chosen, to be printed at the start."""
        chosen = {
            "device": str(self.device.torch_device),
            "backend": self.device.backend,
            "layout": self.settings.layout,
            "layer_spec": self.layer_spec,
            "optimizer": fused_adam(),
            "dtype": self.settings.trainer.dtype,
        }
        if self.layer_spec == "transformer_engine":
            chosen["flash_attn"] = flash_attention()
        return chosen | self.settings.non_default_memory_options

    def _build(self) -> torch.nn.Module:
        model = build_model(self.hf, self._config, self.parallel, self.layer_spec).to(self.device.torch_device)
        parameters = dict(model.named_parameters())
        load(self.layout, parameters, TensorReader(self.hf))
        for name in self.layout.expert_parameters:
            # Megatron marks them so, to be reduced over the experts' own replicas, only with expert parallelism: not where experts are
            # merely sharded less than the rest (expert_tensor_parallel < tensor_parallel).
            marked: Any = parameters[name]
            marked.allreduce = False
        return model

    @torch.no_grad()
    def _fill_main_weights(self) -> None:
        """Fill the optimizer's float32 weights from the files; with bfloat16 Megatron makes them from rounded ones.

        A rounded weight is in the middle of its rounding interval, which no single update of a usual learning rate leaves if it is large.
        """
        reader = TensorReader(self.hf)
        if self.dtype == torch.float32 or set(reader.dtypes.values()) == {"bfloat16"}:
            return
        slabs = optimizer_slabs(self.model, self.optimizer)
        mains = {name: slab.master for name, slab in slabs.items() if slab.master is not None}
        for name, values in assemble(self.layout, reader, dict.fromkeys(mains, torch.float32)):
            mains[name].copy_(values.reshape(-1)[slabs[name].start : slabs[name].stop])

    def update(self, batch: TrainBatch, step: int) -> UpdateReport:
        """Train on one step's batch; the algorithm is in update.py."""
        return self.updater.update(batch, step)

    # --- weights --------------------------------------------------------------------------------------------------------------------------

    def tensor_metas(self, dtype: str) -> list[TensorMeta]:
        """Return every Hugging Face tensor, in the order in which transfers send them."""
        return [TensorMeta(name, dtype, shape) for name, shape in self.hf.tensor_shapes.items()]

    def whole_tensors(
        self, metas: Sequence[TensorMeta], value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield whole Hugging Face tensors on rank 0; the other ranks of `stored_layouts` send, the rest do nothing.

        `value` picks what is gathered of each parameter: itself or a tensor of its shape, such as its gradient.
        """
        if self.parallel.rank not in self.stored_layouts:
            return iter(())
        held = {name: value(parameter) for name, parameter in self.model.named_parameters()}
        return Gather(self.stored_layouts, self.parallel.rank, held).whole(metas)

    def connect(self, host: str, port: int, spec: TransferSpec) -> None:
        """Join the group of all training ranks and the engines' workers, which rank 0 opens."""
        rank, timeout_s = self.parallel.rank, self.settings.trainer.timeout_s
        self._sender = None  # releases what an earlier one holds
        backend = "gloo" if spec.colocated else self.device.backend
        group = stateless_group(host, port, rank, spec.world, timeout_s, backend, names=spec.rank_name, terms=spec.terms())
        self._sender = WeightSender(spec.schedule(rank, group.hosts), group, self.device.torch_device)

    def publish(self, version: int, verify: bool) -> int:
        """Send this rank's part of the current weights to the engines' workers; returns the bytes sent. Raises TransferError."""
        if self._sender is None:
            raise RuntimeError("this rank is not connected with the engines' workers; call connect first")
        return self._sender.send_version(LocalTensors(self.layout, dict(self.model.named_parameters())), version, verify)

    def offload(self, part: str) -> None:
        """Free the device memory of the `optimizer`, gradients included, or of the `weights`, until `reload`.

        The tensors are collected again each time: the optimizer creates its state lazily and may replace it.
        """
        options = self.settings.trainer
        parameters: list[Any] = list(self.model.parameters())  # to which Megatron adds `main_grad`
        if part == "optimizer":
            weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
            # With trainer.offload_optimizer the state is in host memory already.
            state = [] if options.offload_optimizer else state_tensors(self.optimizer)
            kept = [tensor for tensor in state if tensor.untyped_storage().data_ptr() not in weights]
            self._offloaded[part] = OffloadedStorage(kept, [parameter.main_grad for parameter in parameters], self.device)
        else:
            for model in (self.model, self.reference):
                if model is not None:
                    free_fp8_weights(model)
            reference = [] if self.reference is None or options.offload_reference else self.reference.parameters()
            self._offloaded[part] = OffloadedStorage([*parameters, *reference], [], self.device)
        self._offloaded[part].offload()

    def reload(self) -> None:
        """Bring everything that was offloaded back to the device."""
        for storage in self._offloaded.values():
            storage.reload()
        self._offloaded.clear()

    def close(self) -> None:
        """Leave all process groups. No part of this trainer can be used afterwards."""
        self._sender = None
        # Sharded optimizers hold views of the weights, and dispatchers of experts their last tokens, with autograd nodes whose hooks hold
        # everything else: cycles that Python's collector does not see. They would keep the groups alive, whose threads wake up a hundred
        # times a second.
        modules = [module for model in (*self._wrapped, self.reference) if model is not None for module in model.modules()]
        for part in (*getattr(self.optimizer, "chained_optimizers", [self.optimizer]), *modules):
            vars(part).clear()
        parallel_states.destroy()
