"""The images' files: linters accept them, copied files exist, the toy cluster's commands are accepted, the smoke test finds faults."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_aspo.cli import command_parser
from megatron_aspo.launch.start import _parser as launcher_parser

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = ["Dockerfile", "Dockerfile.cpu"]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.mark.parametrize("name", FILES)
def test_hadolint_reports_nothing(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_files_that_an_image_copies_are_in_the_checkout_and_not_ignored(name):
    ignored = set((ROOT / ".dockerignore").read_text().split("\n"))
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (DOCKER / name).read_text(), re.MULTILINE)
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists() and path.split("/")[0] not in ignored, path


def test_environments_and_secrets_stay_out_of_images():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "models", "runs", "docker/token"} <= {*ignored}
    for name in FILES:
        text = (DOCKER / name).read_text()
        assert "USER 1000" in text and not re.search(r"(?i)^(ENV|ARG) .*(token|key|password)", text, re.MULTILINE)


def test_images_install_the_locks_of_the_repository():
    assert "tools/locks/gpu-py312.txt" in (DOCKER / "Dockerfile").read_text()
    assert "tools/setup_env.sh" in (DOCKER / "Dockerfile.cpu").read_text()
    pinned = re.search(r"^transformer-engine-torch==(\S+)$", (ROOT / "tools/locks/gpu-py312.txt").read_text(), re.MULTILINE)
    assert pinned, "the CUDA image compiles this one by its name in the lock"


def test_the_launcher_and_the_grading_server_accept_the_toy_clusters_commands(compose):
    for name in ("head", "worker"):
        service = compose["services"][name]
        bash, script, *options = shlex.split(service["command"])
        assert (bash, script) == ("bash", "tools/start_ray.sh") and launcher_parser().parse_args(options).block
        environment = service["environment"]
        assert environment["MASTER_ADDR"] == "head" and environment["NNODES"] == "2"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/token" and service["secrets"] == ["token"]
    assert [compose["services"][name]["environment"]["NODE_RANK"] for name in ("head", "worker")] == ["0", "1"]
    shell, _, script = shlex.split(compose["services"]["grader"]["command"])
    words = shlex.split(script.replace("$$(hostname -i)", "10.0.0.2"))
    assert (shell, *words[:2]) == ("sh", "exec", "megatron-aspo")
    parsed = command_parser().parse_args(words[2:])
    assert (parsed.host, parsed.port) == ("10.0.0.2", 8300)


def test_the_toy_cluster_publishes_no_port_and_only_graders_may_make_namespaces(compose):
    services = compose["services"]
    assert not [name for name, service in services.items() if "ports" in service]
    assert [name for name, service in services.items() if "security_opt" in service] == ["grader"]


def test_the_smoke_test_names_a_package_that_differs_from_the_lock(tmp_path):
    smoke = load("smoke")
    assert smoke.differing(smoke.lock_of(cuda=False)) == []
    lock = tmp_path / "lock.txt"
    lock.write_text("# comment\nnumpy==0.1\nnowhere-at-all==1.0\n")
    other, missing = smoke.differing(lock)
    assert other.startswith("numpy: lock.txt has 0.1, the image ") and missing.endswith("the image missing")


def test_the_smoke_test_names_a_package_that_cannot_be_imported(tmp_path, monkeypatch):
    smoke = load("smoke")
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smoke.import_all({"numpy": "numpy"}, False) == []
    (failure,) = smoke.import_all({"broken_package": "numpy"}, False)
    assert failure.startswith("import broken_package (numpy ") and "libcudart.so.13" in failure
    assert smoke.import_all({"apex": "apex"}, True) == [] and smoke.import_all({"apex": "apex"}, False) == ["apex is not installed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the image: cpu or cuda"),
        (("cuda", "--debootstrap", "--builder", "buildah"), "makes Debian, the base of the CPU image only"),
        (("cpu", "--debootstrap", "--builder", "docker"), "--debootstrap needs buildah"),
        (("cpu", "--builder", "docker", "--pip-conf", "missing.conf"), "there is no such file"),
        (("cpu", "--squash"), "arguments of the builder go after --"),
    ],
)
def test_a_mistake_in_a_build_is_one_line_and_status_2(arguments, message):
    done = subprocess.run(["bash", DOCKER / "build.sh", *arguments], capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("build.sh: error: ") and message in line
