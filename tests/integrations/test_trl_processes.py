"""TRL's DPO on two processes (DDP over gloo) is TRL's on one, accelerated and packed."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.train_engines import policy_and_reference, random_pairs
from tests.integrations.tokens import tokenizer
from tests.srlm_kernels import ranks as processes

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")

from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate  # noqa: E402

SHAPE = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
CUTS = ((12, 12), (5, 5), (1, 12), (7, 3), (2, 2), (12, 4), (8, 8), (3, 9))
KINDS = ("plain", "accelerated", "packed")


class OnTokenIds(trl.DPOTrainer):
    """TRL tokenises what it is given; our rows are token ids."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trainer_of(kind, batch, folder, count=None, shape=SHAPE):
    """Of six steps of `batch` pairs a process, of `count` pairs."""
    policy, reference = policy_and_reference(shape, torch.float32)
    rows = [
        {
            "prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids[:a]),
            "rejected_ids": list(p.rejected_ids[:b]),
        }
        for p, (a, b) in zip(random_pairs(len(CUTS), 9, 12, SHAPE["vocab_size"]), CUTS, strict=True)
    ]  # fmt: skip
    trainer = (SrlmDPOTrainer if kind == "packed" else OnTokenIds)(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=batch, learning_rate=1e-2,
            optim="sgd", max_steps=6, logging_steps=1, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
            lr_scheduler_type="constant",
        ),
        train_dataset=datasets.Dataset.from_list(rows[:count]),
        processing_class=tokenizer(),
    )  # fmt: skip
    return accelerate(trainer) if kind == "accelerated" else trainer


def trained(*arguments):
    """The weights and the logs after a training."""
    trainer = trainer_of(*arguments)
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"weights": weights, "logs": logs, "processes": trainer.accelerator.num_processes}


def environment():
    """What accelerate asks."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # the group is there already


def of_two(kind, name, batch, count):
    rank = dist.get_rank()
    folder = Path(sys.argv[1])
    torch.save(trained(kind, batch, folder / "out", count), folder / f"{name}.{rank}.pt")


def check(kind, name, *sizes):
    def run():
        of_two(kind, name, *sizes)

    run.__name__ = name
    return run


def gradients(kind, folder, sharded):
    """By name, the mean over the processes, of two micro-batches of this one's pairs."""
    rank = dist.get_rank()
    trainer = trainer_of(kind, 2, folder, shape=SHAPE | {"tie_word_embeddings": False})
    pairs = [trainer.train_dataset[i] for i in (2 * rank, 2 * rank + 1)]
    batch = trainer._prepare_inputs(trainer.data_collator(pairs))
    if sharded:
        for model in (trainer.model, trainer.ref_model):
            shard(model)
    trainer.model.train()
    for _ in range(2):
        trainer.compute_loss(trainer.model, batch).backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters()}
    if sharded:
        return {name: gradient.full_tensor() for name, gradient in found.items()}
    for gradient in found.values():
        dist.all_reduce(gradient)
    return {name: gradient / 2 for name, gradient in found.items()}


def shard(model):
    """As accelerate does with FSDP2, which it has on GPUs alone: the head goes with the last norm,
    and is whole from that one's forward on."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def fsdp2():
    folder = Path(sys.argv[1]) / "out"
    for kind in KINDS[1:]:
        expected, found = (gradients(kind, folder, sharded) for sharded in (False, True))
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), (kind, name)


CHECKS = [check(kind, kind, 2, len(CUTS)) for kind in KINDS]
# Three pairs, one a process: the second step of an epoch has one left, and repeats another.
CHECKS += [check(kind, f"uneven_{kind}", 1, 3) for kind in ("plain", "packed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outputs(folder):
    return processes.start(__file__, folder)[2]


@pytest.fixture(scope="module")
def found(outputs, folder):
    """By kind: what it is on one process, and on each of two."""
    for each in CHECKS:
        processes.assert_passed(each, outputs)
    load = partial(torch.load, weights_only=True)
    both = {each.__name__: [load(folder / f"{each.__name__}.{rank}.pt") for rank in range(2)]
            for each in CHECKS}  # fmt: skip
    return both | {kind: [trained(kind, 4, folder / "out"), *both[kind]] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_weights_of_one(found, kind):
    one, first, second = found[kind]
    assert [run["processes"] for run in found[kind]] == [1, 2, 2]
    assert torch.equal(first["weights"], second["weights"])
    assert (first["weights"] - one["weights"]).norm() <= 1e-6 * one["weights"].norm()
    start = torch.cat(
        [p.flatten() for p in policy_and_reference(SHAPE, torch.float32)[0].parameters()]
    )
    assert (start - one["weights"]).norm() > 1e-3 * start.norm()
    for ours, theirs in zip(first["logs"], one["logs"], strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("kind", "plain"),
    [("accelerated", "plain"), ("packed", "plain"), ("uneven_packed", "uneven_plain")],
)
def test_two_processes_log_what_trls_do(found, kind, plain):
    for ours, theirs in zip(found[kind][-2]["logs"], found[plain][-2]["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_weights_that_fsdp2_shards_have_the_gradients_of_whole_ones(outputs):
    processes.assert_passed(fsdp2, outputs)


if __name__ == "__main__":
    processes.main({2: [environment, *CHECKS, fsdp2]})
