#!/usr/bin/env bash
# Makes a virtual environment and runs the tests: scripts/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${SWIFTBALANCER_TEST_VENV:-.venv-test}" "dev"
# Two at a time: ranks and workers of a test wait for each other, and for deadlines, more than they compute.
exec "$VENV/bin/python" -m pytest -q -n 2 --dist loadfile "$@"
