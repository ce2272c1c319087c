"""The weight map names and shapes exactly the parameters that Megatron-Core builds (listings made by tools/maintain/list_parameters.py)."""

import json
import re
from pathlib import Path

import pytest

from megatron_aspo.weights.families import FAMILIES, NAMINGS, layout
from megatron_aspo.weights.layout import ModelDims, ParallelSizes

LISTINGS = Path(__file__).parent.parent / "listings"
FILES = sorted(LISTINGS.glob("*/*/*.json"))

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join((*file.parts[-3:-1], file.stem)))


def test_every_family_is_listed_under_both_namings_and_versions():
    versions = {"0.16.1", "0.19.2"}
    assert {(f.parts[-3], f.parts[-2], f.stem) for f in FILES} == {(v, n, a) for v in versions for n in NAMINGS for a in FAMILIES}


@each_file
def test_the_map_has_exactly_the_parameters_that_megatron_builds(file):
    content = json.loads(file.read_text())
    dims = ModelDims(**content["dims"])
    for listing in content["ranks"]:
        sizes = ParallelSizes(**listing["sizes"])
        at = sizes.coordinates(listing["rank"])
        ours = layout(content["architecture"], dims, sizes, at, content["layer_spec"])
        assert ours.parameter_shapes == {name: tuple(shape) for name, shape in listing["parameters"].items()}
        assert ours.expert_parameters == {name for name in listing["parameters"] if ".experts." in name}


@each_file
def test_a_rank_has_the_coordinates_that_megatron_gives_it(file):
    for listing in json.loads(file.read_text())["ranks"]:
        # The listings have no context parallelism.
        assert vars(ParallelSizes(**listing["sizes"]).coordinates(listing["rank"])) == listing["place"] | {"context": 0}


@each_file
def test_a_rank_has_the_layers_and_experts_that_megatron_gives_it(file):
    """The numbers in a parameter's name count from the first on this rank, those in the Hugging Face name over the whole model."""
    content = json.loads(file.read_text())
    for listing in content["ranks"]:
        sizes = ParallelSizes(**listing["sizes"])
        ours = layout(
            content["architecture"], ModelDims(**content["dims"]), sizes, sizes.coordinates(listing["rank"]), content["layer_spec"]
        )
        seen = set()
        for piece in ours.pieces:
            if match := re.fullmatch(r"(model\d\.|)decoder\.layers\.(\d+)\.(.*)", piece.parameter):
                prefix, local_layer, rest = match.groups()
                layer = listing["layers"][prefix][int(local_layer)]
                assert piece.tensor.startswith(f"model.layers.{layer}.")
                seen.add((prefix, layer))
                if local_expert := re.search(r"local_experts\.(\d+)|weight(\d+)$", rest):
                    expert = listing["experts"][int(local_expert[1] or local_expert[2])]
                    assert f".experts.{expert}." in piece.tensor
        assert seen == {(prefix, layer) for prefix, layers in listing["layers"].items() for layer in layers}
