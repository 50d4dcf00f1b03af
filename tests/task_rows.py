"""A few invented rows per benchmark, and the parquet files a `--data-dir` would hold of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import vision_rows

from moelora_eval_tasks.catalog import TASKS

Row = dict[str, Any]


def _listed(text: tuple[str, ...]) -> dict[str, list[str]]:
    return {"text": list(text), "label": list("ABCDE"[: len(text)])}


def _pairs(first: str, second: str, rows: list[tuple[str, str, float]]) -> list[Row]:
    return [{first: a, second: b, "label": label} for a, b, label in rows]


_IMAGE = {"bytes": b"not a picture", "path": "picture.png"}

_NLI = _pairs(
    "premise",
    "hypothesis",
    [
        ("Two dogs sleep on the porch.", "Some animals are asleep.", 0),
        ("A woman reads on the train.", "She reads a novel.", 1),
        ("The shop closes at six.", "The shop is open all night. ", 2),
        ("Every seat was taken.", "There was no free seat.", 0),
    ],
)

ROWS: dict[str, list[Row]] = {
    **vision_rows.ROWS,
    "scienceqa": [
        {
            "question": "Which of these is a solid?",
            "choices": ["steam", "ice"],
            "answer": 1,
            "hint": "",
            "image": None,
        },
        {
            "question": "Which is the warmest?",
            "choices": ["snow", "a candle's flame", "rain"],
            "answer": 1,
            "hint": "A thermometer shows how warm a thing is.\n",
            "image": None,
        },
        {
            "question": "Which country is shown?",
            "choices": ["Peru", "Chad"],
            "answer": 0,
            "hint": "",
            "image": _IMAGE,
        },
        {
            "question": "Is a whale a fish?",
            "choices": ["no", "yes"],
            "answer": 0,
            "hint": "",
            "image": None,
        },
    ],
    "commonsenseqa": [
        {"question": question, "choices": _listed(texts), "answerKey": key}
        for question, texts, key in [
            ("Where do you keep milk?", ("oven", "fridge", "drawer", "roof", "lake"), "B"),
            ("What do you cut bread with?", ("knife", "spoon", "rope", "cup", "hat"), "A"),
            ("Who flies a plane?", ("cook", "baker", "pilot", "nurse", "clerk"), "C"),
        ]
    ],
    "openbookqa": [
        {"question_stem": question, "choices": _listed(texts), "answerKey": key}
        for question, texts, key in [
            ("A plant in the dark will", ("grow", "wilt", "sing", "melt"), "B"),
            ("Ice left in the sun will", ("melt", "burn", "rust", "freeze"), "A"),
            ("A magnet attracts", ("wood", "glass", "paper", "iron"), "D"),
        ]
    ],
    "siqa": [
        {
            "context": context,
            "question": question,
            "answerA": a,
            "answerB": b,
            "answerC": c,
            "label": label,
        }
        for context, question, a, b, c, label in [
            ("Kim lost a glove.", "How does Kim feel?", "glad", "annoyed", "hungry", "2"),
            ("Lee baked bread.", "What will Lee do next?", "eat it", "dig", "fly", "1"),
            ("Max missed the bus.", "What does Max need now?", "a hat", "a nap", "a taxi", "3"),
        ]
    ],
    "cola": [
        {"sentence": "The cat sat on the mat.", "label": 1},
        {"sentence": "Cat the on mat sat the.", "label": 0},
        {"sentence": "She sings well.", "label": 1},
        {"sentence": "She sing goodly well are.", "label": 0},
    ],
    "sst2": [
        {"sentence": "a joy from start to finish ", "label": 1},
        {"sentence": "dull , loud and far too long ", "label": 0},
        {"sentence": "the best comedy of the year ", "label": 1},
        {"sentence": "i walked out after ten minutes ", "label": 0},
    ],
    "mrpc": _pairs(
        "sentence1",
        "sentence2",
        [
            ("The firm cut 200 jobs.", "200 jobs were cut by the firm.", 1),
            ("Rain fell all day.", "The match was won.", 0),
            ("He left early.", "He did not stay long.", 1),
            ("Shares rose.", "Shares fell.", 0),
        ],
    ),
    "qqp": _pairs(
        "question1",
        "question2",
        [
            ("How do I learn to swim?", "What is the way to learn swimming?", 1),
            ("How old is the Moon?", "How far is the Moon?", 0),
            ("Is tea healthy?", "Is tea good for you?", 1),
            ("Who wrote it?", "When was it written?", 0),
        ],
    ),
    "mnli": _NLI,
    "mnli_mismatched": _NLI,
    "qnli": _pairs(
        "question",
        "sentence",
        [
            ("When was the bridge built?", "The bridge was built in 1932.", 0),
            ("Who designed the bridge?", "The bridge was built in 1932.", 1),
            ("Where do the birds go?", "In autumn they fly to Spain.", 0),
            ("How many were there?", "The hall was cold.", 1),
        ],
    ),
    "stsb": _pairs(
        "sentence1",
        "sentence2",
        [
            ("A man plays a flute.", "A man is playing a flute.", 5.0),
            ("A dog runs.", "A dog is running in a park.", 3.5),
            ("A child eats.", "A car is parked.", 0.2),
            ("Two boys swim.", "Two children swim.", 4.0),
            ("A bird sings.", "A woman sings.", 1.5),
        ],
    ),
    "rte": _pairs(
        "sentence1",
        "sentence2",
        [
            ("Ann was born in Oslo in 1970.", "Ann was born in Norway.", 0),
            ("The mill burnt down.", "The mill was sold.", 1),
            ("All ten crew members survived.", "Nobody of the crew died.", 0),
            ("He might come.", "He came.", 1),
        ],
    ),
    "wnli": _pairs(
        "sentence1",
        "sentence2",
        [
            ("The box did not fit into the bag as it was too big.", "The box was too big.", 1),
            ("The box did not fit into the bag as it was too big.", "The bag was too big.", 0),
            ("Ben thanked Tom for the help he gave.", "Tom gave help.", 1),
            ("Ben thanked Tom for the help he gave.", "Ben gave help.", 0),
        ],
    ),
}


def write_data(data_dir: Path, names: Iterable[str] = TASKS) -> Path:
    """Write the evaluation split and an equal training split of the named tasks."""
    for task in map(TASKS.__getitem__, names):
        if task.parts:
            write_data(data_dir, task.parts)
        else:
            for split in filter(None, (task.train_split, task.eval_split)):
                write_split(data_dir, task.name, split, ROWS[task.benchmark])
    return data_dir


def write_split(data_dir: Path, name: str, split: str, rows: list[Row]) -> Path:
    """Write one parquet file where the task's loader looks for it."""
    path = data_dir / TASKS[name].folder / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
