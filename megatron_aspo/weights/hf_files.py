"""The tensors of a Hugging Face model directory: strict accounting first, then boxes of them, without loading whole files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_aspo.errors import UserError
from megatron_aspo.weights.hf_model import HFModel
from megatron_aspo.weights.layout import Box

# Buffers that old checkpoints carry although every reader computes them.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class TensorReader:
    """Reads boxes of a model directory's tensors, whichever file holds them, without loading whole files."""

    def __init__(self, model: HFModel):
        """Opens nothing yet; raises UserError when tensors are missing, unknown, doubled or of the wrong shape."""
        self._files = _tensor_files(model.directory)
        expected = model.tensor_shapes
        if model.dims.tied and "lm_head.weight" in self._files:
            # Some exporters write the tied matrix twice; the embedding is the one that counts.
            self._files.pop("lm_head.weight")
        missing = [name for name in expected if name not in self._files]
        extra = [name for name in self._files if name not in expected and not name.endswith(_IGNORED_SUFFIXES)]
        if missing or extra:
            problem = f"lacks {missing[0]}" if missing else f"has the unknown tensor {extra[0]}"
            raise UserError(
                f"{model.directory} {problem} ({len(missing)} missing, {len(extra)} unknown); "
                f"expected the {len(expected)} tensors of a {model.architecture} with its config.json"
            )
        for file in sorted(set(self._files.values())):
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name in expected and tuple(handle.get_slice(name).get_shape()) != expected[name]:
                        shape = tuple(handle.get_slice(name).get_shape())
                        raise UserError(f"{file.name}: {name} has shape {shape}; config.json says {expected[name]}")

    def read(self, wanted: list[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yields (name, box, tensor) for each request, file by file, in the file's dtype."""
        by_file: dict[Path, list[tuple[str, Box]]] = {}
        for name, box in wanted:
            by_file.setdefault(self._files[name], []).append((name, box))
        for file, requests in by_file.items():
            with _open(file) as handle:
                for name, box in requests:
                    yield name, box, handle.get_slice(name)[tuple(slice(*edge) for edge in box)]


@contextmanager
def _open(file: Path):
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); the file is damaged or incomplete, copy it again") from error
    with handle:
        yield handle


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name → file, from the index or the single file; checks the index against the files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            claimed = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from error
        files = sorted({directory / name for name in claimed.values()})
    else:
        claimed = None
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no .safetensors file; convert the model to safetensors first")
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is named by {index.name} but missing; copy it again")
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    raise UserError(f"{name} stands in both {found[name].name} and {file.name}; keep one of them")
                found[name] = file
    return found
