"""LLaMA-Factory's `template: moelora_text`: the data's text as it stands, no chat template.

LLaMA-Factory has no template that adds nothing but the end-of-text token. This one encodes prompt
and answer as our own trainer and `moelora eval` do, BOS included where the tokenizer adds one.
"""

from __future__ import annotations

from typing import Any

NAME = "moelora_text"


def register() -> None:
    """Put the template into LLaMA-Factory's table."""
    from llamafactory.data.template import TEMPLATES, Template, register_template

    from ...training.examples import encode_pair

    if NAME in TEMPLATES:
        return

    class TextTemplate(Template):  # type: ignore[misc]
        """The first question and answer as one text; further turns of a chat follow as they are."""

        def _encode(self, tokenizer: Any, messages: Any, system: Any, tools: Any) -> Any:
            encoded = super()._encode(tokenizer, messages, system, tools)
            context, answer = messages[0]["content"], messages[1]["content"]
            if tools or not context:
                return encoded
            context = (system or self.default_system) + context
            if answer:
                prompt_ids, answer_ids = encode_pair(tokenizer, context, answer)
            else:  # a chat's question
                prompt_ids, answer_ids = tokenizer.encode(context), []
            return [prompt_ids, [*answer_ids, tokenizer.eos_token_id], *encoded[2:]]

    register_template(NAME, template_class=TextTemplate)
