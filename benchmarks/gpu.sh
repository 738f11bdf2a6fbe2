#!/usr/bin/env bash
# Seconds a forward of a full-size UNet by each runtime, on one NVIDIA GPU, in less than 8 minutes.
#
#     benchmarks/gpu.sh [--out TABLE.md]
#
# Prints the Markdown table of docs/deployment.md. The weights are random and made here: nothing is
# downloaded or installed. PYTHON=... names the interpreter. Other options: benchmarks/gpu_unet.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: there is no $python; name a Python of 3.11 or later by PYTHON=..." >&2
    exit 2
fi
if ! command -v nvidia-smi >/dev/null; then
    echo "gpu.sh: nvidia-smi is not here: install NVIDIA's driver, or start the container with" \
        "--gpus all. Without a GPU the script's logic runs with:" \
        "$python benchmarks/gpu_unet.py --tiny --device cpu" >&2
    exit 2
fi
"$python" - <<'END'
import sys
from importlib.util import find_spec

lacks = [it for it in ("torch", "diffusers", "transformers", "pydantic") if find_spec(it) is None]
if sys.version_info < (3, 11):
    sys.exit("gpu.sh: Python 3.11 or later is needed; name one by PYTHON=...")
if lacks:
    sys.exit(
        f"gpu.sh: {sys.executable} lacks {', '.join(lacks)}. Install what is measured:\n"
        "    pip install '.[onnx-gpu,tensorrt]'\n"
        "of which either may be left out; '.[edit]' alone measures PyTorch."
    )
import torch

if not torch.cuda.is_available():
    sys.exit(
        f"gpu.sh: PyTorch {torch.__version__} sees no GPU. Install a build for CUDA, as "
        "https://pytorch.org/get-started says, and a driver that is new enough for it."
    )
END
exec "$python" "$root/benchmarks/gpu_unet.py" "$@"
