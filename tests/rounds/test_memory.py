"""What a dry run says of memory, and that a run which cannot fit does not start."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from srlm_fast.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    JudgeConfig,
    LoraConfig,
    PairsConfig,
    PairwiseConfig,
    PreferenceConfig,
    PromptsConfig,
    SamplingConfig,
    TrainConfig,
)
from srlm_fast.errors import UserError
from srlm_fast.model.sizes import count_parameters, without_data
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.rounds.machine import Machine, machine_here, planned_machine, weights_dtype
from srlm_fast.rounds.memory import Phase, RunMemory

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA = LlamaConfig(**SHAPE)
# Matrices of two layers, their norms and the last one, embedding and head.
COUNT = 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 2 * 300 * 64


def config(**preference: Any) -> Config:
    return Config(
        model="m",
        device="cpu",
        preference=PreferenceConfig(**preference),
        sampling=SamplingConfig(max_new_tokens=100),
    )


def memory(
    run: Config, ranks: Ranks = ALONE, *, room: int | None = None, device: str = "cpu"
) -> RunMemory:
    return RunMemory.of(run, LLAMA, Machine(torch.device(device), room), ranks)


def phase(name: str, run: Config, *args: Any, **options: Any) -> Phase:
    return next(p for p in memory(run, *args, **options).phases if p.name == name)


def test_lines_of_a_dry_run() -> None:
    text = "\n".join(memory(config(reference_cache="states"), room=3 * 10**9).lines())
    assert f"{COUNT / 1e6:.1f}M parameters in float32" in text
    assert re.search(r"sampling: at most \d+\.\d+ GB \(weights 0\.00, pages 0\.\d+, work", text)
    assert re.search(r"judging: at most \d", text)
    assert re.search(r"sft: at most \d+\.\d+ GB in forwards of 4,096 tokens \(weights", text)
    assert re.search(r"preference: at most \d.* of 5,696 tokens .*reference 0\.00", text)
    assert "states of the reference: at most 0.03 GB on disk" in text
    assert "3.00 GB are free" in text and "too little" not in text
    less = "\n".join(memory(config(), room=10**9).lines())
    assert "1.00 GB are free\ntoo little for judging if rows are as long as they may" in less


def test_phases_are_those_of_the_method_and_its_judge() -> None:
    def names(method: Any, kind: Any) -> list[str]:
        run = replace(config(), method=method, judge=JudgeConfig(kind=kind, max_new_tokens=9))
        return [phase.name for phase in memory(run).phases]

    assert names("srlm", "prompted") == ["sampling", "judging", "sft", "preference"]
    assert names("srlm", "expected") == ["sampling", "judging", "sft", "preference"]
    assert names("srlm", "longest") == ["sampling", "sft", "preference"]
    assert names("spa", "implicit") == ["sampling", "scoring", "preference"]
    assert names("spa", "prompted") == ["sampling", "judging", "scoring", "preference"]


def test_comparing_is_a_phase_of_its_own_with_the_last_step_on_the_host() -> None:
    run = replace(config(), evaluate=EvaluateConfig(head_to_head=True))
    assert [p.name for p in memory(run).phases][-1] == "comparing"
    assert "last step" not in phase("comparing", run).parts
    chooses = config(load_best_model_at_end=True, save_steps=1)
    parts = phase("comparing", chooses).parts
    assert parts["last step"] == parts["weights"] == 4 * COUNT
    assert phase("comparing", chooses).least == 2 * 4 * COUNT
    assert "last step" not in phase("comparing", chooses, device="cuda").parts

    few = replace(
        chooses,
        prompts=PromptsConfig(source="dataset", num_prompts=1),
        evaluate=EvaluateConfig(num_prompts=1),
        judge=JudgeConfig(num_samples=1, max_new_tokens=100),
    )

    def pages(num_prompts: int, **pairwise: Any) -> int:
        compared = PairwiseConfig(num_prompts=num_prompts, **pairwise)
        return phase("comparing", replace(few, pairwise=compared)).parts["pages"] or 0

    # 156 tokens of a prompt fill three pages, and two more are a row's own. A prompt more is one to
    # answer, whose pages are kept, and two for the judge: both orders, or both answers.
    page = 64 * 2 * 2 * 64 * 4
    for settings in ({"max_new_tokens": 100}, {"kind": "score"}):
        assert pages(9, **settings) - pages(8, **settings) == (3 + 2 * (3 + 2)) * page


def test_what_makes_a_training_smaller() -> None:
    def peak(ranks: Ranks = ALONE, **preference: Any) -> int:
        return phase("preference", config(**preference), ranks).peak

    whole = peak()
    assert peak(Ranks(0, 4)) < whole
    assert peak(micro_batch_size=1) < whole
    assert peak(micro_batch_tokens=400) < peak(micro_batch_tokens=800) < whole
    assert peak(gradient_checkpointing=True) < whole
    assert peak(reference_cache="logps") < whole
    assert peak(reference_cache="logps", reference="fixed") == whole


def test_shares_of_the_weights_are_less_than_the_whole() -> None:
    def found(parallel: str, world: int) -> Phase:
        return phase("preference", config(parallel=parallel), Ranks(0, world))

    whole, share = found("replicate", 4).parts, found("shard", 4).parts
    assert found("shard", 1) == found("replicate", 1)
    for name in ("optimizer", "gradients", "reference"):
        assert share[name] == (whole[name] or 0) // 4
    assert (whole["weights"] or 0) // 4 < (share["weights"] or 0) < (whole["weights"] or 0)
    # Both are whole when the shares are cut.
    assert found("shard", 4).least == 2 * 4 * COUNT * 5 // 4


def test_scoring_has_a_second_model_and_a_sampler_of_its_own() -> None:
    run = replace(config(), method="spa", judge=JudgeConfig(kind="implicit"))
    one, two = phase("sampling", run).parts, phase("scoring", run).parts
    assert two["weights"] == two["reference"] == one["weights"] == 4 * COUNT
    assert (two["pages"] or 0) > (one["pages"] or 0) > 0
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    run = replace(run, lora=LoraConfig(r=4))
    lora = phase("scoring", run).parts
    assert not lora["reference"] and lora["pages"] == phase("sampling", run).parts["pages"]
    assert 0 < (lora["frozen adapters"] or 0) < 4 * COUNT // 4


def save_shape(folder: Path, **changes: Any) -> tuple[str, int]:
    """A folder with a configuration alone, and the bytes of its model's weights in fp32."""
    shape = LlamaConfig(**(SHAPE | changes))
    shape.save_pretrained(folder)
    return str(folder), 4 * count_parameters(without_data(shape, torch.float32))


def test_a_model_that_writes_prompts_is_beside_the_resident_one_while_it_writes(
    tmp_path: Path,
) -> None:
    name, size = save_shape(tmp_path, hidden_size=128, max_position_embeddings=1024)
    run = replace(config(), prompts=PromptsConfig(model=name))
    writing = phase("writing", run)
    assert memory(run).phases[0] == writing and writing.parts["prompts.model"] == size
    assert writing.parts["weights"] == 4 * COUNT and writing.least == 4 * COUNT + size
    with pytest.raises(UserError, match="does not exist"):
        memory(replace(run, prompts=PromptsConfig(model="no/such/folder")))


def test_the_resident_model_writes_no_lists_where_another_does(tmp_path: Path) -> None:
    """Which here are all that takes more than its few candidates."""
    own = replace(
        config(),
        sampling=SamplingConfig(max_new_tokens=2, num_candidates=2),
        prompts=PromptsConfig(num_prompts=2, max_new_tokens=200),
        evaluate=EvaluateConfig(num_prompts=2),
    )
    other = replace(own, prompts=replace(own.prompts, model=save_shape(tmp_path)[0]))
    sampling, writing = phase("sampling", other), phase("writing", other)
    assert sampling.peak < phase("sampling", own).peak / 4
    # 256 calls, of a prompt's page and the four on which 199 tokens lie behind it.
    assert writing.parts["pages"] == 256 * 5 * 64 * 2 * 2 * 64 * 4
    few = replace(other, prompts=replace(other.prompts, max_calls=4))
    assert phase("writing", few).peak < writing.peak / 4


def test_a_judging_reference_of_its_own_is_as_large_as_it_is(tmp_path: Path) -> None:
    name, size = save_shape(tmp_path, num_hidden_layers=5)
    implicit = replace(config(), method="spa", judge=JudgeConfig(kind="implicit"))
    run = replace(implicit, judge=JudgeConfig(kind="implicit", reference=name))
    assert phase("scoring", run).parts["reference"] == size
    assert phase("scoring", run).least == 4 * COUNT + size
    none = replace(implicit, judge=JudgeConfig(kind="implicit", reference="none"))
    assert phase("scoring", none).parts["reference"] == 0
    cream = replace(run, method="srlm", pairs=PairsConfig(consistency="avg"))
    assert phase("scoring", cream).parts["reference"] == max(size, 4 * COUNT)
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    lora = replace(run, lora=LoraConfig(r=4))
    assert phase("scoring", lora).parts["reference"] == size


def test_an_online_training_has_the_judges_reference_all_the_time(tmp_path: Path) -> None:
    """And between its steps the pages of a step's prompts beside the optimiser's moments."""
    one = config(per_device_train_batch_size=1)
    data = DataConfig(num_test_pairs=1)
    loss = replace(one, method="spa", judge=JudgeConfig(kind="implicit"), data=data)
    spa = replace(loss.spa, self_refinement=False)
    offline, online = replace(loss, spa=spa), replace(loss, spa=spa, online=True)
    before, now = phase("preference", offline), phase("preference", online)
    assert now.parts["judge's reference"] == 4 * COUNT
    assert (now.least, now.peak) == (before.least + 4 * COUNT, before.peak + 4 * COUNT)
    assert phase("scoring", online).peak < phase("scoring", offline).peak
    no_cache = r"preference takes .* to bfloat16, or train adapters \(lora\.r\)$"
    with pytest.raises(UserError, match=no_cache):
        memory(online, room=now.least - 1).check()
    judged = replace(online, judge=JudgeConfig(max_new_tokens=9))
    assert phase("preference", judged).parts["judge's reference"] == 0
    # Judge prompts of the whole context, of many candidates: more than a step of one pair takes.
    many = replace(judged, sampling=replace(judged.sampling, num_candidates=64))
    parts = {name: size or 0 for name, size in phase("preference", many).parts.items()}
    held = ("weights", "reference", "optimizer", "pages", "work")
    assert phase("preference", many).peak == sum(parts[name] for name in held)


def test_other_models_that_cannot_be_sized_are_unknown_and_nothing_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(shape: Any, *rest: Any) -> Any:
        if shape.num_hidden_layers == 5:
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")
        return without_data(shape, *rest)

    monkeypatch.setattr("srlm_fast.rounds.memory.without_data", fails)
    name, _ = save_shape(tmp_path, num_hidden_layers=5)
    judge = JudgeConfig(kind="implicit", reference=name)
    run = replace(config(), judge=judge, prompts=PromptsConfig(model=name), online=True)
    memory(run, room=10**9).check()
    text = "\n".join(memory(run).lines())
    assert "writing: at least" in text and "prompts.model unknown" in text
    assert "scoring: at least" in text and "reference unknown" in text
    assert "preference: at least" in text and "judge's reference unknown" in text


def test_what_a_function_that_judges_holds_is_said_to_be_unknown() -> None:
    judge = JudgeConfig(kind="scorer", scorer="module:function")
    text = "\n".join(memory(replace(config(), judge=judge)).lines())
    assert "judge.scorer module:function is not counted" in text


def test_pages_of_a_gpu_are_a_share_of_what_the_weights_leave() -> None:
    def pages(room: int) -> int:
        return phase("sampling", config(), device="cuda", room=room).parts["pages"] or 0

    page = 64 * 2 * 2 * 64 * 4  # of both layers, keys and values
    for room in (10**8, 2 * 10**8):
        assert pages(room) == int(0.4 * (room - 4 * COUNT) / page) * page
    # A row of the whole context always has them.
    assert pages(10**6) == 5 * page


def test_weights_have_the_dtype_that_loading_gives_them() -> None:
    gpu, stored = torch.device("cuda"), LlamaConfig(**SHAPE, dtype=torch.float16)
    assert weights_dtype(config(), stored, gpu) == torch.float16
    assert weights_dtype(config(), stored, CPU) == torch.float32
    assert weights_dtype(config(), LLAMA, gpu) == torch.float32
    assert weights_dtype(replace(config(), dtype="bfloat16"), stored, CPU) == torch.bfloat16


def test_layers_that_cannot_run_without_data_are_unknown_and_nothing_worse() -> None:
    """In fp32 on the CPU experts run, but not as tensors without data."""
    experts = MixtralConfig(**SHAPE, num_local_experts=4)
    found = RunMemory.of(config(), experts, Machine(CPU, None))
    found.check()
    text = "\n".join(found.lines())
    assert text.count("at most") == 4 or text.count("at least") == 4 <= text.count("unknown")


def test_a_model_that_cannot_be_made_without_its_weights_is_no_reason_not_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("srlm_fast.rounds.memory.without_data", fails)
    found = memory(config(), room=1)
    found.check()
    assert found.lines() == ["unknown: this model cannot be sized without its weights"]


@pytest.mark.parametrize(
    ("preference", "cure"),
    [({}, "reference_cache"), ({"reference_cache": "logps"}, "train adapters")],
)
def test_a_run_whose_weights_cannot_fit_does_not_start(
    preference: dict[str, Any], cure: str
) -> None:
    """Rows as long as the context, which no data may have, are no reason."""
    run = config(**preference)
    need = COUNT * (20 if not preference else 16)
    memory(run, room=need).check()
    memory(run, room=None).check()
    with pytest.raises(UserError, match=rf"takes .* GB at the least, and .*{cure}"):
        memory(run, room=need - 1).check()
    with pytest.raises(UserError, match=r"parallel to shard"):
        memory(run, Ranks(0, 4), room=need - 1).check()
    shared = replace(config(parallel="shard", **preference), sft=TrainConfig(parallel="shard"))
    memory(shared, Ranks(0, 4), room=need - 1).check()


def test_a_reference_that_judges_must_fit_beside_the_model() -> None:
    run = replace(
        config(reference_cache="states", optim="adamw_torch_8bit"),
        method="spa",
        judge=JudgeConfig(kind="implicit"),
        dtype="bfloat16",
    )
    assert phase("scoring", run).least == 2 * 2 * COUNT
    with pytest.raises(UserError, match=r"scoring takes .*lora\.r"):
        memory(run, room=2 * 2 * COUNT - 1).check()


def test_adapters_alone_are_counted_as_trained() -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    full = config()
    lora = replace(full, lora=LoraConfig(r=4))
    # r times (in + out) of the seven matrices of both layers, which are 64 by 64 or 64 by 96
    trained = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))
    parts = phase("preference", lora).parts
    assert parts["weights"] == 4 * (COUNT + trained)
    assert [parts[name] for name in ("reference", "optimizer", "gradients")] == [
        4 * trained, 8 * trained, 4 * trained,
    ]  # fmt: skip
    assert (parts["head"] or 0) < (phase("preference", full).parts["head"] or 0)
    assert "adapters of 0.0M parameters, which alone train" in memory(lora).lines()
    need = 4 * (COUNT + 2 * trained) + 12 * trained
    memory(lora, room=need).check()
    with pytest.raises(UserError, match=r"a larger device, or set dtype to bfloat16$"):
        memory(lora, room=need - 1).check()


def test_free_memory_is_known_here_and_shared_by_the_processes_of_a_machine() -> None:
    room = machine_here(CPU).room
    assert room is None or 10**7 < room < 10**14
    both = machine_here(CPU, Ranks(0, 2, local_world=2)).room
    assert both is None or (room is not None and both < 0.9 * room)


def test_a_device_that_is_not_here_can_be_planned_for() -> None:
    assert planned_machine("cuda", 24.0) == Machine(torch.device("cuda"), 24 * 10**9)
    assert planned_machine("cpu", 0.5) == Machine(CPU, 5 * 10**8)
    assert planned_machine("cpu", None).device == CPU
    with pytest.raises(UserError, match="unknown device"):
        planned_machine("gpu", 24.0)
    with pytest.raises(UserError, match=r"cuda:99 is not here.*--memory"):
        planned_machine("cuda:99", None)


def test_padded_pairs_compute_their_prompt_twice() -> None:
    """A dry run said that they take what packed ones do."""
    whole = config(per_device_train_batch_size=4)
    shared, padded = (
        replace(whole, preference=replace(whole.preference, layout=layout))
        for layout in ("shared", "padded")
    )
    found = phase("preference", padded)
    assert found.tokens == 4 * 2 * 256 and phase("preference", shared).tokens == 4 * (256 + 100)
    assert found.peak > phase("preference", shared).peak


def test_short_rows_fill_a_forward_to_its_limit_of_tokens() -> None:
    """A forward was taken to be of the longest rows that fit, and may be of more and shorter."""

    def tokens(limit: int, **preference: Any) -> int:
        return phase("preference", config(micro_batch_tokens=limit, **preference)).tokens

    item = 256 + 100
    assert tokens(2 * item - 1) == 2 * item - 1
    assert tokens(10) == item  # an item at least
    assert tokens(10**6) == 16 * item
    assert tokens(10**6, micro_batch_size=3) == 3 * item
    found = phase("preference", config(micro_batch_tokens=10**6))
    assert found == phase("preference", config())
