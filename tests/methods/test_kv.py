import pytest
import torch

from methods import fused
from methods.kv import KVCache


def make_cache(capacity: int = 8) -> KVCache:
    return KVCache(
        num_layers=2,
        num_kv_heads=1,
        head_dim=1,
        capacity=capacity,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def write(kv: KVCache, values: list[float]) -> None:
    """Give layer 0 these values and layer 1 their negatives."""
    row = torch.tensor(values).view(1, 1, -1, 1)
    kv.write(0, row, row + 0.5)
    kv.write(1, -row, -row)
    kv.extend(len(values))


def commit(kv: KVCache, nodes: list[int]) -> None:
    """Keep these scratch slots, as a step does."""
    count = torch.tensor([len(nodes)])
    fused.commit(kv.data[:, :, 0], torch.tensor([kv.length]), torch.tensor(nodes), count)
    kv.advance(len(nodes))


def decided(kv: KVCache) -> list[float]:
    return kv.data[0, 0, 0, 0, : kv.length, 0].tolist()


def test_committed_nodes_stand_in_order_and_the_rest_is_forgotten() -> None:
    kv = make_cache()
    write(kv, [1, 2])
    commit(kv, [0, 1])
    write(kv, [3, 4, 5, 6])
    commit(kv, [0, 2, 3])
    assert decided(kv) == [1, 2, 3, 5, 6]
    assert kv.scratch == 0


def test_every_layer_and_both_kinds_are_committed() -> None:
    kv = make_cache()
    write(kv, [1, 2, 3])
    commit(kv, [0, 2])
    assert kv.data[0, 1, 0, 0, :2, 0].tolist() == [1.5, 3.5]
    assert kv.data[1, 0, 0, 0, :2, 0].tolist() == [-1, -3]


def test_a_write_shows_decided_then_earlier_scratch_then_new() -> None:
    kv = make_cache()
    write(kv, [1])
    commit(kv, [0])
    write(kv, [2])
    row = torch.tensor([3.0]).view(1, 1, 1, 1)
    keys, _ = kv.write(0, row, row)
    assert keys.flatten().tolist() == [1, 2, 3]


def test_rewinding_forgets_decided_tokens_and_drafts() -> None:
    kv = make_cache()
    write(kv, [1, 2, 3])
    commit(kv, [0, 1, 2])
    write(kv, [4])
    kv.rewind(1)
    write(kv, [9])
    commit(kv, [0])
    assert decided(kv) == [1, 9]


def test_a_full_cache_says_how_many_slots_are_needed() -> None:
    kv = make_cache(capacity=3)
    write(kv, [1, 2])
    with pytest.raises(ValueError, match="the cache has 3 slots, 4 are needed"):
        kv.reserve(2)
