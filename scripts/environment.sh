#!/bin/sh
# Makes .venv from requirements.lock: with uv where it is there or can be had, else with pip. Both show what they
# download, with sizes: on a terminal as bars, else as lines.
set -eu
if command -v uv >/dev/null; then
    rm -rf .venv
    uv venv --quiet --python '>=3.11,<3.14' .venv
    uv=uv
else
    for python in "${PYTHON:-python3}" python3.12 python3.13 python3.11; do
        "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
        python=
    done
    if [ -z "$python" ]; then
        echo "nobackprop runs on Python 3.11, 3.12 and 3.13 (hydra-core does not start on 3.14 yet); found only" \
            "$(python3 --version 2>&1). Install one of them, or uv, and run make again." >&2
        exit 1
    fi
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || echo "no uv to be had; pip takes longer"
    uv=.venv/bin/uv
fi
echo "installing the locked packages into .venv: 6 GB on disk, most of it torch and its CUDA libraries"
echo "(the first time 3 GB of downloads: a minute on a fast line, four at 100 Mbit/s; from uv's cache a few seconds)"
if command -v "$uv" >/dev/null; then
    "$uv" pip install --python .venv/bin/python --require-hashes -r requirements.lock
    "$uv" pip install --python .venv/bin/python --no-deps --no-build-isolation -e .
else
    .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
touch .venv/ready
echo "ready. Next: source .venv/bin/activate; then nobackprop --help, or nobackprop for a first run, or make demo"
