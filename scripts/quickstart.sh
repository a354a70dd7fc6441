#!/usr/bin/env bash
# Makes a virtual environment, installs swiftbalancer and runs the demo: scripts/quickstart.sh [demo options]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${SWIFTBALANCER_VENV:-.venv}" "fast,torch"
exec "$VENV/bin/swiftbalancer" demo "$@"
