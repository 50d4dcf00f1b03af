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
# What reads other packages' insides besides (the tuner, its optimizers, training and evaluation),
# and the commands, which each of typer, click and rich can break.
CORE = (
    *(part for part in CALLED if not part.startswith(("adapter", "training"))),
    "adapter",
    "optim",
    "training",
    "evaluation",
    "cli",
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
        "test_biases_of_a_router_that_are_frozen": "likewise",
        "biases-untied": "likewise",
        "test_the_groups_and_their_roles": "likewise",
        "test_weight_decay_pulls_experts_and_weights": "likewise",
        "linear-True-True": "PEFT before 0.20 finds no names of a state dict in compiled models",
        "float8_linears": "transformers 5.6 draws such weights at random, which CPUs cannot",
        "jamba-left_out": "transformers 5.6 calls its dt_proj, so it learns there",
        "test_what_the_sweep_does": "transformers 5.6 asks for PEFT 0.18.2, never released",
        "test_load_adapter_beside_another": "PEFT before 0.21 freezes all but the new adapter",
        "test_state_dicts_fit_models_of_other_adapter_names": "PEFT before 0.20 gives those of all",
    },
}


def main(name: str, arguments: list[str]) -> int:
    """Run the core in the environment called `name`; pytest's exit status."""
    home = environment(name)
    # By the environment's own paths, as pip would: PYTHONPATH is a thing that tests replace.
    paths = next(home.glob("lib/python*/site-packages")) / f"moelora-{os.getpid()}.pth"
    with tempfile.TemporaryDirectory() as folder:
        paths.write_text(f"{install_moelora(Path(folder))}\n")
        # Not by `python -m pytest`, which puts the checkout before what is installed.
        command = [str(home / "bin" / "pytest"), *arguments]
        command += ["-m", "not data and not slow and not network and not hosts"]
        if BEYOND[name]:
            command += ["-k", f"not ({' or '.join(BEYOND[name])})"]
        if name == "lowest":  # old packages say much about new ones
            command += ["-o", "filterwarnings=default"]
        command += [str(ROOT / "tests" / part) for part in PARTS[name]]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
        finally:
            paths.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
