"""A training by LLaMA-Factory's own function, with auxiliary losses added to its loss by hand.

python llamafactory_by_hand.py config.json '{"switch_lb": 0.5}'
"""

from __future__ import annotations

import json
import sys

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp
from trainer_runs import by_hand

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        config = json.load(file)
    coefficients = json.loads(sys.argv[2])
    workflow.CustomSeq2SeqTrainer = by_hand(workflow.CustomSeq2SeqTrainer, coefficients)
    run_exp(config)
