"""Experts that are existing LoRA adapters.

Shape suffixes: I in, O out; r is one adapter's rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base_model import HUB_ERRORS
from ..errors import AdapterError, ConfigError, first_line
from ..patterns import require_cheap, whole_name
from ..reading import read_json
from ..values import SavedPaths, fits, require_plain
from .base import Initialization, InitInput
from .kaiming import Kaiming

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# Options of PEFT's LoraConfig with which an adapter's update is not its B A, or not everywhere.
# What adds tensors of its own is found by its tensors as well.
_NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# These change the base's weights, so what was learned is not in A and B alone, unless PEFT has
# converted the adapter, which then says True here.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapters(Initialization):
    """Expert i is the LoRA adapter at `paths[i]` (X-LoRA, Arrow, MoLE, LoRA Soups, PHATGOOSE, ...).

    A_i is the adapter's A, B_i its B times its own scale over the layer's, so that s B_i A_i is the
    adapter's update whatever `r` and `lora_alpha` are here. The adapters may differ in rank, alpha
    and modules: a rank below `r` is filled up with ranks whose B is zero, and in a module that an
    adapter leaves alone its expert's B is zero. Where A trains, what is filled up has LoRA's own A,
    so that it can learn; where it is frozen (`expert_kwargs={"frozen": True}`) it is zero.

    Everything is copied into our adapter, which is loaded without the folders. With a universal
    expert there is one path more, and the last one is its.

    Args:
        paths: folder, hub id, or hub id with a folder in it ("user/repo/folder"), one per expert.
        subtract: general adapters to take out of every expert, in the same forms: their mean A and
            mean B are subtracted from A_i and B_i separately, before scales (GenKnowSub, arXiv
            2505.10939, as PEFT and the authors compute it; the product of the differences is not
            the difference of the products). They need the experts' ranks and modules.

    Raises:
        ConfigError: no path, or one that holds no adapter, or adapters that do not fit the model,
            its `target_modules` or `r`.
        AdapterError: an adapter that is damaged, or more or other than plain LoRA.
    """

    reads_data = True

    def __init__(self, *, paths: Sequence[str], subtract: Sequence[str] = ()) -> None:
        for key, value in (("paths", paths), ("subtract", subtract)):
            if isinstance(value, str) or not all(isinstance(path, str) for path in value):
                raise ConfigError(
                    f"init_kwargs[{key!r}]={value!r} must be a list of folders or hub ids."
                )
        # A saved adapter's experts have the values of these adapters already.
        self.is_saved = isinstance(paths, SavedPaths) or isinstance(subtract, SavedPaths)
        if not paths:
            raise ConfigError("init_kwargs['paths'] must name an adapter for each expert.")
        self.paths, self.subtract = tuple(paths), tuple(subtract)

    def check_targets(self, names: Sequence[str]) -> None:
        """See the base class."""
        self._refuse_saved()
        for path in (*self.paths, *self.subtract):
            left_out = sorted(set(_Adapter(path).modules) - set(names))
            if left_out:
                raise ConfigError(
                    f"The adapter {path!r} of init_kwargs also adapts {left_out[0]!r} "
                    f"({len(left_out)} such modules), which is no module that target_modules "
                    "selects; set target_modules to all modules of the adapters."
                )

    def check_experts(self, inputs: InitInput) -> None:
        """Refuse experts that are no A_i (r_i, I) and B_i (O, r_i) of their own.

        Raises:
            ConfigError: they share a factor, work on slices, or have other tensors in their place.
        """
        if not inputs.has_own_factors:
            raise ConfigError(
                "init='adapters' gives each expert the A and B of its adapter, so no factor can be "
                "shared or of another shape, as in this expert kind; set expert to 'lora'."
            )

    def __call__(self, inputs: InitInput) -> None:
        """Copy each adapter's part for this module into its expert."""
        self._refuse_saved()
        if len(self.paths) != len(inputs.experts):
            raise ConfigError(
                f"init_kwargs['paths'] names {len(self.paths)} adapters for "
                f"{len(inputs.experts)} experts in {inputs.module_name}; set num_experts (and "
                "top_k) to fit."
            )
        Kaiming()(inputs)
        general = [_Adapter(path) for path in self.subtract]
        for path, (a, b) in zip(self.paths, inputs.experts, strict=True):
            if "A" not in inputs.tensors:
                a.zero_()
            b.zero_()
            adapter = _Adapter(path)
            if inputs.module_name not in adapter.modules:
                continue
            own_a, own_b = adapter.factors(inputs.module_name)
            if general:
                pairs = [other.factors(inputs.module_name) for other in general]
                own_a, own_b = _minus_mean(own_a, own_b, pairs, path, inputs.module_name)
            _copy(own_a, a, path, inputs.module_name)
            scale = adapter.scale(inputs.module_name, rank=len(own_a)) / inputs.scaling
            _copy(own_b.T * scale, b.T, path, inputs.module_name)

    def _refuse_saved(self) -> None:
        if self.is_saved:
            raise ConfigError(
                "init_kwargs of a saved configuration names the adapters that its experts were "
                "made of, and none is opened because a file says so; to start from adapters, make "
                "the configuration by MoeLoraConfig(...) with init_kwargs={'paths': [...]}."
            )


def _minus_mean(
    a: Tensor, b: Tensor, others: Sequence[tuple[Tensor, Tensor]], path: str, module: str
) -> tuple[Tensor, Tensor]:
    if any((a.shape, b.shape) != (x.shape, y.shape) for x, y in others):
        raise ConfigError(
            f"The adapters of init_kwargs['subtract'] need the rank that {path!r} has in {module} "
            f"({len(a)}); drop subtract, or use adapters of one rank."
        )
    mean_a = torch.stack([x for x, _ in others]).mean(0)
    mean_b = torch.stack([y for _, y in others]).mean(0)
    return a - mean_a, b - mean_b


def _copy(source: Tensor, target: Tensor, path: str, module: str) -> None:
    """Into the first rows of an expert's factor, its ranks being rows."""
    if source.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ConfigError(
            f"The adapter {path!r} has a factor of shape {tuple(source.shape)} for {module}, which "
            f"needs (r, {target.shape[1]}); use adapters that were trained on this base."
        )
    if len(source) > len(target):
        raise ConfigError(
            f"The adapter {path!r} has rank {len(source)} in {module}, more than the {len(target)} "
            "of an expert; raise r."
        )
    target[: len(source)] = source.to(target)


class _Adapter:
    """A saved adapter: what its configuration says, and its factors when asked for.

    Nothing is kept between modules: reading the header of a file anew costs less than a millisecond
    and holds no file open.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = _local_folder(path)
        self.config = self._read_config()
        self._refuse_other_than_lora()
        self._refuse_damage()
        self.modules = self._read_modules()

    def scale(self, module: str, rank: int) -> float:
        """The adapter's own scale in a module, patterns matched as PEFT matches them."""
        alphas = self.config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(list(alphas), module), self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(A (r, I), B (O, r)) of a module, in fp32 or wider."""
        try:
            with safe_open(self.folder / _WEIGHTS, framework="pt") as file:
                a, b = (file.get_tensor(_PREFIX + module + end) for end in (_A, _B))
        except SafetensorError as error:
            raise AdapterError(
                f"The adapter {self.path!r} has no factors for {module} ({first_line(error)}); use "
                "adapters that adapt the same modules."
            ) from error
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(
                f"The adapter {self.path!r} has weights for {module} that are no finite numbers; "
                "take it out of init_kwargs."
            )
        dtype = torch.promote_types(a.dtype, torch.float32)
        return a.to(dtype), b.to(dtype)

    def _read_config(self) -> dict[str, Any]:
        return read_json(self.folder / _CONFIG, remedy="save the adapter again", error=AdapterError)

    def _refuse_damage(self) -> None:
        """What is read of the configuration has to be of its type."""
        config, where = self.config, f"{self.folder / _CONFIG}: "
        alphas = config.get("alpha_pattern") or {}
        if not fits(alphas, dict[str, float]) or not fits(config.get("lora_alpha"), float):
            raise AdapterError(
                f"{where}lora_alpha must be a number, and alpha_pattern map names to numbers; save "
                "the adapter again."
            )
        for key in ("lora_alpha", "alpha_pattern"):
            require_plain(f"{where}{key}", config.get(key))
        for pattern in alphas:  # PEFT matches by it
            require_cheap(f"{where}alpha_pattern", pattern, whole_name(pattern))

    def _refuse_other_than_lora(self) -> None:
        config = self.config
        found = next((key for key in _NOT_PLAIN if config.get(key)), None)
        if config.get("peft_type") != "LORA":
            found = f"peft_type={config.get('peft_type')!r}"
        elif config.get("bias", "none") != "none":
            found = f"bias={config['bias']!r}"
        elif str(config.get("init_lora_weights")).startswith(_CHANGES_THE_BASE):
            found = f"init_lora_weights={config['init_lora_weights']!r}"
        if found:
            raise AdapterError(
                f"The adapter {self.path!r} of init_kwargs has {found}, but only plain LoRA on "
                "linear modules can become an expert; take it out of init_kwargs."
            )

    def _read_modules(self) -> frozenset[str]:
        try:
            with safe_open(self.folder / _WEIGHTS, framework="pt") as file:
                keys = list(file.keys())
        except SafetensorError as error:
            raise AdapterError(
                f"{self.folder / _WEIGHTS} is truncated or damaged ({first_line(error)}); save or "
                "download it again."
            ) from error
        names = [key.removeprefix(_PREFIX) for key in keys]
        other = next((name for name in names if not name.endswith((_A, _B))), None)
        if other:
            raise AdapterError(
                f"The adapter {self.path!r} of init_kwargs holds {other!r}, but only plain LoRA on "
                "linear modules can become an expert; take it out of init_kwargs."
            )
        return frozenset(name.removesuffix(_A) for name in names if name.endswith(_A))


def _local_folder(path: str) -> Path:
    """The folder that holds the adapter; from the hub if need be."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{path!r} in init_kwargs holds no {name}; name the folder of an adapter that PEFT "
                "has saved."
            )
    return folder


@functools.cache
def _download(path: str) -> Path:
    """Once for all modules of a model."""
    user, name, *inside = path.split("/") if "/" in path else ("", path)
    repo, subfolder = "/".join(part for part in (user, name) if part), "/".join(inside)
    patterns = [f"{subfolder}/{file}".lstrip("/") for file in (_CONFIG, _WEIGHTS)]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns)) / subfolder
    except HUB_ERRORS as error:
        raise ConfigError(
            f"{path!r} in init_kwargs is not a folder and cannot be had from the hub "
            f"({first_line(error)}); name the folder of a saved LoRA adapter."
        ) from error
