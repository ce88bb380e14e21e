"""Tasks from their yamls, and two small tokenizers of the kinds that models have."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from omegaconf import OmegaConf

from bench.build import ROOT, build
from bench.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The published task files lie beside the checkout, not in it.
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = {
    "mt_bench": "mt_bench/question.jsonl",
    "spec_bench": "spec_bench/question.jsonl",
    "gsm8k": "gsm8k/test-00000-of-00001.parquet",
    "gsm8k_chat": "gsm8k/test-00000-of-00001.parquet",
    "humaneval": "human_eval/HumanEval.jsonl.gz",
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    "Q: How many? A: The answer is 8.\nQ: \n``` ```python\ndef f(x):\n    return x\n",
    "Gr\u00f6\u00dfe \u65e5\u672c\u8a9e\u3002 na\u00efve \U0001f642 \u03a9\u3002\n",
] * 20


def task_of(name: str, **changes: object) -> Task:
    """The task of a yaml, made as `bench.build` makes it, with some fields changed."""
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml"))
    assert isinstance(node, dict)
    return build({**node, **changes}, Task, key="task")


def published(name: str, **changes: object) -> Task:
    path = DATA / FILES[name]
    if not path.is_file():
        pytest.skip(f"the published task file {path} is not beside the checkout")
    return task_of(name, path=FILES[name], data_dir=str(DATA), **changes)


def byte_level() -> "PreTrainedTokenizerFast":
    """Byte-level BPE that puts a BOS in front by itself, as Llama 3's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast as Fast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return Fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def byte_fallback() -> "PreTrainedTokenizerFast":
    """Words with a space sign, bytes for rare characters, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast as Fast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    core.train_from_iterator(["Q: A: the answer is \n`"] * 9, trainer)
    return Fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokens(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
