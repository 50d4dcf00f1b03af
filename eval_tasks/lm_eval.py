r"""lm-eval's own command line, which knows our tasks, adapters and models.

    python -m moelora_eval_tasks.lm_eval run --model moelora \
        --model_args pretrained=BASE,peft=runs/quickstart/adapter --tasks moelora_glue

All of lm-eval's commands, options and tasks are there. What is added:

* our tasks, beside those of an `--include_path`;
* local rows from the folder in MOELORA_DATA_DIR, unless `--metadata data_dir=...` names another;
* adapters of the type MOELORA, and the models "moelora" and "moelora-multimodal", which are loaded
  as `moelora eval` does; where MOELORA_AUTOLOAD=0 too.

Our metrics have aggregations of their own, for which lm-eval computes no standard errors; so its
bootstrap of 100,000 draws, which no option of its command line turns off, does not run for them.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import Any

from moelora_plugin import autoload
from moelora_plugin.errors import MoeLoraError

DATA_DIR = "MOELORA_DATA_DIR"


def main() -> None:
    """Run lm-eval's command line on `sys.argv`."""
    autoload.activate()
    try:
        from lm_eval import tasks
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"Error: lm-eval cannot be imported ({error}); run pip install 'moelora[eval]'.")
    stock = tasks.TaskManager

    def with_ours(include_path: str | None = None, **options: Any) -> Any:
        metadata = {"data_dir": os.environ.get(DATA_DIR)} | (options.pop("metadata", None) or {})
        paths = [str(files("moelora_eval_tasks")), *([include_path] if include_path else [])]
        return stock(include_path=paths, metadata=metadata, **options)

    tasks.TaskManager = with_ours  # each command takes it from there when it runs
    try:
        cli_evaluate()
    except MoeLoraError as error:
        sys.exit(f"Error: {error}")
    finally:
        tasks.TaskManager = stock


if __name__ == "__main__":
    main()
