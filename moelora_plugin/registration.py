"""The only file that touches PEFT's globals. Safe to call any number of times."""

from __future__ import annotations

from .errors import MissingDependencyError


def register() -> None:
    """Make PEFT know the type MOELORA, its config and its tuner.

    Raises:
        MissingDependencyError: PEFT's enum cannot be extended.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import register_peft_method

    _add_peft_type()
    from .config import PEFT_TYPE, MoeLoraConfig
    from .model import MoeLoraModel

    # Keys are members of a str enum, which equal and hash as their plain names.
    if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=MoeLoraConfig, model_cls=MoeLoraModel
        )


def _add_peft_type() -> None:
    """Add the member MOELORA to PEFT's `PeftType`.

    PEFT offers no way to register a type of one's own: `register_peft_method` demands a member of
    the enum, and saving reads its `.value`. A plain string in the tables is not enough.
    """
    from peft.utils.peft_types import PeftType

    name = "MOELORA"
    if name in PeftType.__members__:
        return
    try:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    except (AttributeError, TypeError) as error:
        raise MissingDependencyError(
            "This PEFT's PeftType enum cannot be extended, so it cannot know MOELORA; install a "
            "PEFT between 0.18.1 and 0.21.2."
        ) from error
