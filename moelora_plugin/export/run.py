"""`export_adapter`: from a saved adapter to a folder somebody else can use."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from rich.console import Group

from ..analysis.names import short_name
from ..base_model import load_config, resolve_dtype, shows_images
from ..checkpoint import (
    check_adapter,
    load_adapter,
    resolve_adapter,
    verify_config,
    verify_weights,
)
from ..config import PEFT_TYPE, MoeLoraConfig
from ..errors import ConfigError, ExportError, MissingDependencyError
from ..files import atomic_directory, check_out_folder, write_json, write_text
from ..manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    entry,
    read_adapter_config,
    read_manifest,
)
from ..marks import MARK
from ..tables import PlainTable, shown
from .base_files import BaseFiles, restore_dtypes
from .card import adapter_card, merged_card, public_base, read_scores
from .merged import STRATEGIES, Merge, calibration_texts, merge_exact, merge_mean_gate

TARGETS = ("safetensors", "merged")
EXPORT_FILE = "moelora_export.json"


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        out: the folder.
        to: "safetensors" or "merged".
        files: names of the files in it.
        merge: how a merge went; None for safetensors.
        url: where it was pushed to, or None.
    """

    out: Path
    to: str
    files: tuple[str, ...]
    merge: Merge | None = None
    url: str | None = None
    _errors_shown: int = field(default=8, repr=False)

    def table(self) -> Group:
        """For the terminal: what was written and, for an approximation, how far off it is."""
        head = PlainTable(show_header=False, box=None, pad_edge=False)
        head.add_row(shown("written", "bold"), str(self.out))
        head.add_row(shown("files", "bold"), ", ".join(self.files))
        if self.url:
            head.add_row(shown("pushed to", "bold"), self.url)
        if self.merge is None:
            return Group(head)
        head.add_row(shown("strategy", "bold"), self.merge.strategy)
        if not self.merge.layer_errors:
            return Group(head)
        logit_error = f"{self.merge.logit_error:.4f}"
        head.add_row(shown("relative error, logits", "bold"), logit_error)
        errors = PlainTable(
            title="Relative error of the update, worst layers", title_justify="left"
        )
        errors.add_column("layer", overflow="fold")
        errors.add_column("error", justify="right")
        worst = sorted(self.merge.layer_errors.items(), key=lambda item: -item[1])
        for name, error in worst[: self._errors_shown]:
            errors.add_row(short_name(name), f"{error:.4f}")
        return Group(head, errors)


def export_adapter(
    adapter: Path | str,
    out: Path | str,
    *,
    to: str = "safetensors",
    strategy: str = "exact",
    base: str | None = None,
    eval_file: Path | str | None = None,
    calibration_tasks: Sequence[str] = (),
    data_dir: str | None = None,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    dtype: str = "auto",
) -> ExportResult:
    """Write an adapter for sharing, or merged into its base.

    Args:
        adapter: folder or hub id of a saved adapter.
        out: folder to make; written whole or not at all.
        to: "safetensors" (the adapter and a model card) or "merged" (a full checkpoint).
        strategy: for "merged". "exact": only where the gates do not depend on the input.
            "mean-gate": every expert gets its mean gate over calibration text, and the error is
            reported.
        base: folder or hub id of the base, where it is not the adapter's own.
        eval_file: a `moelora_eval.json` whose scores go on the card.
        calibration_tasks: tasks whose training rows mean-gate averages over; by default those the
            adapter was trained on.
        data_dir: local data for them.
        push_to_hub: repository to upload the folder to.
        overwrite: replace what `out` holds.
        dtype: of a merged checkpoint: "auto" is the base's own.

    Raises:
        AdapterError: the adapter is damaged or belongs to another base.
        ExportError: an exact merge of gates that follow the input, or an adapter of another type.
        ConfigError: unknown `to`, `strategy` or `dtype`, or `out` holds something.
        MissingDependencyError: base, data or hub cannot be reached.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to} must be one of {', '.join(TARGETS)}.")
    if strategy not in STRATEGIES:
        raise ConfigError(f"--strategy {strategy} must be one of {', '.join(STRATEGIES)}.")
    if to != "merged" and strategy != "exact":
        raise ConfigError(f"--strategy {strategy} is a way to merge; pass --to merged with it.")
    resolve_dtype(dtype, "cpu")
    place = check_out_folder(out, overwrite=overwrite)
    source = resolve_adapter(adapter)
    for option, used in (("ADAPTER", source), ("--base", base)):
        if used is not None and Path(used).is_dir() and place == Path(used).resolve():
            raise ConfigError(f"{out} is the folder of {option}; choose another --out.")
    peft_type = read_adapter_config(source).get("peft_type")
    if peft_type != PEFT_TYPE:
        raise ExportError(
            f"{source} is a {peft_type} adapter; `moelora export` writes {PEFT_TYPE} only."
        )
    scores = read_scores(eval_file, source)
    if to == "safetensors":
        merge = None
        _write_adapter(source, Path(out), scores, base=base, overwrite=overwrite)
    else:
        merge = _write_merged(
            source,
            Path(out),
            scores,
            strategy=strategy,
            base=base,
            tasks=calibration_tasks,
            data_dir=data_dir,
            overwrite=overwrite,
            dtype=dtype,
        )
    return ExportResult(
        out=Path(out),
        to=to,
        files=tuple(sorted(file.name for file in Path(out).iterdir())),
        merge=merge,
        url=_push(Path(out), push_to_hub) if push_to_hub else None,
    )


def _write_adapter(
    source: Path, out: Path, scores: str, *, base: str | None, overwrite: bool
) -> None:
    verify_weights(source)
    verify_config(source)
    config = read_adapter_config(source)
    with atomic_directory(out, overwrite=overwrite) as folder:
        # Everything that belongs to the adapter; what else lies in a checkpoint folder (optimizer
        # state, the trainer's state) stays behind.
        for file in source.iterdir():
            if _is_shared(file.name) and file.is_file():
                _refuse_link_outside(file, source)
                shutil.copy2(file, folder / file.name)
        if base is not None and base != config.get("base_model_name_or_path"):
            config |= {"base_model_name_or_path": base, "revision": None}
            write_json(folder / CONFIG_FILE, config)
        card = adapter_card(
            MoeLoraConfig.from_pretrained(str(folder)), read_manifest(source), scores
        )
        write_text(folder / "README.md", card)


def _refuse_link_outside(file: Path, source: Path) -> None:
    """A stranger's folder may hold a link to a file of this machine, which must not be shared.

    Raises:
        ExportError: the file is such a link; links into the hub's own cache are not.
    """
    real, folder = file.resolve(), source.resolve()
    blobs = folder.parent.parent / "blobs"  # where a snapshot's files are in the hub's cache
    if not (real.is_relative_to(folder) or real.is_relative_to(blobs)):
        raise ExportError(
            f"{file} is a link out of the adapter's folder, to {real}, which an export would share "
            "with others; put the file itself there if it belongs to the adapter."
        )


def _is_shared(name: str) -> bool:
    return name in {CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE} or name.startswith(
        (
            *("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_tokens"),
            *("processor", "preprocessor"),  # a vision model's
        )
    )


def _write_merged(
    source: Path,
    out: Path,
    scores: str,
    *,
    strategy: str,
    base: str | None,
    tasks: Sequence[str],
    data_dir: str | None,
    overwrite: bool,
    dtype: str,
) -> Merge:
    manifest = read_manifest(source)
    name, revision = _base_of(source, base)
    _refuse_quantised(name, revision)
    texts = []
    if strategy == "mean-gate":  # read before the base is loaded, as it may be what is missing
        _refuse_images(name)
        trained_on = entry(manifest, "recipe", "data", "tasks") or ()
        texts = calibration_texts(tasks or trained_on, data_dir)
    # Fold in fp32 and round once at the end, into the dtype that the base's file has.
    model, tokenizer = load_adapter(source, base=base, dtype="float32")
    merge = merge_exact(model) if strategy == "exact" else merge_mean_gate(model, tokenizer, texts)
    merged = model.unload()
    files = BaseFiles.of(name, revision)
    kept = files.of_other_dtype(set(getattr(merged, "_keep_in_fp32_modules_strict", None) or ()))
    wide = {key: tensor.clone() for key, tensor in merged.state_dict().items() if key in kept}
    merged.to(_main_dtype(name, revision, files, dtype))
    record = {
        "strategy": merge.strategy,
        "logit_error": merge.logit_error,
        "layer_errors": merge.layer_errors,
        "adapter_sha256": verify_weights(source),
        "base": public_base(name),
    }
    merged.config.moelora_export = {k: v for k, v in record.items() if k != "layer_errors"}
    with atomic_directory(out, overwrite=overwrite) as folder:
        merged.save_pretrained(str(folder))
        restore_dtypes(folder, files, kept, wide)
        tokenizer.save_pretrained(str(folder))
        write_json(folder / EXPORT_FILE, record)
        write_text(folder / "README.md", merged_card(name, merge, manifest, scores))
    return merge


def _refuse_images(base: str) -> None:
    if shows_images(load_config(base)):
        raise ExportError(
            f"mean-gate averages the gates over text, which the layers of {base!r} that see images "
            "never do; share the adapter itself (--to safetensors)."
        )


def _base_of(source: Path, base: str | None) -> tuple[str, str | None]:
    """The folder or hub id of the base, and its revision."""
    name = check_adapter(source, base)[1]
    config = read_adapter_config(source)
    return name, config.get("revision") if name == config.get("base_model_name_or_path") else None


def _refuse_quantised(base: str, revision: str | None) -> None:
    """A merge writes plain numbers, and a quantised base has none to add to."""
    quantization = getattr(load_config(base, revision), "quantization_config", None)
    if quantization is not None:
        raise ExportError(
            f"The base {base!r} is published quantised, so nothing can be folded into it exactly; "
            "pass the floating-point original (--base), or share the adapter itself (--to "
            "safetensors)."
        )


def _main_dtype(base: str, revision: str | None, files: BaseFiles, dtype: str) -> torch.dtype:
    if dtype != "auto":
        resolved = resolve_dtype(dtype, "cpu")
    else:
        config = load_config(base, revision)
        resolved = files.main_dtype or config.dtype or torch.float32
    assert isinstance(resolved, torch.dtype)  # "auto" alone resolves to a string
    return resolved


def _push(folder: Path, repository: str) -> str:
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), ignore_patterns=[MARK])
    except Exception as error:  # the HTTP client behind huggingface_hub, and so its errors, vary
        raise MissingDependencyError(
            f"{folder} is written, but pushing it to {repository!r} failed "
            f"({error}); log in with `hf auth login` and check the name."
        ) from error
    return f"https://huggingface.co/{repository}"
