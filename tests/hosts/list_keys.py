"""The keys of a host's config, with their defaults: python list_keys.py llamafactory.

One line of JSON after "KEYS".
"""

from __future__ import annotations

import dataclasses
import json
import sys


def of_dataclass(*kinds):
    return {
        field.name: None
        if field.default is dataclasses.MISSING
        else getattr(field.default, "value", field.default)
        for kind in kinds
        for field in dataclasses.fields(kind)
    }


def llamafactory():
    from llamafactory.hparams.finetuning_args import FinetuningArguments
    from llamafactory.hparams.model_args import ModelArguments

    return of_dataclass(FinetuningArguments, ModelArguments)


def ms_swift():
    from swift.arguments import RLHFArguments

    return of_dataclass(RLHFArguments)


def axolotl():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return dict.fromkeys(AxolotlInputConfig.model_fields)


if __name__ == "__main__":
    print("KEYS" + json.dumps(globals()[sys.argv[1]](), default=str))
