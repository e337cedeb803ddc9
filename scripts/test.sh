#!/usr/bin/env bash
# The checks and the quick tests, from nothing but Python >= 3.11 and git:
#
#     scripts/test.sh                          # all but what takes minutes
#     scripts/test.sh -m slow                  # that
#     scripts/test.sh tests/test_quant_fit.py  # arguments go to pytest
#     VENV=~/.venvs/kvquant scripts/test.sh    # another virtual environment than .venv
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$repository"
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
"$python" -m pytest -q -n 2 -m "not slow" "$@"
