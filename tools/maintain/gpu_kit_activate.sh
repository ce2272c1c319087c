# shellcheck shell=bash
# Source this from the folder of a kit that tools/maintain/make_gpu_kit.sh made: it puts the kit's packages on PYTHONPATH. They are unpacked
# once and atomically into GPU_KIT_HOME (by default a folder in TMPDIR). PYTHON names the interpreter with torch, by default python3.
# Returns 1 and prints one line where the kit does not fit or is damaged.
_gpu_kit_value() {
    sed -n "s/^$1=//p" "$kit/manifest"
}

_activate_gpu_kit() {
    local kit home part packages wanted found python=${PYTHON:-python3}
    kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    wanted="Python $(_gpu_kit_value python), torch $(_gpu_kit_value torch)"
    found=$("$python" -c 'import sys, torch; print("Python %d.%d, torch %s" % (*sys.version_info[:2], ".".join(torch.__version__.split(".")[:2])))' 2>/dev/null) ||
        { echo "gpu kit: error: $python has no torch; name an interpreter that has it with PYTHON" >&2 && return 1; }
    [[ $found == "$wanted" ]] || { echo "gpu kit: error: the kit is for $wanted, $python has $found" >&2 && return 1; }
    packages=$(_gpu_kit_value packages)
    home=${GPU_KIT_HOME:-${TMPDIR:-/tmp}/megatron_aspo-gpu-kit-$UID}/$packages
    if [[ ! -d $home ]]; then
        [[ $(sha256sum <"$kit/packages.tar.xz" | cut -d ' ' -f 1) == "$packages" ]] ||
            { echo "gpu kit: error: $kit/packages.tar.xz is damaged; carry it again" >&2 && return 1; }
        part=$home.$$
        # shellcheck disable=SC2015  # if either fails, it could not be unpacked
        mkdir -p "$part" 2>/dev/null && "$python" -c 'if True:
            import sys, tarfile
            tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$kit/packages.tar.xz" "$part" ||
            { rm -rf "$part" && echo "gpu kit: error: it cannot be unpacked into $part" >&2 && return 1; }
        mv -T "$part" "$home" 2>/dev/null || rm -rf "$part" # another shell was faster
    fi
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
}
_activate_gpu_kit
