"""lm-eval's own command line with our tasks, adapters and models, as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.__main__
import lm_eval.tasks
import pytest
import torch
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from tiny_vision import save_tiny_vision, tiny_vision
from transformers import AutoModelForCausalLM

from moelora_eval_tasks import lm_eval as command
from moelora_eval_tasks.catalog import TASKS
from moelora_plugin import MoeLoraConfig
from moelora_plugin.checkpoint import load_adapter, save_adapter
from moelora_plugin.evaluation import (
    EvaluationReport,
    EvaluationRequest,
    evaluate,
    evaluate_model,
    harness,
)
from moelora_plugin.model import moelora_layers

OURS = str(Path(command.__file__).parent)
CHOSEN = ["mrpc", "cola", "siqa"]  # two with a metric that lm-eval would bootstrap
NAMES = ",".join(f"moelora_{name}" for name in CHOSEN)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a base, and an adapter that changes its answers."""
    folder = tmp_path_factory.mktemp("files")
    write_data(folder / "rows", CHOSEN)
    save_adapted(folder, vocab_size=len(tiny_tokenizer()))
    return folder


def save_adapted(folder: Path, vocab_size: int) -> None:
    """A base and an adapter on it."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_llama(vocab_size).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    config = MoeLoraConfig(
        r=2, num_experts=4, top_k=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    save_adapter(model, adapter, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def expected(files: Path) -> EvaluationReport:
    """What `moelora eval` says."""
    request = EvaluationRequest(
        tasks=tuple(CHOSEN),
        adapters=(str(files / "adapter"),),
        data_dir=str(files / "rows"),
        compare_base=True,
        device="cpu",
        output=files / "scores.json",
        cache=False,
    )
    return evaluate(request)


def run(work: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which knows of us what any process does."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MOELORA_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def results(folder: Path) -> dict[str, Any]:
    """The results that lm-eval has written."""
    (file,) = folder.rglob("results_*.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return content


def same_scores(found: dict[str, Any], expected: EvaluationReport, model: str) -> None:
    assert list(found) == [f"moelora_{name}" for name in expected.tasks]
    for name, measured in expected.tasks.items():
        for metric, estimate in measured.metrics[model].items():
            value = found[f"moelora_{name}"][f"{metric},none"]
            # Both count the same right answers; only the order of the sums may differ.
            assert value == pytest.approx(estimate.value, abs=1e-12), (name, metric)


def test_the_adapter_changes_the_scores(expected: EvaluationReport) -> None:
    """Else the tests below could not tell adapter from base."""
    differ = [name for name in CHOSEN if expected.tasks[name].differences["adapter"].value]
    assert differ


@pytest.mark.slow
def test_the_stock_command_scores_an_adapter(
    files: Path, tmp_path: Path, expected: EvaluationReport
) -> None:
    """Nothing names us but the tasks' folder: `import torch` brings the adapter type."""
    done = run(
        tmp_path,
        *("-m", "lm_eval", "run", "--model", "hf", "--tasks", NAMES, "--include_path", OURS),
        *("--model_args", f"pretrained={files / 'base'},peft={files / 'adapter'}"),
        *("--metadata", f"data_dir={files / 'rows'}", "--device", "cpu", "--batch_size", "4"),
        *("--output_path", "out"),
    )
    assert done.returncode == 0, done.stderr
    same_scores(results(tmp_path / "out"), expected, "adapter")


@pytest.mark.slow
def test_our_module_scores_an_adapter_with_the_hooks_switched_off(
    files: Path, tmp_path: Path, expected: EvaluationReport
) -> None:
    done = run(
        tmp_path,
        *("-m", "moelora_eval_tasks.lm_eval", "run", "--model", "moelora", "--tasks", NAMES),
        *("--model_args", f"pretrained={files / 'base'},peft={files / 'adapter'}"),
        *("--device", "cpu", "--batch_size", "4", "--output_path", "out"),
        MOELORA_AUTOLOAD="0",
        MOELORA_DATA_DIR=str(files / "rows"),
    )
    assert done.returncode == 0, done.stderr
    same_scores(results(tmp_path / "out"), expected, "adapter")


STOCK = (
    "from lm_eval.models.huggingface import HFLM; "
    "HFLM(pretrained='{0}/base', peft='{0}/adapter', device='cpu')"
)


def test_switched_off_the_stock_command_does_not_know_the_adapter(
    files: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, "-c", STOCK.format(files), MOELORA_AUTOLOAD="0")
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'MOELORA'\n")


@pytest.fixture
def our_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`python -m moelora_eval_tasks.lm_eval`, here, without the 20 s that lm-eval's index takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "none" / "manager.py"))
    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # it is the process's
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        command.main()

    return call


def test_our_tasks_stand_beside_the_users_own(
    our_command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text("task: my_own\ndataset_path: a/b\n")
    our_command("ls", "subtasks")
    listed = capsys.readouterr().out
    assert "moelora_sst2" in listed
    assert "my_own" not in listed
    our_command("validate", "--tasks", "moelora_sst2,my_own", "--include_path", "mine")
    assert "All tasks found and valid" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["environment", "metadata"])
def test_rows_come_from_the_local_folder(
    way: str,
    our_command: Callable[..., None],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: EvaluationReport,
) -> None:
    folder = str(files / "rows")
    monkeypatch.setenv("MOELORA_DATA_DIR", folder if way == "environment" else "nowhere")
    named = [] if way == "environment" else ["--metadata", f"data_dir={folder}"]
    our_command(
        *("run", "--model", "hf", "--model_args", f"pretrained={files / 'base'}"),
        *("--tasks", NAMES, "--device", "cpu", "--output_path", "out", *named),
    )
    same_scores(results(tmp_path / "out"), expected, "base")


def test_a_vision_model_is_shown_its_images(
    our_command: Callable[..., None], tmp_path: Path
) -> None:
    base = save_tiny_vision("llava", tmp_path / "base")
    names = ["scienceqa_image", "scienceqa_image_gen"]
    folder = str(write_data(tmp_path / "rows", names))
    model, processor = tiny_vision("llava")
    expected = evaluate_model(model, processor, names, data_dir=folder)
    our_command(
        *("run", "--model", "moelora-multimodal", "--model_args", f"pretrained={base}"),
        *("--tasks", ",".join(f"moelora_{name}" for name in names)),
        *("--batch_size", "2", "--metadata", f"data_dir={folder}", "--output_path", "out"),
    )
    same_scores(results(tmp_path / "out"), expected, "model")


def test_bad_rows_are_one_line(our_command: Callable[..., None], files: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        our_command(
            *("run", "--model", "hf", "--model_args", f"pretrained={files / 'base'}"),
            *("--tasks", NAMES, "--metadata", "data_dir=nowhere"),
        )
    assert str(exit_.value).startswith("Error: Data folder nowhere does not exist")


def test_no_metric_of_ours_is_bootstrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would draw 100,000 times, hours for QQP, and no option of its command stops it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("bootstrapped")

    monkeypatch.setattr(metrics, "bootstrap_stderr", refuse)
    text = [name for name, task in TASKS.items() if not task.shows_images]
    loaded = harness.load_tasks(text, str(write_data(tmp_path, text)))
    lm = HFLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer(), batch_size=8)
    found: Any = lm_eval_evaluate(lm, loaded.lm_eval)
    for scores in found["results"].values():
        assert scores["score_stderr,none"] == "N/A"


def test_a_padded_vocabulary_is_kept_by_our_model_type_only(tmp_path: Path) -> None:
    """Many bases have more embeddings than their tokenizer has tokens; `peft=` cuts them off.

    The lost logits were part of every softmax, so the log-likelihoods become other ones.
    """
    save_adapted(tmp_path, vocab_size=len(tiny_tokenizer()) + 45)
    model, _ = load_adapter(tmp_path / "adapter", device="cpu")
    prompt, answer = ("They are", " not equivalent")
    ids = tiny_tokenizer()(prompt + answer, return_tensors="pt").input_ids
    start = len(tiny_tokenizer()(prompt).input_ids)
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

    def loglikelihood(name: str) -> float:
        arguments = {"pretrained": str(tmp_path / "base"), "peft": str(tmp_path / "adapter")}
        lm = get_model(name).create_from_arg_obj(arguments, {"device": "cpu", "batch_size": 1})
        request = Instance("loglikelihood", {}, (prompt, answer), 0)
        found: float = lm.loglikelihood([request], disable_tqdm=True)[0][0]
        return found

    # Kernels of other shapes round differently (fp32); the cut changes the first decimal.
    assert loglikelihood("moelora") == pytest.approx(expected, abs=1e-4)
    assert abs(loglikelihood("hf") - expected) > 0.1
