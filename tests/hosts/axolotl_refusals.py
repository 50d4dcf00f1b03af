"""What axolotl's validation says to each of some configs: "accepted", or the error.

python axolotl_refusals.py cases.json answers.json [adapts]

With the last word the model is loaded as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import ModelLoader, load_tokenizer


def answer(config, adapts):
    """One config's."""
    Path("tried.yaml").write_text(yaml.safe_dump(config))
    try:
        cfg = load_cfg("tried.yaml")
        if adapts:
            ModelLoader(cfg, load_tokenizer(cfg), inference=bool(cfg.inference)).load()
    except Exception as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    cases, answers = map(Path, sys.argv[1:3])
    adapts = sys.argv[3:] == ["adapts"]
    found = [answer(config, adapts) for config in json.loads(cases.read_text())]
    answers.write_text(json.dumps(found))
