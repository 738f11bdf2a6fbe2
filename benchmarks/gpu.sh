#!/usr/bin/env bash
# Time a forward pass of a full-size UNet with each runtime on one NVIDIA GPU, in under 8 minutes.
#
#     benchmarks/gpu.sh [--out TABLE.md]
#
# Prints the Markdown table of docs/deployment.md. The weights are random: nothing is downloaded or
# installed. PYTHON=... chooses the interpreter. For more options see benchmarks/gpu_unet.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: $python not found; choose Python 3.11 or later with PYTHON=..." >&2
    exit 2
fi
if ! command -v nvidia-smi >/dev/null; then
    echo "gpu.sh: nvidia-smi not found: install NVIDIA's driver, or start the container with" \
        "--gpus all. Without a GPU, test the script with:" \
        "$python benchmarks/gpu_unet.py --tiny --device cpu" >&2
    exit 2
fi
"$python" - <<'END'
import sys
from importlib.util import find_spec

packages = ("torch", "diffusers", "transformers", "pydantic")
missing = [package for package in packages if find_spec(package) is None]
if sys.version_info < (3, 11):
    sys.exit("gpu.sh: Python 3.11 or later is needed; choose one with PYTHON=...")
if missing:
    sys.exit(
        f"gpu.sh: {sys.executable} lacks {', '.join(missing)}. Install:\n"
        "    pip install '.[onnx-gpu,tensorrt]'\n"
        "Either extra may be left out; '.[edit]' alone measures only PyTorch."
    )
import torch

if not torch.cuda.is_available():
    sys.exit(
        f"gpu.sh: PyTorch {torch.__version__} finds no GPU. Install a CUDA build (see "
        "https://pytorch.org/get-started) and a driver that is new enough for it."
    )
END
exec "$python" "$root/benchmarks/gpu_unet.py" "$@"
