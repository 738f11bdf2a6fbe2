"""Copy an editing model in half precision, as it is shipped.

python -m reasonpix_mini.halve runs/reasonpix2pix/model --to checkpoints/reasonpix2pix
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from reasonpix.editing import load_checkpoint, read_model_training_data, save_checkpoint
from reasonpix.plugin import ModelOptions


def main() -> None:
    """Read one folder, write the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder that `reasonpix train` wrote, or a pipeline")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    checkpoint = load_checkpoint(ModelOptions(model=args.model))
    checkpoint.model.half()
    checkpoint.vae.half()
    if text := checkpoint.model.text:
        text.encoder.half()
    save_checkpoint(args.to, checkpoint)
    if training_data := read_model_training_data(ModelOptions(model=args.model)):
        training_data.write(args.to)
    for config in args.to.rglob("config.json"):
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)  # where it was trained
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
