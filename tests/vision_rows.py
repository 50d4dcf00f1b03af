"""A few invented rows per benchmark with images, and the pictures that go with them."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image


def picture(colour: str = "red", *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image file: one colour, but for its top left corner, which is black."""
    image = Image.new("RGB", (12, 8), colour)
    image.paste("black", (0, 0, 4, 4))
    content = BytesIO()
    image.convert(mode).save(content, kind)
    return content.getvalue()


def stored(colour: str, name: str) -> dict[str, Any]:
    """An image as parquet files of the hub hold it."""
    return {"bytes": picture(colour), "path": name}


SCIENCEQA_IMAGE = [
    {
        "question": "Which colour is this flag?",
        "choices": ["red", "green", "blue"],
        "answer": 0,
        "hint": "The corner does not count.",
        "image": stored("red", "flag.png"),
    },
    {
        "question": "What grows here?",
        "choices": ["sand", "grass"],
        "answer": 1,
        "hint": "",
        "image": stored("green", "lawn.png"),
    },
    {
        "question": "Is a triangle round?",
        "choices": ["no", "yes"],
        "answer": 0,
        "hint": "",
        "image": None,
    },
    {
        "question": "What is this, <image>?",
        "choices": ["the sea", "a desert"],
        "answer": 0,
        "hint": "",
        "image": stored("blue", "sea.png"),
    },
]

_VMCBENCH = [
    {
        "index": index,
        "question": question,
        **dict(zip("ABCD", options, strict=True)),
        "answer": answer,
        "category": category,
        "image": stored(colour, f"{colour}.png"),
    }
    for index, (question, options, answer, category, colour) in enumerate(
        [
            ("How many boats sail?", ("none", "one", "two", "nine"), "A", "VQAv2", "blue"),
            ("Which year had most rain?", ("1999", "2003", "2010", "2011"), "C", "ChartQA", "gray"),
            ("What does the sign say?", ("stop", "exit", "open", "sale"), "B", "TextVQA", "green"),
            ("How long is side x?", ("1 cm", "2 cm", "3 cm", "4 cm"), "D", "MathVista", "white"),
        ]
    )
]

VISUAL7W = [
    {
        "qa_id": qa_id,
        "image": stored(colour, f"images/v7w_{qa_id}.jpg"),
        "question": question,
        "choices": list(choices),
        "answer": 0,
        "type": question.split()[0].lower(),
    }
    for qa_id, question, choices, colour in [
        (7, "What is on the table?", ("A cup.", "A hat.", "A shoe.", "A saw."), "brown"),
        (8, "Where was it taken?", ("On a farm.", "In a car.", "At sea.", "Indoors."), "green"),
        (9, "Who wears a hat?", ("A man.", "A dog.", "Nobody.", "The cook."), "pink"),
        (10, "How many are there?", ("Three.", "Two.", "Five.", "Ten."), "gray"),
        (11, "When was it?", ("At night.", "At noon.", "In winter.", "At dawn."), "black"),
        (12, "Why is it wet?", ("Rain.", "Paint.", "A hose.", "Snow."), "blue"),
    ]
]

ROWS: dict[str, list[dict[str, Any]]] = {
    "scienceqa_image": SCIENCEQA_IMAGE,
    "scienceqa_all": SCIENCEQA_IMAGE,
    "vmcbench": _VMCBENCH * 226,  # the paper scores those from number 900 on
    "visual7w": VISUAL7W,
}
