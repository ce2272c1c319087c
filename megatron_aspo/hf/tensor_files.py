"""The tensors of a Hugging Face model directory: checked completely first, then read box by box, without loading whole files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import HFModel
from megatron_aspo.weights.layout import Box, slices

# Buffers in old checkpoints that every reader computes anyway.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HEAD_CHUNK_ROWS = 4096
"""Vocabulary rows of head and embedding that are compared at a time: a few MB of each."""
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Element types of weights: safetensors' code → torch's name."""


class Reader(Protocol):
    """A source of boxes of Hugging Face tensors: a Hugging Face directory, or a checkpoint at any layout."""

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yield (name, box, tensor) for each request, in any order, in the stored dtype."""
        ...

    def homes(self, name: str) -> list[Box]:
        """Return the boxes in which a tensor is stored; together they cover it."""
        ...


class TensorReader:
    """Reads boxes of the tensors in a model directory, from whichever file holds them, without loading whole files."""

    def __init__(self, model: HFModel):
        """Read the headers only. Raises UserError when tensors are missing, unknown, duplicate, or of a wrong shape or element type."""
        self._model = model
        self._files = _tensor_files(model.directory)
        expected = model.tensor_shapes
        self._second_head = self._files.pop(_HEAD, None) if model.dims.tied else None
        missing = [name for name in expected if name not in self._files]
        extra = [name for name in self._files if name not in expected and not name.endswith(_IGNORED_SUFFIXES)]
        if missing or extra:
            problem = f"lacks {missing[0]}" if missing else f"has the unknown tensor {extra[0]} in {self._files[extra[0]].name}"
            raise UserError(
                f"{model.directory} {problem} ({len(missing)} missing, {len(extra)} unknown); "
                f"expected the {len(expected)} tensors of a {model.architecture} with its config.json; get the model again, or correct "
                "config.json"
            )
        self._handles = {file: open_tensors(file) for file in sorted(set(self._files.values()))}
        self.dtypes = {name: self._check(name, shape) for name, shape in expected.items()}
        """Element type of each tensor, as torch names it."""

    def _check(self, name: str, shape: tuple[int, ...]) -> str:
        stored = self._handles[self._files[name]].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise UserError(
                f"{self._files[name]}: {name} has shape {tuple(stored.get_shape())}; config.json says {shape}; one of the two is another "
                "model's: get it again"
            )
        if stored.get_dtype() not in DTYPES:
            raise UserError(
                f"{self._files[name]}: {name} has element type {stored.get_dtype()}; expected one of {', '.join(DTYPES)}: get the model "
                "unquantized"
            )
        return DTYPES[stored.get_dtype()]

    @classmethod
    def checked(cls, model: HFModel) -> "TensorReader":
        """Return a reader after checking that every program loads the same weights: headers, and the output head of a tied model.

        Every command that starts from a model's files opens them here first.
        """
        reader = cls(model)
        reader._check_head()
        return reader

    def _check_head(self) -> None:
        """Raise UserError when the two copies of a tied model's matrix, which some exporters write, differ: one would be lost."""
        if self._second_head is None:
            return
        head = open_tensors(self._second_head).get_slice(_HEAD)
        embedding = self._handles[self._files[_EMBEDDING]].get_slice(_EMBEDDING)
        if not _equal_rows(head, embedding):
            raise UserError(
                f"{self._second_head}: {_HEAD} differs from {_EMBEDDING}, but config.json ties them; set tie_word_embeddings to false, or "
                f"remove {_HEAD}"
            )

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        for name, box in wanted:
            yield name, box, self._handles[self._files[name]].get_slice(name)[slices(box)]

    def homes(self, name: str) -> list[Box]:
        return [tuple((0, extent) for extent in self._model.tensor_shapes[name])]


def open_tensors(file: Path) -> safe_open:
    """Map a safetensors file into memory. Raises UserError when it is incomplete."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); the file is damaged or incomplete, copy it again") from error


def has_weights(directory: Path) -> bool:
    """Whether the directory has weights in any format, or an index of them."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", _INDEX, "*.bin", "*.pth", "*.gguf", *_ADAPTER_FILES))


def _equal_rows(one, other) -> bool:
    """Whether two stored matrices have the same values, whatever their element types."""
    if one.get_shape() != other.get_shape() or not {one.get_dtype(), other.get_dtype()} <= DTYPES.keys():
        return False
    same_type = one.get_dtype() == other.get_dtype()
    for start in range(0, one.get_shape()[0], _HEAD_CHUNK_ROWS):
        first, second = (stored[start : start + _HEAD_CHUNK_ROWS] for stored in (one, other))
        if not torch.equal(first, second) if same_type else not torch.equal(first.float(), second.float()):
            return False
    return True


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Return tensor name → file, from the index or the single file, after comparing the index with the files."""
    files, claimed = _model_files(directory)
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is named by {_INDEX} but missing; copy it again")
        for name in open_tensors(file).keys():  # noqa: SIM118 - safe_open is not a mapping
            if name in found:
                raise UserError(f"{name} stands in both {found[name].name} and {file.name}; keep one of them")
            found[name] = file
    for name, file in claimed.items():
        if found.get(name) != directory / file:
            raise UserError(f"{_INDEX} says that {name} is in {file}, which does not hold it; get the model again")
    return found


def _model_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files of the model, and the index, tensor name → file name, which is empty if there is none.

    Training ranks, engines and transformers must read the same files. With an index vLLM reads the files in it, without one every
    .safetensors file; transformers reads model.safetensors if it exists. Raises UserError, naming the file, where they would differ.
    """
    for name in _ADAPTER_FILES:
        if (directory / name).exists():
            raise UserError(
                f"{directory / name} belongs to a LoRA adapter, which is not applied here; merge it into the model, or move its files away"
            )
    if (index := directory / _INDEX).is_file():
        try:
            claimed = dict(json.loads(index.read_text())["weight_map"])
            files = sorted({directory / name for name in claimed.values()})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from error
        if (whole := directory / _WHOLE) not in files and whole.is_file():
            raise UserError(f"{whole} is not named by {_INDEX} beside it: transformers reads the one, vLLM the other; remove one of them")
        return files, claimed
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no .safetensors file; convert the model to safetensors first")
    if directory / _WHOLE in files and (others := [file for file in files if file.name != _WHOLE]):
        raise UserError(f"{others[0]} is no part of the model in {_WHOLE}, but vLLM would read it too; move it out of the directory")
    return files, {}
