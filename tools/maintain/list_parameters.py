"""Write the names and shapes of the parameters that Megatron-Core builds; tests/unit/test_listings.py compares the weight map with them.

    python tools/maintain/list_parameters.py tests/listings                                  # local layers
    python tools/maintain/list_parameters.py tests/listings --transformer-engine DIRECTORY   # Transformer Engine's layers

The models are built by the Megatron-Core that Python imports, so another version is listed by putting it first on PYTHONPATH. Every rank of
a layout is built in this one process, over torch's fake process groups: nothing is computed and nothing is sent.

Transformer Engine needs CUDA to run, but declares its parameters in Python. DIRECTORY is an unpacked `transformer_engine` wheel: its own
modules run their constructors, and only its compiled part, `transformer_engine_torch`, is replaced by a module in which every name exists.
So are packages for kernels, export and debugging that are imported but do not affect which parameters there are (_ABSENT), where they are
not installed.
"""

import argparse
import copy
import enum
import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from megatron_aspo.trainer import megatron_adapter

_ABSENT = ("onnx", "onnxscript", "nvdlfw_inspect", "triton", "einops")

MODEL = {
    "layers": 4,
    "hidden": 64,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 96,
    "vocab": 131,
    "tied": False,
    "qkv_bias": False,
}
FAMILIES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True, "tied": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "Qwen3MoeForCausalLM": {"qk_norm": True, "experts": 4, "moe_ffn": 48},
    "MixtralForCausalLM": {"experts": 4, "moe_ffn": 80},
    "SeedOssForCausalLM": {"qkv_bias": True},
}
LAYOUTS = (
    ({}, [0]),
    ({"tensor": 2, "pipeline": 2}, [0, 3]),
    ({"tensor": 4}, [1]),
    ({"pipeline": 2, "virtual": 2}, [0, 1]),
)
EXPERT_LAYOUTS = (
    ({"data": 2, "expert": 2}, [0, 1]),
    ({"tensor": 2, "data": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}, [1, 2, 7]),
)


# --- packages that cannot be installed here
# ------------------------------------------------------------------------------------------------


class _Anything(types.ModuleType):
    """A module in which every name exists and is callable."""

    __version__ = "9.9"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return self.__dict__[name]


class _AbsentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages named in _ABSENT, after every other finder."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in _ABSENT else None

    def create_module(self, spec):
        module = _Anything(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module) -> None:
        pass


def _offer_absent_modules() -> None:
    # torch looks for triton here and must not find a stand-in; and it must not compile code that never runs.
    import torch._dynamo
    import torch.utils.flop_counter

    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    sys.meta_path.append(_AbsentModules())


def _offer_transformer_engine(directory: Path) -> str:
    """Make `import transformer_engine` find the sources in `directory`; return their version."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch for imports without the shared libraries
    compiled = _Anything("transformer_engine_torch")
    # The Python side mirrors these enumerations, and checks at import that it knows every member.
    members: dict[str, list[str]] = {}
    for file in (directory / "transformer_engine" / "pytorch").rglob("*.py"):
        for name, member in re.findall(r"= int\((?:tex\.)?([A-Za-z_]+)\.([A-Za-z_0-9]+)\)", file.read_text()):
            members.setdefault(name, []).append(member)
    for name, names in members.items():
        setattr(compiled, name, enum.IntEnum(name, names, start=0))
    sys.modules["transformer_engine_torch"] = compiled

    version = next(directory.glob("transformer_engine-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    package = types.ModuleType("transformer_engine")
    package.__path__, package.__version__ = [str(directory / "transformer_engine")], version
    sys.modules["transformer_engine"] = package
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    import transformer_engine.pytorch.module.base as base

    class WithCuda(types.ModuleType):
        cuda = types.SimpleNamespace(**vars(torch.cuda) | {"is_available": lambda: True, "current_device": lambda: torch.device("cpu")})

        def __getattr__(self, name: str):
            return getattr(torch, name)

    base.torch = WithCuda("torch")
    package.pytorch = transformer_engine.pytorch
    return version


# --- building -----------------------------------------------------------------------------------------------------------------------------


def describe(architecture: str, sizes, rank: int, layer_spec: str) -> dict:
    """Return what Megatron builds for one rank: its coordinates, the global numbers of its layers and experts, its parameters' shapes."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_aspo.hf.model import HFModel
    from megatron_aspo.trainer.device import select_device
    from megatron_aspo.trainer.layers import LAYER_SPECS
    from megatron_aspo.trainer.model import transformer_config
    from megatron_aspo.trainer.parallel import ParallelState, destroy
    from megatron_aspo.weights.layout import ModelDims, padded_vocab

    megatron_adapter.prepare()
    dims = ModelDims(**MODEL | FAMILIES[architecture])
    model = HFModel(Path(), architecture, dims, 1e4, 1e-6, 1024, {}, experts_per_token=2)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    coordinates = {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_rank(),
        "expert_data": parallel_state.get_expert_data_parallel_rank(),
    }
    state = ParallelState(rank, sizes, sizes.coordinates(rank), dist.group.WORLD, dist.group.WORLD)
    config = transformer_config(model, state, select_device(), torch.float32, layer_spec)
    shapes: dict[str, list[int]] = {}
    layer_numbers: dict[str, list[int]] = {}
    for chunk in range(sizes.virtual):
        stage = {"vp_stage": chunk} if sizes.virtual > 1 else {}
        layers = LAYER_SPECS[layer_spec](_one_chunk(config))
        built = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=layers.layer_specs[:1] * get_num_layers_to_build(config, **stage), layer_norm=layers.layer_norm
            ),
            vocab_size=padded_vocab(dims.vocab, sizes.tensor),
            max_sequence_length=model.max_positions,
            pre_process=state.is_first_stage and chunk == 0,
            post_process=state.is_last_stage and chunk == sizes.virtual - 1,
            share_embeddings_and_output_weights=dims.tied,
            position_embedding_type="rope",
            parallel_output=True,
            **stage,
        )
        prefix = f"model{chunk}." if sizes.virtual > 1 else ""
        shapes |= {prefix + name: list(parameter.shape) for name, parameter in built.named_parameters()}
        # Megatron counts layers from 1.
        layer_numbers[prefix] = [layer.layer_number - 1 for layer in built.decoder.layers]
        experts = getattr(built.decoder.layers[0].mlp, "local_expert_indices", [])
    destroy()
    return {
        "rank": rank,
        "place": coordinates,
        "layers": layer_numbers,
        "experts": list(experts),
        "parameters": dict(sorted(shapes.items())),
    }


def _one_chunk(config):
    """Return the configuration with one chunk per stage: the layer specs are the same, only more of them."""
    whole = copy.copy(config)
    whole.virtual_pipeline_model_parallel_size = None
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="where VERSION/SPEC/FAMILY.json go")
    parser.add_argument("--transformer-engine", type=Path, metavar="DIRECTORY", help="an unpacked transformer_engine wheel")
    parsed = parser.parse_args()
    origin = {}
    _offer_absent_modules()
    layer_spec = "transformer_engine" if parsed.transformer_engine else "local"
    if parsed.transformer_engine:
        origin["transformer_engine"] = _offer_transformer_engine(parsed.transformer_engine)
    megatron_adapter.prepare()
    import megatron.core

    from megatron_aspo.weights.layout import ParallelSizes

    origin = {"megatron_core": megatron.core.__version__, **origin, "torch": torch.__version__}
    for architecture, changes in FAMILIES.items():
        listings = [
            {"sizes": sizes} | describe(architecture, ParallelSizes(**sizes), rank, layer_spec)
            for sizes, ranks in LAYOUTS + (EXPERT_LAYOUTS if "experts" in changes else ())
            for rank in ranks
        ]
        file = parsed.target / megatron.core.__version__ / layer_spec / f"{architecture}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"architecture": architecture, "layer_spec": layer_spec, "made_with": origin, "dims": MODEL | changes, "ranks": listings}
        file.write_text(_dump(content))
        print(file)


def _dump(content: dict) -> str:
    """Return the JSON text with each parameter on its own line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+((?:\d+,?\s*)+?)\s+\]", lambda match: "[" + ", ".join(match[1].replace(",", " ").split()) + "]", text) + "\n"


if __name__ == "__main__":
    main()
