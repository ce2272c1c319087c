"""Build the CPU image without a daemon and use it as a new user would: python docker/check_image.py [--steps 2] [--skip-build]

Builds it by docker/build.sh with buildah on a base that debootstrap makes, runs docker/smoke.py and the quickstart in it as the image's
user, and looks whether the code sandbox works there, with and without what docker/README.md asks of a container. The package indexes that
pip uses on this machine are handed on, local ones as volumes. Needs root, buildah and debootstrap; with podman it runs real containers,
else in buildah's chroot, in which no sandbox can work.

The last line is one JSON object: seconds of the build and of the quickstart, the image's size, the quickstart's summary and the sandbox's
answers. Exit status 1 if the build, the smoke test or the quickstart fails.
"""

import argparse
import configparser
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAG = "megatron_aspo:check"
OPEN = ["--security-opt", "seccomp=unconfined", "--security-opt", "unmask=ALL"]
"""Options of podman that the code sandbox needs."""
_CERTIFICATES = "/etc/host-certificates.crt"


def pip_settings(directory: Path) -> tuple[Path, list[str]]:
    """Write a pip.conf with this machine's package indexes; returns it, and the volumes for what of it lies on this machine."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():  # global first, the environment last, as pip reads them
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2].lower()] = value.strip("'\"")
    kept = {key: found[key] for key in ("index-url", "extra-index-url", "find-links", "trusted-host") if key in found}
    volumes = []
    for word in " ".join(kept.values()).replace("\\n", " ").split():
        path = word.removeprefix("file://").removesuffix("/simple")
        if path.startswith("/"):
            volumes += ["--volume", f"{path}:{path}:ro"]
    if certificates := found.get("cert") or os.environ.get("SSL_CERT_FILE"):
        kept["cert"] = _CERTIFICATES
        volumes += ["--volume", f"{certificates}:{_CERTIFICATES}:ro"]
    parser = configparser.RawConfigParser()
    parser["global"] = {key: value.replace("\\n", " ") for key, value in kept.items()}
    path = directory / "pip.conf"
    with path.open("w") as file:
        parser.write(file)
    return path, volumes


class Container:
    """Runs commands in new containers of the image."""

    def __init__(self, pip_conf: Path, volumes: list[str]):
        self._volumes = [*volumes, "--volume", f"{pip_conf}:/etc/pip.conf:ro"]
        self._podman: list[str] = []
        """Beginning of a call of podman; empty where it starts no container, as in some containers."""
        for runtime in ("", "runc", "crun"):
            words = podman(runtime)
            if shutil.which("podman") and not subprocess.run([*words, f"localhost/{TAG}", "true"], capture_output=True).returncode:
                self._podman = words
                break

    @property
    def real(self) -> bool:
        return bool(self._podman)

    def run(self, *command: str, options: list[str] = (), timeout_s: float = 3600) -> subprocess.CompletedProcess:
        if self.real:
            words = [*self._podman, *self._volumes, *options, f"localhost/{TAG}", *command]
            return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
        made = subprocess.run(["buildah", "from", TAG], capture_output=True, text=True, check=True).stdout.strip()
        try:
            words = ["buildah", "run", "--isolation", "chroot", *self._volumes, made, "--", *command]
            return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
        finally:
            subprocess.run(["buildah", "rm", made], capture_output=True, check=False)


def podman(runtime: str) -> list[str]:
    """The beginning of a call; no limit is above what this process may have itself."""
    files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    processes = 32768 if processes == resource.RLIM_INFINITY else min(32768, processes)
    words = ["podman", "--cgroup-manager", "cgroupfs", "run", "--rm", "--network", "host", "--shm-size", "4g", "--pids-limit", "-1"]
    words += ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={processes}:{processes}", "--no-healthcheck"]
    return words + (["--runtime", runtime] if runtime else [])


def sandbox(container: Container, options: list[str]) -> str:
    """Return the status and detail that `megatron-aspo doctor` reports for the code sandbox in a container."""
    done = container.run("megatron-aspo", "doctor", "--json", options=options, timeout_s=300)
    (record,) = (record for record in json.loads(done.stdout)["checks"] if record["check"] == "sandbox")
    return f"{record['status']}: {record['detail']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of the quickstart; default: all")
    parser.add_argument("--skip-build", action="store_true", help=f"use the image {TAG} of an earlier call")
    parsed = parser.parse_args()
    for program in ("buildah", "debootstrap"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            print(f"check_image.py: error: {program} is not installed: apt install {program}", file=sys.stderr)
            return 2
    figures: dict = {}
    with tempfile.TemporaryDirectory() as name:
        pip_conf, volumes = pip_settings(Path(name))
        started = time.monotonic()
        if not parsed.skip_build:
            build = ["bash", "docker/build.sh", "cpu", "--builder", "buildah", "--debootstrap", "--tag", TAG, "--pip-conf", str(pip_conf)]
            status = subprocess.run([*build, "--", *volumes], cwd=ROOT, stdout=sys.stderr, check=False).returncode
            if status:
                return 1
            figures["build_s"] = round(time.monotonic() - started)
        figures["image_size"] = image_size()
        container = Container(pip_conf, volumes)
        figures["real_container"] = container.real
        smoke = container.run("python", "docker/smoke.py", timeout_s=600)
        print(smoke.stdout, smoke.stderr, file=sys.stderr)
        figures["smoke"] = smoke.returncode == 0
        if smoke.returncode:
            print(json.dumps(figures))
            return 1
        started = time.monotonic()
        steps = [f"steps={parsed.steps}"] if parsed.steps else []
        quickstart = container.run("bash", "tools/quickstart.sh", *steps)
        print(quickstart.stdout[-3000:], quickstart.stderr[-3000:], file=sys.stderr)
        figures["quickstart_s"] = round(time.monotonic() - started)
        lines = quickstart.stdout.strip().splitlines()
        figures["quickstart"] = json.loads(lines[-1]) if quickstart.returncode == 0 else None
        figures["sandbox_by_default"] = sandbox(container, [])
        figures["sandbox_allowed"] = sandbox(container, OPEN) if container.real else None
    print(json.dumps(figures))
    return 0 if figures["quickstart"] else 1


def image_size() -> str:
    """As buildah prints it."""
    listed = subprocess.run(["buildah", "images", "--format", "{{.Size}}", TAG], capture_output=True, text=True, check=True).stdout
    return listed.split("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
