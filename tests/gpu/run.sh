#!/usr/bin/env bash
# Tests of kernels on a CUDA device, against an installed fastgen (wheel or editable): bash tests/gpu/run.sh [pytest args]
set -euo pipefail
cd "$(dirname "$0")/../.."
# Not `python -m pytest`: the checkout must not come before an installed wheel on the path.
exec "${PYTHON:-python}" -c '
import os, sys
sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != os.getcwd()]
import torch
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device")
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-m", "", "tests/kernels", "tests/gpu", *sys.argv[1:]]))
' "$@"
