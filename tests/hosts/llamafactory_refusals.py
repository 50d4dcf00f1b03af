"""What LLaMA-Factory's own parser says to command lines and mappings; one line of JSON each.

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


def answer(case):
    """The error's class and message, or the finetuning arguments that were parsed."""
    os.environ.update(case.get("env", {}))
    parse = get_infer_args if case.get("infer") else get_train_args
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = next(a for a in parse(case["args"]) if hasattr(a, "finetuning_type"))
    except (Exception, SystemExit) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        for name in case.get("env", {}):
            del os.environ[name]
    return json.loads(json.dumps(dataclasses.asdict(found), default=str))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print("ANSWERS" + json.dumps([answer(case) for case in json.load(file)]))
