"""Two processes train as one does: DDP, FSDP2, and the bases and engines that are refused.

The file is a script as well: every process of `two_processes` runs it once, through all of
`SCENARIOS`, and writes what it got. One process here runs the same functions for comparison.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from peft import get_peft_model
from tiny import enable_checkpointing, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from moelora_plugin import MoeLoraConfig, build_optimizer, types
from moelora_plugin.errors import ConfigError
from moelora_plugin.model import moelora_layers
from moelora_plugin.optim import precondition_in_backward

# Two processes that import torch, transformers and PEFT: some fifteen seconds on a quiet machine.
pytestmark = pytest.mark.slow

WORLD = 2
BATCH = 8
# Ranks 7 over two processes is 4 | 3: the second expert's rows of A lie on both.
RANKS = (1, 4, 2)

# Sums over the batch in another order, amplified by the metrics' condition: some thousand roundings
# of 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def unequal_ranks(config: MoeLoraConfig, module_name: str) -> types.LayerPlan:
    return types.LayerPlan(num_experts=3, top_k=2, ranks=RANKS, alpha=4.0)


def mixture(**keys) -> nn.Module:
    """Two adapted linears whose sizes no two processes can divide evenly, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    defaults = {"num_experts": 3, "top_k": 2, "lora_dropout": 0.0, "target_modules": ["0", "2"]}
    model = get_peft_model(net, MoeLoraConfig(**{**defaults, **keys}))
    for layer in moelora_layers(model).values():
        # Not through views: B's initial zeros would hide its metric.
        layer.moelora_B["default"].weight.data.normal_()
    return model


def uneven(**keys) -> nn.Module:
    return mixture(allocation=f"{__name__}.unequal_ranks", **keys)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_rows(tensor: torch.Tensor) -> torch.Tensor:
    rank, world = rank_and_world()
    return tensor.chunk(world)[rank]


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, dtype=torch.float64, generator=generator)
    target = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)
    return (model(my_rows(x)) - my_rows(target)).square().mean()


def mean_over_processes(loss: torch.Tensor) -> torch.Tensor:
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)
    return loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def in_fsdp2(model: nn.Module) -> nn.Module:
    if dist.is_initialized():
        for layer in moelora_layers(model).values():
            fully_shard(layer)
        fully_shard(model)
    return model


def train(wrapped: nn.Module, optimizer, steps=range(4)) -> dict[str, torch.Tensor]:
    """The losses, the last gradients and the final weights, all of them whole."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(wrapped, step)
        loss.backward()
        losses.append(mean_over_processes(loss))
        grads = {n: whole(p.grad) for n, p in wrapped.named_parameters() if p.requires_grad}
        optimizer.step()
    weights = {n: whole(p) for n, p in wrapped.named_parameters() if p.requires_grad}
    named = {f"grad of {n}": g for n, g in grads.items()} | weights
    return {
        "losses": torch.stack(losses),
        **{n.replace("module.", ""): v for n, v in named.items()},
    }


NAMES = ("rsgd", "grsgd", "radamw", "gradamw")
# Clipped hard, so that a norm of one process's part alone would show in the gates.
OPTIONS = {"lr": 0.02, "gate_lr": 0.05, "gate_max_grad_norm": 1e-3, "damping": 1e-2}
CASES = [(name, order) for name in NAMES for order in ("jacobi", "gauss_seidel")]


def ddp(name: str, order: str) -> dict[str, torch.Tensor]:
    model = uneven()
    return train(in_ddp(model), build_optimizer(model, name, order=order, **OPTIONS))


def ddp_resumed(name: str) -> dict[str, torch.Tensor]:
    model = uneven()
    optimizer = build_optimizer(model, name, **OPTIONS)
    train(in_ddp(model), optimizer, range(2))
    weights, state = model.state_dict(), optimizer.state_dict()
    again = uneven()
    again.load_state_dict(weights)
    optimizer = build_optimizer(again, name, **OPTIONS)
    optimizer.load_state_dict(state)
    result = train(in_ddp(again), optimizer, range(2, 4))
    return {n: v for n, v in result.items() if n != "losses"}


def ddp_with_experts_that_no_token_selects() -> dict[str, torch.Tensor]:
    """Every token goes to expert 0: the others' gradients are zero, on every process."""
    model = mixture(num_experts=3, top_k=1, r=2)
    for layer in moelora_layers(model).values():
        layer.router_weights().zero_()  # a tie, which the first expert wins
    wrapped = in_ddp(model)
    optimizer = build_optimizer(model, "gradamw", lr=0.02, gate_lr=0.0)
    return train(wrapped, optimizer)


def ddp_of_a_language_model(checkpointing: str) -> dict[str, torch.Tensor]:
    config = MoeLoraConfig(
        r=2, num_experts=3, top_k=2, lora_dropout=0.0, target_modules=["q_proj", "down_proj"]
    )
    model = get_peft_model(tiny_llama(hidden=16), config).train()
    if checkpointing != "none":
        model.enable_input_require_grads()
        enable_checkpointing(model.get_base_model(), checkpointing == "reentrant")
    wrapped = in_ddp(model)
    optimizer = build_optimizer(model, "gradamw", lr=1e-3, gate_lr=1e-3)
    ids = torch.randint(3, 512, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = wrapped(input_ids=my_rows(ids), labels=my_rows(ids)).loss
        loss.backward()
        losses.append(mean_over_processes(loss))
        optimizer.step()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), **grads}


def fsdp2(name: str, order: str, built: str) -> dict[str, torch.Tensor]:
    """The optimizer built on the sharded model, or before, as accelerate does it."""
    model = uneven()
    if built == "after":
        model = in_fsdp2(model)
    optimizer = build_optimizer(model, name, order=order, lora_plus_ratio=2.0, **OPTIONS)
    if built == "before":
        # accelerate's _prepare_fsdp2: the old parameters' addresses are mapped to the new ones.
        addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                address, stand_in = parameter.data_ptr(), torch.empty(1, dtype=torch.float64)
                stand_in.data_ptr = address
                group["params"][i] = stand_in
        model = in_fsdp2(model)
        sharded = dict(model.named_parameters())
        mapping = {address: sharded[name] for name, address in addresses.items()}
        fsdp2_switch_optimizer_parameters(optimizer, mapping)
    return train(model, optimizer)


def fsdp2_keeps_its_shards() -> dict[str, torch.Tensor]:
    model = in_fsdp2(uneven())
    optimizer = build_optimizer(model, "gradamw", **OPTIONS)
    loss_of(model, 0).backward()
    before = [(p, p.grad, p.placements) for p in model.parameters() if p.requires_grad]
    optimizer.step()
    for parameter, grad, placements in before:
        assert parameter.grad is grad
        assert parameter.placements == grad.placements == placements
        for value in optimizer.state[parameter].values():
            assert value.ndim == 0 or value.placements == placements
    return {"local rows": torch.tensor([p.to_local().shape[0] for p, *_ in before])}


def ddp_in_backward(name: str, micro_batches: int) -> dict[str, torch.Tensor]:
    """Against the optimizer of ours in one process."""
    model = uneven()
    options = {**OPTIONS, "gate_max_grad_norm": None, "in_backward": dist.is_initialized()}
    optimizer = build_optimizer(model, name, **options)
    wrapped = in_ddp(model)
    for update in range(3):
        optimizer.zero_grad()
        for i in range(micro_batches):
            last = i == micro_batches - 1 or not dist.is_initialized()
            with contextlib.nullcontext() if last else wrapped.no_sync():
                loss_of(wrapped, update * micro_batches + i).backward()
        optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}


SCENARIOS = {
    **{("ddp", *case): (ddp, case) for case in CASES},
    **{("resumed", name): (ddp_resumed, (name,)) for name in NAMES},
    ("unselected",): (ddp_with_experts_that_no_token_selects, ()),
    **{
        ("llama", kind): (ddp_of_a_language_model, (kind,))
        for kind in ("none", "reentrant", "not reentrant")
    },
    **{("fsdp2", *case, "after"): (fsdp2, (*case, "after")) for case in CASES},
    ("fsdp2", "gradamw", "jacobi", "before"): (fsdp2, ("gradamw", "jacobi", "before")),
    **{
        ("in backward", name, micro_batches): (ddp_in_backward, (name, micro_batches))
        for name in NAMES
        for micro_batches in (1, 3)
    },
}


# What must fail in each process, and so has no counterpart in one.


def fsdp2_with_in_backward() -> None:
    build_optimizer(in_fsdp2(uneven()), "rsgd", in_backward=True, gate_max_grad_norm=None)


def fsdp2_after_in_backward() -> None:
    model = uneven()
    precondition_in_backward(model)
    loss_of(in_fsdp2(model), 0)


def fsdp1() -> None:
    model = FullyShardedDataParallel(uneven(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = build_optimizer(model, "rsgd")
    loss_of(model, 0).backward()
    optimizer.step()


def a_base_in_tensor_parallel() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    parallelize_module(base, init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel()})
    get_peft_model(base, MoeLoraConfig(target_modules=["2"]))


REFUSED = {
    function.__name__: function
    for function in (fsdp2_with_in_backward, fsdp2_after_in_backward, fsdp1)
} | {"tensor parallel": a_base_in_tensor_parallel}


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD
    )
    results, failures = {}, {}
    for key, (function, arguments) in SCENARIOS.items():
        results[key] = function(*arguments)
    results["shards"] = fsdp2_keeps_its_shards()
    for key, function in REFUSED.items():
        try:
            function()
        except Exception as error:
            failures[key] = (type(error).__name__, str(error))
    torch.save({"results": results, "failures": failures}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two_processes")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_as_one_process(two_processes, key, tolerance):
    function, arguments = SCENARIOS[key]
    expected = function(*arguments)
    for process in two_processes:
        found = process["results"][key]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    "key",
    [key for key in SCENARIOS if key[0] in ("ddp", "fsdp2", "in backward")],
    ids=lambda key: "-".join(map(str, key)),
)
def test_two_processes_train_as_one_does(two_processes, key):
    assert_as_one_process(two_processes, key, CLOSE)


def test_every_step_counts_in_the_comparison():
    """The weights move by far more than the tolerance, gates included."""
    start = {n: p.detach().clone() for n, p in uneven().named_parameters()}
    for name in NAMES:
        result = ddp(name, "jacobi")
        for weight in [n for n in result if n in start]:
            assert float((result[weight] - start[weight]).abs().max()) > 1e-5, (name, weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two_processes, name):
    for process in two_processes:
        whole_run, resumed = (
            process["results"][key] for key in (("ddp", name, "jacobi"), ("resumed", name))
        )
        for key, value in resumed.items():
            assert torch.equal(value, whole_run[key]), key


def test_experts_that_no_token_selects_get_zero_gradients_everywhere(two_processes):
    assert_as_one_process(two_processes, ("unselected",), CLOSE)
    for process in two_processes:
        result = process["results"]["unselected",]
        for name, grad in result.items():
            if name.startswith("grad of") and "moelora_A" in name:
                assert grad[:2].any()
                assert not grad[2:].any()
            elif name.startswith("grad of") and "moelora_B" in name:
                assert grad[:, :2].any()
                assert not grad[:, 2:].any()


@pytest.mark.parametrize("kind", ["none", "reentrant", "not reentrant"])
def test_a_language_model_with_activation_checkpointing(two_processes, kind):
    # Llama's norms and softmax compute in fp32: its roundings, through three steps.
    assert_as_one_process(two_processes, ("llama", kind), {"rtol": 1e-4, "atol": 1e-6})


def test_fsdp2_keeps_gradients_and_states_sharded(two_processes):
    rows = [process["results"]["shards"]["local rows"] for process in two_processes]
    # A (7, .), B (9, 7) and the router (3, .) of the first linear: none divides evenly.
    assert [int(r) for r in rows[0] - rows[1]][:3] == [1, 1, 1]
    assert sorted(int(r) for r in (rows[0] + rows[1])[:3]) == [3, 7, 9]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fsdp2_with_in_backward", "remove in_backward: under FSDP2 the optimizer itself does it"),
        ("fsdp2_after_in_backward", "under FSDP2 use build_optimizer without in_backward"),
        ("fsdp1", "use .*FSDP2"),
        ("tensor parallel", "train with DDP or FSDP2"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(two_processes, case, message):
    for process in two_processes:
        kind, text = process["failures"][case]
        assert kind == ConfigError.__name__, text
        assert re.search(message, text), text


def test_a_base_loaded_in_tensor_parallel_is_refused():
    """transformers 5.6 keeps plain local weights and notes the size."""
    base = tiny_llama(hidden=16)
    base._tp_size = 1
    get_peft_model(base, MoeLoraConfig())
    base = tiny_llama(hidden=16)
    base._tp_size = 2
    with pytest.raises(ConfigError, match=r"tensor parallelism.*train with DDP or FSDP2"):
        get_peft_model(base, MoeLoraConfig())


if __name__ == "__main__":
    try:
        worker(int(sys.argv[1]), Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # the other process waits in a collective; gloo's threads must not keep us
