"""No key of a host is passed over beside an adapter of ours: each is honoured or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from host_keys import AXOLOTL, LLAMAFACTORY, MS_SWIFT

HERE = Path(__file__).parent
HOSTS = {"llamafactory": LLAMAFACTORY, "ms_swift": MS_SWIFT, "axolotl": AXOLOTL}

# Keys that begin with our name and are none: by how the host spells ours, and with what is said.
MISSPELT = {
    "llamafactory": {
        "moelora_topk": "did you mean moelora_top_k",
        "moelora_r": "write lora_rank in its place",
        "moelora_target_modules": "write lora_target in its place",
        "MOELORA_TOP_K": "write moelora_top_k in its place",
        "moelora": "Keys are ",
    },
    "ms_swift": {
        "moelora_topk": "did you mean moelora_top_k",
        "moelora_r": "ambiguous option: --moelora_r could match --moelora_router",
        "moelora_target_modules": "write target_modules in its place",
        "MOELORA_TOP_K": "write moelora_top_k in its place",
    },
    "axolotl": {
        "moelora_topk": "did you mean moelora.top_k",
        "moelora_num_experts": "write moelora.num_experts in its place",
        "moelora_r": "write lora_r in its place",
        "MOELORA_TOP_K": "write moelora.top_k in its place",
        "Moelora": "Keys are ",
    },
}


def ask_llamafactory(host, model_dir, folder, changes):
    base = {
        "model_name_or_path": str(model_dir),
        "template": "empty",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "moelora",
        "dataset": "rows",
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "report_to": "none",
        "moelora_num_experts": 4,  # with which the preset's top_k alone would be refused
    }
    cases = [{"args": {**base, "moelora_top_k": 2, **change}} for change in changes[1:]]
    cases.insert(0, {"args": {**base, **changes[0]}, "env": {"ALLOW_EXTRA_ARGS": "1"}})
    (folder / "cases.json").write_text(json.dumps(cases))
    output = host.run("python", str(HERE / "llamafactory_refusals.py"), str(folder / "cases.json"))
    found = json.loads(output.stdout.rpartition("ANSWERS")[2])
    return [answer.get("message", "accepted") for answer in found]


def ask_ms_swift(host, model_dir, folder, changes):
    base = {
        "model": str(model_dir),
        "model_type": "llama",
        "template": "dummy",
        "use_cpu": "true",
        "dataset": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "check_model": "false",
        "tuner_type": "moelora",
        "moelora_num_experts": "4",
    }
    (folder / "rows.jsonl").write_text('{"query": "a", "response": "b"}\n')
    settings = [{**base, **changes[0]}]
    settings += [{**base, "moelora_top_k": "2", **change} for change in changes[1:]]
    cases = [{"argv": [w for k, v in s.items() for w in (f"--{k}", str(v))]} for s in settings]
    files = [str(folder / name) for name in ("cases.json", "answers.json")]
    Path(files[0]).write_text(json.dumps(cases))
    host.run("python", str(HERE / "ms_swift_arguments.py"), *files)
    return [a.get("message", "accepted") for a in json.loads(Path(files[1]).read_text())]


def ask_axolotl(host, model_dir, folder, changes):
    base = yaml.safe_load(
        f"""
        base_model: {model_dir}
        plugins: [moelora_plugin.integrations.axolotl.MoeLoraPlugin]
        adapter: moelora
        lora_target_modules: [q_proj]
        moelora: {{num_experts: 4, top_k: 2}}
        optimizer: gradamw
        datasets: [{{path: {folder}/rows.jsonl, ds_type: json, type: completion}}]
        sequence_len: 64
        micro_batch_size: 2
        gradient_accumulation_steps: 1
        max_steps: 2
        learning_rate: 0.01
        bf16: false
        output_dir: {folder}/out
        """
    )
    (folder / "cases.json").write_text(json.dumps([{**base, **change} for change in changes]))
    script = str(HERE / "axolotl_refusals.py")
    host.run("python", script, "cases.json", "answers.json", cwd=folder)
    return json.loads((folder / "answers.json").read_text())


ASK = {"llamafactory": ask_llamafactory, "ms_swift": ask_ms_swift, "axolotl": ask_axolotl}


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    return request.param, request.getfixturevalue(request.param)


def test_every_key_that_could_concern_an_adapter_is_decided_about(host):
    name, program = host
    keys = HOSTS[name]
    output = program.run("python", str(HERE / "list_keys.py"), name, moelora=False).stdout
    found = json.loads(output.rpartition("KEYS")[2])
    decided = {*keys.honoured, *keys.refused}
    assert decided <= set(found)  # none that the host no longer has
    patterns = [*keys.elsewhere, keys.host_refuses]
    undecided = {
        key
        for key in found
        if re.fullmatch(keys.concerned, key)
        and key not in decided
        and not any(re.fullmatch(pattern, key) for pattern in patterns)
    }
    assert not undecided


def test_keys_that_cannot_be_followed_and_those_that_only_look_ours_are_refused(
    host, model_dir, tmp_path
):
    name, program = host
    expected = [*MISSPELT[name].items(), *((key, key) for key in HOSTS[name].refused)]
    changes = [{key: 2} for key in MISSPELT[name]]
    changes += [{key: value} for key, value in HOSTS[name].refused.items()]
    # The first is asked where a known option alone would already be an error.
    answers = ASK[name](program, model_dir, tmp_path, [*changes, {}])
    for (key, said), answer in zip(expected, answers, strict=False):
        assert key in answer, (key, answer)
        assert said in answer, (key, answer)
        assert "HfArgumentParser" not in answer, (key, answer)
    assert answers[-1] == "accepted"
