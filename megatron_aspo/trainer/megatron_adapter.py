"""Every adaptation of Megatron-Core: running on the CPU, and returning hidden states. No other file patches it.

Written for megatron-core 0.16.1. Megatron assumes CUDA by name (`torch.cuda.current_device()`, streams, events, tensor type strings). On a
machine without CUDA a proxy replaces `torch` in each `megatron.core` module; torch itself and all other libraries stay untouched, since a
global patch of torch's constructors silently corrupts libraries that rely on `device="meta"`. The CPU patches do not run where CUDA exists
and can go when Megatron-Core runs on gloo and CPU tensors.
"""

import contextlib
import functools
import importlib
import sys
import types

import torch
from torch import Tensor

from megatron_aspo.trainer.transformer_engine import check_installation

_CPU = torch.device("cpu")

# They are imported before patching, since a module keeps the `torch` that it was imported with.
_MODULES = (
    "tensor_parallel.random",
    "models.gpt",
    "optimizer",
    "distributed",
    "pipeline_parallel",
    "transformer",
    "transformer.moe.token_dispatcher",
    "parallel_state",
)


def prepare() -> None:
    """Make Megatron-Core usable on this machine. Idempotent; call it again after importing further Megatron modules.

    Raises UserError if an incomplete Transformer Engine would break Megatron's import.
    """
    if torch.cuda.is_available():
        check_installation()
        _define_router_gemm()
        return
    # Megatron takes Transformer Engine's optimizer, which needs a GPU, wherever it finds the package: make its import fail.
    sys.modules.setdefault("transformer_engine", None)
    from megatron.core import jit

    # Megatron compiles small functions with torch.compile at import; on a CPU each compilation costs seconds and a C++ compiler.
    jit.jit_fuser = jit.noop_decorator
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    proxy = _torch_proxy()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy
    _patch_rng_state()
    _patch_moves_to_cuda()
    _patch_type_checks()
    _patch_expert_splits()
    _patch_uneven_collectives()
    _patch_clip()
    _define_router_gemm()


def _define_router_gemm() -> None:
    """Define `te_general_gemm`, which 0.16.1's router reads and which only exists with Transformer Engine. Fixed in 0.17."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


class _Namespace(types.ModuleType):
    """A module whose attributes are its overrides, else those of the real module."""

    def __init__(self, real: types.ModuleType, **overrides):
        super().__init__(real.__name__)
        self.__dict__.update(overrides)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_real"], name)


class _NoStream:
    """Replaces torch.cuda.Stream and torch.cuda.Event: work on the CPU is done when the call returns."""

    def __init__(self, *args, **kwargs):
        pass

    def _done(self, *args, **kwargs):
        return self

    record = wait = wait_event = wait_stream = record_event = synchronize = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _no_op(*args, **kwargs) -> None:
    return None


def _make_on_cpu(function):
    """Return a tensor constructor for which `device="cuda"` means the CPU."""

    @functools.wraps(function)
    def construct(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return construct


@functools.cache
def _torch_proxy() -> _Namespace:
    cuda = _Namespace(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        synchronize=_no_op,
        empty_cache=_no_op,
        set_device=_no_op,
        set_stream=_no_op,
        Stream=_NoStream,
        Event=_NoStream,
        current_stream=_NoStream,
        default_stream=_NoStream,
        stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        nvtx=types.SimpleNamespace(range_push=_no_op, range_pop=_no_op, range=lambda *args: contextlib.nullcontext()),
    )
    constructors = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
    return _Namespace(torch, cuda=cuda, **{name: _make_on_cpu(getattr(torch, name)) for name in constructors})


def _patch_rng_state() -> None:
    """Make Megatron's random tracker fork the CPU's generator instead of CUDA's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_moves_to_cuda() -> None:
    """Make `.cuda()`, which Megatron calls on tensors and modules, a no-op; a CPU build of torch would raise."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


@contextlib.contextmanager
def _cuda_type_names():
    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result if args or kwargs else result.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name
    try:
        yield
    finally:
        torch.Tensor.type = original


def _patch_type_checks() -> None:
    """Make `param.type()` return CUDA names while optimizer constructors and the gradient clip compare it with them."""
    from megatron.core import optimizer
    from megatron.core.optimizer import optimizer as steps

    for module, name in ((optimizer, "_get_megatron_optimizer_based_on_param_groups"), (steps, "clip_grad_by_total_norm_fp32")):
        function = getattr(module, name)
        if not hasattr(function, "_answers_cuda"):

            @functools.wraps(function)
            def wrapped(*args, _function=function, **kwargs):
                with _cuda_type_names():
                    return _function(*args, **kwargs)

            wrapped._answers_cuda = True
            setattr(module, name, wrapped)


def _patch_clip() -> None:
    """Scale gradients in place: without apex and Transformer Engine the clip makes scaled copies and copies them back, in three passes."""
    from megatron.core.optimizer import clip_grads

    def scale_all(chunk_size, noop_flag, tensor_lists, scale):
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, scale, out=target)

    clip_grads.multi_tensor_scale_impl = scale_all


def _patch_expert_splits() -> None:
    """Convert the token dispatcher's split sizes to arrays, as it does only when it copies from a GPU; collectives take no tensors."""
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu
    if hasattr(move, "_makes_arrays"):
        return

    @functools.wraps(move)
    def wrapped(tensor, as_numpy: bool = False, record_stream: bool = False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else move(tensor)

    wrapped._makes_arrays = True
    token_dispatcher.maybe_move_tensor_to_cpu = wrapped


def _patch_uneven_collectives() -> None:
    """Let expert tensor parallelism gather and reduce different token counts per rank; gloo takes only equal sizes."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    if hasattr(gather, "_takes_uneven_shares"):
        return

    @functools.wraps(gather)
    def wrapped_gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: len(input_)] = input_
        shares = gather(padded, group).split(longest)
        return torch.cat([share[:count] for share, count in zip(shares, output_split_sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def wrapped_reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()]

    wrapped_gather._takes_uneven_shares = True
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = wrapped_gather, wrapped_reduce_scatter


@functools.cache
def hidden_state_model() -> type:
    """Return Megatron's GPTModel with two changes for which it has no public option.

    The forward pass of the last pipeline stage ends at the final hidden states [tokens, 1, hidden size], the same on all tensor-parallel
    ranks: `logprobs` does the output projection in blocks. And unfused rotary embeddings follow `position_ids` and are applied by the
    local layers' attention (attention.py): for packed batches Megatron counts positions within segments, or across them when the longest
    segment is as long as the whole batch, and neither is right for segments that share a prompt.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from megatron_aspo.trainer.attention import rotary_tables  # imports Megatron modules

    class HiddenStateModel(GPTModel):
        def _preprocess(self, *, position_ids: Tensor, packed_seq_params, **kwargs) -> tuple:
            result = super()._preprocess(position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs)
            if self.config.apply_rope_fusion:
                return result
            decoder_input, angles, *rest = result
            positions = position_ids[0] if packed_seq_params.local is None else position_ids[0][packed_seq_params.local]
            packed_seq_params.rotary = rotary_tables(angles[positions], self.config.params_dtype)
            return (decoder_input, None, *rest)

        def _postprocess(self, hidden_states: Tensor, **kwargs) -> Tensor:
            if not (self.post_process and self.config.sequence_parallel):
                return hidden_states
            # `logprobs` sums the gradient of hidden states over the group, so each rank takes a slice of it.
            return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp)

        def output_weight(self) -> Tensor:
            """Return this rank's rows of the output matrix, [rows, hidden size]; last stage only."""
            return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    return HiddenStateModel


def set_rotary_frequencies(model: torch.nn.Module, frequencies: tuple[float, ...]) -> None:
    """Set the radians per position of each pair of channels, [head size / 2], on a GPTModel that has not run yet.

    Megatron has options for some scalings of rotary embeddings, but fixes constants that differ between models (weights/rope.py).
    """
    rotary = model.rotary_pos_emb
    if rotary.inv_freq.shape != (len(frequencies),):
        raise ValueError(f"{len(frequencies)} rotary frequencies for a model of {len(rotary.inv_freq)}")
    rotary.inv_freq = torch.tensor(frequencies, dtype=torch.float32, device=rotary.inv_freq.device)
