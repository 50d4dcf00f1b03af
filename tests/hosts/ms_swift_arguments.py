"""What swift makes of command lines, and its parser of keywords from Python code.

Of a case with "adapts" the model is made as well.

python ms_swift_arguments.py cases.json answers.json
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft
from swift.utils import parse_args


def answer(case):
    """The adapter's config and who chooses the targets, or the error's class and message."""
    sys.argv = ["sft.py", *case.get("argv", [])]
    said = io.StringIO()
    try:
        if "keywords" in case:
            args = SftArguments(**case["keywords"])
        else:
            with contextlib.redirect_stderr(said):
                args, left = parse_args(SftArguments)
            assert not left, left
        if case.get("adapts"):
            model, _ = args.get_model_processor()
            SwiftSft.prepare_model(args, model)
            return {}
        # Late, as our arguments would be in swift's place when its hooks are off.
        from moelora_plugin.integrations.ms_swift.arguments import (
            moelora_config,
            targets_are_the_presets,
        )

        chosen = {"by_preset": targets_are_the_presets(args)}
        return {**moelora_config(args).to_dict(), **chosen}
    except SystemExit:  # argparse has said why
        return {"error": "SystemExit", "message": said.getvalue()}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    cases, answers = map(Path, sys.argv[1:])
    found = [answer(case) for case in json.loads(cases.read_text())]
    answers.write_text(json.dumps(found))
