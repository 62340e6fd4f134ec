"""TRL's DPO on two processes (DDP over gloo) is TRL's on one, accelerated and packed."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

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


def trained(kind, batch, folder, count=None):
    """The weights and the logs after six steps of `batch` pairs a process, of `count` pairs."""
    policy, reference = policy_and_reference(SHAPE, torch.float32)
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
    if kind == "accelerated":
        accelerate(trainer)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"weights": weights, "logs": logs, "processes": trainer.accelerator.num_processes}


def of_two(kind, name, batch, count):
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # the group is there already
    folder = Path(sys.argv[1])
    torch.save(trained(kind, batch, folder / "out", count), folder / f"{name}.{rank}.pt")


def check(kind, name, *sizes):
    def run():
        of_two(kind, name, *sizes)

    run.__name__ = name
    return run


CHECKS = [check(kind, kind, 2, len(CUTS)) for kind in KINDS]
# Three pairs, one a process: the second step of an epoch has one left, and repeats another.
CHECKS += [check(kind, f"uneven_{kind}", 1, 3) for kind in ("plain", "packed")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By kind: what it is on one process, and on each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    outputs = processes.start(__file__, folder)[2]
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


if __name__ == "__main__":
    processes.main({2: CHECKS})
