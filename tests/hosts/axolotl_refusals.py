"""What axolotl's validation says to each of some configs: "accepted", or the error.

python axolotl_refusals.py cases.json answers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from axolotl.cli.config import load_cfg


def answer(config):
    """One config's."""
    Path("tried.yaml").write_text(yaml.safe_dump(config))
    try:
        load_cfg("tried.yaml")
    except Exception as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    cases, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([answer(config) for config in json.loads(cases.read_text())]))
