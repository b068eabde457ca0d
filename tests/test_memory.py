"""The pools: every cell has one address, and nothing overlaps."""

import pytest
import torch

from nsa_serve.kernels.shapes import NSAShape
from nsa_serve.memory.device_pool import DevicePool
from nsa_serve.memory.large_pages import allocate_large
from nsa_serve.memory.layout import KVLayout
from nsa_serve.models.config import ModelConfig, NSAConfig

NSA_LAYOUT = KVLayout(3, 2, 6, 4, page=8, entries_per_page=4, dtype=torch.float32)
DENSE_LAYOUT = KVLayout(2, 1, 4, 4, page=8, entries_per_page=0, dtype=torch.bfloat16)


def number_cells(views) -> int:
    """Write 0, 1, 2, … through every view in turn; the number of cells."""
    count = 0
    for view in views:
        size = view.numel()
        view.copy_(torch.arange(count, count + size, dtype=view.dtype).view(view.shape))
        count += size
    return count


def raw_views(pool):
    return [half for kv in pool.kv for half in (kv.k, kv.v)]


def compressed_views(pool):
    return [half for kv in pool.compressed for half in (kv.k, kv.v)]


@pytest.mark.parametrize("views_of", [raw_views, compressed_views])
def test_views_cover_the_pool_and_share_no_cell(views_of):
    pool = DevicePool(NSA_LAYOUT, num_slots=5, num_blocks=5, device="cpu")
    views = views_of(pool)
    count = number_cells(views)
    seen = torch.cat([view.flatten() for view in views])
    assert torch.equal(seen, torch.arange(count, dtype=seen.dtype))


def test_views_have_the_shapes_of_the_contract():
    pool = DevicePool(NSA_LAYOUT, num_slots=5, num_blocks=7, device="cpu")
    assert pool.kv[1].k.shape == (5, 2, 8, 6)
    assert pool.kv[1].v.shape == (5, 2, 8, 4)
    assert pool.compressed[2].k.shape == (7, 2, 4, 6)
    assert pool.compressed[2].v.shape == (7, 2, 4, 4)


def test_a_page_of_all_layers_and_a_head_of_one_layer_are_single_runs():
    pool = DevicePool(NSA_LAYOUT, num_slots=4, num_blocks=4, device="cpu")
    cells = number_cells(raw_views(pool))
    base = pool.kv[0].k.data_ptr()
    page = [(half[1, h].data_ptr() - base) // 4 for half in raw_views(pool) for h in (0, 1)]
    per_page = cells // 4
    assert min(page) == per_page
    assert max(page) < 2 * per_page
    kv = pool.kv[2]
    assert kv.v[3, 1].data_ptr() - kv.k[3, 1].data_ptr() == kv.k[3, 1].numel() * 4


def test_bytes_are_those_of_the_tensors():
    pool = DevicePool(NSA_LAYOUT, num_slots=5, num_blocks=5, device="cpu")
    assert pool.num_bytes == 5 * NSA_LAYOUT.bytes_per_block
    assert NSA_LAYOUT.bytes_per_slot == 3 * 2 * 8 * (6 + 4) * 4
    assert NSA_LAYOUT.compressed_bytes_per_block * 2 == NSA_LAYOUT.bytes_per_slot


def test_a_dense_model_keeps_no_compressed_entries():
    pool = DevicePool(DENSE_LAYOUT, num_slots=3, num_blocks=3, device="cpu")
    assert pool.compressed is None
    assert pool.compressed is None
    assert DENSE_LAYOUT.bytes_per_block == DENSE_LAYOUT.bytes_per_slot


def test_without_a_tier_a_block_lies_in_the_slot_of_its_number():
    pool = DevicePool(DENSE_LAYOUT, num_slots=4, num_blocks=4, device="cpu")
    table = torch.tensor([[3, 0, -1]], dtype=torch.int32)
    assert pool.slots_of(table).tolist() == [[3, 0, -1]]
    assert pool.slot_table.tolist() == [0, 1, 2, 3]


def test_blocks_beyond_the_slots_are_not_on_the_device():
    pool = DevicePool(DENSE_LAYOUT, num_slots=2, num_blocks=4, device="cpu")
    table = torch.tensor([[3, 1, -1]], dtype=torch.int32)
    assert pool.slots_of(table).tolist() == [[-1, 1, -1]]


def test_poison_reaches_every_cell():
    pool = DevicePool(NSA_LAYOUT, num_slots=3, num_blocks=3, device="cpu")
    pool.poison()
    assert all(view.isnan().all() for view in raw_views(pool) + compressed_views(pool))


@pytest.mark.parametrize("nsa", [None, NSAConfig(shape=NSAShape(page=32, window=64))])
def test_the_layout_follows_the_model(nsa):
    model = ModelConfig("llama", 100, 32, 4, 6, 2, 16, 8, 64, 512, nsa=nsa)
    layout = KVLayout.of(model, torch.bfloat16)
    page, entries = (32, 2) if nsa else (64, 0)
    assert layout == KVLayout(4, 2, 16, 8, page, entries, torch.bfloat16)
    assert [layout.num_pages(n) for n in (0, 1, page, page + 1)] == [0, 1, 1, 2]


def test_large_pages_give_a_flat_tensor_that_can_be_written() -> None:
    found = allocate_large(3_000_001, torch.bfloat16)
    assert found.shape == (3_000_001,)
    assert found.dtype == torch.bfloat16
    found.fill_(2.5)
    assert bool((found == 2.5).all())
    assert allocate_large(0, torch.float32).numel() == 0
