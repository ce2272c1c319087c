"""Small Hugging Face directories written by hand, with the names and shapes of each family stated here, independently of the weight map.

Fast enough for hundreds of shapes. `test_convert.py` compares the names and shapes with those that transformers saves.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
}
DENSE, MOE = ("llama", "mistral", "qwen2", "qwen3", "seed_oss"), ("qwen3_moe", "mixtral")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# Files of a model directory beside the weights; bytes that any JSON or text round trip would change.
SMALL_FILES = {
    "generation_config.json": b'{"eos_token_id": [2,7],\r\n\t"do_sample" : true}',
    "tokenizer.json": '{"text": "é \\u00e9",  "model": {}}\n\n'.encode(),
    "tokenizer_config.json": b'{ "model_max_length":1000000000000000019884624838656 }',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": b"{% for m in messages %}\r\n{{ m }}{% endfor %}",
    "README.md": b"# A model\n",
}


@contextmanager
def flipped_bit(file: Path, draw: Callable[[Any], int]) -> Iterator[None]:
    """Flip one bit of a file, drawn by hypothesis, while the block runs."""
    content = file.read_bytes()
    bit = draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(content)


@dataclass(frozen=True)
class Model:
    """Sizes of a model; `ffn` are the channels of one expert where there are experts."""

    family: str = "qwen2"
    layers: int = 2
    hidden: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 2
    ffn: int = 8
    vocab: int = 19
    tied: bool = False
    experts: int = 4

    @property
    def moe(self) -> bool:
        return self.family in MOE

    def config(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
        """Return the contents of config.json."""
        experts: dict[str, Any] = {
            "qwen3_moe": {"num_experts": self.experts, "moe_intermediate_size": self.ffn, "num_experts_per_tok": 2, "norm_topk_prob": True},
            "mixtral": {"num_local_experts": self.experts, "num_experts_per_tok": 2},
            "mistral": {"sliding_window": None},
        }.get(self.family, {})
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "dtype": _name(dtype),
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn + (4 if self.family == "qwen3_moe" else 0),
            "max_position_embeddings": 64,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            **experts,
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape of every tensor of the checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            here: dict[str, tuple[int, ...]] = {"input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,)}
            here |= {"self_attn.q_proj": (q, self.hidden), "self_attn.o_proj": (self.hidden, q)}
            here |= {"self_attn.k_proj": (kv, self.hidden), "self_attn.v_proj": (kv, self.hidden)}
            if self.family.startswith("qwen3"):
                here |= {"self_attn.q_norm": (self.head_dim,), "self_attn.k_norm": (self.head_dim,)}
            feed_forward = {"gate_proj": (self.ffn, self.hidden), "up_proj": (self.ffn, self.hidden), "down_proj": (self.hidden, self.ffn)}
            if self.family == "mixtral":
                feed_forward = dict(zip(("w1", "w3", "w2"), feed_forward.values()))
            if self.moe:
                block = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe"}[self.family]
                here[f"{block}.gate"] = (self.experts, self.hidden)
                here |= {f"{block}.experts.{e}.{part}": shape for e in range(self.experts) for part, shape in feed_forward.items()}
            else:
                here |= {f"mlp.{part}": shape for part, shape in feed_forward.items()}
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in here.items()}
            if self.family in ("qwen2", "seed_oss"):
                rows = {"q": q, "k": kv, "v": kv}
                shapes |= {f"model.layers.{layer}.self_attn.{part}_proj.bias": (n,) for part, n in rows.items()}
        return shapes


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return random bit patterns of the element type: NaNs with payloads, subnormals and −0 included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def random_tensors(model: Model, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bits(shape, dtype, generator) for name, shape in model.tensor_shapes().items()}


def write_model(
    directory: Path,
    model: Model = Model(),
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    files: int = 1,
) -> dict[str, torch.Tensor]:
    """Write a model directory of random bits, with an index if `files` > 1; return the tensors."""
    tensors = random_tensors(model, dtype, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, tensors, files)
    (directory / "config.json").write_text(json.dumps(model.config(dtype), indent=3))
    for name, content in SMALL_FILES.items():
        (directory / name).write_bytes(content)
    return tensors


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    names = sorted(tensors)
    index = {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def read_tensors(directory: Path, files: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """Return all tensors of a directory's safetensors files, read by the safetensors library; a name in two files is an error."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob(files)):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert the same names, shapes, element types and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
