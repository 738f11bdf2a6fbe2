#!/usr/bin/env bash
# Make the environment of the peers, apart from reasonpix's own:  benchmarks/peers/setup.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.peers}
"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
echo "$folder is ready:  python benchmarks/stages.py --peers $folder"
