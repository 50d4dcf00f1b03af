"""Clusters of prompts: what they separate, what is kept on disk, what is refused."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from moelora_cli.main import app
from moelora_eval_tasks.catalog import TASKS
from moelora_plugin import MoeLoraConfig
from moelora_plugin.clusters import (
    FEATURES,
    ClusterAssigner,
    GradientFeatures,
    add_cluster_ids,
    fit_clusters,
    read_prompts,
)
from moelora_plugin.clusters.features import lora_targets
from moelora_plugin.errors import AdapterError, ConfigError, DataError, MissingDependencyError

FILMS = ("positive", "attitude", "film.")
LOGIC = ("entailment", "contradiction", "5")


def texts(words: tuple[str, ...], count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=16 + number % 7)) for number in range(count)]


def llama(vocab_size: int, **keywords) -> LlamaForCausalLM:
    """A random Llama with weights of the usual size: like texts have like features."""
    model = tiny_llama(vocab_size, **keywords)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 0.02 / 0.3
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer):
    return llama(len(tokenizer))


KINDS = texts(FILMS, 14, 0) + texts(LOGIC, 10, 1)
TRUTH = [0] * 14 + [1] * 10


@pytest.fixture(scope="module", params=FEATURES)
def fitted(request, base, tokenizer):
    """Clusters of two kinds of text."""
    return fit_clusters(read_prompts(KINDS, tokenizer), FEATURES[request.param](base), 2)


def test_two_kinds_of_text_are_two_clusters(fitted, tokenizer):
    assigner = ClusterAssigner(fitted.features, fitted.centroids_CF, fitted.sizes, tokenizer)
    ids = assigner.assign(KINDS)
    assert adjusted_rand_score(TRUTH, ids.tolist()) == 1
    assert sorted(fitted.sizes) == [10, 14]
    assert tuple(ids.bincount().tolist()) == fitted.sizes
    new = texts(FILMS, 5, 2) + texts(LOGIC, 5, 3)
    assert adjusted_rand_score([0] * 5 + [1] * 5, assigner.assign(new).tolist()) == 1


def test_the_same_seed_gives_the_same_clusters(fitted, base, tokenizer):
    # Five clusters of two kinds of text: many partitions are almost as good.
    prompts, kind = read_prompts(KINDS, tokenizer), type(fitted.features)
    first, again = (fit_clusters(prompts, kind(base), 5) for _ in range(2))
    assert torch.equal(again.centroids_CF, first.centroids_CF)


def test_saved_clusters_give_the_same_ids(fitted, base, tokenizer, tmp_path):
    fitted.save(tmp_path / "clusters", manifest={"data": []})
    loaded = ClusterAssigner.load(tmp_path / "clusters", base, tokenizer)
    assert torch.equal(loaded.centroids_CF, fitted.centroids_CF)
    assert (loaded.sizes, loaded.features.seed) == (fitted.sizes, 0)
    assert torch.equal(loaded.assign(KINDS), fitted.assign(rows_of(KINDS, tokenizer)))
    assert not list(tmp_path.glob(".*"))


def test_the_base_is_loaded_where_none_is_given(fitted, tokenizer, tmp_path):
    llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    fitted.save(tmp_path / "clusters")
    manifest = json.loads((tmp_path / "clusters" / "clusters.json").read_text())
    manifest["base"] = str(tmp_path / "base")
    (tmp_path / "clusters" / "clusters.json").write_text(json.dumps(manifest))
    loaded = ClusterAssigner.load(tmp_path / "clusters", tokenizer=tokenizer)
    assert torch.equal(loaded.assign(KINDS), fitted.assign(rows_of(KINDS, tokenizer)))


def rows_of(prompts: list[str], tokenizer, answer: str = " positive") -> dict[str, list[list[int]]]:
    """Columns of examples: each prompt and an answer that trains."""
    ends = tokenizer.encode(answer, add_special_tokens=False)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return {
        "input_ids": [row + ends for row in ids],
        "labels": [[-100] * len(row) + ends for row in ids],
    }


def test_neither_the_answer_nor_padding_nor_the_batch_count(fitted, tokenizer):
    features = fitted.features
    alone = torch.cat([features([row]) for row in read_prompts(KINDS, tokenizer)])
    columns = rows_of(KINDS, tokenizer, " contradiction")
    # fp32: a batch adds up the same numbers in another order than one prompt does.
    torch.testing.assert_close(features(read_prompts(columns)), alone, rtol=0, atol=1e-5)
    width = max(map(len, columns["input_ids"])) + 3
    padded = {  # on the left, as a batch to generate from is
        "input_ids": torch.tensor([[9] * (width - len(r)) + r for r in columns["input_ids"]]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(r)) + [1] * len(r) for r in columns["input_ids"]]
        ),
        "labels": torch.tensor([[-100] * (width - len(r)) + r for r in columns["labels"]]),
    }
    assert read_prompts(padded) == read_prompts(KINDS, tokenizer)
    without_labels = {key: padded[key] for key in ("input_ids", "attention_mask")}
    assert read_prompts(without_labels) == columns["input_ids"]


@pytest.mark.parametrize("kind", ["lora", "moelora"])
def test_an_adapter_on_the_base_changes_nothing(fitted, tokenizer, kind):
    config = (
        LoraConfig(init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        if kind == "lora"
        else MoeLoraConfig(num_experts=2, top_k=1, target_modules=["q_proj", "down_proj"])
    )
    model = get_peft_model(llama(len(tokenizer)), config)
    for name, parameter in model.named_parameters():
        if name.endswith("moelora_B.default.weight"):
            nn.init.normal_(parameter)
    model.train()
    prompts = read_prompts(KINDS, tokenizer)
    assert torch.equal(type(fitted.features)(model)(prompts), fitted.features(prompts))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_a_lora_with_b_zero(base, tokenizer):
    """Against PEFT's own LoRA, prompt by prompt, and the projection written out."""
    features = GradientFeatures(base, seed=3)
    prompts = read_prompts(KINDS[:3], tokenizer)
    model = get_peft_model(
        llama(len(tokenizer)),
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    )
    pairs = [
        (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for m in model.modules()
        if hasattr(m, "lora_A")
    ]
    assert len(pairs) == len(lora_targets(base)) == 4
    expected = torch.zeros(3, features.width)
    for number, (a, b) in enumerate(pairs):
        a.data.copy_(features.draw(number, a.shape[1], len(b))[0])
    for row, prompt in enumerate(prompts):
        model.zero_grad()
        ids = torch.tensor([prompt])
        model(input_ids=ids, labels=ids).loss.backward()
        for number, (a, b) in enumerate(pairs):
            _, entry, sign = features.draw(number, a.shape[1], len(b))
            for value, where, s in zip(b.grad.flatten(), entry, sign, strict=True):
                expected[row, where] += s * value
    expected = nn.functional.normalize(expected, dim=-1)
    # fp32, and one prompt's gradient against a batch's; see above.
    torch.testing.assert_close(features(prompts), expected, rtol=0, atol=1e-5)


def test_the_projection_keeps_inner_products(base):
    features = GradientFeatures(base)
    a, entry, sign = features.draw(0, 8, 2000)
    for other in (features.draw(1, 8, 2000), GradientFeatures(base, seed=1).draw(0, 8, 2000)):
        assert not torch.equal(other[0], a)
        assert not torch.equal(other[1], entry)
    vectors = nn.functional.normalize(torch.randn(6, 8000, generator=torch.manual_seed(0)), dim=-1)
    vectors[1] = vectors[0]
    sketched = torch.zeros(6, GradientFeatures.width).index_add_(1, entry, vectors * sign)
    # The standard deviation of an inner product of unit vectors is about 1 / sqrt(512) = 0.044.
    error = sketched @ sketched.T - vectors @ vectors.T
    assert error.abs().max() < 4 * GradientFeatures.width**-0.5
    torch.testing.assert_close(sketched[0], sketched[1])


def test_examples_get_a_column(fitted, tokenizer):
    rows = Dataset.from_dict(rows_of(KINDS, tokenizer))
    found = add_cluster_ids(rows, fitted)
    assert found.column_names == ["input_ids", "labels", "cluster_id"]
    assert adjusted_rand_score(TRUTH, found["cluster_id"]) == 1


def test_what_cannot_be_clustered_says_so_in_a_sentence(fitted, base, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="need a tokenizer"):
        fitted.assign(KINDS)
    with pytest.raises(DataError, match="Prompt 1 has 1 tokens before its answer"):
        read_prompts({"input_ids": [[0, 5], [0, 6]], "labels": [[-100, -100], [-100, 6]]})
    prompts = read_prompts(KINDS[:3] * 4, tokenizer)
    with pytest.raises(ConfigError, match=r"4 clusters need as many .* the data has 3; lower"):
        fit_clusters(prompts, fitted.features, 4)
    with pytest.raises(ConfigError, match="num_clusters=0"):
        fit_clusters(prompts, fitted.features, 0)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"pip install moelora\[cluster\]"):
        fit_clusters(prompts, fitted.features, 2)


def test_gradients_need_a_linear():
    config = tiny_llama().config
    config.num_hidden_layers = 0
    with pytest.raises(ConfigError, match="no linear module"):
        GradientFeatures(type(tiny_llama())(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "clusters.json").unlink(), "holds no clusters.json"),
        (lambda f: (f / "clusters.json").write_text("{"), "clusters.json is not valid JSON"),
        (
            lambda f: (f / "clusters.json").write_text("{}"),
            "clusters.json is damaged: method is missing",
        ),
        (lambda f: (f / "clusters.safetensors").unlink(), "clusters.safetensors is damaged"),
        (lambda f: (f / "clusters.safetensors").write_text("x"), "sha256 is not the one in"),
    ],
)
def test_damaged_clusters_are_refused(fitted, base, tmp_path, damage, message):
    fitted.save(tmp_path / "clusters")
    damage(tmp_path / "clusters")
    with pytest.raises(AdapterError, match=message):
        ClusterAssigner.load(tmp_path / "clusters", base)


def test_another_base_is_refused(fitted, tokenizer, tmp_path):
    fitted.save(tmp_path / "clusters")
    for other in (llama(len(tokenizer), seed=1), llama(len(tokenizer), hidden=64)):
        with pytest.raises(AdapterError, match="other weights than this one"):
            ClusterAssigner.load(tmp_path / "clusters", other)
    ClusterAssigner.load(tmp_path / "clusters", llama(len(tokenizer)).bfloat16())


@pytest.fixture
def recipe(base, tokenizer, tmp_path) -> Path:
    """A recipe with two tasks whose prompts differ."""
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for task, columns in {
        "sst2": {"sentence": texts(FILMS, 8, 4), "label": [0, 1] * 4},
        "stsb": {
            "sentence1": texts(LOGIC, 8, 5),
            "sentence2": texts(LOGIC, 8, 6),
            "label": [float(n % 5) for n in range(8)],
        },
    }.items():
        folder = tmp_path / "data" / TASKS[task].folder
        folder.mkdir(parents=True)
        Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{name: {tmp_path / 'base'}}}\n"
        f"data: {{tasks: [sst2, stsb], data_dir: {tmp_path / 'data'}}}\n"
    )
    return file


@pytest.mark.parametrize("method", FEATURES)
def test_the_command_writes_clusters_of_a_recipe_s_prompts(recipe, tmp_path, method):
    out = tmp_path / "clusters"
    line = ["cluster", str(recipe), "--out", str(out), "--method", method, "--num-clusters", "2"]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "16" in result.stdout
    manifest = json.loads((out / "clusters.json").read_text())
    assert (manifest["method"], manifest["sizes"]) == (method, [8, 8])
    assert [source["task"] for source in manifest["data"]] == ["sst2", "stsb"]
    assert CliRunner().invoke(app, [*line, "--overwrite"]).exit_code == 0
    shutil.rmtree(tmp_path / "base")
    refused = CliRunner().invoke(app, line)  # before it looks for the base
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr


def test_a_recipe_trains_each_cluster_s_experts(recipe, tmp_path):
    """From the command to an adapter whose experts follow the clusters."""
    out = tmp_path / "clusters"
    with recipe.open("a") as file:
        file.write(
            "adapter: {preset: mocle, num_experts: 2, r: 2, target_modules: [q_proj], "
            "router_score_kwargs: {num_ids: 2}}\n"
            "optimizer: {lr: 0.1, gate_lr: 0.1}\n"
            "training: {max_steps: 2, use_cpu: true, disable_tqdm: true}\n"
            f"output_dir: {tmp_path / 'run'}\n"
        )
    # The recipe names the folder before there is one.
    recipe.write_text(recipe.read_text().replace("data: {", f"data: {{clusters: {out}, "))
    train = ["train", str(recipe)]
    missing = CliRunner().invoke(app, train)
    assert missing.exit_code == 1
    assert "data.clusters" in missing.stderr
    made = CliRunner().invoke(
        app, ["cluster", str(recipe), "--out", str(out), "--num-clusters", "2"]
    )
    assert made.exit_code == 0, made.output
    done = CliRunner().invoke(app, train, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    trained = [tensor for name, tensor in tensors.items() if "moelora_B" in name]
    assert len(trained) == 2
    assert all(tensor.abs().max() > 0 for tensor in trained)


def test_the_command_offers_the_nearest_method(recipe, tmp_path):
    line = ["cluster", str(recipe), "--out", str(tmp_path / "c"), "--method", "gradients"]
    result = CliRunner().invoke(app, line)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "did you mean 'gradient'" in result.stderr
