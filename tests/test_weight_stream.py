"""Weights streamed from host memory: which layers, what is spared, the same numbers as without."""

from dataclasses import replace

import pytest
import torch

from nsa_serve.bench.latency import Point
from nsa_serve.bench.measure import summarise
from nsa_serve.bench.offload import Streaming, rows
from nsa_serve.config import EngineConfig, ModelSource
from nsa_serve.errors import ConfigError
from nsa_serve.models.checkpoint import resolve
from nsa_serve.models.families import model_config
from nsa_serve.models.loader import load_decoder, num_weight_bytes, parameter_shapes
from nsa_serve.models.weight_stream import NUM_BUFFERS, StreamPlan, WeightStream
from nsa_serve.runner.model_runner import StreamCount
from nsa_serve.runner.worker import Worker
from nsa_serve.stats import StreamReport
from tests.checkpoints import PHIS, gated, nsa_config_json, write_checkpoint
from tests.model_steps import PagedModel

CPU = torch.device("cpu")
LAYERS = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = nsa_config_json(gated(PHIS["mean"]), num_hidden_layers=LAYERS)
    return resolve(ModelSource(model=str(write_checkpoint(tmp_path_factory.mktemp("m"), config))))


@pytest.fixture(scope="module")
def config(checkpoint):
    return model_config(checkpoint)


def plan_of(config, num_layers, spare=0):
    """The plan of so many layers' bytes and ``spare`` ones."""
    shapes = parameter_shapes(config)
    whole = StreamPlan.of(shapes, config.num_layers, torch.float32, 1 << 40)
    num_bytes = num_layers * whole.layer_bytes + spare
    return StreamPlan.of(shapes, config.num_layers, torch.float32, num_bytes)


def load(checkpoint, config, plan, **options):
    stream = None
    if plan is not None:
        host = torch.zeros(plan.host_bytes // plan.dtype.itemsize)
        stream = WeightStream(plan, host, CPU)
    return load_decoder(
        checkpoint, config, device=CPU, dtype=torch.float32, stream=stream, **options
    )


@pytest.mark.parametrize(
    ("count", "layers"),
    [(3, (2, 4, 6)), (4, (1, 3, 5, 6)), (7, (0, 1, 2, 3, 4, 5, 6)), (99, (0, 1, 2, 3, 4, 5, 6))],
)
def test_streamed_layers_lie_apart_and_the_last_is_one_of_them(config, count, layers):
    assert plan_of(config, count, spare=100).layers == layers


def test_what_a_plan_spares_is_what_the_device_holds_less(checkpoint, config):
    plan = plan_of(config, 5)
    decoder = load(checkpoint, config, plan)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in decoder.layers
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        for tensor in [linear.weight]
    }
    products = LAYERS * plan.layer_bytes
    assert sum(held.values()) == products - plan.saved_bytes
    assert plan.host_bytes == 5 * plan.layer_bytes
    assert plan.saved_bytes < num_weight_bytes(config, torch.float32)


@pytest.mark.parametrize("count", [0, 1, NUM_BUFFERS])
def test_too_few_layers_are_refused_in_numbers(config, count):
    with pytest.raises(ConfigError, match=f"holds {count} of 7 layers .* at least 3 layers"):
        plan_of(config, count)


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"deterministic": True}])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_streamed_weights_give_the_same_logits_step_after_step(checkpoint, config, options, count):
    ids = list(range(60))
    expected = PagedModel(load(checkpoint, config, None, **options), [200]).prefill(ids, (25,))
    streamed = load(checkpoint, config, plan_of(config, count), **options)
    found = PagedModel(streamed, [200]).prefill(ids, (25,))
    assert torch.equal(found, expected)


class Watched(WeightStream):
    """Spoils a buffer as soon as its layer is done, and says in which order things were asked."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def begin(self):
        self._buffers.fill_(torch.nan)
        super().begin()

    def leave(self, layer):
        if layer in self._order:
            self._buffers[self._order[layer] % NUM_BUFFERS].fill_(torch.nan)
        super().leave(layer)

    def _copy(self, at):
        self.asked.append(at)
        super()._copy(at)


def test_a_buffer_is_filled_anew_once_its_layer_is_done_and_no_copy_is_made_twice(
    checkpoint, config
):
    plan = plan_of(config, 5)
    host = torch.zeros(plan.host_bytes // 4)
    stream = Watched(plan, host, CPU)
    decoder = load_decoder(checkpoint, config, device=CPU, dtype=torch.float32, stream=stream)
    found = PagedModel(decoder, [100]).prefill(range(40), (20,))
    assert found.isfinite().all()
    assert stream.asked == 2 * [0, 1, 2, 3, 4]  # of two steps


def test_time_of_copies_and_of_waiting_is_counted(checkpoint, config):
    decoder = load(checkpoint, config, plan_of(config, 4))
    PagedModel(decoder, [100]).prefill(range(40))
    copying, waiting = decoder.stream.nanoseconds.tolist()
    assert copying > 0
    assert waiting == 0  # on a CPU nothing runs beside
    report = StreamCount(100, torch.tensor([4_000_000_000, 1_000_000_000])).report()
    assert report == StreamReport(100, 4.0, 1.0)
    assert report.overlap == 0.75
    assert StreamReport(100, 1.0, 2.0).overlap == 0.0
    assert StreamReport().overlap == 1.0


def test_a_cpu_refuses_to_stream_what_it_holds_already(tmp_path, checkpoint):
    folder = str(checkpoint.path)
    with pytest.raises(ConfigError, match="needs a GPU: on a CPU all weights"):
        Worker(EngineConfig.from_flags(model=folder, device="cpu", cpu_offload_bytes=1 << 20))
    with pytest.raises(ConfigError, match="--cpu-offload-bytes must not be negative"):
        EngineConfig.from_flags(cpu_offload_bytes=-1)


def test_a_benchmark_tells_the_overlap_of_its_own_steps():
    point = Point("decode", 1, 4096, summarise([10.0], 0), 1.0, 0)
    streaming = Streaming(StreamReport(100, 1.0, 0.5), StreamReport(4_000_000_100, 3.0, 1.0))
    resident = {"a": (replace(point, timing=summarise([4.0], 0)), streaming)}
    one, other = rows({"a": (point, streaming), "b": (point, streaming)}, resident)
    assert (one["copied_gb"], one["gb_per_s"], one["overlap"]) == (4.0, 2.0, 0.75)
    assert one["resident_ms"] == 4.0
    assert "resident_ms" not in other
