"""The choice of layers where Transformer Engine is absent, complete, broken, or beside an incompatible library."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.trainer import megatron_adapter, transformer_engine

megatron_adapter.prepare()

from megatron_aspo.trainer.device import Device  # noqa: E402
from megatron_aspo.trainer.layers import choose_layer_spec  # noqa: E402
from megatron_aspo.trainer.optimizer import fused_adam  # noqa: E402
from megatron_aspo.trainer.options import TrainerOptions  # noqa: E402

CPU, CUDA = Device(torch.device("cpu"), "gloo"), Device(torch.device("cuda"), "nccl")


@pytest.mark.parametrize(
    ("wanted", "dtype", "device", "installed", "chosen"),
    [
        ("auto", "bfloat16", CUDA, True, "transformer_engine"),
        ("auto", "float32", CUDA, True, "local"),
        ("auto", "bfloat16", CUDA, False, "local"),
        ("auto", "bfloat16", CPU, True, "local"),
        ("local", "bfloat16", CUDA, True, "local"),
        ("transformer_engine", "bfloat16", CUDA, True, "transformer_engine"),
        ("transformer_engine", "bfloat16", CUDA, False, UserError("needs the transformer_engine package, which is not here")),
        ("transformer_engine", "bfloat16", CPU, True, UserError("needs a CUDA device, which is not here; use auto or local")),
        ("transformer_engine", "float32", CUDA, True, UserError("in half precision only, not in trainer.dtype=float32; use auto or local")),
    ],
)
def test_the_chosen_layers_run_on_this_device_in_this_dtype(monkeypatch, wanted, dtype, device, installed, chosen):
    monkeypatch.setattr(transformer_engine, "is_installed", lambda: installed)
    options = TrainerOptions(layer_spec=wanted, dtype=dtype)
    if isinstance(chosen, str):
        assert choose_layer_spec(options, device) == chosen
    else:
        with pytest.raises(UserError, match=str(chosen)):
            choose_layer_spec(options, device)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package transformer_engine whose torch part is this code."""
    # Where there is no GPU, importing it is prevented.
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)

    def put(code: str, *distributions: str) -> None:
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "pytorch.py").write_text(code)
        for named in distributions:
            name, version = named.split("==")
            (tmp_path / f"{name}-{version}.dist-info").mkdir()
            (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


def test_an_absent_or_complete_engine_is_accepted(install):
    transformer_engine.check_installation()
    install("")
    transformer_engine.check_installation()


def test_on_a_cpu_megatron_does_not_find_an_engine_whose_optimizer_needs_a_gpu(tmp_path):
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch" / "__init__.py").touch()
    (package / "pytorch" / "optimizers.py").write_text(
        "class FusedAdam: pass\nmulti_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = None"
    )
    about = tmp_path / "transformer_engine-2.12.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.12.0\n")
    code = "from megatron_aspo.trainer import rank, transformer_engine as te; print(rank.fused_adam(), te.is_installed())"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "torch fused AdamW False\n", done.stderr[-1000:]


def test_an_engine_without_its_torch_extension_is_refused_naming_the_missing_part(install):
    install("import transformer_engine_torch", "transformer_engine==2.12.0")
    message = r"No module named 'transformer_engine_torch'; build its torch extension .*transformer-engine-torch==2.12.0"
    with pytest.raises(UserError, match=f"transformer_engine is installed but cannot be imported: ModuleNotFoundError: {message}"):
        transformer_engine.check_installation()


def test_a_library_that_does_not_load_is_explained_by_the_cublas_beside_it(install):
    install("raise OSError('undefined symbol')", "transformer_engine_cu13==2.15.0", "nvidia_cublas==13.1.1.3")
    with pytest.raises(UserError, match=r"cu13 2.15.0 need nvidia-cublas 13.2.0.9 or later, 13.1.1.3 is installed; upgrade"):
        transformer_engine.check_installation()


@pytest.mark.parametrize(
    ("engine", "cublas", "experts", "conflict"),
    [
        ("2.12.0", "13.1.1.3", True, False),
        ("2.13.0", "13.1.1.3", False, True),
        ("2.16.1", "13.1.1.3", False, True),
        ("2.16.1", "13.2.0.9", True, False),
        ("2.17.1", "13.1.1.3", False, False),
        ("2.17.1", "13.1.1.3", True, True),
        ("2.20.2", "13.3.0.1", True, False),
        ("", "13.1.1.3", True, False),  # built for CUDA 12, or from source
        ("2.15.0", "", True, False),
    ],
)
def test_versions_of_transformer_engine_and_cublas_that_disagree(engine, cublas, experts, conflict):
    assert bool(transformer_engine.cublas_conflict(engine, cublas, experts=experts)) == conflict


def test_the_printed_adam_is_the_one_that_megatron_imported():
    assert fused_adam() == "torch fused AdamW"
