"""The walk over a graph: every feed is seen with what its readers read, and only while its visitor runs."""

import pytest
import torch

from tinycompress.calibration.walk import Stream, blocks, walk, working_dtype
from tinycompress.errors import InputError
from tinycompress.graph.topology import feeds

IDS = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))


def test_every_feed_is_visited_in_order_with_the_inputs_of_its_readers(nonuniform):
    module = nonuniform.module()
    expected = {}
    for feed in feeds(nonuniform.config):
        linear = module.get_submodule(feed.readers[0])
        linear.register_forward_pre_hook(
            lambda _, args, name=feed.readers[0]: expected.setdefault(name, []).append(args[0].flatten(0, -2).clone())
        )
    for window in IDS:  # the forward takes an FFN some rows at a time: one window, one entry
        module(window[None])
    visited = []

    def visit(feed, inputs):
        visited.append(feed)
        rows = torch.cat([batch.flatten(0, 1) for batch in inputs])
        assert torch.allclose(rows, torch.cat(expected[feed.readers[0]]), atol=1e-5)

    assert walk(nonuniform, IDS, visit).fingerprint() == nonuniform.fingerprint()
    assert tuple(visited) == feeds(nonuniform.config)


def test_what_a_visitor_returns_reaches_the_feeds_behind_it(tiny):
    silent = {}

    def visit(feed, inputs):
        if feed.layer == 0 and feed.role == "attention_out":
            name = f"{feed.readers[0]}.weight"
            silent[name] = torch.zeros_like(tiny.tensor(name))
            return silent
        if feed.layer == 0 and feed.role == "ffn_in":
            unchanged = walk_inputs(tiny, feed)
            now = torch.cat(list(inputs))
            assert not torch.allclose(now, unchanged)
            assert torch.allclose(now, walk_inputs(tiny.replace(weights=silent), feed), atol=1e-6)
        return None

    walked = walk(tiny, IDS, visit)
    assert torch.equal(walked.tensor(next(iter(silent))), torch.zeros_like(next(iter(silent.values()))))


def walk_inputs(graph, wanted):
    """The inputs of one feed of a graph."""
    batches = []

    def visit(feed, inputs):
        if feed == wanted:
            batches.extend(batch.clone() for batch in inputs)

    walk(graph, IDS, visit)
    return torch.cat(batches)


def test_inputs_that_outlive_their_visitor_are_refused(tiny):
    kept = []
    walk(tiny, IDS, lambda feed, inputs: kept.append(inputs), reference=True)
    for inputs in (kept[0], kept[-1], kept[0].reference):
        with pytest.raises(InputError, match="visitor"):
            list(inputs)


def test_a_stream_of_blocks_is_the_model(nonuniform):
    stream = Stream(nonuniform, IDS)
    for block in blocks(nonuniform, stream.device, stream.dtype):
        stream.step(block)
    module = nonuniform.module()
    assert torch.allclose(module.lm_head(module.model.norm(torch.cat(stream.hidden))), module(IDS), atol=1e-5)


def test_blocks_run_in_float32_on_a_processor_and_as_stored_elsewhere(tiny):
    half = tiny.dense(torch.bfloat16)
    assert working_dtype(half, "cpu") == torch.float32 and working_dtype(half, "cuda") == torch.bfloat16
    assert working_dtype(tiny.dense(torch.float64), "cpu") == torch.float64


@pytest.mark.parametrize(
    "tokens, message",
    [
        (IDS[0], "integer ids"),
        (IDS.float(), "integer ids"),
        (IDS[:, :1], "at least 2 tokens"),
        (IDS.repeat(1, 5), "at most the context, 64"),
        (IDS + 128, "0 … 127"),
    ],
)
def test_unusable_tokens_are_refused(tokens, message, tiny):
    with pytest.raises(InputError, match=message):
        walk(tiny, tokens, lambda feed, inputs: None)
