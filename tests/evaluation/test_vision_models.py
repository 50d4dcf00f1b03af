"""Vision models through lm-eval: what images score, batched and shared out, as by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import PeftModel, get_peft_model
from task_rows import write_data
from tiny import tiny_llama, tiny_tokenizer
from tiny_vision import VISION_MODELS, picture, save_tiny_vision, tiny_vision

from moelora_plugin import MoeLoraConfig, save_adapter
from moelora_plugin.errors import ConfigError, DataError
from moelora_plugin.evaluation import EvaluationRequest, evaluate, evaluate_model, subjects
from moelora_plugin.evaluation.lm import wrap
from moelora_plugin.evaluation.lm.text import MoeLoraLM
from moelora_plugin.model import moelora_layers
from moelora_plugin.processors import image_text

Row = tuple[str, list[Any], list[str]]

STEM = "The correct answer is"
# Letters after a stem, one prompt about two pictures, answers of several tokens, no picture.
ROWS: list[Row] = [
    (f"<image>\nWhat is it?\n(A) yes\n(B) no\n{STEM}", [picture("red")], [" A", " B", " C"]),
    (
        f"<image> and <image>\nWhich sentence is positive? {STEM}",
        [picture("blue", 40, 20), picture("green")],
        [" positive", " not equivalent", " not positive"],
    ),
    (f"Which of the two sentences is correct? {STEM}", [], [" A", " B"]),
    ("<image>\nYes or no:", [picture("yellow", 8, 40)], [" yes", " no", " yes yes yes"]),
]
# Sums over other batches and pads round differently: up to 2e-6 was seen on scores near -10, where
# a step of fp32 is 1e-6.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = ["scienceqa_image", "scienceqa_all", "sst2"]
    return str(write_data(tmp_path_factory.mktemp("images"), names))


def scored(rows: Sequence[Row]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, answer, shown), index, metadata=("task", number, 1))
        for number, (context, images, answers) in enumerate(rows)
        for shown in [{"visual": images}]
        for index, answer in enumerate(answers)
    ]


def written(rows: Sequence[Row]) -> list[Instance]:
    options = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    return [
        Instance(
            "generate_until",
            {},
            (context, dict(options), {"visual": images}),
            0,
            metadata=("task", number, 1),
        )
        for number, (context, images, _) in enumerate(rows)
    ]


def by_hand(model: Any, processor: Any, row: Row) -> list[tuple[float, bool]]:
    """Each answer in a pass of its own, without lm-eval and without padding."""
    context, images, answers = row
    context = context.replace("<image>", image_text(processor))
    found = []
    for answer in answers:
        whole, before = (
            processor(text=[text], images=[images] if images else None, return_tensors="pt")
            for text in (context + answer, context)
        )
        start = before["input_ids"].shape[1]
        with torch.no_grad():
            log_probs = model(**whole).logits[0, start - 1 : -1].log_softmax(-1)
        tokens = whole["input_ids"][0, start:]
        is_greedy = bool((log_probs.argmax(-1) == tokens).all())
        found.append((float(log_probs.gather(1, tokens[:, None]).sum()), is_greedy))
    return found


def set_to_work(model: PeftModel) -> PeftModel:
    torch.manual_seed(3)
    for layer in moelora_layers(model).values():
        for _, b in layer.expert_weights():
            b.normal_(std=0.5)
    return model.eval()


def adapted(model: Any, targets: Any = "all-linear") -> PeftModel:
    config = MoeLoraConfig(
        r=2, num_experts=3, top_k=2, target_modules=targets, router="softmax", lora_dropout=0.0
    )
    return set_to_work(get_peft_model(model, config))


def values(found: Sequence[tuple[float, bool]]) -> torch.Tensor:
    return torch.tensor([value for value, _ in found], dtype=torch.float64)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_answers_score_as_they_do_by_hand(name: str) -> None:
    model, processor = tiny_vision(name)
    expected = [one for row in ROWS for one in by_hand(model, processor, row)]
    for batch_size in (1, 3, 4):
        found = wrap(model, processor, batch_size).loglikelihood(scored(ROWS))
        torch.testing.assert_close(values(found), values(expected), rtol=0, atol=ROUNDING)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_what_is_written_does_not_depend_on_the_batch(name: str) -> None:
    model, processor = tiny_vision(name)
    alone = wrap(model, processor, 1).generate_until(written(ROWS))
    assert len(set(alone)) > 1
    for batch_size in (3, "auto"):
        assert wrap(model, processor, batch_size).generate_until(written(ROWS)) == alone
    context, images, _ = ROWS[0]
    inputs = processor(
        text=[context.replace("<image>", image_text(processor))],
        images=[images],
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    text = processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert alone[0] == text


@pytest.mark.parametrize("name", VISION_MODELS)
def test_another_picture_gives_other_scores(name: str) -> None:
    model, processor = tiny_vision(name)
    context, _, answers = ROWS[0]
    rows: list[Row] = [(context, [picture(colour)], answers) for colour in ("red", "blue")]
    found = values(wrap(model, processor, 2).loglikelihood(scored(rows)))
    assert (found[:3] - found[3:]).abs().min() > 0.01  # of scores that differ by units


def test_letters_of_a_row_share_a_forward_pass_and_its_picture_is_prepared_once() -> None:
    model, processor = tiny_vision("llava")
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lm = wrap(model, processor, 2)
    prepared: list[int] = []
    prepare = lm.processor.image_processor.preprocess

    def count(images: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.append(len(images))
        return prepare(images, *args, **kwargs)

    lm.processor.image_processor.preprocess = count
    letters = [" A", " B", " C", " D"]
    rows: list[Row] = [
        (f"<image>\nNumber {i}. {STEM}", [picture("red")], letters) for i in range(4)
    ]
    lm.loglikelihood(scored(rows))
    assert passes == [2, 2]
    assert prepared == [2, 2]


def test_logits_are_computed_at_the_answers_alone() -> None:
    model, processor = tiny_vision("qwen2_5_vl")
    positions: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[1]))
    wrap(model, processor, 1).loglikelihood(scored(ROWS[:1]))
    assert positions == [1]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_rows_of_text_score_as_the_text_class_scores_them(name: str) -> None:
    """After a row with a picture, of which nothing may stay behind."""
    model, processor = tiny_vision(name)
    lm = wrap(model, processor, 4)
    lm.loglikelihood(scored(ROWS[:1]))
    text = [(context.replace("<image>", "(image)"), [], answers) for context, _, answers in ROWS]
    found = lm.loglikelihood(scored(text))
    bare = [
        Instance("loglikelihood", {}, (context, answer), 0, metadata=("task", 0, 1))
        for context, _, answers in text
        for answer in answers
    ]
    assert found == MoeLoraLM(model, processor.tokenizer, batch_size=4).loglikelihood(bare)


def test_white_space_before_an_answer_belongs_to_it_as_in_text() -> None:
    model, processor = tiny_vision("llava")
    rows: list[Row] = [
        (f"<image>\nYes or no:{before}", [picture("red")], [f"{after}yes"])
        for before, after in (("", " "), (" ", ""))
    ]
    first, second = wrap(model, processor, 1).loglikelihood(scored(rows))
    assert first == second


def test_the_tokens_of_a_request_count_those_of_its_images() -> None:
    model, processor = tiny_vision("llava")
    lm = wrap(model, processor, "auto")
    with_image, letter = scored(ROWS[:1])[0], written(ROWS[:1])[0]
    texts = [with_image.args[0], with_image.args[0] + " A"]
    prompt, whole = (processor(text=[text], images=[ROWS[0][1]])["input_ids"][0] for text in texts)
    assert lm.tokens_of(with_image) == len(whole)
    assert lm.tokens_of(letter) == len(prompt) + 5


def test_half_precision_scores_are_not_rounded_to_ties() -> None:
    model, processor = tiny_vision("llava")
    rows = [row for row in ROWS if row[1]]
    found = wrap(model.to(torch.bfloat16), processor, 4).loglikelihood(scored(rows))
    values_32 = torch.tensor([value for value, _ in found])
    assert not torch.equal(values_32, values_32.to(torch.bfloat16).float())


def test_a_prompt_that_is_too_long_with_its_images_is_refused_by_name() -> None:
    model, processor = tiny_vision("llava")
    model.config.text_config.max_position_embeddings = 30
    lm = wrap(model, processor, 4)
    short: Row = ("<image>\nYes or no:", [picture("red")], [" yes", " no"])
    lm.loglikelihood(scored([short]))
    message = r"^The prompt '<image> What is it.* has \d+ tokens with its images, .*--tasks\.$"
    with pytest.raises(DataError, match=message):
        lm.loglikelihood(scored([short, ROWS[0]]))
    with pytest.raises(DataError, match="tokens with its images"):
        lm.generate_until(written([ROWS[0]]))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_adapter_is_compared_with_its_base(name: str, image_data: str) -> None:
    model, processor = tiny_vision(name)
    plain = evaluate_model(model, processor, ["scienceqa_image", "sst2"], data_dir=image_data)
    report = evaluate_model(
        adapted(model),
        processor,
        ["scienceqa_image", "sst2"],
        data_dir=image_data,
        compare_base=True,
        batch_size=2,
    )
    for task in ("scienceqa_image", "sst2"):
        base, own = (report.predictions[one][task] for one in ("base", "model"))
        assert base.pred.tolist() == plain.predictions["model"][task].pred.tolist()
        assert base.prompts_sha256 == own.prompts_sha256
        assert set(report.tasks[task].differences) == {"model"}


def test_an_adapter_on_the_vision_tower_alone_is_scored(image_data: str) -> None:
    model, processor = tiny_vision("llava")
    tower = adapted(model, r".*vision_tower.*\.(q_proj|fc1)")
    report = evaluate_model(tower, processor, ["scienceqa_image"], data_dir=image_data)
    assert report.tasks["scienceqa_image"].n == 3


def test_pictures_and_text_are_mixed_in_one_task(image_data: str) -> None:
    model, processor = tiny_vision("idefics3")
    report = evaluate_model(
        model, processor, ["scienceqa_all", "scienceqa_all_gen"], data_dir=image_data, batch_size=3
    )
    assert report.tasks["scienceqa_all"].n > 3
    assert report.tasks["scienceqa_all_gen"].n == report.tasks["scienceqa_all"].n


def test_from_files_base_and_adapter_score_as_in_memory(
    image_data: str, tmp_path: Path, output: Path
) -> None:
    base = save_tiny_vision("qwen2_5_vl", tmp_path / "base")
    model, processor = tiny_vision("qwen2_5_vl")
    adapter = adapted(model)
    adapter.peft_config["default"].base_model_name_or_path = base
    folder = save_adapter(adapter, tmp_path / "adapter")
    in_memory = evaluate_model(adapter, processor, ["scienceqa_image"], data_dir=image_data)
    report = evaluate(
        EvaluationRequest(
            tasks=("scienceqa_image",),
            adapters=(str(folder),),
            data_dir=image_data,
            compare_base=True,
            device="cpu",
            output=output,
        )
    )
    own = report.predictions["adapter"]["scienceqa_image"]
    assert own.answers == in_memory.predictions["model"]["scienceqa_image"].answers
    assert list(report.tasks["scienceqa_image"].differences) == ["adapter"]


def test_a_text_model_is_not_asked_about_pictures(
    image_data: str, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "^A llama model cannot be shown the images of scienceqa_image, scienceqa_all; "
    tasks = ("scienceqa_image", "sst2", "scienceqa_all")
    with pytest.raises(ConfigError, match=message):
        evaluate_model(tiny_llama(), tiny_tokenizer(), tasks, data_dir=image_data)
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(subjects, "load_base_model", None)  # refused before it is loaded
    request = EvaluationRequest(
        tasks=tasks, base=str(folder), data_dir=image_data, device="cpu", output=output
    )
    with pytest.raises(ConfigError, match=message):
        evaluate(request)
    assert not output.exists()
