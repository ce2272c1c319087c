#!/usr/bin/env bash
# Makes build/gpu-kit: the packages that a machine with a Hopper card and no network lacks for tools/prove/gpu_check.py, if it has Python 3.12,
# torch 2.11 for CUDA 13.0 and transformers. All come from public packages, with the versions and hashes in tools/locks/gpu-kit*.txt.
# docs/gpu.md explains its use. The kit is complete or absent, and is made again only after one of its inputs has changed.
#   bash tools/maintain/make_gpu_kit.sh [TARGET]
# PYTHON=/path/to/python3.12 chooses the interpreter, which needs its headers. Downloads and compiled files stay in TARGET.work.
#
# It needs no CUDA compiler and no GPU. Transformer Engine's kernels come compiled, as a library for seven architectures, of which
# tools/maintain/keep_gpu_code.py keeps one. Its torch extension comes as C++ source, which needs CUDA's headers; they are packages too.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
host_lock=$root/tools/locks/gpu-kit-host-py312.txt
kit_lock=$root/tools/locks/gpu-kit-py312.txt
architecture=sm_90
disk_gib=12    # 6 for the environment, 3 while pip unpacks, the rest for the library and the kit
memory_gib=3   # the compiler's
limit_mib=64   # of the kit and the repository's files together

fail() {
    echo "make_gpu_kit.sh: error: $*" >&2
    exit 1
}

check_machine() {
    local name free
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "the kit is for Linux x86_64, this is $(uname -sm)"
    for name in g++ strip xz sha256sum flock git; do
        [[ -n $(command -v "$name") ]] || fail "$name was not found; install it"
    done
    python=${PYTHON:-$(command -v python3.12 || true)}
    [[ $("${python:-false}" -c 'import sys; print(sys.version_info[:2] == (3, 12))' 2>/dev/null) == True ]] ||
        fail "Python 3.12 was not found; install it, or name it with PYTHON=/path/to/python3.12"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $headers/Python.h ]] || fail "$python has no headers in $headers; install them (Debian, Ubuntu: apt install python3.12-dev)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3.12-venv)"
    free=$(df -Pk "$(dirname "$target")" | awk 'NR == 2 { print $4 }')
    ((free >= disk_gib << 20)) || fail "$disk_gib GiB of free disk are needed beside $target, $((free >> 20)) GiB are there; free some"
    free=$(awk '/MemAvailable/ { print $2 }' /proc/meminfo)
    ((free >= memory_gib << 20)) || fail "$memory_gib GiB of free memory are needed, $((free >> 20)) GiB are there"
}

# The inputs of the kit.
fingerprint() {
    cat "$host_lock" "$kit_lock" "$root"/tools/maintain/{make_gpu_kit.sh,gpu_kit_activate.sh,keep_gpu_code.py} | sha256sum | cut -d ' ' -f 1
}

# Run a step unless it was done with the same inputs: step NAME COMMAND …
step() {
    local name=$1 stamp=$work/$1.done
    shift
    if [[ -f $stamp && $(cat "$stamp") == "$made_of" ]]; then return; fi
    echo "make_gpu_kit.sh: $name"
    # Not on the left of ||, where bash would continue after a command that fails.
    (set -e && "$@") >"$work/$name.log" 2>&1 &
    wait $! || { tail -n 15 "$work/$name.log" >&2; fail "$name failed; the whole output is in $work/$name.log"; }
    echo "$made_of" >"$stamp"
}

pip_install() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH='' "$work/host/bin/python" -m pip install --no-input --no-cache-dir --no-deps --require-hashes \
        --only-binary :all: --progress-bar off "$@"
}

# An environment with the other machine's packages, to compile against and to test the kit in.
make_host() {
    rm -rf "$work/host"
    "$python" -m venv "$work/host"
    pip_install -r "$host_lock"
}

install_packages() {
    rm -rf "$work/site" "$work/wheels.txt"
    grep -v '^transformer_engine_torch==' "$kit_lock" >"$work/wheels.txt"
    pip_install --target "$work/site" -r "$work/wheels.txt"
}

fetch_source() {
    rm -rf "$work/source"
    mkdir "$work/source"
    grep '^transformer_engine_torch==' "$kit_lock" >"$work/source/lock.txt"
    CUDA_HOME=$cuda PYTHONPATH='' "$work/host/bin/python" -m pip download --no-cache-dir --no-deps --no-build-isolation --no-binary :all: \
        --require-hashes --progress-bar off --dest "$work/source" -r "$work/source/lock.txt"
    tar -xzf "$work"/source/*.tar.gz --strip-components 1 -C "$work/source"
}

# All sources in one unit, so that torch's headers, which compile longer than the code, are read once.
compile_extension() {
    local packages=$1 source=$work/source name options
    name=transformer_engine_torch$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    (cd "$source/csrc" && find . -name '*.cpp' | sort | sed 's#^\./\(.*\)$#\#include "\1"#') >"$work/all.cpp"
    options=(-O1 -g0 -fPIC -std=c++17 -fvisibility=hidden -DNDEBUG -DTORCH_API_INCLUDE_EXTENSION_H
        -DTORCH_EXTENSION_NAME=transformer_engine_torch -I"$source/csrc" -I"$source/common_headers" -I"$source/common_headers/common"
        -I"$source/common_headers/common/include" -I"$packages/torch/include" -I"$packages/torch/include/torch/csrc/api/include"
        -I"$cuda/include" -I"$packages/nvidia/cudnn/include" -I"$packages/nvidia/nccl/include" -I"$headers")
    g++ "${options[@]}" -shared -o "$work/site/$name" "$work/all.cpp" -L"$packages/torch/lib" -lc10 -ltorch -ltorch_cpu -ltorch_python
    strip --strip-unneeded "$work/site/$name"
    # So that Transformer Engine compares its version with those of the other two packages.
    mkdir -p "$work/site/transformer_engine_torch-2.11.0.dist-info"
    cp "$source/PKG-INFO" "$work/site/transformer_engine_torch-2.11.0.dist-info/METADATA"
}

# NVIDIA's own tool must find the code of this architecture, and no other, in the result.
trim_library() {
    local library=$work/site/transformer_engine/wheel_lib/libtransformer_engine.so found
    "$work/host/bin/python" "$root/tools/maintain/keep_gpu_code.py" "$library" "$architecture"
    strip --strip-unneeded "$library"
    found=$("$1/triton/backends/nvidia/bin/cuobjdump" -lelf "$library" | grep -o 'sm_[0-9]*' | sort -u)
    [[ $found == "$architecture" ]] || { echo "cuobjdump finds code for: $found" && return 1; }
}

# Put a folder of packages into a new kit: pack SITE KIT
pack() {
    rm -rf "$2"
    mkdir -p "$2"
    tar -C "$1" --exclude=__pycache__ --exclude=./bin --sort=name --owner=0 --group=0 --mtime=@0 -cf - . | xz -6 >"$2/packages.tar.xz"
    cp "$root/tools/maintain/gpu_kit_activate.sh" "$2/activate.sh"
    {
        printf 'made_of=%s\npython=%s\ntorch=%s\n' "$made_of" 3.12 2.11
        echo "packages=$(sha256sum <"$2/packages.tar.xz" | cut -d ' ' -f 1)"
        sed -n 's/^\([^#]*\) --hash=.*/# \1/p' "$kit_lock"
    } >"$2/manifest"
}

check_size() {
    local kit repository
    kit=$(du -sk --apparent-size "$1" | cut -f 1)
    repository=$(git -C "$root" ls-files -z | (cd "$root" && xargs -0 du -ck --apparent-size) | awk 'END { print $1 }')
    echo "the kit has $((kit >> 10)) MiB, the repository's files $((repository >> 10)) MiB"
    ((kit + repository <= limit_mib << 10)) || { echo "together they may have $limit_mib MiB" && return 1; }
}

# As on the other machine, except for the card: a fresh shell, the kit's own script, all imports, and the check with small sizes.
try_kit() {
    rm -rf "$work/tried"
    cd "$root"
    # shellcheck disable=SC2016  # $0 is the inner shell's
    env -i PATH="$work/host/bin:/usr/bin:/bin" HOME="$work" TMPDIR="$work" GPU_KIT_HOME="$work/tried" bash -euc '
        source "$0/activate.sh"
        python3 -c "import megatron.core, transformer_engine.pytorch as engine; print(engine.Linear, engine.DotProductAttention)"
        python3 tools/prove/gpu_check.py environment trainer logprobs --small' "$1"
    rm -rf "$work/tried"
}

# The finished kit gets its name atomically.
publish() {
    rm -rf "$target.old"
    if [[ -e $target ]]; then mv "$target" "$target.old"; fi
    mv "$1" "$target"
    rm -rf "$target.old"
}

main() {
    local packages
    target=$(realpath -m "${1:-$root/build/gpu-kit}")
    made_of=$(fingerprint)
    if grep -qsx "made_of=$made_of" "$target/manifest"; then
        echo "make_gpu_kit.sh: $target is up to date"
        return
    fi
    work=$target.work
    mkdir -p "$work"
    exec 9>"$work/lock"
    flock 9 # a second one waits for the first
    if grep -qsx "made_of=$made_of" "$target/manifest"; then return; fi
    check_machine
    step environment make_host
    packages=$("$work/host/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cuda=$packages/nvidia/cu13
    step packages install_packages
    step source fetch_source
    step extension compile_extension "$packages"
    step library trim_library "$packages"
    step archive pack "$work/site" "$work/kit"
    step size check_size "$work/kit"
    step trial try_kit "$work/kit"
    publish "$work/kit"
    rm -f "$work"/{archive,size,trial}.done
    cat "$work/size.log"
    echo "make_gpu_kit.sh: $target is ready after $SECONDS s; $work can be removed"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
