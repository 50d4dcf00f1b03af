"""docs/architectures.md, written from what the sweep found."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from adapter_check import TASKS, Outcome

TITLES = {
    "causal": "Causal language models",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder-decoders",
    "vision-text": "Vision and text",
    "vision": "Image classifiers",
}
_INTRODUCTION = """# Architectures

`make test-architectures` writes this page. It builds every causal, encoder, encoder-decoder,
vision-text and image classification architecture of the installed transformers as small as it goes,
with random weights, and takes each through what an adapter is for: `target_modules="all-linear"`, a
training step with gradients at every adapted linear, saving, loading by `load_adapter`, by
`PeftModel.from_pretrained` and by the model's own `load_adapter` with the same answers to the bit,
and generating.

{versions}

| outcome | meaning |
|---|---|
| works | all of that |
| as LoRA | all but a step at which PEFT's LoRA on the same linears fails alike |
| refused | in one sentence, which stands here |
| not tiny | the base alone could not be built or called small here, as given; not tried |
| fault | ours; there should be none |

Three things keep an adapter from a part of a base, and each is said when the adapter is put on:

- **Experts that are fused parameters**: most mixtures of experts in transformers 5. They cannot be
  adapted yet. "all-linear" and default lists leave them out with a warning; naming them is an
  error.
- **Linears that are none**: routers that are an `nn.Linear` and return a tuple, for example. They
  are asked what their forward returns.
- **Linears whose weight is used past their forward**: by `nn.MultiheadAttention`, WavLM, Mamba's
  kernels. The code of the module around them says so. "all-linear" leaves them out with a warning;
  naming them is an error, as PEFT's LoRA has it for Mamba.

After the first training step one more warning names adapted linears that it did not reach.

{counts}
"""


def document(found: Mapping[tuple[str, str], Outcome]) -> str:
    """The page, from the outcome by (task, model type)."""
    statuses = ("works", "as LoRA", "refused", "not tiny", "fault")
    counts = ["| | " + " | ".join(statuses) + " |", "|---|" + "---|" * len(statuses)]
    sections = []
    for task in TASKS:
        rows = {name: outcome for (other, name), outcome in found.items() if other == task}
        numbers = [sum(o.status == status for o in rows.values()) for status in statuses]
        counts.append(f"| {TITLES[task]} | " + " | ".join(map(str, numbers)) + " |")
        lines = [
            f"## {TITLES[task]}",
            "",
            "| architecture | linears | outcome | |",
            "|---|---|---|---|",
        ]
        lines += [_row(name, rows[name]) for name in sorted(rows)]
        sections.append("\n".join(lines))
    page = _INTRODUCTION.format(versions=versions(), counts="\n".join(counts))
    return "\n".join([page, *(f"{section}\n" for section in sections)])


def versions() -> str:
    """The sentence that says what was installed."""
    packages = ("transformers", "peft", "torch")
    return f"With {', '.join(f'{name} {version(name)}' for name in packages)}."


def _row(name: str, outcome: Outcome) -> str:
    notes = [outcome.detail]
    notes += [f"left out: {outcome.left_out}"] if outcome.left_out else []
    notes += [f"not reached: {outcome.unreached}"] if outcome.unreached else []
    text = "; ".join(note for note in notes if note).replace("|", "\\|").replace("\n", " ")
    text = text.replace("*", "\\*").replace("<", "&lt;")
    return f"| {name} | {outcome.linears or ''} | {outcome.status} | {text} |"
