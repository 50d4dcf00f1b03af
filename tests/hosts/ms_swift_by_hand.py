"""A file for `--external_plugins`: swift's trainer with auxiliary losses added to its loss by hand.

BY_HAND='{"switch_lb": 0.5}' swift sft --external_plugins ms_swift_by_hand.py ...
"""

from __future__ import annotations

import json
import os

import swift.trainers
from trainer_runs import by_hand

coefficients = json.loads(os.environ["BY_HAND"])
swift.trainers.Seq2SeqTrainer = by_hand(swift.trainers.Seq2SeqTrainer, coefficients)
