from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from methods.transformer import Transformer, read_tree
from methods.tree import Tree
from quant.dense import Dense
from tests.family import llama_config, write_llama
from tests.methods.parts import load

LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


def read_whole(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    kv = model.cache(tokens.shape[1], batch=tokens.shape[0])
    read = model(tokens, torch.arange(tokens.shape[1]), kv)
    return model.logits(read.hidden)


def random_tokens(n: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (batch, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, LLAMA3]
)
def test_logits_equal_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_llama(tmp_path, llama_config(**changes), seed=1)
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(oracle.config, LlamaConfig)
    tokens = random_tokens(150, batch=2)
    with torch.inference_mode():
        expected = oracle(tokens).logits
    got = read_whole(load(folder, Dense(), torch.float32), tokens)
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_reading_in_pieces_equals_reading_at_once(tmp_path: Path) -> None:
    model = load(write_llama(tmp_path, llama_config(), seed=1), Dense())
    tokens = random_tokens(30)
    kv = model.cache(30)
    pieces = []
    for start, end in [(0, 11), (11, 12), (12, 30)]:
        read = model(tokens[:, start:end], torch.arange(start, end), kv)
        kv.advance(end - start)
        pieces.append(read.hidden)
    torch.testing.assert_close(
        model.logits(torch.cat(pieces, dim=1)), read_whole(model, tokens), rtol=0, atol=1e-12
    )


def test_a_tree_reads_as_each_of_its_paths_would(tmp_path: Path) -> None:
    model = load(write_llama(tmp_path, llama_config(), seed=1), Dense())
    prompt = random_tokens(9)
    tree = Tree(tokens=torch.tensor([4, 5, 6, 7, 8, 9]), parents=torch.tensor([-1, 0, 0, 1, 2, 3]))
    kv = model.cache(20)
    model(prompt, torch.arange(9), kv)
    kv.advance(9)
    read = model(tree.tokens[None], 9 + tree.depths, kv, tree.ancestors)
    got = model.logits(read.hidden[0])
    for node in range(len(tree)):
        path = tree.tokens[tree.mask[node]]
        alone = read_whole(model, torch.cat([prompt[0], path])[None])[0, -1]
        torch.testing.assert_close(got[node], alone, rtol=0, atol=1e-12)


def test_a_root_alone_is_read_as_the_first_node_of_any_tree(tmp_path: Path) -> None:
    model = load(write_llama(tmp_path, llama_config(), seed=1), Dense())
    kv = model.cache(20)
    model(random_tokens(9), torch.arange(9), kv)
    kv.advance(9)
    tree, base = Tree.chain([4, 5, 6]), torch.tensor([9])
    whole, positions = read_tree(model, kv, base, tree.tokens[None], tree.parents)
    assert positions.tolist() == [9, 10, 11]
    alone, positions = read_tree(model, kv, base, tree.tokens[None, :1], tree.parents[:1])
    assert positions.tolist() == [9]
    torch.testing.assert_close(alone.hidden[0, 0], whole.hidden[0, 0], rtol=0, atol=1e-12)
    assert kv.scratch == 0


def test_features_are_the_streams_that_transformers_calls_hidden_states(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, llama_config(), seed=1)
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = random_tokens(12)
    with torch.inference_mode():
        states = oracle(tokens, output_hidden_states=True).hidden_states
    model = load(folder, Dense())
    read = model(tokens, torch.arange(12), model.cache(12), taps=(1, 3, 5))
    expected = torch.cat([states[1], states[3], states[5]], dim=-1)
    # transformers keeps rotary angles and norms in float32.
    torch.testing.assert_close(read.features, expected, rtol=0, atol=1e-4)


def test_weight_bytes_count_what_one_forward_reads(tmp_path: Path) -> None:
    model = load(write_llama(tmp_path, llama_config(), seed=1), Dense(), torch.float32)
    layer = (4 * 32 + 4 * 32) * 128 + 128 * 128 + 3 * 128 * 256 + 2 * 128
    assert model.weight_bytes == 4 * (5 * layer + 128 + 96 * 128)


def test_flops_count_two_per_weight_and_token(tmp_path: Path) -> None:
    model = load(write_llama(tmp_path, llama_config(), seed=1), Dense(), torch.float32)
    linear = 5 * ((4 * 32 + 4 * 32) * 128 + 128 * 128 + 3 * 128 * 256) + 96 * 128
    attention = 4 * 5 * 4 * 32 * (100 + 3)
    assert model.flops(3, context=100) == 3 * (2 * linear + attention)
