"""Hugging Face → Megatron → Hugging Face is the same model, bit for bit, at every layout; the files beside the weights are copied."""

import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.weights.families import NAMINGS
from megatron_aspo.weights.layout import ParallelSizes
from tests.models import save_tiny
from tests.tokenizers import save_byte_tokenizer
from tests.unit.hf_shards import ARCHITECTURES, DTYPES, SMALL_FILES, Model, assert_same, bits, random_tensors, read_tensors, write_model

MAX_RANKS = 8
MEMORY = Path("/dev/shm")
"""A directory where fsync costs nothing."""


def to_megatron(source: Path, target: Path, sizes: ParallelSizes = ParallelSizes(), naming: str = "local", **options) -> Path:  # noqa: B008
    convert(open_source(source, options.get("dtype")), target, to="megatron", sizes=sizes, naming=naming, **options)
    return target


def to_hugging_face(source: Path, target: Path, **options) -> Path:
    convert(open_source(source, options.get("dtype")), target, to="huggingface", sizes=ParallelSizes(), **options)
    return target


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


@st.composite
def models(draw) -> Model:
    kv_heads, per_group = draw(st.sampled_from([(1, 4), (1, 8), (2, 1), (2, 4), (3, 1), (3, 2), (4, 2), (8, 1), (6, 1), (4, 3)]))
    heads, head_dim = kv_heads * per_group, draw(st.sampled_from([2, 4, 6]))
    return Model(
        family=draw(st.sampled_from(sorted(ARCHITECTURES))),
        layers=draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        hidden=heads * draw(st.integers(1, 3)),  # transformers refuses others for Llama
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=draw(st.sampled_from([2, 6, 8, 24])),
        vocab=draw(st.integers(9, 40)),
        tied=draw(st.booleans()),
        experts=draw(st.sampled_from([2, 3, 4, 8])),
    )


@st.composite
def layouts(draw, model: Model) -> ParallelSizes:
    """Draw any layout of up to MAX_RANKS ranks that can split the model, by the rules of Megatron-Core."""
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    tensor = draw(
        st.sampled_from(
            [
                n
                for n in divisors(math.gcd(model.heads, rows), MAX_RANKS)
                if (model.moe or model.ffn % n == 0) and (model.kv_heads % n == 0 or n % model.kv_heads == 0)
            ]
        )
    )
    pipeline = draw(st.sampled_from(divisors(model.layers, MAX_RANKS // tensor)))
    virtual = draw(st.sampled_from(divisors(model.layers // pipeline, 4))) if pipeline > 1 else 1
    data = draw(st.integers(1, MAX_RANKS // (tensor * pipeline)))
    if not model.moe:
        return ParallelSizes(tensor, pipeline, data, virtual)
    stage = tensor * data
    ways, expert = draw(
        st.sampled_from(
            [(w, e) for w in divisors(model.ffn, MAX_RANKS) for e in divisors(model.experts, MAX_RANKS) if stage % (w * e) == 0]
        )
    )
    return ParallelSizes(tensor, pipeline, data, virtual, expert, ways)


@st.composite
def journeys(draw) -> tuple[Model, ParallelSizes, ParallelSizes]:
    model = draw(models())
    return model, draw(layouts(model)), draw(layouts(model))


@settings(max_examples=60, deadline=None)
@given(
    journey=journeys(),
    namings=st.tuples(st.sampled_from(NAMINGS), st.sampled_from(NAMINGS)),
    dtype=st.sampled_from(DTYPES),
    files=st.integers(1, 4),
    shard_bytes=st.sampled_from([1, 2000, 10**9]),
    seed=st.integers(0, 2**32),
)
def test_conversion_is_bit_exact_for_every_layout_and_through_another_layout(journey, namings, dtype, files, shard_bytes, seed):
    model, first, second = journey
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        room = Path(name)
        tensors = write_model(room / "hf", model, dtype, seed=seed, files=files)
        to_megatron(room / "hf", room / "first", first, namings[0])
        to_megatron(room / "first", room / "second", second, namings[1])
        for checkpoint in ("first", "second"):
            back = to_hugging_face(room / checkpoint, room / f"{checkpoint}_hf", shard_bytes=shard_bytes)
            assert_same(read_tensors(back), tensors)
            assert_small_files(room / "hf", back)
        # A layout reached through another equals the one reached directly.
        direct = to_megatron(room / "hf", room / "direct", second, namings[1])
        assert contents(direct) == contents(room / "second")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_small_files(source: Path, target: Path) -> None:
    for name in ("config.json", *SMALL_FILES):
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert {p.name for p in target.iterdir() if "safetensors" not in p.name} == {"config.json", *SMALL_FILES}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_names_and_shapes_of_these_tests_are_those_of_transformers(tmp_path, family, tied):
    model = Model(family, layers=2, tied=tied)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config())).save_pretrained(tmp_path)
    assert {name: tuple(t.shape) for name, t in read_tensors(tmp_path).items()} == model.tensor_shapes()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "seed_oss"])
def test_a_model_of_transformers_survives_a_round_trip_and_loads_again(tmp_path, family):
    expected = save_tiny(family, tmp_path / "hf", tied=family == "qwen2", vocab_size=301)
    save_byte_tokenizer(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelSizes(tensor=2, pipeline=2))
    back = to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert_same(read_tensors(back), read_tensors(tmp_path / "hf"))
    loaded = AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    assert_same(loaded.state_dict(), expected.state_dict())
    assert {p.name: p.read_bytes() for p in back.iterdir() if p.suffix != ".safetensors"} == {
        p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir() if p.suffix != ".safetensors"
    }


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("by_way_of_megatron_in", ["source", "target"])
def test_a_chosen_dtype_casts_every_tensor_like_torch(tmp_path, source, target, by_way_of_megatron_in):
    model = Model("qwen2", tied=True)
    wide = {
        name: 300 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for name, t in random_tensors(model, source).items()
    }
    wide["model.norm.weight"][:6] = torch.tensor([float("inf"), -0.0, 1e-8, 1e6, 3e38, 1e-42])
    tensors = {name: tensor.to(source) for name, tensor in wide.items()}
    write_model(tmp_path / "hf", model, source)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    name = str(target).removeprefix("torch.")
    early, late = (None, name) if by_way_of_megatron_in == "source" else (name, None)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelSizes(tensor=2), dtype=early)
    back = to_hugging_face(tmp_path / "megatron", tmp_path / "back", dtype=late)
    assert_same(read_tensors(back), {name: tensor.to(target) for name, tensor in tensors.items()})
    config, original = (json.loads((d / "config.json").read_text()) for d in (back, tmp_path / "hf"))
    assert config == original | {"dtype": name}


def test_an_older_config_with_torch_dtype_is_kept_byte_for_byte_and_a_chosen_dtype_replaces_it(tmp_path):
    tensors = write_model(tmp_path / "hf", Model())
    config = Model().config() | {"torch_dtype": "bfloat16"}
    del config["dtype"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    back = to_hugging_face(to_megatron(tmp_path / "hf", tmp_path / "a"), tmp_path / "b")
    assert_same(read_tensors(back), tensors)
    assert_small_files(tmp_path / "hf", back)
    cast = to_hugging_face(tmp_path / "a", tmp_path / "c", dtype="float32")
    written = json.loads((cast / "config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_tensors_of_several_element_types_are_cast_to_the_chosen_one(tmp_path):
    tensors = write_model(tmp_path / "hf", Model(), torch.bfloat16)
    tensors["model.norm.weight"] = torch.linspace(-3, 3, 12)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    back = to_hugging_face(to_megatron(tmp_path / "hf", tmp_path / "a", dtype="bfloat16"), tmp_path / "b")
    assert_same(read_tensors(back), {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


def test_the_manifest_states_the_hash_of_every_hugging_face_tensor(tmp_path):
    tensors = write_model(tmp_path / "hf", Model(), torch.float32)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelSizes(tensor=2, pipeline=2))
    stated = json.loads((tmp_path / "megatron" / "manifest.json").read_text())["tensors"]
    assert stated == {name: hashlib.sha256(bits(tensor).numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_a_tied_model_whose_exporter_wrote_the_matrix_twice_keeps_one(tmp_path):
    tensors = write_model(tmp_path / "hf", Model(tied=True), torch.float32)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].nan_to_num().clone()}
    plain = tensors | {"model.embed_tokens.weight": head["lm_head.weight"].clone()}
    save_file(plain | head, tmp_path / "hf" / "model.safetensors")
    back = to_hugging_face(to_megatron(tmp_path / "hf", tmp_path / "a", ParallelSizes(pipeline=2)), tmp_path / "b")
    assert_same(read_tensors(back), plain)


def test_buffers_of_old_checkpoints_are_left_out(tmp_path):
    tensors = write_model(tmp_path / "hf", Model("llama"))
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    assert_same(read_tensors(to_hugging_face(tmp_path / "hf", tmp_path / "copy")), tensors)


@pytest.mark.parametrize("shard_bytes", [1, 500, 3000])
def test_shards_hold_at_most_the_given_size_or_one_tensor_and_the_index_lists_them(tmp_path, shard_bytes):
    tensors = write_model(tmp_path / "hf", Model("mixtral"), torch.float32, files=2)
    back = to_hugging_face(tmp_path / "hf", tmp_path / "copy", shard_bytes=shard_bytes)
    assert_same(read_tensors(back), tensors)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(back.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= shard_bytes


def test_a_checkpoint_has_one_file_per_rank_of_the_first_replica_with_the_parameters_of_the_layout(tmp_path):
    """Qwen2 over two tensor-parallel ranks and two stages: names and shapes as Megatron-Core's local layers have them."""
    model = Model("qwen2", layers=2, hidden=12, heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=19)
    write_model(tmp_path / "hf", model)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelSizes(tensor=2, pipeline=2, data=2))
    layer = {
        "input_layernorm.weight": (12,),
        "self_attention.linear_qkv.weight": (8, 12),
        "self_attention.linear_qkv.bias": (8,),
        "self_attention.linear_proj.weight": (12, 4),
        "pre_mlp_layernorm.weight": (12,),
        "mlp.linear_fc1.weight": (8, 12),
        "mlp.linear_fc2.weight": (12, 4),
    }
    layer = {f"decoder.layers.0.{name}": shape for name, shape in layer.items()}
    first = {"embedding.word_embeddings.weight": (10, 12), **layer}
    last = {**layer, "decoder.final_layernorm.weight": (12,), "output_layer.weight": (10, 12)}
    # Ranks count tensor, then data, then pipeline: those of the second replica have no file.
    expected = {0: first, 1: first, 4: last, 5: last}
    files = sorted((tmp_path / "megatron" / "model").iterdir())
    assert [f.name for f in files] == [f"rank_{rank:05d}.safetensors" for rank in expected]
    for file, shapes in zip(files, expected.values()):
        with safe_open(file, framework="pt") as handle:
            assert {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()} == shapes  # noqa: SIM118


def test_rows_that_pad_the_vocabulary_are_zero(tmp_path):
    write_model(tmp_path / "hf", dataclasses.replace(Model(), vocab=9))
    to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelSizes(tensor=4))
    ranks = [read_tensors(tmp_path / "megatron" / "model", f"rank_{rank:05d}.safetensors") for rank in range(4)]
    rows = [rank["embedding.word_embeddings.weight"] for rank in ranks]
    assert all(r.shape == (3, 12) for r in rows) and not bits(torch.cat(rows)[9:]).any()
