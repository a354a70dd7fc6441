# Sourced by the other scripts: finds a Python and makes a virtual environment with swiftbalancer in it.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.10; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.10 to 3.13 with the venv module found; install one, or set PYTHON to its path." >&2
  return 1
}

# make_environment FOLDER EXTRAS: sets VENV. An environment that is there already is brought up to date.
make_environment() {
  local python
  VENV=$1
  if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$VENV"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$2]"
  # Compiles the planner's kernels into numba's cache, once; a worker would otherwise do it at its first start.
  "$VENV/bin/python" -m swiftbalancer_worker.warmup
}
