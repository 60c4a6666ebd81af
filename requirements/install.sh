#!/bin/sh
# Make the virtual environment .venv from the locks in this folder (called by make, from the project's folder).
#
#     install.sh STAMP [PYTHON]      STAMP: the file written last, so that an interrupted set-up is done again
#
# TORCH_ARGS in the environment is passed on to pip for torch, for example an index of CPU builds.
set -eu
stamp=$1
python=${2:-}

stop() {
    echo "ERROR: $*" >&2
    exit 2
}

fits() { # a Python that the locks were made for
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

advice='install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13)'
if [ -n "$python" ]; then
    command -v "$python" >/dev/null || stop "PYTHON=$python is not a command here; name a Python 3.11, 3.12 or 3.13."
    fits "$python" || stop "PYTHON=$python is $("$python" --version 2>&1), but 3.11, 3.12 or 3.13 is needed."
else
    for candidate in python3 python3.13 python3.12 python3.11; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || stop "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1 || true));" \
        "$advice, or name it: make PYTHON=/path/to/python3.12"
fi
# The interpreter below any active environment: .venv itself may be the active one, and is about to be replaced.
python=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments: its venv module is missing; $advice."

echo "Setting up .venv with $("$python" --version) (once; a few minutes, most of them for torch) ..."
rm -rf .venv
"$python" -m venv .venv
pip() {
    .venv/bin/python -m pip --disable-pip-version-check "$@"
}
locked() { # exact versions and hashes, built (where there is no wheel) by the locked setuptools
    pip install --quiet --no-deps --require-hashes --no-build-isolation --use-pep517 "$@"
}
locked -r requirements/build.txt
locked -r requirements/base.txt -r requirements/dev.txt
# pip would warn that backpack-for-pytorch misses torchvision, which stays out on purpose (see pyproject.toml).
# shellcheck disable=SC2086 # several options in one variable
pip install --no-warn-conflicts ${TORCH_ARGS:-} -r requirements/torch.txt
pip install --quiet --no-deps --no-build-isolation --editable .
touch "$stamp"
echo "Set up .venv."
