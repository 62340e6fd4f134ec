"""What processes tell each other: two and three of them on gloo, and one alone."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from srlm_fast import parallel
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks, start
from tests.srlm_kernels import ranks as processes


def here() -> Ranks:
    store = dist.PrefixStore("run", dist.distributed_c10d._get_default_store())
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), store)


def shares_are_gathered_into_their_order() -> None:
    ranks = here()
    for count in range(8):
        items = [f"item {i}" for i in range(count)]
        mine = ranks.share(items)
        assert len(mine) in (count // ranks.world, count // ranks.world + 1)
        assert ranks.gather(mine) == items
    assert ranks.gather([None] if ranks.main else []) == [None], "lists of any lengths, and None"


def the_main_ranks_thing_goes_to_all() -> None:
    ranks = here()
    assert ranks.from_main({"rank": ranks.rank}) == {"rank": 0}


def sums_are_in_place_and_the_same_on_all_ranks() -> None:
    ranks = here()
    generator = torch.Generator().manual_seed(ranks.rank)
    own = [
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((3, 5), (), (7,), (4, 6))
        for dtype in (torch.float32, torch.float64)
    ]
    own.append(torch.randn(6, 4, generator=generator).T)  # not contiguous
    expected = [sum(column) for column in zip(*_by_rank(ranks, own), strict=True)]
    for bucket in (1, 20, parallel._BUCKET):
        tensors = [tensor.clone(memory_format=torch.preserve_format) for tensor in own]
        with mock.patch.object(parallel, "_BUCKET", bucket):
            ranks.sum_(tensors)
        for tensor, total in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, total)
        for other in _by_rank(ranks, tensors):
            assert all(map(torch.equal, other, tensors))


def _by_rank(ranks: Ranks, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return ranks.gather([tensors])


def gradients_of_one_dtype_are_one_message() -> None:
    ranks, tensors = here(), [torch.ones(3), torch.ones(2, 2), torch.ones(())]
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        ranks.sum_(tensors)
    assert reduce.call_count == 1
    ranks.sum_([])


def a_flag_of_one_rank_is_known_to_all() -> None:
    ranks = here()
    last = ranks.rank == ranks.world - 1
    assert ranks.any(last) and not ranks.any(False)
    assert ranks.any_of_each([False, last, ranks.main]) == [False, True, True]


def memory_that_runs_out_on_one_rank_does_so_on_all() -> None:
    ranks = here()
    with ranks.running_out_together():
        pass
    after = []
    with pytest.raises(torch.OutOfMemoryError), ranks.running_out_together():
        if ranks.rank == ranks.world - 1:
            raise torch.OutOfMemoryError("no room")
        after.append("the others go on to the end of the block")
    assert len(after) == (ranks.rank < ranks.world - 1)
    assert ranks.gather([ranks.rank]) == list(range(ranks.world)), "and are where they were"


def one_rank_speaks() -> None:
    ranks = here()
    with ranks.speaker() as first:
        spoken = first
    assert ranks.gather([spoken]).count(True) == 1


CHECKS: list[Callable[[], None]] = [
    shares_are_gathered_into_their_order,
    the_main_ranks_thing_goes_to_all,
    sums_are_in_place_and_the_same_on_all_ranks,
    gradients_of_one_dtype_are_one_message,
    a_flag_of_one_rank_is_known_to_all,
    memory_that_runs_out_on_one_rank_does_so_on_all,
    one_rank_speaks,
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    return processes.start(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks(check: Callable[[], None], world: int, outputs: dict[int, list[str]]) -> None:
    processes.assert_passed(check, outputs[world])


def test_alone_nothing_is_distributed() -> None:
    code = (
        "import sys; from srlm_fast.parallel import ALONE, start\n"
        "assert start() is ALONE and ALONE.main\n"
        "assert ALONE.share('ab') == ALONE.gather('ab') == ['a', 'b']\n"
        "assert ALONE.from_main(3) == 3 and ALONE.any(True) and not ALONE.any(False)\n"
        "ALONE.sum_([1]), ALONE.barrier(), ALONE.check_device('cuda:1'), ALONE.close()\n"
        "with ALONE.speaker() as first: assert first\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert start() is ALONE


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_half_an_environment_names_torchrun(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=rf"{missing} expected.*torchrun"):
        start()


def test_each_rank_needs_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda", "cpu"):
        Ranks(1, 3, local_rank=1).check_device(name)
    Ranks(2, 3, local_rank=2).check_device("cpu")
    with pytest.raises(UserError, match=r"more processes than the 2 GPUs.*--nproc-per-node"):
        Ranks(2, 3, local_rank=2).check_device("auto")
    with pytest.raises(UserError, match="cuda:1 would be shared by 3 processes"):
        Ranks(1, 3, local_rank=1).check_device("cuda:1")


if __name__ == "__main__":
    processes.main({2: CHECKS, 3: CHECKS})


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked up in /proc")
def test_no_thread_of_gloo_outlives_the_group(tmp_path: Path) -> None:
    """What was imported later kept the group, and one process in eight aborted at its end."""
    script = (
        "from pathlib import Path\n"
        "from srlm_fast.parallel import start\n"
        "ranks = start()\n"
        "import transformers.modeling_utils\n"
        "ranks.close()\n"
        "names = [t.read_text() for t in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not any('gloo' in name for name in names), names\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, *torchrun, "script.py"], cwd=tmp_path, env=environment, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
