"""Evaluation, checkpoints and logs of TRL's DPO with our head are those of TRL without it."""

import warnings
from pathlib import Path

import numpy
import pytest
import torch

from srlm_fast.errors import UserError

trl = pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (with trl)")

from srlm_fast.integrations.trl import SrlmDPOTrainer, accelerate  # noqa: E402
from tests.integrations.dpo_runs import OnTokenIds, check_logs  # noqa: E402

WAYS = ("accelerated", "packed")


@pytest.fixture
def made(make):
    """A trainer by its way: TRL's, accelerated or ours."""

    def make_trainer(way, **options):
        trainer = make(SrlmDPOTrainer if way == "packed" else OnTokenIds, **options)
        return accelerate(trainer) if way == "accelerated" else trainer

    return make_trainer


def measured(prediction):
    """Of logits [2P, S, V] and token ids."""
    logits, ids = prediction.predictions, prediction.label_ids
    return {"size": logits.size, "mean": float(logits.mean()), "ids": int(ids[ids > 0].sum())}


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_is_trls(made, rows, way):
    plain, trainer = (made(each, eval_dataset=rows) for each in ("plain", way))
    assert plain.evaluate().keys() == trainer.evaluate().keys()
    check_logs(trainer.state.log_history, plain.state.log_history)


@pytest.mark.parametrize(
    ("way", "metrics"), [("accelerated", measured), ("packed", None), ("packed", measured)]
)
def test_an_evaluation_between_two_logs_counts_all_tokens(made, rows, way, metrics):
    options = {
        "eval_dataset": rows.select(range(7)), "eval_strategy": "steps", "eval_steps": 2,
        "logging_steps": 3, "max_steps": 5, "per_device_eval_batch_size": 4, "eval_on_start": True,
        "compute_metrics": metrics,
    }  # fmt: skip
    plain, trainer = (made(each, **options) for each in ("plain", way))
    for each in (plain, trainer):
        each.train()
    check_logs(trainer.state.log_history, plain.state.log_history)
    logged = trainer.state.log_history
    assert {0, 2, 4} <= {row["step"] for row in logged if "eval_num_tokens" in row}
    assert any("eval_mean" in row for row in logged) == (metrics is not None)


@pytest.mark.parametrize("way", WAYS)
def test_predictions_are_trls(made, rows, way):
    plain, found = (
        made(each, eval_dataset=rows, compute_metrics=measured).predict(rows.select(range(3)))
        for each in ("plain", way)
    )
    assert plain.metrics.keys() == found.metrics.keys()
    numpy.testing.assert_allclose(found.predictions, plain.predictions, atol=1e-5)
    numpy.testing.assert_array_equal(found.label_ids, plain.label_ids)


def test_several_sets_whose_reference_is_computed_before(made, rows):
    options = {
        "eval_dataset": {"some": rows.select(range(3)), "all": rows}, "max_steps": 2,
        "precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    plain, trainer = (made(each, **options) for each in ("plain", "packed"))
    for each in (plain, trainer):
        each.train()
        each.evaluate(rows.select(range(5)))  # not known when the trainer was made
    check_logs(trainer.state.log_history, plain.state.log_history)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_training_has_the_weights_of_one_that_was_not_stopped(made, way):
    options = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 7, "optim": "adamw_torch",
        "per_device_train_batch_size": 3, "lr_scheduler_type": "linear",
    }  # fmt: skip
    straight, resumed = made(way, **options), made(way, **options)
    straight.train()
    stopped = Path(straight.args.output_dir, "checkpoint-4")  # in the middle of an epoch of 3
    resumed.train(resume_from_checkpoint=str(stopped))
    assert resumed.state.global_step == 7
    for name, weight in straight.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name
    for ours, theirs in zip(resumed.state.log_history, straight.state.log_history, strict=True):
        assert ours.get("loss") == theirs.get("loss")


def test_a_checkpoint_is_trls(made, tmp_path):
    files, weights = [], []
    for way in ("plain", *WAYS):
        folder = tmp_path / way
        trainer = made(way, save_strategy="steps", save_steps=1, max_steps=1)
        trainer.args.output_dir = str(folder)
        trainer.train()
        trainer.save_model(str(folder / "model"))
        files.append({str(path.relative_to(folder)) for path in folder.rglob("*")})
        saved = type(trainer.model).from_pretrained(folder / "model")
        weights.append(torch.cat([p.flatten() for p in saved.parameters()]))
    assert files[0] == files[1] == files[2]
    for found in weights[1:]:
        assert (found - weights[0]).norm() <= 1e-6 * weights[0].norm()


@pytest.mark.parametrize(
    ("way", "cached"), [("accelerated", False), ("packed", False), ("packed", True)]
)
def test_a_policy_from_a_folder_is_its_own_reference(
    models, rows, tokenizer, tmp_path, way, cached
):
    models[0].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    logs = []
    for each in ("plain", way):
        trainer = (SrlmDPOTrainer if each == "packed" else OnTokenIds)(
            model=str(tmp_path / "model"),
            args=trl.DPOConfig(
                output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[],
                max_steps=3, logging_steps=1, disable_tqdm=True, save_strategy="no", optim="sgd",
                learning_rate=1e-2, precompute_ref_log_probs=cached,
            ),
            train_dataset=rows,
        )  # fmt: skip
        (accelerate(trainer) if each == "accelerated" else trainer).train()
        logs.append(trainer.state.log_history)
    first = logs[1][0]
    # A cache was filled by other batches than those of training, whose sums round otherwise.
    assert abs(first["rewards/margins"]) <= (1e-5 if cached else 0)
    for log in logs if cached else ():
        del log[0]["rewards/accuracies"]
    check_logs(logs[1], logs[0])


def test_spa_goes_on_from_a_checkpoint_with_what_it_knew(make, rows):
    data = datasets.concatenate_datasets([rows] * 4)
    options = {"loss_type": ["spa"], "spa_warmup_fraction": 0.0, "data": data, "save_steps": 10}
    straight = make(SrlmDPOTrainer, save_strategy="steps", **options)
    straight.train()
    folder = straight.args.output_dir + "/checkpoint-10"
    resumed = make(SrlmDPOTrainer, save_strategy="steps", **options)
    resumed.train(resume_from_checkpoint=folder)
    found, expected = (
        {row["step"]: row for row in t.state.log_history if "spa/tau" in row}
        for t in (resumed, straight)
    )
    assert expected[15]["spa/tau"] != 0
    for step in range(11, 21):
        for name in ("loss", "spa/tau", "spa/flagged_share"):
            assert found[step][name] == pytest.approx(expected[step][name], abs=1e-6), step


def test_spas_checkpoint_of_another_loss_is_refused(make):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    plain = make(SrlmDPOTrainer, **options)
    plain.train()
    with pytest.raises(UserError, match="was not written with loss_type spa"):
        make(SrlmDPOTrainer, loss_type=["spa"], **options).train(
            resume_from_checkpoint=plain.args.output_dir + "/checkpoint-1"
        )


def test_spa_is_evaluated_as_dpo_with_metrics_of_the_users_own(make, rows):
    found = []
    for kind in ("spa", "sigmoid"):
        trainer = make(
            SrlmDPOTrainer, loss_type=[kind], eval_dataset=rows, compute_metrics=measured
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_mean", "eval_rewards/margins"):
        assert found[0][name] == found[1][name]
