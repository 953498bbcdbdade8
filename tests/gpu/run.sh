#!/usr/bin/env bash
# Tests of kernels on a CUDA device, with an installed fastgen (wheel or editable): bash tests/gpu/run.sh [pytest args]
# With pytest-xdist, those of tests/kernels run in several processes (WORKERS, default: the cores but four, at most 12):
# most of their time is the compilation of kernels. Those of tests/gpu run alone afterwards; they need the memory.
# SANITIZER goes before python: SANITIZER="compute-sanitizer --tool memcheck".
set -euo pipefail
cd "$(dirname "$0")/../.."

# Not `python -m pytest`: the checkout must not come before an installed wheel on the path.
run() {
    # shellcheck disable=SC2086
    ${SANITIZER:-} "${PYTHON:-python}" -c '
import importlib.util, os, sys
sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != os.getcwd()]
import torch
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device")
import pytest
workers = int(sys.argv[1] or max(1, min(12, (os.cpu_count() or 1) - 4)))
options = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
sys.exit(pytest.main(["-p", "no:cacheprovider", "-m", "", *options, *sys.argv[2:]]))
' "$@"
}

status=0
run "${WORKERS:-}" tests/kernels "$@" || status=$?
[ "$status" -eq 5 ] && status=0 # the arguments select nothing here
second=0
run 1 tests/gpu "$@" || second=$?
[ "$second" -eq 5 ] && second=0
exit $((status > second ? status : second))
