#!/usr/bin/env bash
# Builds an image of this checkout with docker, podman or buildah, whichever is there; buildah needs neither a daemon nor, as root, a registry.
#   bash docker/build.sh cpu                     megatron_aspo:cpu, from docker/Dockerfile.cpu
#   bash docker/build.sh cuda                    megatron_aspo:cuda, from docker/Dockerfile
# Options:
#   --tag NAME           of the image
#   --builder NAME       docker, podman or buildah
#   --debootstrap        makes the CPU image's base from Debian's package mirror, where no registry can be reached; needs root, debootstrap and
#                        buildah; MIRROR=URL names another mirror
#   --pip-conf FILE      a pip.conf with another package index, for the time of the build only
#   -- ARGUMENT…         goes to the builder, such as --build-arg WITH_APEX=0 or --volume /wheels:/wheels:ro
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "build.sh: error: $*" >&2
    exit 2
}

kind=${1:-}
shift || true
case $kind in
    cpu) file=docker/Dockerfile.cpu ;;
    cuda) file=docker/Dockerfile ;;
    *) fail "name the image: cpu or cuda" ;;
esac
tag=megatron_aspo:$kind builder='' debootstrap=false pip_conf=''
while (($#)); do
    case $1 in
        --tag) tag=${2:?} && shift 2 ;;
        --builder) builder=${2:?} && shift 2 ;;
        --debootstrap) debootstrap=true && shift ;;
        --pip-conf) pip_conf=${2:?} && shift 2 ;;
        --) shift && break ;;
        *) fail "$1 is not known; arguments of the builder go after --" ;;
    esac
done
[[ -z $pip_conf || -f $pip_conf ]] || fail "--pip-conf $pip_conf: there is no such file"

if [[ -z $builder ]]; then
    if docker info >/dev/null 2>&1; then
        builder=docker
    elif [[ -n $(command -v podman) ]]; then
        builder=podman
    elif [[ -n $(command -v buildah) ]]; then
        builder=buildah
    else
        fail "docker does not answer, and there is no podman and no buildah; install one (Debian, Ubuntu: apt install buildah)"
    fi
fi

arguments=(--file "$file" --tag "$tag")
# Without a checkout, as from an archive, the revision stays unknown.
if revision=$(git rev-parse HEAD 2>/dev/null); then arguments+=(--build-arg "REVISION=$revision"); fi
arguments+=(--build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' megatron_aspo/__init__.py)")
if [[ -n $pip_conf ]]; then arguments+=(--secret "id=pip,src=$pip_conf"); fi
# Only docker's own format keeps health checks and shells.
if [[ $builder != docker ]]; then arguments+=(--format docker); fi
# As root buildah works in a plain chroot, which containers allow too.
if [[ $builder == buildah ]] && ((EUID == 0)); then arguments+=(--isolation chroot); fi

if $debootstrap; then
    [[ $kind == cpu ]] || fail "--debootstrap makes Debian, the base of the CPU image only"
    [[ $builder == buildah ]] || fail "--debootstrap needs buildah; name it by --builder buildah"
    ((EUID == 0)) || fail "--debootstrap needs root"
    [[ -n $(command -v debootstrap) ]] || fail "debootstrap is not installed: apt install debootstrap"
    base=localhost/megatron_aspo_base:bookworm
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        root=$(mktemp -d /var/tmp/megatron_aspo_base.XXXXXX)
        trap 'rm -rf "$root"' EXIT
        echo "build.sh: making Debian 12 from ${MIRROR:-http://deb.debian.org/debian}"
        debootstrap --variant=minbase bookworm "$root/system" "${MIRROR:-http://deb.debian.org/debian}" >"$root/log" 2>&1 ||
            { tail -n 15 "$root/log" >&2; fail "debootstrap failed"; }
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$root/system" / >/dev/null
        buildah commit --quiet --rm "$container" "$base" >/dev/null
    fi
    arguments+=(--build-arg "BASE=$base")
fi

command=("$builder" build "${arguments[@]}" "$@" .)
printf 'build.sh: '
printf '%q ' "${command[@]}"
echo
exec "${command[@]}"
