"""Lay trained weights out as checkpoint folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.corpus import BEGIN, END
from lab.heads import head_shape
from lab.llama import Shape, config_of, write_json

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "# {{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)


def assemble(
    *,
    run: Path,
    corpus: Path,
    out: Path,
    shapes: dict[str, Shape],
    draft_vocab: int,
    begin: int,
    end: int,
) -> None:
    """Write the folders of a family from a run's files and its corpus."""
    for name, shape in shapes.items():
        folder = _folder(out / name, run / f"{name}.safetensors")
        write_json(folder / "config.json", config_of(shape, begin=begin, end=end))
        write_json(folder / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end})
        save_tokenizer(corpus / "tokenizer.json", folder, positions=shape.positions)
        head = config_of(head_shape(shape), begin=begin, end=end) | {"tie_word_embeddings": False}
        folder = _folder(out / f"{name}-eagle2", run / f"{name}-eagle2.safetensors")
        write_json(folder / "config.json", head | {"bias": False})
        folder = _folder(out / f"{name}-eagle3", run / f"{name}-eagle3.safetensors")
        extra: dict[str, object] = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": draft_vocab,
            "eagle_aux_hidden_state_layer_ids": list(shape.taps),
        }
        write_json(folder / "config.json", head | extra)
    for name in ("heldout.jsonl", "calibration.jsonl", "corpus.json"):
        shutil.copyfile(corpus / name, out / name)
    shutil.copyfile(run / "training.json", out / "training.json")


def _folder(folder: Path, weights: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / "model.safetensors")
    return folder


def save_tokenizer(tokenizer: Path, folder: Path, *, positions: int) -> None:
    """Write the tokeniser's files as a checkpoint has them."""
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    config = {
        "bos_token": BEGIN,
        "chat_template": CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
