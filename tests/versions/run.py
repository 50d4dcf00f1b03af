"""The core of the suite with another set of versions: `make test-newest`, `make test-lowest`.

With "previous", `make test-previous`, only what transformers' own changes can break.

    python tests/versions/run.py lowest [arguments for pytest]

The set is `<name>.txt` beside this file, a complete list that `resolve.py` writes, so that a run
does not depend on what was released since. The environment is kept and made anew when the list
changes (`tests/hosts/environments.py`); moelora is put beside it as it is now.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from environments import environment, install_moelora  # noqa: E402

# What depends on how transformers calls its models and loads adapters.
CALLED = (
    "adapter/test_native.py",
    "methods/test_generation_modes.py",
    "methods/test_ids.py",
    "methods/test_inputs.py",
    "methods/test_layer_site.py",
    "methods/test_model_site.py",
    "methods/test_packing.py",
    "security/test_paths.py",
    "training/test_run_guards.py",
)
# What reads other packages' insides besides: the tuner, its optimizers, training and evaluation.
CORE = (
    *(part for part in CALLED if not part.startswith(("adapter", "training"))),
    "adapter",
    "optim",
    "training",
    "evaluation",
    "methods/test_peft_agreement.py",
)
PARTS = {"newest": CORE, "previous": CALLED, "lowest": CORE}
# What the lowest versions cannot do, though the adapter works with them: the test, and whose it is.
BEYOND = {
    "newest": {},
    "previous": {},
    "lowest": {
        "idefics3": "transformers 5.6 reads its images with torchvision, which CPUs' builds lack",
        "smolvlm": "likewise",
        "test_pictures_and_text_are_mixed_in_one_task": "likewise",
        "test_on_plain_lora_it_is_peft_s_riemannian_optimizer": "PEFT has it from 0.21 on",
        "test_biases_train_and_travel": "refused before PEFT 0.21, which saves them",
        "test_load_adapter_beside_another": "PEFT before 0.21 freezes all but the new adapter",
        "test_state_dicts_fit_models_of_other_adapter_names": "PEFT before 0.20 gives those of all",
    },
}


def main(name: str, arguments: list[str]) -> int:
    """Run the core in the environment called `name`; pytest's exit status."""
    pytest = environment(name) / "bin" / "pytest"
    with tempfile.TemporaryDirectory() as folder:
        site = install_moelora(Path(folder))
        # Not by `python -m pytest`, which puts the checkout before what is installed.
        command = [str(pytest), *arguments]
        command += ["-m", "not data and not slow and not network and not hosts"]
        if BEYOND[name]:
            command += ["-k", f"not ({' or '.join(BEYOND[name])})"]
        if name == "lowest":  # old packages say much about new ones
            command += ["-o", "filterwarnings=default"]
        command += [str(ROOT / "tests" / part) for part in PARTS[name]]
        environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
