"""What LLaMA-Factory says to command lines and mappings; one line of JSON each.

With "adapts" the model is made as well, and what its parser alone says is not all.

python llamafactory_refusals.py cases.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys

from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.model import load_model, load_tokenizer


def answer(case):
    """The error's class and message, or the finetuning arguments that were parsed."""
    os.environ.update(case.get("env", {}))
    parse = get_infer_args if case.get("infer") else get_train_args
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parsed = parse(case["args"])
            found = next(a for a in parsed if hasattr(a, "finetuning_type"))
            if case.get("adapts"):
                model_args = next(a for a in parsed if hasattr(a, "model_name_or_path"))
                trains = not case.get("infer")
                load_model(load_tokenizer(model_args)["tokenizer"], model_args, found, trains)
    except (Exception, SystemExit) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        for name in case.get("env", {}):
            del os.environ[name]
    return json.loads(json.dumps(dataclasses.asdict(found), default=str))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print("ANSWERS" + json.dumps([answer(case) for case in json.load(file)]))
