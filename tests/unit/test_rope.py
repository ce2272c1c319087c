"""Scaled rotary embeddings: frequencies by the papers' definitions, and refusal of configs that transformers and vLLM read differently."""

import json

import pytest
import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_model
from tests.models import ROPE_SCALINGS, rope_scaling, save_tiny
from tests.reference.decoder import rotary_frequencies


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory, vocab_size=64)
    return json.loads((directory / "config.json").read_text())


def read(directory, config: dict, rope: dict):
    (directory / "config.json").write_text(json.dumps(config | rope))
    return read_model(directory)


REAL = {
    "Llama 3.1": rope_scaling("llama3", rope_theta=5e5, original_max_position_embeddings=8192),
    "Llama 3.2": rope_scaling("llama3", rope_theta=5e5, factor=32.0, original_max_position_embeddings=8192),
    "Qwen": rope_scaling("yarn", rope_theta=1e6, original_max_position_embeddings=32768),
    "yarn with every option": rope_scaling("yarn", beta_fast=16, beta_slow=2, attention_factor=1.5),
}


@pytest.mark.parametrize("rope", [*map(rope_scaling, ROPE_SCALINGS), *REAL.values()], ids=[*ROPE_SCALINGS, *REAL])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_frequencies_equal_the_definition(tmp_path, config, rope, head_dim):
    scaling = read(tmp_path, config | {"head_dim": head_dim}, rope).rope_scaling
    frequencies, attention_factor = rotary_frequencies(rope["rope_parameters"], head_dim)
    torch.testing.assert_close(torch.tensor(scaling.frequencies, dtype=torch.float64), frequencies, rtol=1e-6, atol=0)
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    # They are scaled, otherwise this would prove nothing.
    plain, _ = rotary_frequencies({"rope_theta": rope["rope_parameters"]["rope_theta"]}, head_dim)
    assert (frequencies / plain).min() == pytest.approx(1 / rope["rope_parameters"]["factor"])


def test_a_model_without_scaling_has_the_frequencies_of_its_base(tmp_path, config):
    assert read(tmp_path, config, {}).rope_scaling is None


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_older_configs_are_read_too(tmp_path, config, name):
    """rope_theta and rope_scaling, instead of rope_parameters."""
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 1e4}
    scaling = read(tmp_path, old, {"rope_scaling": {name: "linear", "factor": 3.0}}).rope_scaling
    assert scaling == read(tmp_path, config, rope_scaling("linear")).rope_scaling


@pytest.mark.parametrize(("config_says", "longest"), [(64, 64), (1024, 128)])
def test_engines_have_yarn_positions_up_to_factor_times_the_original_length(tmp_path, config, config_says, longest):
    assert read(tmp_path, config | {"max_position_embeddings": config_says}, rope_scaling("yarn")).max_positions == longest


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=dynamic is not supported; expected one",
        ),
        (rope_scaling("linear", factor=0.5), "factor=0.5 is not supported with rope_type=linear; expected a number from 1 on"),
        (rope_scaling("linear", factor="2"), "factor=2 is not supported"),
        (rope_scaling("yarn", factor=None), "factor=None is not supported"),
        (rope_scaling("yarn", beta_fast=None), "beta_fast=None is not supported"),
        (rope_scaling("yarn", attn_factor=2.0), "attn_factor=2.0 is not a setting of rope_type=yarn; remove it"),
        (rope_scaling("llama3", beta_fast=32), "beta_fast=32 is not a setting of rope_type=llama3"),
        (rope_scaling("llama3", low_freq_factor=4.0), "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
        (rope_scaling("llama3", original_max_position_embeddings=-1), "original_max_position_embeddings=-1 is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, r"config\.json cannot be read: .*low_freq_factor"),
    ],
)
def test_an_ambiguous_scaling_is_refused(tmp_path, config, rope, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, config, rope)
