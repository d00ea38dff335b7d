"""Llamas that transformers' own tensor parallelism has cut: trained, saved and folded as one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from gloo_ranks import run_ranks
from tiny_architectures import build
from tiny_training import losses, shard_on_cpus
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import hf_stable
from hf_stable._ranks import whole_tensor
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.methods.agreement import refuse_different_patches
from hf_stable.methods.sigma_reparam.method import sigma_layers

pytestmark = pytest.mark.slow

STEPS, HALF = 4, 2

# Some fourteen products in a row, whose sums of at most 64 terms are in another order: each differs
# by about the root of 64 half units (6e-8), and all of them by the root of 14 times that.
REORDERED = dict(rtol=2e-6, atol=0)
# The quotient of an Adam step has that of its gradient, which is a thousand times as much where a
# gradient is a thousandth of the others. AdamW2 leaves each entry of a step 5e-4 (0.01 of sigma,
# for signs of a norm near 10), so four steps differ by 4e-6: a hundredth of one of them.
STEPPED = dict(rtol=1e-5, atol=4e-6)

BOTH = "sigmaReparam and AdamW2"
EVERYTHING = ("losses", "vectors", "checkpoints", "resume")


def examples():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 37, (4 * STEPS, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch(step, rank=0, world=1):
    rows = examples()[4 * step : 4 * step + 4][rank::world]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def load(folder, tp_size=2, **sizes):
    config = DistributedConfig(tp_size=tp_size, **sizes)
    cut = {} if tp_size == 1 else {"distributed_config": config}
    return AutoModelForCausalLM.from_pretrained(folder / "plain", **cut)


def make_optimizer(model):
    groups = hf_stable.parameter_groups(model, weight_decay=0.1)
    return hf_stable.AdamW2(groups, lr=1e-2, tau=0.01)


def step_through(model, optimizer, steps, rank=0, world=1):
    found = []
    for step in steps:
        loss = model(**batch(step, rank, world)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def train(model, rank=0, world=1, checkpoint=None):
    """Train a patched model in a loop of its own; everything that is to be the same."""
    optimizer = make_optimizer(model)
    found = step_through(model, optimizer, range(HALF), rank, world)
    if checkpoint:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=checkpoint)
    found += step_through(model, optimizer, range(HALF, STEPS), rank, world)
    together = torch.stack(found)
    if world > 1:
        dist.all_reduce(together)
        together /= dist.get_world_size()
    model.eval()
    with torch.no_grad():
        evaluated = model(**batch(0)).loss
    return {"losses": together, "evaluated": evaluated, "tensors": tensors_of(model)}


def resume(model, checkpoint, rank=0, world=1):
    """Go on from what `train` saved halfway, with a fresh model; what it comes to."""
    optimizer = make_optimizer(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load(dict(model=weights, optimizer=state), checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    step_through(model, optimizer, range(HALF, STEPS), rank, world)
    return tensors_of(model)


def tensors_of(model):
    return {name: whole_tensor(value).clone() for name, value in model.state_dict().items()}


def train_cut(folder, sizes, placed, resumes, options):
    """On each of two ranks: the whole life of a patched model that transformers has cut."""
    model = hf_stable.patch(load(folder, **sizes), "sigma_reparam", **options)
    placements = {name: str(model.get_parameter(name).placements[0]) for name in placed}
    assert placements == placed
    result = train(model, checkpoint=folder / "dcp" if resumes else None)
    if resumes:
        again = hf_stable.patch(load(folder, **sizes), "sigma_reparam", **options)
        result["resumed"] = resume(again, folder / "dcp")
    model.save_pretrained(folder / "saved")
    hf_stable.fold(model)
    with torch.no_grad():
        result["folded"] = model(**batch(0)).loss
    result["left"] = len(sigma_layers(model))
    return result


def cut_by_torch(model, mesh):
    """Cut a Llama as its plan of transformers does, by torch's own functions."""
    for block in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def lay_out(folder, way):
    """A patched Llama over four ranks, and the place and number of its replicas."""
    names = {"HSDP": ("replicate", "shard"), "FSDP2 x TP": ("dp", "tp")}[way]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model = load(folder, 1)
    if way == "FSDP2 x TP":
        cut_by_torch(model, mesh["tp"])
    hf_stable.patch(model, "sigma_reparam")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["dp"] if way == "FSDP2 x TP" else mesh)
    place = (mesh.get_local_rank("dp"), 2) if way == "FSDP2 x TP" else (dist.get_rank(), 4)
    return model, *place


def train_on_mesh(folder, way):
    """On each of four ranks: train, save halfway, resume, and write plain weights."""
    model, *place = lay_out(folder, way)
    placed = [str(model.model.layers[0].mlp.up_proj.weight.placements)]
    result = train(model, *place, checkpoint=folder / "dcp") | {"placed": placed}
    again, *place = lay_out(folder, way)
    result["resumed"] = resume(again, folder / "dcp", *place)
    model.save_pretrained(folder / "saved", is_main_process=not dist.get_rank())
    return result


def assert_same(ranks, alone):
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], **REORDERED)
        torch.testing.assert_close(rank["evaluated"], alone["evaluated"], **REORDERED)
        assert rank["tensors"].keys() == alone["tensors"].keys()
        for name, tensor in alone["tensors"].items():
            here = rank["tensors"][name]
            torch.testing.assert_close(here, tensor, **STEPPED, msg=name)
            assert torch.equal(here, ranks[0]["tensors"][name]), f"ranks differ: {name}"
            again = rank.get("resumed", rank["tensors"])[name]
            assert torch.equal(here, again), f"resumed otherwise: {name}"


def make_plain(folder, name="llama"):
    torch.manual_seed(0)
    build(name).save_pretrained(folder / "plain")


def shows(engine, model, *aspects):
    return pytest.mark.parity(engine=engine, models=(model,), method=BOTH, same=aspects)


FIRST = "model.layers.0.mlp."
EXPERTS = FIRST + "experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "sizes", "placed", "resumes"),
    [
        pytest.param(
            "llama", {},
            {f"{FIRST}up_proj.weight": "S(0)", f"{FIRST}down_proj.weight": "S(1)"}, True,
            marks=shows("tensor parallel", "Llama", *EVERYTHING),
        ),
        # torch's distributed checkpoints cannot tell where a packed weight is cut.
        pytest.param(
            "mixtral", {}, {EXPERTS: "_S(1, 2)"}, False,
            marks=shows("tensor parallel", "Mixtral", "losses", "vectors", "checkpoints"),
        ),
        pytest.param(
            "mixtral", {"ep_size": 2}, {EXPERTS: "S(0)"}, True,
            marks=shows("tensor and expert parallel", "Mixtral", *EVERYTHING),
        ),
    ],
    ids=["llama", "mixtral", "experts"],
)  # fmt: skip
def test_what_transformers_has_cut_trains_saves_and_folds_as_one(
    name, sizes, placed, resumes, tmp_path
):
    make_plain(tmp_path, name)
    options = {"exclude": ("*experts*",)} if name == "mixtral" else {}
    ranks = run_ranks(train_cut, 2, tmp_path, sizes, placed, resumes, options)
    model = hf_stable.patch(load(tmp_path, 1), "sigma_reparam", **options)
    start = tensors_of(model)
    alone = train(model)
    assert_same(ranks, alone)
    moved = [
        name
        for name, old in start.items()
        if not torch.allclose(alone["tensors"][name], old, **STEPPED)
    ]
    assert moved == list(start), "not everything has moved"
    for rank in ranks:
        assert rank["left"] == 0
        torch.testing.assert_close(rank["folded"], rank["evaluated"], **REORDERED)
    check_saved(tmp_path / "saved", ranks[0])


def check_saved(folder, rank):
    """The folder loads plainly and patched, as the model that was trained."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    patched = hf_stable.load(AutoModelForCausalLM, folder)
    assert all(torch.equal(t, rank["tensors"][n]) for n, t in tensors_of(patched).items())
    for model in (plain, patched.eval()):
        with torch.no_grad():
            torch.testing.assert_close(model(**batch(0)).loss, rank["evaluated"])


@pytest.mark.parity(engine="{way}", models=("Llama",), method=BOTH, same=EVERYTHING)
@pytest.mark.parametrize(
    ("way", "placed"),
    [
        ("HSDP", "(Replicate(), Shard(dim=0))"),
        ("FSDP2 x TP", "(_StridedShard(dim=0, sf=2), Shard(dim=0))"),
    ],
)
def test_a_llama_on_two_dimensions_trains_resumes_and_saves_as_one(way, placed, tmp_path):
    make_plain(tmp_path)
    ranks = run_ranks(train_on_mesh, 4, tmp_path, way)
    assert ranks[0]["placed"] == [placed]
    alone = train(hf_stable.patch(load(tmp_path, 1), "sigma_reparam"))
    assert_same(ranks, alone)
    check_saved(tmp_path / "saved", ranks[0])


def cannot_keep_maps(model, tokens):
    with pytest.raises(ValueError, match="each process sees its own heads"):
        with hf_stable.probe(model, maps=[0]):
            model(input_ids=tokens)


def run_trainer(folder, tp_size):
    """A Trainer with everything of ours; its losses, and what it has saved."""
    if tp_size > 1:
        shard_on_cpus()  # accelerate knows tensor parallelism on accelerators only
    model = hf_stable.patch(load(folder, tp_size), "sigma_reparam")
    args = TrainingArguments(
        str(folder / f"run{tp_size}"), use_cpu=True, optim="adamw2", max_steps=STEPS,
        per_device_train_batch_size=4, logging_steps=1, report_to="none", disable_tqdm=True,
        learning_rate=1e-2, weight_decay=0.1, save_only_model=True, seed=1,
    )  # fmt: skip
    monitor = hf_stable.StabilityCallback(every=2, terms="all")
    trainer = Trainer(model, args, train_dataset=examples(), callbacks=[monitor])
    trainer.train()
    if tp_size > 1:
        cannot_keep_maps(model, batch(0)["input_ids"])
    return {"losses": losses(trainer), "cut": isinstance(model.lm_head.weight, DTensor)}


def test_the_trainer_trains_a_cut_llama_as_one(tmp_path):
    make_plain(tmp_path)
    first, second = run_ranks(run_trainer, 2, tmp_path, 2)
    assert first["cut"] and first["losses"] == second["losses"]
    alone = run_trainer(tmp_path, 1)
    assert not alone["cut"] and len(alone["losses"]) == STEPS
    for step, values in alone["losses"].items():
        torch.testing.assert_close(first["losses"][step], values, **REORDERED)
    saved = [
        hf_stable.load(
            transformers.LlamaForCausalLM, tmp_path / f"run{size}" / f"checkpoint-{STEPS}"
        )
        for size in (1, 2)
    ]
    found, expected = map(tensors_of, saved)
    torch.testing.assert_close(found, expected, **STEPPED)
    start = tensors_of(hf_stable.patch(load(tmp_path, 1), "sigma_reparam"))
    for name, old in start.items():
        assert not torch.allclose(expected[name], old, **STEPPED), f"has not moved: {name}"


def refuse(folder):
    """On each rank: what is refused before anything has changed, and that nothing has."""
    said = {}
    model = build("phi3")
    model.save_pretrained(folder / f"phi3-{dist.get_rank()}")
    dist.barrier()
    cut = AutoModelForCausalLM.from_pretrained(
        folder / "phi3-0", distributed_config=DistributedConfig(tp_size=2)
    )
    rank, joint = dist.get_rank(), dict(fused_qkv="joint")
    with pytest.raises(ValueError) as differently:
        hf_stable.patch(
            cut, "sigma_reparam", **joint, exclude=["model.layers.1.*"] if rank else None
        )
    with pytest.raises(ValueError) as alone:
        if rank:  # what the Trainer asks when it begins
            refuse_different_patches(cut)
        hf_stable.patch(cut, "sigma_reparam", **joint)
    said["differently"], said["alone"] = str(differently.value), str(alone.value)
    try:
        hf_stable.patch(cut, "sigma_reparam")
    except UnsupportedModelError as error:
        said["fused"] = str(error)
    said["touched"] = bool(sigma_layers(cut))
    hf_stable.patch(cut, "sigma_reparam", fused_qkv="joint")
    said["joint"] = len(sigma_layers(cut))
    experts = load(folder)
    try:
        hf_stable.patch(experts, "sigma_reparam")
    except UnsupportedModelError as error:
        said["experts"] = str(error)
    return said


def test_what_is_refused_changes_nothing_and_joint_parts_are_taken(tmp_path):
    make_plain(tmp_path, "mixtral")
    for rank, said in enumerate(run_ranks(refuse, 2, tmp_path)):
        assert "the ranks patch a model differently that they share" in said["differently"]
        assert "exclude=('model.layers.1.*',)" in said["differently"]
        assert ("rank 1 with nothing", "the ranks have patched the model")[rank] in said["alone"]
        assert "is experts in one parameter" in said["experts"]
        assert "fused_qkv='joint'" in said["fused"] and not said["touched"]
        assert said["joint"] == 8
